# SPDX-License-Identifier: Apache-2.0
"""The NBD protocol: handshake, codec, server and client. Standard library only."""

# SPDX-License-Identifier: Apache-2.0
"""One command registry; the QMP server and its client."""

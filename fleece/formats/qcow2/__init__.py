# SPDX-License-Identifier: Apache-2.0
"""The qcow2 driver."""

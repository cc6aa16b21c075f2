# SPDX-License-Identifier: Apache-2.0
"""Image formats: raw and qcow2."""

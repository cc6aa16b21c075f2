# SPDX-License-Identifier: Apache-2.0
"""What changed, and since when: the epoch map, checkpoints, cursors."""

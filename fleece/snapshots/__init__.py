# SPDX-License-Identifier: Apache-2.0
"""Instants of live disks: copy-before-write, fleecing views, their life."""

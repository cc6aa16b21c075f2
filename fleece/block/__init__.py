# SPDX-License-Identifier: Apache-2.0
"""A disk while it runs: nodes, filters, the graph and its drain."""

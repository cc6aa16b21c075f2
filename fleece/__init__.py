# SPDX-License-Identifier: Apache-2.0
"""fleece: a pure-Python NBD server and image-fleecing backup appliance."""

__version__ = "0.1.0"

# SPDX-License-Identifier: Apache-2.0
"""``python -m nbdwire``: see `nbdwire.tools`."""

import sys

from nbdwire.tools.main import main

if __name__ == "__main__":
    sys.exit(main())

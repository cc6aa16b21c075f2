# SPDX-License-Identifier: Apache-2.0
"""``python -m fleece`` is the ``fleece`` command."""

import sys

from fleece.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""``python -m nbdwire``: see `nbdwire.tools`."""

import signal
import sys

from nbdwire.tools.main import main

if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        # To the very end of the process: a second signal must not turn an orderly end into a kill.
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    sys.exit(main())

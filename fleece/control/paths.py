# SPDX-License-Identifier: Apache-2.0
"""Where the daemon's sockets and state are when nobody says otherwise.

The daemon and its clients must agree, so both ask here. Light on purpose: every client imports it.
"""

import os
from pathlib import Path


def runtime_directory() -> Path:
    """``/run/fleece`` for root, a directory of the user's own for everybody else.

    Never below ``/tmp``: there another user could sit at the path before us.
    """
    if os.geteuid() == 0:
        return Path("/run/fleece")
    given = os.environ.get("XDG_RUNTIME_DIR")
    return Path(given) / "fleece" if given else state_directory()


def state_directory() -> Path:
    """``/var/lib/fleece`` for root, ``~/.local/state/fleece`` for everybody else."""
    if os.geteuid() == 0:
        return Path("/var/lib/fleece")
    given = os.environ.get("XDG_STATE_HOME")
    return (Path(given) if given else Path.home() / ".local" / "state") / "fleece"


def control_socket() -> str:
    """``$FLEECE_CONTROL``, else ``control.sock`` in the runtime directory."""
    return os.environ.get("FLEECE_CONTROL") or str(runtime_directory() / "control.sock")


def nbd_socket() -> str:
    """``nbd.sock`` in the runtime directory."""
    return str(runtime_directory() / "nbd.sock")

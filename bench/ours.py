# SPDX-License-Identifier: Apache-2.0
"""Our server for what ``fleece export`` does not offer yet: ``ours.py SOCKET IMAGE CERTIFICATES``.

``CERTIFICATES`` is a directory; TLS is required then.
"""

import signal
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fleece.block.file import FileNode
from nbdwire.server import Server
from nbdwire.tls import ServerTLS
from nbdwire.uri import NBDURI


def main(argv: Sequence[str]) -> int:
    """Serve until SIGTERM; returns the exit status."""
    where, image, certificates = argv
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    node = FileNode(image)
    with Server(tls=ServerTLS("required", certificates=certificates)) as server:
        server.add("", node)
        server.listen(NBDURI(socket=where))
        signal.sigwait({signal.SIGTERM, signal.SIGINT})
    node.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""A `nbdwire.Server` on a socket in the test's own directory, with the disk that it serves."""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nbdwire.export import ExtentsFunction
from nbdwire.server import Server
from nbdwire.uri import NBDURI


@contextmanager
def serving(
    directory: Path,
    export: Any,
    *,
    tcp: bool = False,
    contexts: Mapping[str, ExtentsFunction] | None = None,
    **options: Any,
) -> Iterator[tuple[Server, NBDURI]]:
    """``export`` under the name "disk"; gives the server, and where it listens."""
    where = NBDURI(host="127.0.0.1", port=0) if tcp else NBDURI(socket=str(directory / "nbd.sock"))
    with Server(**options) as server:
        server.add("disk", export, contexts=contexts)
        yield server, server.listen(where)


def noise(length: int, seed: int = 1) -> bytes:
    """Bytes that differ from place to place; the same for the same ``seed``."""
    return random.Random(seed).randbytes(length)

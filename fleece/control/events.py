# SPDX-License-Identifier: Apache-2.0
"""Events: what happened in the daemon, told to every control client that listens."""

import threading
from collections.abc import Callable, Mapping
from itertools import count
from typing import Any, Final

from fleece.control import qmp

SNAPSHOT_BROKEN: Final = "X_FLEECE_SNAPSHOT_BROKEN"
LEASE_EXPIRED: Final = "X_FLEECE_LEASE_EXPIRED"
SHUTDOWN: Final = "SHUTDOWN"
BLOCK_IMAGE_CORRUPTED: Final = "BLOCK_IMAGE_CORRUPTED"

MEMBERS: Final[Mapping[str, Mapping[str, type]]] = {
    SNAPSHOT_BROKEN: {"name": str, "disk": str, "error": str},
    LEASE_EXPIRED: {"name": str},
    SHUTDOWN: {"guest": bool, "reason": str},
    BLOCK_IMAGE_CORRUPTED: {"device": str, "node-name": str, "msg": str, "fatal": bool},
}
"""The members of each event's ``data``; ``query-qmp-schema`` tells them to clients."""

Sink = Callable[[bytes], None]
"""Takes one encoded event. It must not block: the emitter may hold up a guest's write."""


class Events:
    """Hands each event to every sink. Any thread may emit, subscribe and unsubscribe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers = count()
        self._sinks: dict[int, Sink] = {}

    def emit(self, name: str, data: Mapping[str, Any] | None = None) -> None:
        """Tell everyone, with the time of now. Returns without waiting for any client."""
        line = qmp.encode(qmp.event(name, dict(data or {})))
        with self._lock:
            sinks = list(self._sinks.values())
        for sink in sinks:
            sink(line)

    def subscribe(self, sink: Sink) -> Callable[[], None]:
        """Call ``sink`` with each event from now on, until the returned function is called."""
        with self._lock:
            number = next(self._numbers)
            self._sinks[number] = sink

        def unsubscribe() -> None:
            with self._lock:
                self._sinks.pop(number, None)

        return unsubscribe

# SPDX-License-Identifier: Apache-2.0
"""Clients that ask for nothing are hung up after a time, if the server wants that."""

import socket
import threading
import time
from collections.abc import Callable, Iterable
from typing import Protocol


class Watched(Protocol):
    """What is watched: a connection."""

    def activity(self) -> int | None:
        """A number that grows with each request; None before there can be any."""
        ...

    def hang_up(self, how: int, why: str) -> None:
        """End it."""
        ...


class IdleWatch:
    """Hangs up connections without a request for ``seconds``, between one and 1.25 times that.

    First what was received may be answered (SHUT_RD); a client that does not even take its answers
    is cut off the same time later.
    """

    def __init__(self, seconds: float, connections: Callable[[], Iterable[Watched]]) -> None:
        if seconds <= 0:
            raise ValueError("the idle time must be more than 0 seconds")
        self._seconds = seconds
        self._connections = connections
        self._seen: dict[Watched, tuple[int | None, float, bool]] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="nbd-idle", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.wait(self._seconds / 4):
            self.look(time.monotonic())

    def look(self, now: float) -> None:
        """One round, at the time ``now`` (seconds)."""
        seen = {}
        for conn in self._connections():
            count = conn.activity()
            before, since, warned = self._seen.get(conn, (None, now, False))
            if count is None or count != before:
                since, warned = now, False
            elif now - since >= self._seconds:
                how = socket.SHUT_RDWR if warned else socket.SHUT_RD
                conn.hang_up(how, f"it was idle for {self._seconds:g} seconds")
                since, warned = now, True
            seen[conn] = count, since, warned
        self._seen = seen

    def stop(self) -> None:
        """End the watch."""
        self._over.set()
        self._thread.join()

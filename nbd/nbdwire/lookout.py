# SPDX-License-Identifier: Apache-2.0
"""How a worker waits for its client: it looks for input for a moment before it sleeps.

At depth 1 a client asks again some 10 us after it was answered. To wake a processor that went to
sleep meanwhile takes longer than that; not to let it sleep serves twice the requests, for the same
processor time each (docs/design/data-plane.md has the figures). So a worker whose client has just
asked again soon looks for LOOK seconds, lets other threads of its processor run meanwhile, and
sleeps if nothing comes.
"""

import select
import socket
import threading
from os import sched_yield
from time import perf_counter
from typing import Final

LIVELY: Final = 100e-6
"""Seconds: a client that asks again within that is expected to do it again."""

LOOK: Final = 50e-6
"""Seconds to look for its next request."""


class Lookout:
    """For one connection.

    ``turn`` is shared by a server's connections: one of them looks at a time, for more would only
    take the processor from each other.
    """

    __slots__ = ("_lively", "_poll", "_turn")

    def __init__(self, sock: socket.socket, turn: threading.Lock) -> None:
        poller = select.poll()
        poller.register(sock, select.POLLIN)
        self._poll = poller.poll
        self._turn = turn
        self._lively = False

    def begin(self) -> float:
        """Call it before the socket is read. Returns what `end` wants."""
        began = perf_counter()
        if self._lively and self._turn.acquire(blocking=False):
            try:
                while not self._poll(0) and perf_counter() - began < LOOK:
                    sched_yield()
            finally:
                self._turn.release()
        return began

    def end(self, began: float) -> None:
        """Call it after the socket was read."""
        self._lively = perf_counter() - began < LIVELY

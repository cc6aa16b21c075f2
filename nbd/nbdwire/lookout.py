# SPDX-License-Identifier: Apache-2.0
"""How a worker waits for its client: it looks for input for a moment before it sleeps.

At depth 1 a client asks again some 10 us after it was answered. To wake a processor that went to
sleep meanwhile takes longer than that; not to let it sleep serves twice the requests, for the same
processor time each (docs/design/data-plane.md has the figures). So a worker whose client has just
asked again soon looks for LOOK seconds, lets other threads of its processor run meanwhile, and
sleeps if nothing comes.
"""

import select
import threading
from os import sched_yield
from time import perf_counter
from typing import Final, Protocol, runtime_checkable

from nbdwire.transport import Stream

LIVELY: Final = 100e-6
"""Seconds: a client that asks again within that is expected to do it again."""

LOOK: Final = 50e-6
"""Seconds to look for its next request."""


IDLE: Final = 1000
"""Milliseconds: a client that was silent so long needs no buffers for what it asked before."""


@runtime_checkable
class SecureStream(Stream, Protocol):
    """A stream that receives whole records, and hands them out in parts."""

    def pending(self) -> int:
        """Bytes that it has received and not handed out; not 0 for some, encrypted or not."""
        ...


class Lookout:
    """For one connection.

    ``turn`` is shared by a server's connections: one of them looks at a time, for more would only
    take the processor from each other. ``idle`` becomes true when nothing came for IDLE.
    """

    __slots__ = ("_lively", "_poll", "_turn", "idle")

    def __init__(self, sock: Stream, turn: threading.Lock) -> None:
        poller = select.poll()
        poller.register(sock, select.POLLIN)
        self._poll = poller.poll
        self._turn = turn
        self._lively = False
        self.idle = False

    def begin(self) -> float:
        """Call it before the socket is read. Returns the time, in seconds, which `end` wants."""
        began = perf_counter()
        if self._lively and self._turn.acquire(blocking=False):
            try:
                while perf_counter() - began < LOOK:
                    if self._poll(0):
                        return began
                    sched_yield()
            finally:
                self._turn.release()
        if not self._poll(IDLE):
            self.idle = True
        return began

    def end(self, began: float) -> float:
        """Call it after the socket was read. Returns the time, as `begin` does."""
        now = perf_counter()
        self._lively = now - began < LIVELY
        return now


class SecureLookout(Lookout):
    """For a stream that may have received what the socket does not tell of any more."""

    __slots__ = ("_pending",)

    def __init__(self, stream: SecureStream, turn: threading.Lock) -> None:
        super().__init__(stream, turn)
        self._pending = stream.pending

    def begin(self) -> float:
        """As in `Lookout`; what has been received already is not looked for."""
        return perf_counter() if self._pending() else super().begin()


def look_at(stream: Stream, turn: threading.Lock) -> Lookout:
    """The lookout that suits ``stream``."""
    if isinstance(stream, SecureStream):
        return SecureLookout(stream, turn)
    return Lookout(stream, turn)

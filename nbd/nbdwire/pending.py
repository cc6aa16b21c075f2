# SPDX-License-Identifier: Apache-2.0
"""A request in flight, seen from the client, and which bytes of its reply have come."""

from bisect import bisect_left
from collections.abc import Collection
from typing import TYPE_CHECKING, Final

from nbdwire.errors import ProtocolError, from_wire
from nbdwire.negotiate_client import printable

if TYPE_CHECKING:
    import threading

    from nbdwire.extents import Extent
    from nbdwire.pipeline import Ticket

MAX_PIECES: Final = 1 << 16
"""Disjoint pieces that a read may be in at one time: 32 MiB in sectors, every second one."""

MAX_ERRORS: Final = 1024
"""Error chunks in one reply."""


class Coverage:
    """Which of the bytes ``[start, ...)`` have arrived; each may arrive once."""

    __slots__ = ("_islands", "front")

    def __init__(self, start: int) -> None:
        self.front = start  # everything before it is there
        self._islands: list[tuple[int, int]] = []  # behind the front: in order, disjoint

    def add(self, start: int, stop: int) -> None:
        """``[start, stop)`` arrives now. ProtocolError if a part of it was there already."""
        islands = self._islands
        at = bisect_left(islands, (start, stop))
        if (
            start < self.front
            or (at > 0 and islands[at - 1][1] > start)
            or (at < len(islands) and islands[at][0] < stop)
        ):
            raise ProtocolError(f"the server sent the bytes at offset {start} twice")
        islands.insert(at, (start, stop))
        self._join(at)
        if islands[0][0] == self.front:
            self.front = islands.pop(0)[1]
        if len(islands) > MAX_PIECES:
            raise ProtocolError("the server sends a read in too many pieces")

    def _join(self, at: int) -> None:
        """Join the island ``at`` with its neighbours where they touch."""
        islands = self._islands
        if at + 1 < len(islands) and islands[at][1] == islands[at + 1][0]:
            islands[at : at + 2] = [(islands[at][0], islands[at + 1][1])]
        if at > 0 and islands[at - 1][1] == islands[at][0]:
            islands[at - 1 : at + 1] = [(islands[at - 1][0], islands[at][1])]


class Pending:
    """A request that waits for its reply.

    ``view`` takes the data of a READ, and ``contexts`` are the ids that a BLOCK_STATUS must answer.
    When ``done``, ``error`` is (errno, text) or None, and ``status`` has the extents of each id;
    ``lost`` means that the connection failed before the reply came. Who does not wait for it in
    `Link.wait` gives it a ``ticket``.
    """

    # Not slots: what most requests never need is read here and costs nothing when one is made.
    coverage: Coverage | None = None  # of a read that comes in parts
    cookie = 0
    done = False
    error: tuple[int, str] | None = None
    errors = 0
    leads = False
    lost = False
    ticket: "Ticket | None" = None
    wake: "threading.Lock | None" = None  # of a thread that waits for the one that leads

    def __init__(
        self,
        kind: int,
        offset: int,
        length: int,
        view: memoryview | None = None,
        contexts: Collection[int] = (),
    ) -> None:
        self.kind = kind
        self.offset = offset
        self.length = length
        self.view = view
        self.contexts = contexts
        self.status: dict[int, list[Extent]] = {}

    def part(self, offset: int, length: int) -> memoryview:
        """Where ``length`` bytes from ``offset`` go, which must not have arrived before."""
        if self.view is None:
            raise ProtocolError("the server sent data for a request that reads none")
        if not length or offset < self.offset or offset + length > self.offset + self.length:
            raise ProtocolError(f"the server sent {length} bytes at {offset}, outside the request")
        if self.coverage is None:
            self.coverage = Coverage(self.offset)
        self.coverage.add(offset, offset + length)
        start = offset - self.offset
        return self.view[start : start + length]

    def fail(self, error: int, text: bytes = b"") -> None:
        """The server reports an error; the first one counts."""
        if not error:
            raise ProtocolError("the server reports an error without a number")
        self.errors += 1
        if self.errors > MAX_ERRORS:
            raise ProtocolError("the server reports errors without end")
        if self.error is None:
            self.error = (from_wire(error), printable(text))

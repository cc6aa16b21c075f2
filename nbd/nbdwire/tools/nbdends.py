# SPDX-License-Identifier: Apache-2.0
"""An NBD export as an end of ``copy``. Each lane has a connection of its own, and no other thread.

So the lane that waits for a reply is the one that reads it, and nothing is handed from thread to
thread (see `nbdwire.link`: whoever waits leads).
"""

from collections import deque
from typing import Final

from nbdwire import constants as c
from nbdwire.checks import payload_limit
from nbdwire.client import Client
from nbdwire.errors import ConnectionClosed, NBDError, RequestError
from nbdwire.extents import Extent
from nbdwire.pending import Pending
from nbdwire.pool import Pool
from nbdwire.tools.ends import CopyFailed, Done, failed, text

_ZEROES: Final = bytes(1 << 18)
_ZERO_STEP: Final = 128 << 20
"""Bytes of one WRITE_ZEROES: a server that has to write them should answer within seconds."""


class NbdEnd:
    """An export, a lane for each connection of ``pool``, ``depth`` requests in flight on each."""

    ordered = False

    def __init__(self, name: str, pool: Pool, depth: int) -> None:
        self.name = name
        self.size: int | None = pool.size
        self.lanes = len(pool.clients)
        self.is_zero = False
        self.block = pool.session.minimum_block
        self.maximum = payload_limit(pool.session)
        self.read_only = pool.read_only
        self._pool = pool
        self._depth = depth
        self._can_flush = bool(pool.flags & c.TFLAG_SEND_FLUSH)

    def reader(self, lane: int) -> "NbdReader":
        """On the connection of that lane."""
        return NbdReader(self.name, self._pool.clients[lane], self._depth)

    def writer(self, lane: int, done: Done) -> "NbdWriter":
        """On the connection of that lane."""
        return NbdWriter(self.name, self._pool.clients[lane], self._depth, done)

    def cancel(self) -> None:
        """Whoever waits for an answer stops waiting."""
        for client in self._pool.clients:
            client.link.fail(ConnectionClosed("the copy has been given up"))

    def finish(self, size: int, flush: bool) -> None:
        """FLUSH, if the server has it."""
        if flush and self._can_flush:
            self._pool.flush()

    def close(self) -> None:
        """Leave the server."""
        self._pool.close()


class _Read(Pending):
    """A READ that takes its buffer when its data come, and the one that was used last.

    Most replies come in order: then a single buffer is used again and again, and stays in the
    processor's cache between the read and the write.
    """

    def __init__(self, offset: int, length: int, free: list[bytearray]) -> None:
        self.buffer: bytearray | None = None
        self._free = free
        super().__init__(c.CMD_READ, offset, length)

    @property
    def view(self) -> memoryview:
        """Where the data go."""
        if self.buffer is None:
            self.buffer = self._free.pop() if self._free else bytearray()
            if len(self.buffer) < self.length:
                self.buffer = bytearray(self.length)
        return memoryview(self.buffer)[: self.length]

    @view.setter
    def view(self, value: memoryview | None) -> None:
        """A reply that is complete loses its view; the buffer stays until the data are taken."""


class NbdReader:
    """READs and BLOCK_STATUS of one lane."""

    def __init__(self, name: str, client: Client, depth: int) -> None:
        self.depth = depth
        self._name = name
        self._client = client
        self._link = client.link
        self._asked: deque[_Read] = deque()
        self._free: list[bytearray] = []
        self._used: bytearray | None = None

    def extents(self, offset: int, length: int) -> list[Extent]:
        """Where the server does not tell, all is data: to read too much is never wrong."""
        try:
            return self._client.extents(offset, length)
        except RequestError:
            return [Extent(offset, min(length, 1 << 30), 0)]
        except (OSError, NBDError) as error:
            text_ = f"cannot ask {self._name} where its data are: {text(error)}"
            raise CopyFailed(text_) from error

    def ask(self, offset: int, length: int) -> None:
        """READ."""
        read = _Read(offset, length, self._free)
        try:
            self._link.submit(read)
        except NBDError as error:
            raise failed("read", length, offset, self._name, error) from error
        self._asked.append(read)

    def take(self) -> memoryview:
        """Wait for the oldest."""
        if self._used is not None:
            self._free.append(self._used)
            self._used = None
        read = self._asked.popleft()
        try:
            if not read.done or read.lost:
                self._link.wait(read)
            if read.error is not None:
                raise RequestError(*read.error)
        except (OSError, NBDError) as error:
            raise failed("read", read.length, read.offset, self._name, error) from error
        view = read.view
        self._used = read.buffer
        return view


class NbdWriter:
    """WRITEs and WRITE_ZEROES of one lane; ``done`` is told of those that were answered."""

    def __init__(self, name: str, client: Client, depth: int, done: Done) -> None:
        self._name = name
        self._link = client.link
        self._depth = depth
        self._done = done
        self._maximum = payload_limit(client.session)
        self._can_zero = bool(client.flags & c.TFLAG_SEND_WRITE_ZEROES)
        self._sent: deque[tuple[Pending, bool]] = deque()  # and whether it makes zeroes

    def write(self, view: memoryview, offset: int) -> None:
        """WRITE. The link has sent all of ``view`` when it returns."""
        self._write(view, offset, False)

    def _write(self, view: memoryview, offset: int, zero: bool) -> None:
        for start in range(0, len(view), self._maximum):
            part = view[start : start + self._maximum]
            self._send(Pending(c.CMD_WRITE, offset + start, len(part)), 0, part, zero)

    def zero(self, offset: int, length: int, allocate: bool) -> None:
        """WRITE_ZEROES, or zeroes written where the server does not have that."""
        step = _ZERO_STEP if self._can_zero else len(_ZEROES)
        flags = c.CMD_FLAG_NO_HOLE if allocate else 0
        for start in range(offset, offset + length, step):
            size = min(step, offset + length - start)
            if self._can_zero:
                self._send(Pending(c.CMD_WRITE_ZEROES, start, size), flags, None, True)
            else:
                self._write(memoryview(_ZEROES)[:size], start, True)

    def _send(self, pending: Pending, flags: int, payload: memoryview | None, zero: bool) -> None:
        while len(self._sent) >= self._depth:
            self._wait()
        try:
            self._link.submit(pending, flags, payload)
        except NBDError as error:
            raise self._failed(pending, zero, error) from error
        self._sent.append((pending, zero))

    def _wait(self) -> None:
        """For the oldest; no answer goes unchecked."""
        pending, zero = self._sent.popleft()
        try:
            if not pending.done or pending.lost:
                self._link.wait(pending)
            if pending.error is not None:
                raise RequestError(*pending.error)
        except (OSError, NBDError) as error:
            raise self._failed(pending, zero, error) from error
        self._done(pending.length, zero)

    def _failed(self, pending: Pending, zero: bool, error: Exception) -> CopyFailed:
        verb = "zero" if zero else "write"
        return failed(verb, pending.length, pending.offset, self._name, error)

    def drain(self) -> None:
        """Wait for all answers."""
        while self._sent:
            self._wait()

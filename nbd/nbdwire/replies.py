# SPDX-License-Identifier: Apache-2.0
"""How a client reads replies: each is checked against the request that it claims to answer.

The server is not trusted: data goes only where the request asked for it, every byte once, and
nothing is allocated or skipped that is larger than the specification allows.
Source: the NBD protocol document, section "Reply types".
"""

import threading
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator
from struct import Struct
from typing import Final, Protocol

from nbdwire import constants as c
from nbdwire.codec import (
    CHUNK_ERROR,
    CHUNK_SIZE,
    EXTENDED_CHUNK,
    EXTENT,
    EXTENT_EXT,
    HOLE,
    OFFSET,
    SIMPLE_REPLY_SIZE,
)
from nbdwire.errors import ProtocolError, from_wire
from nbdwire.extents import Extent
from nbdwire.negotiate_client import printable

MAX_PIECES: Final = 1 << 16
"""Disjoint pieces that a read may be in at one time: 32 MiB in sectors, every second one."""

MAX_ERRORS: Final = 1024
"""Error chunks in one reply."""

_CAP_EXTENTS: Final = 1 << 20  # the protocol's cap on descriptors in one chunk
_ERROR_CAP: Final = CHUNK_ERROR.size + c.MAX_STRING + 64
_ZEROES: Final = bytes(1 << 16)
_BATCH: Final = 1 << 12  # descriptors that are parsed at a time


class Source(Protocol):
    """Where the bytes come from: `nbdwire.transport.Receiver`."""

    def take(self, length: int) -> memoryview:
        """The next ``length`` bytes (at most 64 KiB); valid until the next call."""
        ...

    def into(self, view: memoryview) -> None:
        """Fill ``view`` with the next bytes."""
        ...


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
    When ``done``, ``error`` is (errno, text) or None, and ``status`` has the extents of each id.
    ``then`` is called with it, without a lock, by the thread that has read the reply; also when
    the connection fails before that comes (``lost``).
    """

    __slots__ = (
        "contexts", "cookie", "coverage", "done", "error", "errors", "kind", "leads", "length",
        "lost", "offset", "status", "then", "view", "waiting", "wake",
    )  # fmt: skip

    def __init__(
        self,
        kind: int,
        offset: int,
        length: int,
        view: memoryview | None = None,
        contexts: Collection[int] = (),
        then: "Callable[[Pending], None] | None" = None,
    ) -> None:
        self.contexts = contexts
        self.then = then
        self.cookie = 0
        self.kind = kind
        self.offset = offset
        self.length = length
        self.view = view
        self.coverage = Coverage(offset)
        self.status: dict[int, list[Extent]] = {}
        self.error: tuple[int, str] | None = None
        self.errors = 0
        self.done = False
        self.lost = False  # the connection failed before the reply came
        self.waiting = False  # for the thread that leads
        self.leads = False
        self.wake = threading.Lock()
        self.wake.acquire()

    def part(self, offset: int, length: int) -> memoryview:
        """Where ``length`` bytes from ``offset`` go, which must not have arrived before."""
        if self.view is None:
            raise ProtocolError("the server sent data for a request that reads none")
        if not length or offset < self.offset or offset + length > self.offset + self.length:
            raise ProtocolError(f"the server sent {length} bytes at {offset}, outside the request")
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


class ReplyReader:
    """Reads messages from ``source`` and applies each to the request with its cookie.

    ``find`` returns the request in flight with a cookie.
    """

    __slots__ = ("_extended", "_find", "_source", "_structured")

    def __init__(
        self,
        source: Source,
        find: Callable[[int], Pending | None],
        structured: bool,
        extended: bool = False,
    ) -> None:
        self._source = source
        self._find = find
        self._structured = structured
        self._extended = extended

    def read(self) -> Pending | None:
        """Read one message. Returns the request if its reply is complete now."""
        if self._extended:
            return self._read_extended()
        head = self._source.take(SIMPLE_REPLY_SIZE)
        magic = int.from_bytes(head[:4])
        cookie = int.from_bytes(head[8:16])
        if magic == c.SIMPLE_REPLY_MAGIC:
            error = int.from_bytes(head[4:8])
            return self._simple(self._pending(cookie), error)
        if magic != c.STRUCTURED_REPLY_MAGIC or not self._structured:
            raise _no_reply(magic)
        flags, kind = int.from_bytes(head[4:6]), int.from_bytes(head[6:8])
        length = int.from_bytes(self._source.take(CHUNK_SIZE - SIMPLE_REPLY_SIZE))
        return self._chunk(self._pending(cookie), flags, kind, length)

    def _read_extended(self) -> Pending | None:
        head = EXTENDED_CHUNK.unpack(self._source.take(EXTENDED_CHUNK.size))
        magic, flags, kind, cookie, offset, length = head
        if magic != c.EXTENDED_REPLY_MAGIC:
            raise _no_reply(magic)
        pending = self._pending(cookie)
        if offset != pending.offset:
            raise ProtocolError(f"the server answers a request at {offset}, which nobody made")
        return self._chunk(pending, flags, kind, length)

    def _chunk(self, pending: Pending, flags: int, kind: int, length: int) -> Pending | None:
        self._take_chunk(pending, kind, length)
        if flags & c.REPLY_FLAG_DONE:
            return self._finish(pending)
        if kind == c.REPLY_NONE:
            raise ProtocolError("the server sent an empty chunk that is not the last")
        return None

    def _pending(self, cookie: int) -> Pending:
        pending = self._find(cookie)
        if pending is None:
            raise ProtocolError(f"the server answers a request that is not in flight: {cookie:#x}")
        return pending

    def _simple(self, pending: Pending, error: int) -> Pending:
        carries = pending.kind == c.CMD_READ or pending.kind == c.CMD_BLOCK_STATUS
        if self._structured and (pending.kind == c.CMD_READ or (carries and not error)):
            raise ProtocolError("the server sent a simple reply where a structured one must be")
        if error:
            pending.fail(error)
        elif pending.view is not None:
            self._source.into(pending.part(pending.offset, pending.length))
        return pending

    def _finish(self, pending: Pending) -> Pending:
        if pending.error is None:
            if pending.kind == c.CMD_READ and (
                pending.coverage.front != pending.offset + pending.length
            ):
                raise ProtocolError("the server ended a read before all of it had come")
            if len(pending.status) < len(pending.contexts):
                raise ProtocolError("the server left out the status of a metadata context")
        return pending

    def _take_chunk(self, pending: Pending, kind: int, length: int) -> None:
        if kind == c.REPLY_OFFSET_DATA:
            self._data(pending, length)
        elif kind == c.REPLY_OFFSET_HOLE:
            self._hole(pending, length)
        elif kind == c.REPLY_NONE:
            _check_length(kind, length, 0, 0)
        elif kind == (c.REPLY_BLOCK_STATUS_EXT if self._extended else c.REPLY_BLOCK_STATUS):
            self._status(pending, kind, length)
        elif kind & c.REPLY_FLAG_ERROR:
            self._error(pending, kind, length)
        else:
            raise ProtocolError(f"the server sent a chunk of the unknown type {kind}")

    def _data(self, pending: Pending, length: int) -> None:
        _check_length(c.REPLY_OFFSET_DATA, length, 9, OFFSET.size + pending.length)
        (offset,) = OFFSET.unpack(self._source.take(OFFSET.size))
        self._source.into(pending.part(offset, length - OFFSET.size))

    def _hole(self, pending: Pending, length: int) -> None:
        _check_length(c.REPLY_OFFSET_HOLE, length, HOLE.size, HOLE.size)
        offset, size = HOLE.unpack(self._source.take(HOLE.size))
        _clear(pending.part(offset, size))

    def _error(self, pending: Pending, kind: int, length: int) -> None:
        """An error chunk; one of an unknown type is laid out as the specification promises."""
        _check_length(kind, length, CHUNK_ERROR.size, _ERROR_CAP)
        payload = bytes(self._source.take(length))
        error, size = CHUNK_ERROR.unpack_from(payload)
        text = payload[CHUNK_ERROR.size : CHUNK_ERROR.size + size]
        rest = len(payload) - CHUNK_ERROR.size - size
        if size > c.MAX_STRING or rest < 0 or (kind == c.REPLY_ERROR and rest):
            raise ProtocolError("the length of an error's message does not fit its chunk")
        if kind == c.REPLY_ERROR_OFFSET:
            if rest != OFFSET.size:
                raise ProtocolError("the length of an error's message does not fit its chunk")
            (offset,) = OFFSET.unpack_from(payload, length - rest)
            if not pending.offset <= offset < pending.offset + max(pending.length, 1):
                raise ProtocolError(f"the server reports an error at {offset}, outside the request")
        pending.fail(error, text)

    def _status(self, pending: Pending, kind: int, length: int) -> None:
        entry, head = (EXTENT_EXT, 8) if self._extended else (EXTENT, 4)
        _check_length(kind, length, head + entry.size, head + entry.size * _CAP_EXTENTS)
        count, rest = divmod(length - head, entry.size)
        number = int.from_bytes(self._source.take(4))
        if rest or (self._extended and int.from_bytes(self._source.take(4)) != count):
            raise ProtocolError(f"a block status chunk cannot have {length} bytes")
        if pending.kind != c.CMD_BLOCK_STATUS:
            raise ProtocolError("the server sent block status for a request that asks for none")
        if number not in pending.contexts or number in pending.status:
            raise ProtocolError(f"the server sent block status for context {number}: not expected")
        extents = self._extents(entry, count)
        pending.status[number] = _collect(extents, pending.offset, pending.length)
        for _ in extents:  # what nobody wants is read all the same
            pass

    def _extents(self, entry: Struct, count: int) -> Iterator[tuple[int, int]]:
        """(length, status) of ``count`` descriptors, of which few are in memory at a time."""
        while count:
            batch = min(count, _BATCH)
            count -= batch
            yield from entry.iter_unpack(bytes(self._source.take(batch * entry.size)))


def _no_reply(magic: int) -> ProtocolError:
    return ProtocolError(f"the server sent {magic:#010x} where a reply should begin")


def _check_length(kind: int, length: int, least: int, most: int) -> None:
    if not least <= length <= most:
        raise ProtocolError(f"the server sent a chunk of type {kind:#x} with {length} bytes")


def _collect(extents: Iterator[tuple[int, int]], offset: int, length: int) -> list[Extent]:
    """The descriptors as extents, neighbours of equal status joined, up to the request's end.

    The last of a reply may run past it. No more than MAX_EXTENTS are kept: a shorter list is as
    good as a long one, and takes less memory.
    """
    found: list[Extent] = []
    end, start, status = offset + length, offset, -1
    position = offset
    for size, flags in extents:
        if not size:
            raise ProtocolError("the server sent an extent of no length")
        if flags != status:
            if position > start:
                found.append(Extent(start, position - start, status))
            if len(found) == c.MAX_EXTENTS:
                return found
            start, status = position, flags
        position = min(position + size, end)
        if position == end:
            break
    found.append(Extent(start, position - start, status))
    return found


def _clear(view: memoryview) -> None:
    for start in range(0, len(view), len(_ZEROES)):
        part = view[start : start + len(_ZEROES)]
        part[:] = _ZEROES[: len(part)]

# SPDX-License-Identifier: Apache-2.0
"""How a client reads replies: each is checked against the request that it claims to answer.

The server is not trusted: data goes only where the request asked for it, every byte once, and
nothing is allocated or skipped that is larger than the specification allows.
Source: the NBD protocol document, section "Reply types".
"""

from collections.abc import Iterator
from struct import Struct
from typing import Final, Protocol

from nbdwire import constants as c
from nbdwire.codec import (
    CHUNK_ERROR,
    CHUNK_OFFSET_DATA,
    CHUNK_SIZE,
    EXTENDED_CHUNK,
    EXTENDED_CHUNK_SIZE,
    EXTENDED_OFFSET_DATA,
    EXTENT,
    EXTENT_EXT,
    HOLE,
    OFFSET,
    SIMPLE_REPLY,
    SIMPLE_REPLY_SIZE,
)
from nbdwire.errors import ProtocolError
from nbdwire.extents import Extent
from nbdwire.pending import Pending

_CAP_EXTENTS: Final = 1 << 20  # the protocol's cap on descriptors in one chunk
_ERROR_CAP: Final = CHUNK_ERROR.size + c.MAX_STRING + 64
_ZEROES: Final = bytes(1 << 16)
_BATCH: Final = 1 << 12  # descriptors that are parsed at a time


class Source(Protocol):
    """Where the bytes come from: `nbdwire.transport.Receiver`.

    ``buffer[start:stop]`` has arrived; who takes bytes from there moves ``start``.
    """

    buffer: memoryview
    start: int
    stop: int

    def take(self, length: int) -> memoryview:
        """The next ``length`` bytes (at most 64 KiB); valid until the next call."""
        ...

    def into(self, view: memoryview) -> None:
        """Fill ``view`` with the next bytes."""
        ...


class ReplyReader:
    """Reads messages from ``source`` and applies each to the request with its cookie.

    ``pending`` are the requests in flight by their cookies; one whose reply is complete leaves it.
    """

    __slots__ = ("_extended", "_magic", "_more", "_pending", "_source", "_structured")

    def __init__(
        self,
        source: Source,
        pending: dict[int, Pending],
        structured: bool,
        extended: bool = False,
    ) -> None:
        self._source = source
        self._pending = pending
        self._structured = structured
        self._extended = extended
        self._magic = c.EXTENDED_REPLY_MAGIC if extended else c.STRUCTURED_REPLY_MAGIC
        self._more = self._more_chunks if structured or extended else self._more_simple

    def read(self, finished: list[Pending]) -> None:
        """Read one message, and all that have arrived with it.

        The requests whose replies are complete now are added to ``finished``.
        """
        pending = self._read()
        if pending is not None:
            del self._pending[pending.cookie]
            finished.append(pending)
        self._more(finished)

    def _more_simple(self, finished: list[Pending]) -> None:
        """Simple replies that are in the buffer as a whole, as long as nothing is unusual."""
        source, table = self._source, self._pending
        buffer, at, stop = source.buffer, source.start, source.stop
        while stop - at >= SIMPLE_REPLY_SIZE:
            magic, error, cookie = SIMPLE_REPLY.unpack_from(buffer, at)
            pending = table.get(cookie)
            if magic != c.SIMPLE_REPLY_MAGIC or error or pending is None:
                break
            end = at + SIMPLE_REPLY_SIZE
            view = pending.view
            if view is not None:
                begin, end = end, end + pending.length
                if end > stop:
                    break
                view[:] = buffer[begin:end]
            source.start = at = end
            del table[cookie]
            finished.append(pending)

    def _more_chunks(self, finished: list[Pending]) -> None:
        """Chunks, and simple replies between them, that are in the buffer as a whole."""
        source, table, extended = self._source, self._pending, self._extended
        buffer, at, stop = source.buffer, source.start, source.stop
        while stop - at >= SIMPLE_REPLY_SIZE:  # the buffer is longer than any header behind stop
            if extended:
                magic, flags, kind, cookie, asked, length, offset = (
                    EXTENDED_OFFSET_DATA.unpack_from(buffer, at)
                )
                begin = at + EXTENDED_CHUNK_SIZE
            else:
                magic, flags, kind, cookie, length, offset = CHUNK_OFFSET_DATA.unpack_from(
                    buffer, at
                )
                begin, asked = at + CHUNK_SIZE, -1
            simple = magic == c.SIMPLE_REPLY_MAGIC and not extended
            end = at + SIMPLE_REPLY_SIZE if simple else begin + length
            if end > stop:
                return
            pending = table.get(cookie)
            view = None if pending is None else pending.view
            if (
                pending is not None
                and view is not None
                and kind == c.REPLY_OFFSET_DATA
                and flags == c.REPLY_FLAG_DONE
                and magic == self._magic
                and offset == pending.offset
                and length == pending.length + OFFSET.size
                and pending.coverage is None
                and (asked < 0 or asked == offset)
            ):
                view[:] = buffer[begin + OFFSET.size : end]
                source.start = end
            else:  # a chunk of several, or without data, or wrong
                pending = self._read()
            at = source.start
            if pending is not None:
                del table[pending.cookie]
                finished.append(pending)

    def _read(self) -> Pending | None:
        if self._extended:
            return self._read_extended()
        head = self._source.take(SIMPLE_REPLY_SIZE)
        magic = int.from_bytes(head[:4])
        cookie = int.from_bytes(head[8:16])
        if magic == c.SIMPLE_REPLY_MAGIC:
            error = int.from_bytes(head[4:8])
            return self._simple(self._request(cookie), error)
        if magic != c.STRUCTURED_REPLY_MAGIC or not self._structured:
            raise _no_reply(magic)
        flags, kind = int.from_bytes(head[4:6]), int.from_bytes(head[6:8])
        length = int.from_bytes(self._source.take(CHUNK_SIZE - SIMPLE_REPLY_SIZE))
        return self._chunk(self._request(cookie), flags, kind, length)

    def _read_extended(self) -> Pending | None:
        head = EXTENDED_CHUNK.unpack(self._source.take(EXTENDED_CHUNK.size))
        magic, flags, kind, cookie, offset, length = head
        if magic != c.EXTENDED_REPLY_MAGIC:
            raise _no_reply(magic)
        pending = self._request(cookie)
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

    def _request(self, cookie: int) -> Pending:
        pending = self._pending.get(cookie)
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
                pending.coverage is None
                or pending.coverage.front != pending.offset + pending.length
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

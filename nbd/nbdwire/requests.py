# SPDX-License-Identifier: Apache-2.0
"""One request, from its checked fields to its reply: every command but the fast reads and writes.

The workers (`nbdwire.worker`, `nbdwire.followers`) read requests and send replies; what a request
means is here, once. Source: the protocol's sections "Request types", "Error values" and "Structured
reply chunk types".
"""

import errno
import logging
import os
import sys
from array import array
from collections.abc import Callable, Mapping, Sequence

from nbdwire import constants as c
from nbdwire.codec import CHUNK, SIMPLE_REPLY, error_chunk
from nbdwire.errors import to_wire
from nbdwire.export import Export, ExtentsFunction
from nbdwire.extents import Extent

log = logging.getLogger(__name__)

_FLAGS: dict[int, int] = {
    c.CMD_READ: c.CMD_FLAG_FUA,
    c.CMD_WRITE: c.CMD_FLAG_FUA,
    c.CMD_FLUSH: c.CMD_FLAG_FUA,
    c.CMD_TRIM: c.CMD_FLAG_FUA,
    c.CMD_CACHE: c.CMD_FLAG_FUA,
    c.CMD_WRITE_ZEROES: c.CMD_FLAG_FUA | c.CMD_FLAG_NO_HOLE,
    c.CMD_BLOCK_STATUS: c.CMD_FLAG_FUA | c.CMD_FLAG_REQ_ONE,
}
_MODIFIES = frozenset({c.CMD_WRITE, c.CMD_TRIM, c.CMD_WRITE_ZEROES})
_PAST_END_IS_ENOSPC = frozenset({c.CMD_WRITE, c.CMD_WRITE_ZEROES})


def legal_flags(offered: int) -> dict[int, int]:
    """Command -> the flags that a client may set, given the transmission flags ``offered``."""
    flags = dict(_FLAGS)
    if offered & c.TFLAG_SEND_DF:
        flags[c.CMD_READ] |= c.CMD_FLAG_DF
    if offered & c.TFLAG_SEND_FAST_ZERO:
        flags[c.CMD_WRITE_ZEROES] |= c.CMD_FLAG_FAST_ZERO
    return flags


class Requests:
    """What one connection negotiated, and how its requests are carried out."""

    def __init__(
        self,
        *,
        size: int,
        flags: int,
        structured: bool,
        contexts: Sequence[tuple[int, str]],
        functions: Mapping[str, ExtentsFunction],
    ) -> None:
        self.size = size
        self.structured = structured
        self.read_only = bool(flags & c.TFLAG_READ_ONLY)
        self.legal = legal_flags(flags)
        # Only the allocation is the node's own: no other context may ever be answered with it.
        self._contexts = [
            (number, functions.get(name) if name == c.CONTEXT_BASE_ALLOCATION else functions[name])
            for number, name in contexts
        ]

    def check(self, kind: int, flags: int, offset: int, length: int) -> int:
        """0, or the errno for a request that must not be carried out."""
        legal = self.legal.get(kind)
        if legal is None or flags & ~legal:
            return errno.EINVAL
        if kind == c.CMD_FLUSH:
            return 0
        if self.read_only and kind in _MODIFIES:
            return errno.EPERM
        if offset + length > self.size:
            return errno.ENOSPC if kind in _PAST_END_IS_ENOSPC else errno.EINVAL
        if length == 0 or (kind == c.CMD_BLOCK_STATUS and not self._contexts):
            return errno.EINVAL
        if kind in (c.CMD_READ, c.CMD_WRITE) and length > c.MAX_PAYLOAD:
            return errno.EOVERFLOW if flags & c.CMD_FLAG_DF else errno.EINVAL
        return 0

    def error(self, cookie: int, number: int | None, message: str = "") -> bytes:
        """The reply that says so; a chunk with a message where structured replies are on."""
        wire = to_wire(number)
        if self.structured:
            return error_chunk(cookie, wire, message or os.strerror(number or errno.EIO))
        return SIMPLE_REPLY.pack(c.SIMPLE_REPLY_MAGIC, wire, cookie)

    def failure(self, cookie: int, flags: int = 0) -> bytes:
        """The reply for the exception being handled; one that is no OSError is our fault."""
        problem = sys.exc_info()[1]
        if isinstance(problem, OSError):
            number = problem.errno
            if number == errno.EOPNOTSUPP and not flags & c.CMD_FLAG_FAST_ZERO:
                number = errno.EINVAL  # section "Error values": ENOTSUP is for FAST_ZERO alone
            return self.error(cookie, number, problem.strerror or "")
        log.error("a request failed by a fault of this program: %r", problem)
        log.debug("where it happened", exc_info=problem)
        return self.error(cookie, errno.EIO, "internal error")

    def execute(
        self, node: Export, kind: int, flags: int, cookie: int, offset: int, length: int
    ) -> bytes:
        """The whole reply of a checked request without payload and without data in its reply."""
        try:
            if kind == c.CMD_BLOCK_STATUS:
                return self._block_status(node, flags, cookie, offset, length)
            _VERBS[kind](node, flags, offset, length)
        except Exception:  # every failure is answered; the connection goes on
            return self.failure(cookie, flags)
        return SIMPLE_REPLY.pack(c.SIMPLE_REPLY_MAGIC, c.NBD_SUCCESS, cookie)

    def _block_status(
        self, node: Export, flags: int, cookie: int, offset: int, length: int
    ) -> bytes:
        parts = []
        one = bool(flags & c.CMD_FLAG_REQ_ONE)
        for index, (number, function) in enumerate(self._contexts):
            extents = collect(function or node.extents, offset, length, 1 if one else c.MAX_EXTENTS)
            last = index == len(self._contexts) - 1
            parts.append(_status_chunk(cookie, number, extents, last))
        return b"".join(parts)


def collect(function: ExtentsFunction, offset: int, length: int, limit: int) -> list[Extent]:
    """Ask ``function`` until the range is covered or ``limit`` is reached; neighbours joined."""
    found: list[Extent] = []
    position, end = offset, offset + length
    while position < end:
        for extent in function(position, end - position):
            if found and found[-1].status == extent.status:
                last = found[-1]
                found[-1] = Extent(last.offset, last.length + extent.length, last.status)
            elif len(found) == limit:
                return found
            else:
                found.append(extent)
        if not found or found[-1].end <= position:
            raise OSError(errno.EIO, "the list of extents made no progress")
        position = found[-1].end
    return found


def _status_chunk(cookie: int, number: int, extents: Sequence[Extent], last: bool) -> bytes:
    words = array("I", (word for extent in extents for word in (extent.length, extent.status)))
    if sys.byteorder == "little":
        words.byteswap()
    head = CHUNK.pack(
        c.STRUCTURED_REPLY_MAGIC,
        c.REPLY_FLAG_DONE if last else 0,
        c.REPLY_BLOCK_STATUS,
        cookie,
        4 + 8 * len(extents),
    )
    return head + number.to_bytes(4, "big") + words.tobytes()


def _flush(node: Export, _flags: int, _offset: int, _length: int) -> None:
    node.flush()


def _trim(node: Export, flags: int, offset: int, length: int) -> None:
    node.trim(offset, length, flags)


def _zero(node: Export, flags: int, offset: int, length: int) -> None:
    node.zero(offset, length, flags)


def _cache(node: Export, _flags: int, offset: int, length: int) -> None:
    prefetch = getattr(node, "prefetch", None)
    if prefetch is not None:
        prefetch(offset, length)


_VERBS: dict[int, Callable[[Export, int, int, int], None]] = {
    c.CMD_FLUSH: _flush,
    c.CMD_TRIM: _trim,
    c.CMD_WRITE_ZEROES: _zero,
    c.CMD_CACHE: _cache,
}

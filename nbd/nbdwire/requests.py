# SPDX-License-Identifier: Apache-2.0
"""One request, from its checked fields to its reply: every command but the fast reads and writes.

The workers (`nbdwire.worker`, `nbdwire.followers`) read requests and send replies; what a request
means is here, once. Source: the protocol's sections "Request types", "Error values", "Block size
constraints" and "Structured reply chunk types".

With extended headers CMD_FLAG_PAYLOAD_LEN says that ``length`` bytes follow. The workers turn it
round for WRITE, which must have it, before they ask here; so the flag always means that something
is wrong, but for a BLOCK_STATUS, whose payload `Requests.filtered_status` takes.
"""

import errno
import logging
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from nbdwire import constants as c
from nbdwire import status, wire
from nbdwire.codec import EFFECT_LENGTH, U32
from nbdwire.errors import to_wire
from nbdwire.export import Export, ExtentsFunction, Session
from nbdwire.extents import Extent
from nbdwire.limits import Account

log = logging.getLogger(__name__)

LONG: Final = 1 << 28
"""Bytes. A longer TRIM or WRITE_ZEROES is done in steps, so that it cannot hold up a drain."""

_FLAGS: Final[dict[int, int]] = {
    c.CMD_READ: c.CMD_FLAG_FUA,
    c.CMD_WRITE: c.CMD_FLAG_FUA,
    c.CMD_FLUSH: c.CMD_FLAG_FUA,
    c.CMD_TRIM: c.CMD_FLAG_FUA,
    c.CMD_CACHE: c.CMD_FLAG_FUA,
    c.CMD_WRITE_ZEROES: c.CMD_FLAG_FUA | c.CMD_FLAG_NO_HOLE,
    c.CMD_BLOCK_STATUS: c.CMD_FLAG_FUA | c.CMD_FLAG_REQ_ONE,
}
_MODIFIES: Final = frozenset({c.CMD_WRITE, c.CMD_TRIM, c.CMD_WRITE_ZEROES})
_PAST_END_IS_ENOSPC: Final = frozenset({c.CMD_WRITE, c.CMD_WRITE_ZEROES})
_CARRIES_DATA: Final = frozenset({c.CMD_READ, c.CMD_WRITE})
_IN_STEPS: Final = frozenset({c.CMD_TRIM, c.CMD_WRITE_ZEROES})

Problem = tuple[int, str]
"""An errno, and a text for the client."""


def legal_flags(offered: int) -> dict[int, int]:
    """Command -> the flags that a client may set, given the transmission flags ``offered``."""
    flags = dict(_FLAGS)
    if offered & c.TFLAG_SEND_DF:
        flags[c.CMD_READ] |= c.CMD_FLAG_DF
    if offered & c.TFLAG_SEND_FAST_ZERO:
        flags[c.CMD_WRITE_ZEROES] |= c.CMD_FLAG_FAST_ZERO
    return flags


class Requests:
    """What one connection negotiated, and how its requests are carried out.

    ``size``, ``minimum_block`` and ``maximum_payload`` are in bytes, ``flags`` are the transmission
    flags that were sent, ``contexts`` (id, name) those that were selected. Once ``stopping`` is
    set requests are refused with ESHUTDOWN (see `look`). ``account`` is asked for the memory of
    large payloads.
    """

    def __init__(
        self,
        *,
        size: int,
        flags: int,
        structured: bool,
        contexts: Sequence[tuple[int, str]],
        functions: Mapping[str, ExtentsFunction],
        extended: bool = False,
        minimum_block: int = c.MIN_BLOCK,
        maximum_payload: int = c.MAX_PAYLOAD,
        stopping: threading.Event | None = None,
        account: Account | None = None,
    ) -> None:
        self.size = size
        self.wire = wire.choose(structured, extended)
        self.read_only = bool(flags & c.TFLAG_READ_ONLY)
        self.minimum_block = minimum_block
        self.maximum_payload = maximum_payload
        self.account = account
        self.legal = legal_flags(flags)
        self.late = False
        self._stopping = stopping
        self._filters = bool(flags & c.TFLAG_BLOCK_STATUS_PAYLOAD)
        self._contexts = status.select(contexts, functions)
        # A status chunk is no longer than the payload that the client has been told of.
        self._most_extents = max(1, min(c.MAX_EXTENTS, maximum_payload // 16 - 1))

    def look(self) -> bool:
        """Call it for what was just received: whether the server is about to stop (``late``)."""
        if self._stopping is not None and self._stopping.is_set():
            self.late = True
        return self.late

    def vouched(self, length: int) -> int:
        """The end of the range in which requests of up to ``length`` bytes need no `check`.

        They must be of a legal command with legal flags, not be empty, and, if they write, not be
        for a read-only export.
        """
        if self.late or self.minimum_block > 1 or self.maximum_payload < length:
            return -1
        return self.size

    def check(self, kind: int, flags: int, offset: int, length: int) -> int:
        """0, or the errno for a request that must not be carried out."""
        problem = self.problem(kind, flags, offset, length)
        return problem[0] if problem is not None else 0

    def problem(self, kind: int, flags: int, offset: int, length: int) -> Problem | None:
        """Why the request must not be carried out."""
        if self.late:
            return errno.ESHUTDOWN, "the server is shutting down"
        legal = self.legal.get(kind)
        if legal is None:
            return errno.EINVAL, "there is no such command"
        if flags & c.CMD_FLAG_PAYLOAD_LEN:
            return errno.EINVAL, "the request has a payload that it must not have, or lacks one"
        if flags & ~legal:
            return errno.EINVAL, "the command does not have this flag, or it was not offered"
        if kind == c.CMD_FLUSH:
            return None
        if self.read_only and kind in _MODIFIES:
            return errno.EPERM, "the export is read-only"
        return self._problem_of_range(kind, flags, offset, length)

    def _problem_of_range(self, kind: int, flags: int, offset: int, length: int) -> Problem | None:
        if offset + length > self.size:
            number = errno.ENOSPC if kind in _PAST_END_IS_ENOSPC else errno.EINVAL
            return number, f"the range ends behind the export's {self.size} bytes"
        if length == 0:
            return errno.EINVAL, "the length is 0"
        if (offset | length) & (self.minimum_block - 1):
            return errno.EINVAL, f"the range is not in blocks of {self.minimum_block} bytes"
        if kind == c.CMD_BLOCK_STATUS and not self._contexts:
            return errno.EINVAL, "no metadata context was selected"
        if kind in _CARRIES_DATA and length > self.maximum_payload:
            number = errno.EOVERFLOW if flags & c.CMD_FLAG_DF else errno.EINVAL
            return number, f"{self.maximum_payload} bytes is the most that may be asked for"
        return None

    def error(
        self,
        cookie: int,
        offset: int,
        number: int | None,
        message: str = "",
        at: int | None = None,
    ) -> bytes:
        """The reply that says so; a chunk with a message where there are chunks.

        ``offset`` is the request's, ``at`` (bytes, within the request) where the error is.
        """
        text = message or os.strerror(number or errno.EIO)
        return self.wire.error(cookie, offset, to_wire(number), text, at)

    def failure(self, cookie: int, offset: int, flags: int = 0) -> bytes:
        """The reply for the exception being handled; one that is no OSError is our fault."""
        problem = sys.exc_info()[1]
        if isinstance(problem, OSError):
            number = problem.errno
            if number == errno.EOPNOTSUPP and not flags & c.CMD_FLAG_FAST_ZERO:
                number = errno.EINVAL  # section "Error values": ENOTSUP is for FAST_ZERO alone
            return self.error(cookie, offset, number, problem.strerror or "")
        log.error("a request failed by a fault of this program: %r", problem)
        log.debug("where it happened", exc_info=problem)
        return self.error(cookie, offset, errno.EIO, "internal error")

    def execute(
        self, node: Export, kind: int, flags: int, cookie: int, offset: int, length: int
    ) -> bytes:
        """The whole reply of a checked request without payload and without data in its reply."""
        try:
            if kind == c.CMD_BLOCK_STATUS:
                return self._block_status(node, flags, cookie, offset, length, self._contexts)
            _VERBS[kind](node, flags, offset, length)
        except Exception:  # every failure is answered; the connection goes on
            return self.failure(cookie, offset, flags)
        return self.wire.done(cookie, offset)

    @staticmethod
    def is_long(kind: int, length: int) -> bool:
        """Whether the request is one for `execute_in_steps`."""
        return length > LONG and kind in _IN_STEPS

    def execute_in_steps(
        self, session: Session, kind: int, flags: int, cookie: int, offset: int, length: int
    ) -> bytes:
        """As `execute`, with the session's gate taken for LONG bytes at a time."""
        end, legal = offset + length, flags
        try:
            for start in range(offset, end, LONG):
                with session.gate:
                    _VERBS[kind](session.node, legal, start, min(LONG, end - start))
                # ENOTSUP promises that nothing has changed, which now is too late to promise.
                legal &= ~c.CMD_FLAG_FAST_ZERO
        except Exception:  # every failure is answered; the connection goes on
            return self.failure(cookie, offset, legal)
        return self.wire.done(cookie, offset)

    def takes_payload(self, kind: int, length: int) -> bool:
        """Whether a payload of ``length`` bytes is one for `filtered_status`."""
        most = EFFECT_LENGTH.size + U32.size * len(self._contexts)
        return self._filters and kind == c.CMD_BLOCK_STATUS and length <= most

    def filtered_status(
        self, node: Export, flags: int, cookie: int, offset: int, payload: bytes
    ) -> bytes:
        """The reply to a BLOCK_STATUS whose ``payload`` names the contexts that are wanted."""
        flags &= ~c.CMD_FLAG_PAYLOAD_LEN
        try:
            length, contexts = status.parse_filter(payload, self._contexts)
            problem = self.problem(c.CMD_BLOCK_STATUS, flags, offset, length)
            if problem is not None:
                return self.error(cookie, offset, *problem)
            return self._block_status(node, flags, cookie, offset, length, contexts)
        except Exception:  # every failure is answered; the connection goes on
            return self.failure(cookie, offset)

    def _block_status(
        self,
        node: Export,
        flags: int,
        cookie: int,
        offset: int,
        length: int,
        contexts: Sequence[status.Context],
    ) -> bytes:
        parts = []
        limit = 1 if flags & c.CMD_FLAG_REQ_ONE else self._most_extents
        for context in contexts:
            extents = context.extents(node, offset, length, limit, self.minimum_block)
            done = c.REPLY_FLAG_DONE if context is contexts[-1] else 0
            parts.append(self._status_chunk(cookie, offset, context.number, extents, done))
        return b"".join(parts)

    def _status_chunk(
        self, cookie: int, offset: int, number: int, extents: list[Extent], flags: int
    ) -> bytes:
        if not self.wire.extended:
            longest = (1 << 32) - max(512, self.minimum_block)
            extents = status.clip_lengths(extents, longest)
        try:
            return self.wire.status(cookie, offset, number, extents, flags)
        except OverflowError:
            raise OSError(errno.EOVERFLOW, "this status needs extended headers") from None


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


_VERBS: Final[dict[int, Callable[[Export, int, int, int], None]]] = {
    c.CMD_FLUSH: _flush,
    c.CMD_TRIM: _trim,
    c.CMD_WRITE_ZEROES: _zero,
    c.CMD_CACHE: _cache,
}

# SPDX-License-Identifier: Apache-2.0
"""A client: one connection to an export, which many threads may use at once."""

import socket
from collections.abc import Collection, Sequence
from types import TracebackType
from typing import Final, overload

from nbdwire import constants as c
from nbdwire.checks import (
    check_range,
    check_writable,
    context_ids,
    cut,
    effect_limit,
    need,
    payload_limit,
    status_request,
)
from nbdwire.errors import RequestError
from nbdwire.extents import Extent
from nbdwire.link import Link
from nbdwire.negotiate_client import (
    ClientSession,
    client_describe,
    client_handshake,
    client_list,
    client_list_contexts,
)
from nbdwire.opening import CONNECT_TIMEOUT, open_stream
from nbdwire.pending import Pending
from nbdwire.pipeline import DEPTH, Pipeline
from nbdwire.reconnect import Policy, Reconnecting
from nbdwire.transport import Stream, Upgrader
from nbdwire.uri import NBDURI, parse

_ZERO_STEP: Final = 1 << 20


class Client:
    """An export on an NBD server. It has the verbs of `nbdwire.export.Export`, and a few more.

    Offsets and lengths are bytes. Every verb raises RequestError (an OSError) if the server, or
    its lack of that verb, fails this one request, and ProtocolError or ConnectionClosed if the
    connection is over; then every later call raises it too. If the server told a
    ``session.minimum_block`` above 1, it may refuse what is not aligned to it.
    """

    def __init__(
        self,
        sock: socket.socket | Stream,
        session: ClientSession,
        request_timeout: float | None = None,
    ) -> None:
        """Take over ``sock``, on which the handshake has led to ``session``.

        ``request_timeout``: see `connect`.
        """
        self.session = session
        self.link = Link(sock, session, request_timeout)
        self._payload = payload_limit(session)
        self._effect_limit = effect_limit(session)
        self._names = dict(session.contexts)

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def size(self) -> int:
        """Bytes."""
        return self.session.size

    @property
    def flags(self) -> int:
        """The transmission flags, TFLAG_*."""
        return self.session.flags

    @property
    def read_only(self) -> bool:
        """Whether the server refuses pwrite, zero and trim."""
        return bool(self.session.flags & c.TFLAG_READ_ONLY)

    @property
    def contexts(self) -> tuple[str, ...]:
        """The metadata contexts that `extents` can be asked for."""
        return tuple(self._names.values())

    def pread_into(self, buf: memoryview, offset: int) -> None:
        """Fill ``buf`` with the bytes from ``offset``."""
        view = memoryview(buf).cast("B")
        check_range(self.session, offset, len(view))
        for start in range(0, len(view), self._payload):
            part = view[start : start + self._payload]
            self._request(Pending(c.CMD_READ, offset + start, len(part), part))

    def pread(self, length: int, offset: int) -> bytes:
        """``length`` bytes from ``offset``."""
        check_range(self.session, offset, length)
        data = bytearray(length)
        self.pread_into(memoryview(data), offset)
        return bytes(data)

    def pwrite(self, buf: memoryview | bytes | bytearray, offset: int, fua: bool = False) -> None:
        """Write ``buf`` at ``offset``; with ``fua`` it is on stable storage on return."""
        view = memoryview(buf).cast("B")
        check_writable(self.session, offset, len(view))
        flags = self._fua(c.CMD_FLAG_FUA if fua else 0)
        for start in range(0, len(view), self._payload):
            part = view[start : start + self._payload]
            self._request(Pending(c.CMD_WRITE, offset + start, len(part)), flags, part)
        if fua and not flags:
            self.flush()

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        """Make the range read as zeroes; ``flags`` are CMD_FLAG_FUA, _NO_HOLE and _FAST_ZERO.

        A server that cannot do it gets zeroes written, unless FAST_ZERO forbids that (EOPNOTSUPP).
        """
        check_writable(self.session, offset, length)
        if flags & c.CMD_FLAG_FAST_ZERO:
            need(self.session, c.TFLAG_SEND_FAST_ZERO, "fast zeroing")
        if not self.flags & c.TFLAG_SEND_WRITE_ZEROES:
            self._write_zeroes(offset, length, bool(flags & c.CMD_FLAG_FUA))
        else:
            self._effect(c.CMD_WRITE_ZEROES, flags, offset, length, self._effect_limit)

    def trim(self, offset: int, length: int, flags: int = 0) -> None:
        """Tell the server that the contents are not needed any more; ``flags``: CMD_FLAG_FUA."""
        check_writable(self.session, offset, length)
        need(self.session, c.TFLAG_SEND_TRIM, "trimming")
        self._effect(c.CMD_TRIM, flags, offset, length, self._effect_limit)

    def cache(self, offset: int, length: int) -> None:
        """Ask the server to bring the range into its memory."""
        check_range(self.session, offset, length)
        need(self.session, c.TFLAG_SEND_CACHE, "caching")
        self._effect(c.CMD_CACHE, 0, offset, length, self._payload)

    def flush(self) -> None:
        """Return when every write that completed before this call is on stable storage."""
        if self.read_only and not self.flags & c.TFLAG_SEND_FLUSH:
            return  # nothing was written
        need(self.session, c.TFLAG_SEND_FLUSH, "flushing")
        self._request(Pending(c.CMD_FLUSH, 0, 0))

    def extents(
        self, offset: int, length: int, context: str = c.CONTEXT_BASE_ALLOCATION
    ) -> list[Extent]:
        """The status of the range in one context, in order from ``offset``, without gaps.

        At least one extent; the list may end before the range does, and never behind its end.
        Without ``base:allocation`` all is data; any other context must have been negotiated
        (else EOPNOTSUPP).
        """
        check_range(self.session, offset, length)
        if context == c.CONTEXT_BASE_ALLOCATION and context not in self._names.values():
            return [Extent(offset, length, 0)]
        return self.status(offset, length, (context,))[context]

    def status(
        self, offset: int, length: int, contexts: Collection[str] | None = None
    ) -> dict[str, list[Extent]]:
        """As `extents`, of several contexts at once (None: all negotiated ones), in one request."""
        check_range(self.session, offset, length)
        ids = context_ids(self.session, contexts)
        if not ids:
            return {}
        asked = min(length, self._effect_limit)
        pending, payload = status_request(self.session, offset, asked, ids)
        self._request(pending, 0, payload)
        return {self._names[number]: pending.status[number] for number in ids}

    def pipeline(self, depth: int = DEPTH) -> Pipeline:
        """Requests that need not be waited for one by one: at most ``depth`` in flight."""
        return Pipeline([self], depth)

    def close(self) -> None:
        """Say good-bye and close the connection. Calls in other threads fail: ConnectionClosed."""
        self.link.close()

    # Requests

    def _fua(self, flags: int) -> int:
        """``flags`` without FUA if the server does not know it: then a flush must follow."""
        return flags if self.flags & c.TFLAG_SEND_FUA else flags & ~c.CMD_FLAG_FUA

    def _effect(self, kind: int, flags: int, offset: int, length: int, step: int) -> None:
        """A request without payload, in parts of at most ``step`` bytes."""
        sent = self._fua(flags)
        for start, size in cut(offset, length, step):
            self._request(Pending(kind, start, size), sent)
        if sent != flags:
            self.flush()

    def _write_zeroes(self, offset: int, length: int, fua: bool) -> None:
        step = min(self._payload, _ZERO_STEP)
        zeroes = memoryview(bytes(min(step, length)))
        for start, size in cut(offset, length, step):
            self.pwrite(zeroes[:size], start, fua)

    def _request(self, pending: Pending, flags: int = 0, payload: memoryview | None = None) -> None:
        """Send one request, wait for its reply; RequestError if that is an error."""
        self.link.submit(pending, flags, payload)
        self.link.wait(pending)
        if pending.error is not None:
            raise RequestError(*pending.error)


@overload
def connect(
    uri: str | NBDURI,
    *,
    contexts: Sequence[str] = ...,
    structured: bool = ...,
    extended: bool = ...,
    tls: Upgrader | None = ...,
    timeout: float = ...,
    request_timeout: float | None = ...,
    reconnect: None = None,
) -> Client: ...


@overload
def connect(
    uri: str | NBDURI,
    *,
    contexts: Sequence[str] = ...,
    structured: bool = ...,
    extended: bool = ...,
    tls: Upgrader | None = ...,
    timeout: float = ...,
    request_timeout: float | None = ...,
    reconnect: Policy,
) -> Reconnecting: ...


def connect(
    uri: str | NBDURI,
    *,
    contexts: Sequence[str] = (c.CONTEXT_BASE_ALLOCATION,),
    structured: bool = True,
    extended: bool = True,
    tls: Upgrader | None = None,
    timeout: float = CONNECT_TIMEOUT,
    request_timeout: float | None = None,
    reconnect: Policy | None = None,
) -> Client | Reconnecting:
    """Connect to the export that ``uri`` names.

    ``contexts`` are the metadata contexts to ask for; what the server lacks is simply not in
    `Client.contexts`. Extended headers and structured replies are used if the server has them and
    the caller does not forbid them. ``tls`` makes a socket TLS; without it the URI decides, and
    its ``tls-*`` parameters. ``timeout`` is in seconds, for connecting and the handshake together;
    ``request_timeout`` for each request after that (None: it may take for ever). When a request is
    not answered in time (a server that hangs, or dribbles), it and all others in flight raise
    ConnectionClosed at most an eighth later, and the connection is over.
    With a ``reconnect`` policy a lost connection is opened again: `nbdwire.reconnect`.
    URIError, OSError (no connection), NegotiationError (refused), ProtocolError or
    ConnectionClosed.
    """
    where = parse(uri) if isinstance(uri, str) else uri
    secure = where.tls or tls is not None

    def once() -> Client:
        handshake = client_handshake(
            where.export, contexts, structured, extended=extended, tls=secure
        )
        return Client(*open_stream(where, handshake, timeout, tls), request_timeout)

    return once() if reconnect is None else Reconnecting(once, reconnect)


def list_exports(
    uri: str | NBDURI, *, timeout: float = CONNECT_TIMEOUT, tls: Upgrader | None = None
) -> list[tuple[str, str]]:
    """Name and description of each export that the server at ``uri`` lists. Errors: `connect`."""
    where = parse(uri) if isinstance(uri, str) else uri
    handshake = client_list(tls=where.tls or tls is not None)
    stream, found = open_stream(where, handshake, timeout, tls)
    stream.close()
    return found


def list_contexts(
    uri: str | NBDURI,
    queries: Sequence[str] = (),
    *,
    timeout: float = CONNECT_TIMEOUT,
    tls: Upgrader | None = None,
) -> list[str]:
    """The metadata contexts of an export that match ``queries`` (none: all). Errors: `connect`."""
    where = parse(uri) if isinstance(uri, str) else uri
    handshake = client_list_contexts(where.export, queries, tls=where.tls or tls is not None)
    stream, found = open_stream(where, handshake, timeout, tls)
    stream.close()
    return found


def describe(
    uri: str | NBDURI, *, timeout: float = CONNECT_TIMEOUT, tls: Upgrader | None = None
) -> tuple[ClientSession, tuple[str, ...]]:
    """What a server tells about an export, and all its contexts, without opening it.

    nbd-server 3.25 tells a size of 0 here whatever the size is. Errors: `connect`.
    """
    where = parse(uri) if isinstance(uri, str) else uri
    handshake = client_describe(where.export, tls=where.tls or tls is not None)
    stream, found = open_stream(where, handshake, timeout, tls)
    stream.close()
    return found

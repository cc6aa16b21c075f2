# SPDX-License-Identifier: Apache-2.0
"""A client: one connection to an export, which many threads may use at once.

No thread of its own reads the replies. Of the threads that wait, one leads: it reads, and wakes
the others as their replies come; when it has its own, another one leads. A thread starts to wait
when its request is sent, so a server that is held up by its replies always finds a reader.
"""

import contextlib
import errno
import socket
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Final, NoReturn, TypeVar

from nbdwire import constants as c
from nbdwire.codec import REQUEST
from nbdwire.errors import ConnectionClosed, NBDError, RequestError
from nbdwire.extents import Extent
from nbdwire.negotiate import Handshake
from nbdwire.negotiate_client import (
    ClientSession,
    client_handshake,
    client_list,
    client_list_contexts,
)
from nbdwire.replies import Pending, ReplyReader
from nbdwire.transport import Receiver, connect_socket, run_handshake, send_all
from nbdwire.uri import NBDURI, parse

T = TypeVar("T")

CONNECT_TIMEOUT: Final = 30.0
"""Seconds for connecting and the handshake together."""

# Requests without payload are cut too: servers differ in what they make of more than 31 bits.
_MAX_EFFECT: Final = 1 << 30
_ZERO_STEP: Final = 1 << 20


class Client:
    """An export on an NBD server. It has the verbs of `nbdwire.export.Export`, and a few more.

    Offsets and lengths are bytes. Every verb raises RequestError (an OSError) if the server, or
    its lack of that verb, fails this one request, and ProtocolError or ConnectionClosed if the
    connection is over; then every later call raises it too. If the server told a
    ``session.minimum_block`` above 1, it may refuse what is not aligned to it.
    """

    def __init__(self, sock: socket.socket, session: ClientSession) -> None:
        """Take over ``sock``, on which the handshake has led to ``session``."""
        self.session = session
        self._sock = sock
        self._ids = {name: number for number, name in session.contexts}
        payload = min(session.maximum_payload, c.MAX_PAYLOAD)
        self._payload = payload - payload % session.minimum_block
        self._send_lock = threading.Lock()
        self._state = threading.Lock()  # for all that follows
        self._left = threading.Condition(self._state)
        self._pending: dict[int, Pending] = {}
        self._cookie = 0
        self._leading = False
        self._failure: NBDError | None = None
        self._closed = False
        self._reader = ReplyReader(
            Receiver(sock), self._pending.get, session.structured, dict(session.contexts)
        )

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
        return tuple(self._ids)

    def pread_into(self, buf: memoryview, offset: int) -> None:
        """Fill ``buf`` with the bytes from ``offset``."""
        view = memoryview(buf).cast("B")
        self._check_range(offset, len(view))
        for start in range(0, len(view), self._payload):
            part = view[start : start + self._payload]
            self._request(c.CMD_READ, 0, offset + start, len(part), view=part)

    def pread(self, length: int, offset: int) -> bytes:
        """``length`` bytes from ``offset``."""
        self._check_range(offset, length)
        data = bytearray(length)
        self.pread_into(memoryview(data), offset)
        return bytes(data)

    def pwrite(self, buf: memoryview | bytes | bytearray, offset: int, fua: bool = False) -> None:
        """Write ``buf`` at ``offset``; with ``fua`` it is on stable storage on return."""
        view = memoryview(buf).cast("B")
        self._check_writable(offset, len(view))
        flags = self._fua(c.CMD_FLAG_FUA if fua else 0)
        for start in range(0, len(view), self._payload):
            part = view[start : start + self._payload]
            self._request(c.CMD_WRITE, flags, offset + start, len(part), payload=part)
        if fua and not flags:
            self.flush()

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        """Make the range read as zeroes; ``flags`` are CMD_FLAG_FUA, _NO_HOLE and _FAST_ZERO.

        A server that cannot do it gets zeroes written, unless FAST_ZERO forbids that (EOPNOTSUPP).
        """
        self._check_writable(offset, length)
        if flags & c.CMD_FLAG_FAST_ZERO:
            self._need(c.TFLAG_SEND_FAST_ZERO, "fast zeroing")
        if not self.flags & c.TFLAG_SEND_WRITE_ZEROES:
            self._write_zeroes(offset, length, bool(flags & c.CMD_FLAG_FUA))
        else:
            self._effect(c.CMD_WRITE_ZEROES, flags, offset, length, _MAX_EFFECT)

    def trim(self, offset: int, length: int, flags: int = 0) -> None:
        """Tell the server that the contents are not needed any more; ``flags``: CMD_FLAG_FUA."""
        self._check_writable(offset, length)
        self._need(c.TFLAG_SEND_TRIM, "trimming")
        self._effect(c.CMD_TRIM, flags, offset, length, _MAX_EFFECT)

    def cache(self, offset: int, length: int) -> None:
        """Ask the server to bring the range into its memory."""
        self._check_range(offset, length)
        self._need(c.TFLAG_SEND_CACHE, "caching")
        self._effect(c.CMD_CACHE, 0, offset, length, self._payload)

    def flush(self) -> None:
        """Return when every write that completed before this call is on stable storage."""
        if self.read_only and not self.flags & c.TFLAG_SEND_FLUSH:
            return  # nothing was written
        self._need(c.TFLAG_SEND_FLUSH, "flushing")
        self._request(c.CMD_FLUSH, 0, 0, 0)

    def extents(
        self, offset: int, length: int, context: str = c.CONTEXT_BASE_ALLOCATION
    ) -> list[Extent]:
        """The status of the range in one context, in order from ``offset``, without gaps.

        At least one extent; the list may end before the range does, and never behind its end.
        Without ``base:allocation`` all is data; any other context must have been negotiated
        (else EOPNOTSUPP).
        """
        if context not in self._ids:
            if context == c.CONTEXT_BASE_ALLOCATION:
                self._check_range(offset, length)
                return [Extent(offset, length, 0)]
            raise RequestError(errno.EOPNOTSUPP, f"the context {context} was not negotiated")
        return self.status(offset, length)[context]

    def status(self, offset: int, length: int) -> dict[str, list[Extent]]:
        """As `extents`, of all negotiated contexts at once: one request, one list for each."""
        self._check_range(offset, length)
        if not self._ids:
            return {}
        asked = min(length, _MAX_EFFECT)
        pending = self._request(c.CMD_BLOCK_STATUS, 0, offset, asked)
        return {name: pending.status[number] for name, number in self._ids.items()}

    def close(self) -> None:
        """Say good-bye and close the connection. Calls in other threads fail: ConnectionClosed."""
        with self._state:
            if self._closed:
                return
            self._closed = True
            idle = self._failure is None and not self._pending
        if idle:
            self._say_goodbye()
        self._fail(ConnectionClosed("this client has been closed"))
        # The descriptor's number must not be used again while another thread sends or receives.
        with self._send_lock, self._left:
            self._left.wait_for(lambda: not self._leading)
            self._sock.close()

    def _say_goodbye(self) -> None:
        if self._send_lock.acquire(blocking=False):
            try:
                header = REQUEST.pack(c.REQUEST_MAGIC, 0, c.CMD_DISC, 0, 0, 0)
                with contextlib.suppress(OSError):
                    self._sock.send(header, socket.MSG_DONTWAIT)
            finally:
                self._send_lock.release()

    # What a request must satisfy before it is sent

    def _check_range(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise RequestError(
                errno.EINVAL, f"{length} bytes at {offset} are not within {self.size} bytes"
            )

    def _check_writable(self, offset: int, length: int) -> None:
        if self.read_only:
            raise RequestError(errno.EPERM, "the export is read-only")
        self._check_range(offset, length)

    def _need(self, flag: int, what: str) -> None:
        if not self.flags & flag:
            raise RequestError(errno.EOPNOTSUPP, f"the server does not offer {what}")

    def _fua(self, flags: int) -> int:
        """``flags`` without FUA if the server does not know it: then a flush must follow."""
        return flags if self.flags & c.TFLAG_SEND_FUA else flags & ~c.CMD_FLAG_FUA

    # Requests

    def _effect(self, kind: int, flags: int, offset: int, length: int, step: int) -> None:
        """A request without payload, in parts of at most ``step`` bytes."""
        sent = self._fua(flags)
        for start in range(offset, offset + length, step):
            self._request(kind, sent, start, min(step, offset + length - start))
        if sent != flags:
            self.flush()

    def _write_zeroes(self, offset: int, length: int, fua: bool) -> None:
        step = min(self._payload, _ZERO_STEP)
        zeroes = memoryview(bytes(min(step, length)))
        for start in range(offset, offset + length, step):
            self.pwrite(zeroes[: offset + length - start], start, fua)

    def _request(
        self,
        kind: int,
        flags: int,
        offset: int,
        length: int,
        view: memoryview | None = None,
        payload: memoryview | None = None,
    ) -> Pending:
        """Send one request, wait for its reply; RequestError if that is an error."""
        pending = Pending(kind, offset, length, view)
        try:
            self._submit(pending, flags, payload)
            self._wait(pending)
        except BaseException as error:  # also KeyboardInterrupt: nobody knows how far we came
            self._fail(error, leader=pending.leads)
            if isinstance(error, (NBDError, OSError)):
                self._raise_failure()
            raise
        if pending.error is not None:
            raise RequestError(*pending.error)
        return pending

    def _submit(self, pending: Pending, flags: int, payload: memoryview | None) -> None:
        with self._state:
            if self._failure is not None:
                self._raise_failure()
            self._cookie += 1
            pending.cookie = self._cookie
            self._pending[pending.cookie] = pending
        header = REQUEST.pack(
            c.REQUEST_MAGIC, flags, pending.kind, pending.cookie, pending.offset, pending.length
        )
        with self._send_lock:
            if payload is None:
                send_all(self._sock, header)
            else:
                send_all(self._sock, header, payload)

    def _wait(self, pending: Pending) -> None:
        with self._state:
            follow = not pending.done and self._leading
            pending.waiting = follow
            if not (pending.done or follow):
                pending.leads = self._leading = True
        if follow:
            pending.wake.acquire()  # its reply is there, the connection is lost, or it leads now
        if pending.leads:
            self._lead(pending)
        if pending.lost:
            self._raise_failure()

    def _lead(self, own: Pending) -> None:
        """Read replies until that of ``own`` is there; then let another thread lead."""
        while not own.done:
            finished = self._reader.read()
            if finished is not None:
                self._complete(finished)
        with self._state:
            heir = next((x for x in self._pending.values() if x.waiting), None)
            if self._failure is not None:
                self._abandon()
            elif heir is not None:
                heir.waiting, heir.leads = False, True
                heir.wake.release()
            else:
                self._stop_leading()

    def _complete(self, pending: Pending) -> None:
        with self._state:
            del self._pending[pending.cookie]
            self._wake(pending)

    # Helpers that want self._state to be held

    def _wake(self, pending: Pending) -> None:
        pending.view = None
        pending.done = True
        pending.waiting = False
        pending.wake.release()

    def _stop_leading(self) -> None:
        self._leading = False
        self._left.notify_all()

    def _abandon(self) -> None:
        for pending in self._pending.values():
            pending.lost = True
            self._wake(pending)
        self._pending.clear()
        self._stop_leading()

    # Failure: the first one is kept

    def _fail(self, error: BaseException, leader: bool = False) -> None:
        """The connection is over.

        While a thread leads, only that one wakes those who wait: it may still be filling their
        buffers. Shutting the socket down makes it stop.
        """
        with self._state:
            if self._failure is None:
                self._failure = _as_fatal(error)
                with contextlib.suppress(OSError):
                    self._sock.shutdown(socket.SHUT_RDWR)
            if leader or not self._leading:
                self._abandon()

    def _raise_failure(self) -> NoReturn:
        failure = self._failure or ConnectionClosed("the connection is lost")
        raise type(failure)(*failure.args)  # a new one: several threads must not share a traceback


def _as_fatal(error: BaseException) -> NBDError:
    if isinstance(error, NBDError):
        return error
    return ConnectionClosed(f"the connection failed: {error or type(error).__name__}")


def connect(
    uri: str | NBDURI,
    *,
    contexts: Sequence[str] = (c.CONTEXT_BASE_ALLOCATION,),
    structured: bool = True,
    timeout: float = CONNECT_TIMEOUT,
) -> Client:
    """Connect to the export that ``uri`` names.

    ``contexts`` are the metadata contexts to ask for; what the server lacks is simply not in
    `Client.contexts`. ``timeout`` is in seconds. URIError, OSError (no connection),
    NegotiationError (refused), ProtocolError or ConnectionClosed.
    """
    where = parse(uri) if isinstance(uri, str) else uri
    sock, session = _open(where, client_handshake(where.export, contexts, structured), timeout)
    return Client(sock, session)


def list_exports(uri: str | NBDURI, *, timeout: float = CONNECT_TIMEOUT) -> list[tuple[str, str]]:
    """Name and description of each export that the server at ``uri`` lists. Errors: `connect`."""
    sock, found = _open(uri, client_list(), timeout)
    sock.close()
    return found


def list_contexts(
    uri: str | NBDURI, queries: Sequence[str] = (), *, timeout: float = CONNECT_TIMEOUT
) -> list[str]:
    """The metadata contexts of an export that match ``queries`` (none: all). Errors: `connect`."""
    where = parse(uri) if isinstance(uri, str) else uri
    sock, found = _open(where, client_list_contexts(where.export, queries), timeout)
    sock.close()
    return found


def _open(uri: str | NBDURI, handshake: Handshake[T], timeout: float) -> tuple[socket.socket, T]:
    """Connect and run ``handshake``; the socket is closed if that fails."""
    deadline = time.monotonic() + timeout
    sock = connect_socket(parse(uri) if isinstance(uri, str) else uri, timeout)
    try:
        return sock, run_handshake(sock, handshake, deadline)
    except BaseException:
        sock.close()
        raise

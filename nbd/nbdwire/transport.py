# SPDX-License-Identifier: Apache-2.0
"""Streams: connect them, run handshakes on them, and move exact numbers of bytes through them.

A peer that went away, by a reset as well as by an orderly end, is ConnectionClosed.
"""

import contextlib
import errno
import os
import socket
import struct
import time
from collections.abc import Callable, Iterable
from typing import Final, Protocol, TypeAlias, TypeVar

from nbdwire.errors import ConnectionClosed, URIError
from nbdwire.handshake import Handshake, Upgrade
from nbdwire.uri import NBDURI

T = TypeVar("T")
Buffer: TypeAlias = bytes | bytearray | memoryview

_IOV_MAX: Final = 1024
_GONE: Final = "the peer closed the connection"


class Stream(Protocol):
    """What a connection is read from and written to: a socket, or a `nbdwire.tls.TLSStream`.

    The methods are those of `socket.socket`, for memoryviews of bytes. A stream that is not a
    socket also has ``secure`` (nobody else can read or change what passes) and ``can_sendfile``
    (whether ``os.sendfile`` to its ``fileno()`` is as good as ``sendall``).
    """

    def recv_into(self, buffer: memoryview, nbytes: int = 0, flags: int = 0, /) -> int:
        """Receive up to ``nbytes`` (0: the view's length); 0 at the end."""

    def sendall(self, data: Buffer, flags: int = 0, /) -> None:
        """Send all of it."""

    def sendmsg(self, buffers: Iterable[Buffer], /) -> int:
        """Send the buffers in order; how many of the bytes were taken."""

    def fileno(self) -> int:
        """The descriptor, -1 when closed."""

    def shutdown(self, how: int, /) -> None:
        """As that of a socket; it wakes a thread that receives."""

    def settimeout(self, value: float | None, /) -> None:
        """Seconds that each call may take; None: for ever."""

    def close(self) -> None:
        """Close it, with the good-bye that the stream's kind asks for."""

    @property
    def family(self) -> int:
        """AF_INET and so on."""


Upgrader: TypeAlias = Callable[[socket.socket], Stream]
"""Makes a socket TLS. The socket's time limit is what is left for it."""


def recv_exact_into(sock: Stream, view: memoryview) -> None:
    """Fill ``view`` (bytes) from a blocking socket."""
    done, length = 0, len(view)
    while done < length:  # WAITALL: one system call where a large view would take many
        done += _recv_some(sock, view[done:], socket.MSG_WAITALL)


def _recv_some(sock: Stream, view: memoryview, flags: int = 0) -> int:
    try:
        received = sock.recv_into(view, 0, flags)
    except ConnectionError as error:
        raise ConnectionClosed(f"{_GONE} ({error.strerror})") from error
    if not received:
        raise ConnectionClosed(_GONE)
    return received


def send_all(sock: Stream, *buffers: Buffer) -> None:
    """Send all ``buffers`` (of bytes), in order, without joining them first."""
    try:
        if len(buffers) == 1:
            sock.sendall(buffers[0])
        else:
            _send_many(sock, [memoryview(buffer) for buffer in buffers])
    except ConnectionError as error:
        raise ConnectionClosed(f"{_GONE} ({error.strerror})") from error


def _send_many(sock: Stream, views: list[memoryview]) -> None:
    first = 0
    while first < len(views):
        sent = sock.sendmsg(views[first : first + _IOV_MAX])
        while first < len(views) and sent >= len(views[first]):
            sent -= len(views[first])
            first += 1
        if sent:
            views[first] = views[first][sent:]


_SLACK: Final = 64  # behind the buffer's end, so that any header may be unpacked at any place
_LARGE: Final = 32 << 10
_HEADERS: Final = 4 << 10


class Receiver:
    """Receives through one buffer, so that many small messages cost one system call.

    ``buffer[start:stop]`` has arrived; who takes bytes from there moves ``start``. Large pieces go
    where they belong without a copy: as long as they keep coming, little is asked for beside them.
    """

    __slots__ = ("_ask", "_size", "_sock", "buffer", "start", "stop")

    def __init__(self, sock: Stream, size: int = 256 << 10) -> None:
        self._sock = sock
        self._size = self._ask = size
        self.buffer = memoryview(bytearray(size + _SLACK))
        self.start = self.stop = 0

    def take(self, length: int) -> memoryview:
        """The next ``length`` bytes (at most the buffer's size); valid until the next call."""
        if self.stop - self.start < length:
            self._fill(length)
        start = self.start
        self.start = start + length
        return self.buffer[start : start + length]

    def _fill(self, length: int) -> None:
        left = self.stop - self.start
        if left:
            self.buffer[:left] = bytes(self.buffer[self.start : self.stop])
        self.start, self.stop = 0, left
        end = max(self._ask, length)
        while self.stop < length:
            self.stop += _recv_some(self._sock, self.buffer[self.stop : end])

    def into(self, view: memoryview) -> None:
        """Fill ``view``: what has arrived already is copied, the rest goes there directly."""
        length = len(view)
        self._ask = self._size if length < _LARGE else min(self._size, _HEADERS)
        ready = min(length, self.stop - self.start)
        view[:ready] = self.buffer[self.start : self.start + ready]
        self.start += ready
        if ready < length:
            recv_exact_into(self._sock, view[ready:])


def run_handshake(sock: Stream, handshake: Handshake[T], deadline: float | None) -> T:
    """Run a handshake that stays as it is, plain or TLS, and return its result: see `establish`."""
    return _to_its_end(sock, handshake, deadline, _no_upgrade)[0]


def establish(
    sock: socket.socket,
    handshake: Handshake[T],
    deadline: float | None,
    upgrade: Upgrader | None = None,
) -> tuple[T, Stream]:
    """Run a handshake of `nbdwire.negotiate` or `nbdwire.negotiate_client` on a socket.

    Returns its result and the stream to go on with: the one that ``upgrade`` made if the handshake
    turned to TLS, else ``sock``. ``deadline`` (`time.monotonic`; None: never) is for the whole of
    it, TLS included, however slowly the peer dribbles; ConnectionClosed when it has passed.
    Afterwards the stream has no time limit.

    Nothing that came in plain text is acted upon inside TLS (CVE-2021-3716): we receive exactly
    what a message of the handshake needs and keep nothing, so what somebody injected behind
    STARTTLS, or behind its acknowledgement, is read by the TLS handshake, which fails on it.
    """
    return _to_its_end(sock, handshake, deadline, upgrade or _no_upgrade)


def _no_upgrade(_: socket.socket) -> Stream:
    raise ValueError("the handshake turns to TLS, and the caller gave no way to do so")


def _to_its_end(
    sock: Stream, handshake: Handshake[T], deadline: float | None, upgrade: Upgrader
) -> tuple[T, Stream]:
    driver = _Driver(sock, deadline, upgrade)
    try:
        return driver.run(handshake), driver.stream
    except TimeoutError:
        driver.abort()
        raise ConnectionClosed("the peer did not complete the handshake in time") from None
    except BaseException:
        driver.abort()
        raise
    finally:
        handshake.close()
        if driver.stream.fileno() >= 0:
            driver.stream.settimeout(None)


class _Driver:
    """Does what a handshake yields."""

    def __init__(self, stream: Stream, deadline: float | None, upgrade: Upgrader) -> None:
        self.stream = stream
        self._deadline = deadline
        self._upgrade = upgrade

    def run(self, handshake: Handshake[T]) -> T:
        answer = b""
        try:
            wanted = next(handshake)
            while True:
                answer = self._do(wanted)
                wanted = handshake.send(answer)
        except StopIteration as stop:
            result: T = stop.value
            return result

    def _do(self, wanted: int | bytes | Upgrade) -> bytes:
        if isinstance(wanted, int):
            return _recv_by(self.stream, wanted, self._deadline)
        _limit(self.stream, self._deadline)
        if isinstance(wanted, bytes):
            send_all(self.stream, wanted)
        elif isinstance(self.stream, socket.socket):
            self.stream = self._upgrade(self.stream)
        else:
            raise ValueError("the handshake turns to TLS for the second time")
        return b""

    def abort(self) -> None:
        """A failure inside TLS: end that in good order. The socket is the caller's to close."""
        if not isinstance(self.stream, socket.socket):
            with contextlib.suppress(OSError):
                self.stream.shutdown(socket.SHUT_WR)


def _recv_by(sock: Stream, length: int, deadline: float | None) -> bytes:
    data = bytearray(length)
    view, done = memoryview(data), 0
    while done < length:
        _limit(sock, deadline)
        done += _recv_some(sock, view[done:])
    return bytes(data)


def _limit(sock: Stream, deadline: float | None) -> None:
    if deadline is not None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        sock.settimeout(left)


def connect_socket(
    uri: NBDURI, timeout: float | None = None, *, upgraded: bool = False
) -> socket.socket:
    """A blocking socket that is connected to the server which ``uri`` names.

    ``timeout`` is in seconds. An nbds URI must never be spoken to in plain text, so a
    caller that connects to one says with ``upgraded`` that it turns to TLS; URIError otherwise.
    OSError: no connection; the text tells to whom.
    """
    if uri.tls and not upgraded:
        raise URIError(f"{uri}: this operation does not use TLS; give an nbd or nbd+unix URI")
    try:
        if uri.socket:
            return _connect_unix(uri.socket, timeout)
        if uri.vsock:
            return _connect_vsock(int(uri.host), uri.port, timeout)
        return _connect_tcp(uri.host or "localhost", uri.port, timeout)
    except OSError as error:
        raise _cannot_connect(uri, error) from error


def _cannot_connect(uri: NBDURI, error: OSError) -> OSError:
    # Errors of name resolution carry numbers of their own, and some carry none.
    number = errno.ETIMEDOUT if isinstance(error, TimeoutError) else error.errno
    if number is None or number < 0:
        return OSError(errno.EHOSTUNREACH, f"cannot connect to {uri}: {error.strerror or error}")
    return OSError(number, f"cannot connect to {uri}: {os.strerror(number)}")


def _connect_tcp(host: str, port: int, timeout: float | None) -> socket.socket:
    sock = socket.create_connection((host, port), timeout)
    sock.settimeout(None)
    tune(sock)
    return sock


def _connect_unix(path: str, timeout: float | None) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    try:
        # A full backlog makes a socket with a Python timeout fail at once; this one waits.
        _send_timeout(sock, timeout or 0)
        sock.connect(path)
        _send_timeout(sock, 0)
    except BlockingIOError as error:
        sock.close()
        raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)) from error
    except BaseException:
        sock.close()
        raise
    return sock


def _send_timeout(sock: socket.socket, seconds: float) -> None:
    value = struct.pack("@ll", int(seconds), int(seconds % 1 * 1_000_000))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)


def _connect_vsock(cid: int, port: int, timeout: float | None) -> socket.socket:
    sock = socket.socket(socket.AF_VSOCK)
    try:
        sock.settimeout(timeout)
        sock.connect((cid, port))
        sock.settimeout(None)
    except BaseException:
        sock.close()
        raise
    return sock


def tune(sock: socket.socket) -> None:
    """What every TCP connection of ours has: no Nagle delay, and dead peers are noticed."""
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

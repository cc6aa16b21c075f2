# SPDX-License-Identifier: Apache-2.0
"""Sockets: connect them, and move exact numbers of bytes through them.

A peer that went away, by a reset as well as by an orderly end, is ConnectionClosed.
"""

import errno
import os
import socket
import struct
import time
from collections.abc import Generator
from typing import Final, TypeAlias, TypeVar

from nbdwire.errors import ConnectionClosed, URIError
from nbdwire.uri import NBDURI

T = TypeVar("T")
Buffer: TypeAlias = bytes | bytearray | memoryview

_IOV_MAX: Final = 1024
_GONE: Final = "the peer closed the connection"


def recv_exact_into(sock: socket.socket, view: memoryview) -> None:
    """Fill ``view`` (bytes) from a blocking socket."""
    done, length = 0, len(view)
    while done < length:
        received = _recv_some(sock, view[done:])
        done += received


def _recv_some(sock: socket.socket, view: memoryview) -> int:
    try:
        received = sock.recv_into(view)
    except ConnectionError as error:
        raise ConnectionClosed(f"{_GONE} ({error.strerror})") from error
    if not received:
        raise ConnectionClosed(_GONE)
    return received


def send_all(sock: socket.socket, *buffers: Buffer) -> None:
    """Send all ``buffers`` (of bytes), in order, without joining them first."""
    try:
        if len(buffers) == 1:
            sock.sendall(buffers[0])
        else:
            _send_many(sock, [memoryview(buffer) for buffer in buffers])
    except ConnectionError as error:
        raise ConnectionClosed(f"{_GONE} ({error.strerror})") from error


def _send_many(sock: socket.socket, views: list[memoryview]) -> None:
    first = 0
    while first < len(views):
        sent = sock.sendmsg(views[first : first + _IOV_MAX])
        while first < len(views) and sent >= len(views[first]):
            sent -= len(views[first])
            first += 1
        if sent:
            views[first] = views[first][sent:]


class Receiver:
    """Receives through one buffer, so that many small messages cost one system call."""

    __slots__ = ("_buffer", "_sock", "_start", "_stop")

    def __init__(self, sock: socket.socket, size: int = 1 << 16) -> None:
        self._sock = sock
        self._buffer = memoryview(bytearray(size))
        self._start = self._stop = 0

    def take(self, length: int) -> memoryview:
        """The next ``length`` bytes (no more than the buffer holds); valid until the next call."""
        if self._stop - self._start < length:
            self._fill(length)
        start = self._start
        self._start = start + length
        return self._buffer[start : start + length]

    def _fill(self, length: int) -> None:
        left = self._stop - self._start
        self._buffer[:left] = bytes(self._buffer[self._start : self._stop])
        self._start, self._stop = 0, left
        while self._stop < length:
            self._stop += _recv_some(self._sock, self._buffer[self._stop :])

    def into(self, view: memoryview) -> None:
        """Fill ``view``: what has arrived already is copied, the rest goes there directly."""
        ready = min(len(view), self._stop - self._start)
        view[:ready] = self._buffer[self._start : self._start + ready]
        self._start += ready
        if ready < len(view):
            recv_exact_into(self._sock, view[ready:])


def run_handshake(
    sock: socket.socket, handshake: Generator[int | bytes, bytes, T], deadline: float | None
) -> T:
    """Run a handshake of `nbdwire.negotiate` on a socket, and return its result.

    ``deadline`` (`time.monotonic`; None: never) is for the whole of it, however slowly the peer
    dribbles; ConnectionClosed when it has passed. Afterwards the socket has no time limit.
    """
    try:
        return _run(sock, handshake, deadline)
    except TimeoutError:
        raise ConnectionClosed("the peer did not complete the handshake in time") from None
    finally:
        handshake.close()
        if sock.fileno() >= 0:
            sock.settimeout(None)


def _run(
    sock: socket.socket, handshake: Generator[int | bytes, bytes, T], deadline: float | None
) -> T:
    answer = b""
    try:
        wanted = next(handshake)
        while True:
            if isinstance(wanted, int):
                answer = _recv_by(sock, wanted, deadline)
            else:
                _limit(sock, deadline)
                send_all(sock, wanted)
                answer = b""
            wanted = handshake.send(answer)
    except StopIteration as stop:
        result: T = stop.value
        return result


def _recv_by(sock: socket.socket, length: int, deadline: float | None) -> bytes:
    data = bytearray(length)
    view, done = memoryview(data), 0
    while done < length:
        _limit(sock, deadline)
        done += _recv_some(sock, view[done:])
    return bytes(data)


def _limit(sock: socket.socket, deadline: float | None) -> None:
    if deadline is not None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        sock.settimeout(left)


def connect_socket(uri: NBDURI, timeout: float | None = None) -> socket.socket:
    """A blocking socket that is connected to the server which ``uri`` names.

    ``timeout`` is in seconds. URIError: this needs something that we do not do yet. OSError: no
    connection; the text tells to whom.
    """
    if uri.tls:
        raise URIError(f"{uri}: TLS is not supported yet; use an nbd:// or nbd+unix:// URI")
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

"""Both ends of a TLS connection in one process, on a socket pair."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from nbdwire.tls import ClientTLS, ServerTLS, TLSStream

T = TypeVar("T")
SECONDS = 20.0


def soon() -> float:
    """A deadline that no test should reach."""
    return time.monotonic() + SECONDS


def outcome(function: Callable[[], T]) -> T | Exception:
    """What it returns, or what it raises."""
    try:
        return function()
    except Exception as problem:
        return problem


@contextmanager
def sockets(family: int = socket.AF_UNIX) -> Iterator[tuple[socket.socket, socket.socket]]:
    """(ours, theirs)"""
    ours, theirs = socket.socketpair(family)
    with ours, theirs:
        ours.settimeout(SECONDS)
        theirs.settimeout(SECONDS)
        yield ours, theirs


def shake(
    server: ServerTLS, client: ClientTLS, ends: tuple[socket.socket, socket.socket]
) -> tuple[TLSStream | Exception, TLSStream | Exception]:
    """(the server's end, the client's end), or why it has none. An end that fails hangs up."""

    def one(side: ServerTLS | ClientTLS, sock: socket.socket) -> TLSStream | Exception:
        found = outcome(lambda: side.upgrade(sock, soon()))
        if isinstance(found, Exception):
            sock.shutdown(socket.SHUT_RDWR)
        return found

    with ThreadPoolExecutor(1) as pool:
        theirs = pool.submit(one, client, ends[1])
        mine = one(server, ends[0])
        return mine, theirs.result(SECONDS)


@contextmanager
def streams(server: ServerTLS, client: ClientTLS) -> Iterator[tuple[TLSStream, TLSStream]]:
    """(the server's end, the client's end)"""
    with sockets() as ends:
        mine, theirs = shake(server, client, ends)
        assert isinstance(mine, TLSStream), mine
        assert isinstance(theirs, TLSStream), theirs
        mine.settimeout(SECONDS)
        theirs.settimeout(SECONDS)
        try:
            yield mine, theirs
        finally:
            mine.close()
            theirs.close()


class Tap:
    """Stands between two sockets and keeps what passes; in the way of nothing."""

    def __init__(self) -> None:
        self.ours, inner = socket.socketpair()
        self.theirs, outer = socket.socketpair()
        self.from_ours, self.from_theirs = bytearray(), bytearray()
        self._threads = [
            threading.Thread(target=self._copy, args=(inner, outer, self.from_ours)),
            threading.Thread(target=self._copy, args=(outer, inner, self.from_theirs)),
        ]
        self._inside = (inner, outer)
        for thread in self._threads:
            thread.start()

    def _copy(self, source: socket.socket, sink: socket.socket, kept: bytearray) -> None:
        try:
            while data := source.recv(1 << 16):
                kept += data
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:  # one of the ends is gone
            pass

    def __enter__(self) -> "Tap":
        return self

    def __exit__(self, *_: object) -> None:
        self.ours.close()
        self.theirs.close()
        for thread in self._threads:
            thread.join(SECONDS)
        for sock in self._inside:
            sock.close()


def records(data: bytes) -> list[tuple[int, int]]:
    """(content type, length) of each TLS record."""
    found, position = [], 0
    while position + 5 <= len(data):
        length = int.from_bytes(data[position + 3 : position + 5], "big")
        found.append((data[position], length))
        position += 5 + length
    assert position == len(data), "a record is cut off"
    return found

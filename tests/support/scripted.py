"""A server of a few lines, behind a socketpair: it says what a test wants it to say."""

import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from nbdwire import codec
from nbdwire import constants as c
from nbdwire.client import Client
from nbdwire.errors import ConnectionClosed
from nbdwire.negotiate_client import ClientSession
from nbdwire.transport import recv_exact_into

ALL = (
    c.TFLAG_HAS_FLAGS
    | c.TFLAG_SEND_FLUSH
    | c.TFLAG_SEND_FUA
    | c.TFLAG_SEND_TRIM
    | c.TFLAG_SEND_WRITE_ZEROES
    | c.TFLAG_SEND_FAST_ZERO
    | c.TFLAG_SEND_CACHE
)
SIZE = 1 << 20
BASE, DIRTY = "base:allocation", "qemu:dirty-bitmap:a"
CONTEXTS = ((1, BASE), (2, DIRTY))
PLAIN = ClientSession("disk", SIZE, ALL)
STRUCTURED = ClientSession("disk", SIZE, ALL, structured=True, contexts=CONTEXTS)
EXTENDED = ClientSession("disk", SIZE, ALL, structured=True, contexts=CONTEXTS, extended=True)

Request = tuple[int, int, int, int, int]  # flags, type, cookie, offset, length
Answer = Callable[[Request, bytes], bytes]


class Peer:
    """A server that hands each request to ``answer`` and sends back what that returns."""

    def __init__(self, sock: socket.socket, answer: Answer, extended: bool = False) -> None:
        self._sock = sock
        self._answer = answer
        self._header = codec.EXTENDED_REQUEST if extended else codec.REQUEST
        self._extended = extended
        self.requests: list[Request] = []
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        header = bytearray(self._header.size)
        with self._sock:
            try:
                while True:
                    recv_exact_into(self._sock, memoryview(header))
                    request: Request = self._header.unpack(header)[1:]
                    self.requests.append(request)
                    if request[1] == c.CMD_DISC:
                        return
                    payload = bytearray(request[4] if self._carries(request) else 0)
                    recv_exact_into(self._sock, memoryview(payload))
                    self._sock.sendall(self._answer(request, bytes(payload)))
            except (ConnectionClosed, OSError):
                return

    def _carries(self, request: Request) -> bool:
        if self._extended:
            return bool(request[0] & c.CMD_FLAG_PAYLOAD_LEN)
        return request[1] == c.CMD_WRITE

    def join(self) -> None:
        self._thread.join(10)
        assert not self._thread.is_alive()


@contextmanager
def serving(answer: Answer, session: ClientSession = PLAIN) -> Iterator[tuple[Client, Peer]]:
    """A client in transmission, and its server."""
    ours, theirs = socket.socketpair()
    peer = Peer(theirs, answer, session.extended)
    with Client(ours, session) as client:
        yield client, peer
    peer.join()


@contextmanager
def answering(
    make: Callable[[int], Sequence[bytes]], session: ClientSession = STRUCTURED
) -> Iterator[Client]:
    """A client whose every request is answered by the chunks that ``make(cookie)`` returns."""
    with serving(lambda request, _: b"".join(make(request[2])), session) as (client, _):
        yield client


def ok(request: Request, _payload: bytes = b"") -> bytes:
    """Success, in a simple reply."""
    data = bytes(request[4]) if request[1] == c.CMD_READ else b""
    return codec.simple_reply(request[2]) + data


def kinds(peer: Peer) -> list[tuple[int, int, int, int]]:
    """(type, flags, offset, length) of what came."""
    return [(kind, flags, offset, length) for flags, kind, _, offset, length in peer.requests]

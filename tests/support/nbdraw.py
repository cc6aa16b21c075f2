"""A client that sends what it is told to, legal or not, and takes replies apart byte by byte.

Only the handshake is the package's own; the transmission is written here a second time, so that a
mistake of `nbdwire.codec` cannot hide itself.
"""

import errno
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from nbdwire.negotiate_client import ClientSession, client_handshake
from nbdwire.transport import run_handshake
from nbdwire.uri import NBDURI

READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES, STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD_LEN = (1 << bit for bit in range(6))
NAMES = ("read", "write", "disc", "flush", "trim", "cache", "zeroes", "status")

NONE, DATA, HOLE, BLOCK_STATUS, BLOCK_STATUS_EXT = 0, 1, 2, 5, 6
ERROR = 0x8001
ERROR_OFFSET = 0x8002

MAGIC = 0x25609513
EXTENDED_MAGIC = 0x21E41C71
_REQUEST = struct.Struct(">IHHQQI")
_EXTENDED_REQUEST = struct.Struct(">IHHQQQ")
_SIMPLE, _CHUNK, _EXTENDED_CHUNK = 0x67446698, 0x668E33EF, 0x6E8A278C
SECONDS = 20.0


def request(
    kind: int,
    offset: int = 0,
    length: int = 0,
    *,
    flags: int = 0,
    cookie: int = 0,
    payload: bytes = b"",
    magic: int = MAGIC,
) -> bytes:
    return _REQUEST.pack(magic, flags, kind, cookie, offset, length) + payload


def extended_request(
    kind: int,
    offset: int = 0,
    length: int = 0,
    *,
    flags: int = 0,
    cookie: int = 0,
    payload: bytes = b"",
    magic: int = EXTENDED_MAGIC,
) -> bytes:
    """PAYLOAD_LEN is as ``flags`` say, whatever the command."""
    return _EXTENDED_REQUEST.pack(magic, flags, kind, cookie, offset, length) + payload


@dataclass(frozen=True)
class Chunk:
    flags: int
    kind: int
    payload: bytes

    @property
    def done(self) -> bool:
        return bool(self.flags & 1)

    @property
    def offset(self) -> int:
        return int.from_bytes(self.payload[:8], "big")

    @property
    def span(self) -> tuple[int, int]:
        """(offset, length) that a content chunk tells about."""
        if self.kind == HOLE:
            return self.offset, int.from_bytes(self.payload[8:], "big")
        return self.offset, len(self.payload) - 8

    @property
    def data(self) -> bytes:
        return bytes(self.span[1]) if self.kind == HOLE else self.payload[8:]


@dataclass
class Reply:
    """``error`` 0 is success. A simple reply has ``data``, a structured one has ``chunks``."""

    cookie: int
    error: int = 0
    message: str = ""
    data: bytes = b""
    chunks: list[Chunk] = field(default_factory=list)

    @property
    def kinds(self) -> list[int]:
        return [chunk.kind for chunk in self.chunks]

    @property
    def content(self) -> list[Chunk]:
        return [chunk for chunk in self.chunks if chunk.kind in (DATA, HOLE)]

    def assemble(self, offset: int, length: int) -> bytes:
        """What was read; every byte must have come once, whatever the chunks."""
        if not self.chunks:
            return self.data
        parts = sorted(self.content, key=lambda chunk: chunk.offset)
        position = offset
        for chunk in parts:
            assert chunk.span[0] == position, "a gap or an overlap between the chunks"
            assert chunk.span[1] > 0, "an empty chunk"
            position += chunk.span[1]
        assert position == offset + length
        return b"".join(chunk.data for chunk in parts)

    def statuses(self) -> dict[int, list[tuple[int, int]]]:
        """Context id -> [(length, flags)]."""
        found: dict[int, list[tuple[int, int]]] = {}
        for chunk in self.chunks:
            assert chunk.kind in (BLOCK_STATUS, BLOCK_STATUS_EXT)
            number = int.from_bytes(chunk.payload[:4], "big")
            assert number not in found, "two chunks for one context"
            shape, start = (">II", 4) if chunk.kind == BLOCK_STATUS else (">QQ", 8)
            found[number] = list(struct.iter_unpack(shape, chunk.payload[start:]))
        return found


class Raw:
    """A connection in transmission."""

    def __init__(self, sock: socket.socket, session: ClientSession) -> None:
        self.sock = sock
        self.session = session
        self._cookie = 0
        self._reads: dict[int, int] = {}
        self._offsets: dict[int, int] = {}

    def close(self) -> None:
        self.sock.close()

    def reset(self) -> None:
        """As a crash of the client's host would look: no orderly end."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def make(
        self, kind: int, offset: int = 0, length: int = 0, flags: int = 0, payload: bytes = b""
    ) -> bytes:
        """A request with a cookie of its own, which `reply` will know."""
        self._cookie += 1
        cookie = self._cookie << 32 | 0xFEEDFACE
        if kind == READ:
            self._reads[cookie] = length
        self._offsets[cookie] = offset
        return self.form(kind, offset, length, flags=flags, cookie=cookie, payload=payload)

    def form(
        self,
        kind: int,
        offset: int = 0,
        length: int = 0,
        *,
        flags: int = 0,
        cookie: int = 0,
        payload: bytes = b"",
    ) -> bytes:
        """A request with the headers that were negotiated; `reply` will not know it."""
        if not self.session.extended:
            return request(kind, offset, length, flags=flags, cookie=cookie, payload=payload)
        flags ^= PAYLOAD_LEN if kind == WRITE else 0
        return extended_request(kind, offset, length, flags=flags, cookie=cookie, payload=payload)

    def ask(
        self, kind: int, offset: int = 0, length: int = 0, flags: int = 0, payload: bytes = b""
    ) -> Reply:
        """Send one request, return its reply."""
        message = self.make(kind, offset, length, flags, payload)
        self.send(message)
        reply = self.reply()
        assert message[8:16] == reply.cookie.to_bytes(8, "big"), "the reply to another request"
        return reply

    def read(self, offset: int, length: int, flags: int = 0) -> bytes:
        reply = self.ask(READ, offset, length, flags)
        assert reply.error == 0, reply
        return reply.assemble(offset, length)

    def write(self, offset: int, data: bytes, flags: int = 0) -> int:
        """The error of the reply."""
        return self.ask(WRITE, offset, len(data), flags, data).error

    def in_step(self) -> None:
        """Nothing but the answer to this comes: requests and replies match."""
        assert self.ask(READ, 0, 1).error == 0

    def take(self, length: int) -> bytes:
        """Exactly so many bytes; EOFError if the server hangs up before."""
        data = bytearray()
        while len(data) < length:
            part = self.sock.recv(min(length - len(data), 1 << 20))
            if not part:
                raise EOFError(f"{len(data)} of {length} bytes")
            data += part
        return bytes(data)

    def hung_up(self) -> bool:
        """Whether the server ends the connection; it may send what it still has to say."""
        try:
            while self.sock.recv(1 << 20):
                pass
        except OSError as error:
            return error.errno in (errno.ECONNRESET, errno.EPIPE)
        return True

    def is_dropped_for(self, data: bytes) -> bool:
        """Whether the server ends the connection because of ``data``, perhaps half way."""
        try:
            self.sock.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            return True
        return self.hung_up()

    def reply(self) -> Reply:
        """The next reply. Chunks of several replies must not be mixed; our server does not."""
        (magic,) = struct.unpack(">I", self.take(4))
        if magic == _SIMPLE:
            assert not self.session.extended, "a simple reply, with extended headers"
            return self._simple()
        expected = _EXTENDED_CHUNK if self.session.extended else _CHUNK
        assert magic == expected, f"{magic:#x} is no reply"
        assert self.session.structured, "a chunk, and structured replies were not negotiated"
        return self._chunks(expected)

    def _simple(self) -> Reply:
        error, cookie = struct.unpack(">IQ", self.take(12))
        length = self._reads.pop(cookie, 0)
        assert not (length and self.session.structured), "a simple reply to a read"
        return Reply(cookie, error, data=b"" if error else self.take(length))

    def _head(self) -> tuple[int, int, int, int]:
        """(flags, type, cookie, length) of a chunk whose magic has been read."""
        if not self.session.extended:
            return struct.unpack(">HHQI", self.take(16))
        flags, kind, cookie, offset, length = struct.unpack(">HHQQQ", self.take(28))
        assert offset == self._offsets.get(cookie, offset), "not the offset of the request"
        return flags, kind, cookie, length

    def _chunks(self, expected: int) -> Reply:
        flags, kind, cookie, length = self._head()
        reply = Reply(cookie)
        while True:
            chunk = Chunk(flags, kind, self.take(length))
            _check_chunk(chunk, self.session.extended)
            reply.chunks.append(chunk)
            if chunk.kind in (ERROR, ERROR_OFFSET):
                reply.error, size = struct.unpack(">IH", chunk.payload[:6])
                assert len(chunk.payload) == 6 + size + (8 if chunk.kind == ERROR_OFFSET else 0)
                reply.message = chunk.payload[6 : 6 + size].decode()
            if chunk.done:
                self._reads.pop(cookie, 0)
                return reply
            (magic,) = struct.unpack(">I", self.take(4))
            flags, kind, again, length = self._head()
            assert (magic, again) == (expected, cookie)


def _check_chunk(chunk: Chunk, extended: bool = False) -> None:
    """What section "Structured reply chunk types" demands of each."""
    assert chunk.flags in (0, 1)
    if chunk.kind == NONE:
        assert chunk.payload == b""
        assert chunk.done
    elif chunk.kind == DATA:
        assert len(chunk.payload) >= 9
    elif chunk.kind == HOLE:
        assert len(chunk.payload) == 12
        assert chunk.span[1] > 0
    elif chunk.kind == BLOCK_STATUS_EXT:
        assert extended
        assert len(chunk.payload) == 8 + 16 * int.from_bytes(chunk.payload[4:8], "big")
        assert len(chunk.payload) >= 24
    elif chunk.kind == BLOCK_STATUS:
        assert not extended, "nbd.md §7: BLOCK_STATUS_EXT, always, with extended headers"
        assert len(chunk.payload) >= 12
        assert len(chunk.payload) % 8 == 4
    else:
        assert chunk.kind in (ERROR, ERROR_OFFSET)
        assert len(chunk.payload) >= (6 if chunk.kind == ERROR else 14)


def open_socket(where: NBDURI) -> socket.socket:
    if where.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(SECONDS)
        sock.connect(where.socket)
    else:
        sock = socket.create_connection((where.host, where.port), SECONDS)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


FORMS: dict[str, dict[str, bool]] = {
    "simple": {"structured": False},
    "structured": {},
    "extended": {"extended": True},
}
"""The forms of requests and replies, as arguments of `connected`."""


@contextmanager
def connected(
    where: NBDURI,
    export: str = "disk",
    *,
    structured: bool = True,
    extended: bool = False,
    contexts: Sequence[str] = (),
) -> Iterator[Raw]:
    sock = open_socket(where)
    try:
        handshake = client_handshake(export, contexts, structured, extended=extended)
        session = run_handshake(sock, handshake, None)
        assert session.extended == extended
        sock.settimeout(SECONDS)
        yield Raw(sock, session)
    finally:
        sock.close()

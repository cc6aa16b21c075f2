"""A client that haggles by hand: raw option bytes on a socket, and replies taken apart.

The numbers are written here a second time, so that a mistake of `nbdwire` cannot hide itself.
"""

import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from nbdwire.uri import NBDURI
from tests.support.nbdraw import open_socket

EXPORT_NAME, ABORT, LIST, PEEK, STARTTLS, INFO, GO, STRUCTURED, LIST_META, SET_META, EXTENDED = (
    range(1, 12)
)
ACK, SERVER, REP_INFO, META = 1, 2, 3, 4
UNSUP, POLICY, INVALID, PLATFORM, TLS_REQD, UNKNOWN, SHUTDOWN, SIZE_REQD, TOO_BIG, EXT_REQD = (
    1 << 31 | number for number in range(1, 11)
)
NAME, DESCRIPTION, BLOCK_SIZE = 1, 2, 3
FIXED, NO_ZEROES = 1, 2
BASE = "base:allocation"
_REPLY_MAGIC = 0x0003E889045565A9

Reply = tuple[int, int, bytes]
"""(option, type, data)"""


def option(number: int, data: bytes = b"") -> bytes:
    return b"IHAVEOPT" + struct.pack(">II", number, len(data)) + data


def info(number: int, name: str | bytes = "disk", *wanted: int) -> bytes:
    """INFO or GO."""
    raw = name.encode() if isinstance(name, str) else name
    numbers = struct.pack(f">H{len(wanted)}H", len(wanted), *wanted)
    return option(number, struct.pack(">I", len(raw)) + raw + numbers)


def meta(number: int, name: str, *queries: str | bytes) -> bytes:
    """LIST_META or SET_META."""
    data = struct.pack(">I", len(name.encode())) + name.encode() + struct.pack(">I", len(queries))
    for query in queries:
        raw = query.encode() if isinstance(query, str) else query
        data += struct.pack(">I", len(raw)) + raw
    return option(number, data)


def is_error(reply: int) -> bool:
    return bool(reply >> 31)


class Haggler:
    """The socket of a client, behind the greeting."""

    def __init__(self, sock: socket.socket, flags: int | None = FIXED | NO_ZEROES) -> None:
        self.sock = sock
        self.greeting = self.take(18)
        if flags is not None:
            self.send(struct.pack(">I", flags))

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def take(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            part = self.sock.recv(length - len(data))
            if not part:
                raise EOFError(f"{len(data)} of {length} bytes")
            data += part
        return data

    def reply(self) -> Reply:
        magic, number, kind, length = struct.unpack(">QIII", self.take(20))
        assert magic == _REPLY_MAGIC, "the replies are out of step"
        return number, kind, self.take(length)

    def ask(self, message: bytes) -> list[Reply]:
        """Send one option; its replies up to the last, which is ACK or an error."""
        self.send(message)
        return self.replies(struct.unpack(">I", message[8:12])[0])

    def replies(self, number: int) -> list[Reply]:
        found = [self.reply()]
        while found[-1][1] != ACK and not is_error(found[-1][1]):
            found.append(self.reply())
        assert {echo for echo, _, _ in found} == {number}, "a reply echoes its option"
        return found

    def outcome(self, message: bytes) -> int:
        """The type of the last reply to an option."""
        return self.ask(message)[-1][1]

    def in_step(self) -> None:
        """Whatever was before, the next option gets its own answer."""
        assert self.outcome(option(LIST)) == ACK

    def closed(self) -> bytes | None:
        """What the server still says before it hangs up; None if it does not hang up."""
        said = b""
        try:
            while part := self.sock.recv(65536):
                said += part
        except TimeoutError:
            return None
        except (ConnectionResetError, BrokenPipeError):
            pass
        return said


@contextmanager
def haggling(where: NBDURI, flags: int | None = FIXED | NO_ZEROES) -> Iterator[Haggler]:
    sock = open_socket(where)
    try:
        yield Haggler(sock, flags)
    finally:
        sock.close()

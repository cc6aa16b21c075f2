# SPDX-License-Identifier: Apache-2.0
"""What attacks are made of, and the proof that the server has survived them."""

import os
import socket
import struct
import threading
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nbdwire import constants as c
from nbdwire.server import Server
from nbdwire.uri import NBDURI
from tests.support.haggling import FIXED, NO_ZEROES, Haggler
from tests.support.nbdraw import connected, open_socket
from tests.support.serving import serving
from tests.support.threads import wait_until

CLIENT_FLAGS = b"\0\0\0\3"
GREETING = b"NBDMAGICIHAVEOPT\0\3"
INVALID, UNKNOWN, TOO_BIG = c.REP_ERR_INVALID, c.REP_ERR_UNKNOWN, c.REP_ERR_TOO_BIG
_REPLY_MAGIC = b"\x00\x03\xe8\x89\x04\x55\x65\xa9"


def option(number: int, data: bytes = b"", length: int | None = None) -> bytes:
    """An option; ``length`` may lie about its data."""
    length = len(data) if length is None else length
    return b"IHAVEOPT" + struct.pack(">II", number, length) + data


def sized(name: bytes, length: int | None = None) -> bytes:
    """A string behind its length, which may be a lie."""
    return struct.pack(">I", len(name) if length is None else length) + name


def about(name: bytes, length: int | None = None) -> bytes:
    """The data of INFO and GO: the name, and no information requests."""
    return sized(name, length) + b"\0\0"


def answer(number: int, kind: int, data: bytes = b"") -> bytes:
    """What a server says to an option."""
    return _REPLY_MAGIC + struct.pack(">III", number, kind, len(data)) + data


def vanish(sock: socket.socket) -> None:
    """Close it with a RST: no orderly end."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


class Attacker(Haggler):
    """Haggles as nobody should."""

    def last(self, number: int, data: bytes = b"") -> int:
        """What an option ends with."""
        return self.outcome(option(number, data))

    def still_in_step(self) -> None:
        """The server knows where one option ends and the next one begins."""
        assert self.last(99, b"what?") == c.REP_ERR_UNSUP
        assert self.last(c.OPT_INFO, about(b"disk")) == c.REP_ACK

    def refused_for(self, data: bytes) -> bytes:
        """The server hangs up because of ``data``, and what it said before."""
        said = b""
        try:
            self.sock.sendall(data)
            while part := self.sock.recv(65536):
                said += part
        except (BrokenPipeError, ConnectionResetError):
            pass
        return said


@contextmanager
def attacking(where: NBDURI, flags: int = FIXED | NO_ZEROES) -> Iterator[Attacker]:
    with open_socket(where) as sock:
        yield Attacker(sock, flags)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@contextmanager
def unharmed(directory: Path, export: Any, **options: Any) -> Iterator[tuple[Server, NBDURI]]:
    """A server to be attacked in the block. Afterwards somebody who was connected all the time and
    somebody new are served, and no thread, descriptor or byte of the budget is held for the others.
    """
    threads, files = threading.active_count(), descriptors()
    with serving(directory, export, **options) as (server, where):
        with connected(where) as bystander:
            bystander.in_step()
            yield server, where
            bystander.in_step()
        with connected(where) as new:
            new.in_step()
        wait_until(lambda: server.clients() == 0)
        assert server._house.budget.held == 0
    wait_until(lambda: (threading.active_count(), descriptors()) == (threads, files))


@contextmanager
def memory_below(limit: int) -> Iterator[None]:
    """What Python allocates in the block, at its highest, is less than ``limit`` bytes."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < limit, f"{peak} bytes at the peak"

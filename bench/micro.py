# SPDX-License-Identifier: Apache-2.0
"""What one request costs in the worker's loop: ``python bench/micro.py [--write] [--form FORM]``.

A worker serves a disk in memory over a socket pair. The client is another process, which sends
ready-made batches and throws the replies away, so the server's processor time is what counts: it
is printed in nanoseconds for each request, as the smallest and the median of all rounds.
"""

import argparse
import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fleece.block.null import NullNode
from nbdwire import constants as c
from nbdwire.codec import EXTENDED_REQUEST, REQUEST
from nbdwire.requests import Requests
from nbdwire.served import PlainSession
from nbdwire.worker import Worker

BLOCK = 4096
SPAN = 64 << 20
FORMS = {"simple": (False, False), "structured": (True, False), "extended": (True, True)}
_FLAGS = c.TFLAG_HAS_FLAGS | c.TFLAG_SEND_FLUSH | c.TFLAG_SEND_FUA


class Flat(NullNode):
    """The cheapest disk there is: one piece of memory."""

    def __init__(self) -> None:
        super().__init__(SPAN)
        self._bytes = memoryview(bytearray(SPAN))

    def pread_into(self, buf: memoryview, offset: int) -> None:
        """A copy."""
        buf[:] = self._bytes[offset : offset + len(buf)]

    def pwrite(self, buf: memoryview, offset: int, fua: bool = False) -> None:
        """A copy."""
        self._bytes[offset : offset + len(buf)] = buf


def batch(kind: int, depth: int, extended: bool) -> bytes:
    """The bytes of ``depth`` requests for blocks that lie far from each other."""
    magic = c.EXTENDED_REQUEST_MAGIC if extended else c.REQUEST_MAGIC
    head = EXTENDED_REQUEST if extended else REQUEST
    writes = kind == c.CMD_WRITE
    flags = c.CMD_FLAG_PAYLOAD_LEN if extended and writes else 0
    payload = bytes(BLOCK) if writes else b""
    offsets = [(n * 7919 * BLOCK) % SPAN for n in range(depth)]
    return b"".join(head.pack(magic, flags, kind, n, at, BLOCK) + payload
                    for n, at in enumerate(offsets))  # fmt: skip


def reply_length(write: bool, structured: bool, extended: bool) -> int:
    """Bytes of one reply."""
    if write:
        return 32 if extended else 16
    return BLOCK + (40 if extended else 28 if structured else 16)


def client(sock: socket.socket, data: bytes, expected: int, batches: int) -> None:
    """Send ``data`` again and again, and receive ``expected`` bytes each time."""
    room = memoryview(bytearray(expected))
    for _ in range(batches):
        sock.sendall(data)
        if sock.recv_into(room, expected, socket.MSG_WAITALL) != expected:
            return


def one_round(write: bool, form: str, depth: int, batches: int) -> float:
    """Nanoseconds of processor time for each request."""
    structured, extended = FORMS[form]
    kind = c.CMD_WRITE if write else c.CMD_READ
    data = batch(kind, depth, extended)
    expected = depth * reply_length(write, structured, extended)
    ours, theirs = socket.socketpair()
    for sock in (ours, theirs):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 << 20)
    child = os.fork()
    if not child:
        ours.close()
        client(theirs, data, expected, batches)
        os._exit(0)
    theirs.close()
    node = Flat()
    requests = Requests(
        size=SPAN, flags=_FLAGS, structured=structured, contexts=(), functions={}, extended=extended
    )
    worker = Worker(ours, PlainSession(node), requests, threading.Lock())
    began = time.thread_time_ns()
    worker.run()
    spent = time.thread_time_ns() - began
    os.waitpid(child, 0)
    ours.close()
    assert worker.reads + worker.writes == depth * batches, "requests were lost"
    return spent / (depth * batches)


def main(argv: Sequence[str]) -> int:
    """Measure and print; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="writes instead of reads")
    parser.add_argument("--form", choices=FORMS, default="simple")
    parser.add_argument("--depth", type=int, default=32, help="requests in a batch")
    parser.add_argument("--batches", type=int, default=8000, help="batches in a round")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(argv)
    times = [
        one_round(options.write, options.form, options.depth, options.batches)
        for _ in range(options.rounds)
    ]
    kind = "write" if options.write else "read"
    print(
        f"{kind} {BLOCK} {options.form} depth {options.depth}: "
        f"{min(times):.0f} ns at best, {median(times):.0f} ns in the median"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

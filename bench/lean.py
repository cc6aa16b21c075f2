# SPDX-License-Identifier: Apache-2.0
"""A client that costs next to nothing, for what fio cannot ask for: a form of replies.

fio's client always asks for structured replies. This one asks for what it is told to; it learns
from one request how long a reply is, then sends ready-made requests in two halves of the wanted
depth by turns and receives each half's replies as one piece.
"""

import math
import random
import time
from dataclasses import dataclass

from bench.fio import SEED, Result
from bench.tools import BenchFailed
from nbdwire import constants as c
from nbdwire.codec import EXTENDED_REQUEST, REQUEST
from nbdwire.negotiate_client import ClientSession, client_handshake, client_list
from nbdwire.opening import open_stream
from nbdwire.transport import Stream, recv_exact_into
from nbdwire.uri import parse

# name: (structured, extended)
FORMS = {"simple": (False, False), "structured": (True, False), "extended": (True, True)}
_HALVES = 64  # ready-made halves of a batch; more than enough to reach all over the disk
_TIMEOUT = 20.0
_PARSED = 64 << 10  # reads from this size on may come in several chunks


@dataclass(frozen=True)
class Load:
    """What is asked for; ``block`` in bytes, all blocks within the first ``size`` bytes."""

    form: str
    write: bool
    block: int
    depth: int
    size: int
    seconds: float


def perform(load: Load, uri: str) -> Result:
    """Run ``load`` against ``uri``; `BenchFailed` if a reply is not a success."""
    structured, extended = FORMS[load.form]
    handshake = client_handshake("", structured=structured, extended=extended)
    stream, session = open_stream(parse(uri), handshake, _TIMEOUT)
    try:
        return _Run(stream, session, load).result()
    finally:
        stream.close()


def connections(uri: str, count: int) -> Result:
    """``count`` clients, one after another: connect, list the exports, leave. An operation each."""
    parsed = parse(uri)
    began = time.perf_counter()
    for _ in range(count):
        stream, _ = open_stream(parsed, client_list(), _TIMEOUT)
        stream.close()
    spent = time.perf_counter() - began
    return Result(count / spent, count / spent, count, math.nan)


class _Run:
    """A connection in transmission, on which one load is run."""

    def __init__(self, stream: Stream, session: ClientSession, load: Load) -> None:
        self._stream = stream
        self._load = load
        self._extended = session.extended
        self._kind = c.CMD_WRITE if load.write else c.CMD_READ
        self._reply = self._probe(session)
        self._half = max(1, load.depth // 2)
        self._room = memoryview(bytearray(self._half * self._reply))

    def _request(self, offset: int) -> bytes:
        length, write = self._load.block, self._load.write
        payload = bytes(length) if write else b""
        if self._extended:
            flags = c.CMD_FLAG_PAYLOAD_LEN if write else 0
            magic = c.EXTENDED_REQUEST_MAGIC
            return EXTENDED_REQUEST.pack(magic, flags, self._kind, 1, offset, length) + payload
        return REQUEST.pack(c.REQUEST_MAGIC, 0, self._kind, 1, offset, length) + payload

    def _probe(self, session: ClientSession) -> int:
        """Bytes of each reply. They must not depend on the place: the disk is all data."""
        self._stream.sendall(self._request(0))
        head = memoryview(bytearray(32))
        recv_exact_into(self._stream, head[:16])
        magic = int.from_bytes(head[:4])
        data = 0 if self._load.write else self._load.block
        if magic == c.SIMPLE_REPLY_MAGIC:
            length, failed = 16 + data, any(head[4:8])
        else:
            whole = 32 if magic == c.EXTENDED_REPLY_MAGIC else 20
            recv_exact_into(self._stream, head[16:whole])
            size = int.from_bytes(head[24:32] if whole == 32 else head[16:20])
            length = whole + size
            failed = int.from_bytes(head[4:6]) != c.REPLY_FLAG_DONE or bool(head[6] & 0x80)
        if failed:
            raise BenchFailed("a request failed, or was answered in several chunks")
        self._start = bytes(head[:4])
        rest = length - (16 if magic == c.SIMPLE_REPLY_MAGIC else whole)
        recv_exact_into(self._stream, memoryview(bytearray(rest)))
        return length

    def _halves(self) -> list[bytes]:
        """Requests at random places, so many at a time as half of the depth."""
        chance, blocks = random.Random(SEED), self._load.size // self._load.block
        count = max(2, min(_HALVES, (32 << 20) // (self._half * self._load.block)))
        return [
            b"".join(
                self._request(chance.randrange(blocks) * self._load.block)
                for _ in range(self._half)
            )
            for _ in range(count)
        ]

    def result(self) -> Result:
        """Ask for so long as the load says."""
        halves, send = self._halves(), self._stream.sendall
        in_flight = 2 if self._load.depth > 1 else 1
        began = time.perf_counter()
        until, done, sent = began + self._load.seconds, 0, 0
        while sent < in_flight:
            send(halves[sent % len(halves)])
            sent += 1
        while done < sent:
            self._receive()
            done += 1
            if time.perf_counter() < until:
                send(halves[sent % len(halves)])
                sent += 1
        spent = time.perf_counter() - began
        operations = done * self._half
        moved = operations * self._load.block
        return Result(moved / spent, operations / spent, moved, math.nan)

    def _receive(self) -> None:
        """The replies to half of the requests."""
        if self._load.block >= _PARSED and not self._load.write:
            for _ in range(self._half):
                self._receive_one()
            return
        recv_exact_into(self._stream, self._room)
        last = len(self._room) - self._reply
        for at in {0, last}:
            if self._room[at : at + 4] != self._start:
                raise BenchFailed("replies are not of equal length, so their bytes went astray")

    def _receive_one(self) -> None:
        """A large read, which may come in several chunks; what they carry is thrown away."""
        head, done = self._room[:32], False
        while not done:
            recv_exact_into(self._stream, head[:16])
            magic = int.from_bytes(head[:4])
            if magic == c.SIMPLE_REPLY_MAGIC:
                size, failed, done = self._load.block, any(head[4:8]), True
            else:
                whole = 32 if magic == c.EXTENDED_REPLY_MAGIC else 20
                recv_exact_into(self._stream, head[16:whole])
                size = int.from_bytes(head[24:32] if whole == 32 else head[16:20])
                failed, done = bool(head[6] & 0x80), bool(head[5] & c.REPLY_FLAG_DONE)
            if failed or size > len(self._room):
                raise BenchFailed("a request failed, or its reply makes no sense")
            if size:
                recv_exact_into(self._stream, self._room[:size])

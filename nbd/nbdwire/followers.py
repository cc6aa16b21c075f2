# SPDX-License-Identifier: Apache-2.0
"""The loop that serves one connection whose node may wait long: a network, an object store.

Leader and followers: each of some threads reads one request under the read lock, carries it out
with no lock of the connection held, and replies under the write lock. So requests overlap and are
answered in the order in which they end; there is no queue and no hand-over between threads.
"""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Final, TypeAlias

from nbdwire import constants as c
from nbdwire.errors import ConnectionClosed, ProtocolError
from nbdwire.export import ZERO_RUN, Export, Run, Session, SupportsMap
from nbdwire.limits import Account, Share
from nbdwire.requests import Requests
from nbdwire.transport import Stream, recv_exact_into, send_all

THREADS: Final = 8
BUFFER: Final = 64 << 10
KEEP_SIZE: Final = 1 << 20  # larger buffers are given back, lest idle clients pin them
PART_SIZE: Final = 4 << 20  # a client that has sent or taken so much is going on
HOLE_SIZE: Final = 32 << 10  # shorter holes are sent as data, shorter reads do not look for them
MAX_PIECES: Final = 64  # a read that is more fragmented than this is sent as data

Reply: TypeAlias = list[bytes | memoryview]
"""The parts of a whole reply, in order."""

Piece: TypeAlias = tuple[int, int, bool]
"""(offset, length, whether it is a hole), in bytes."""


class Followers:
    """Serves one connection in transmission with several threads until the client leaves."""

    def __init__(
        self,
        stream: Stream,
        open_session: Callable[[], Session],
        requests: Requests,
        threads: int = THREADS,
    ) -> None:
        self._stream = stream
        self._open_session = open_session
        self._requests = requests
        self._wire = requests.wire
        self._threads = threads
        self._read_lock = threading.Lock()
        self._write_lock = threading.Lock()
        self._count_lock = threading.Lock()
        self._over = False
        self._problem: Exception | None = None
        self.reads = self.writes = self.others = 0
        self.bytes_read = self.bytes_written = 0
        self.slowest = 0.0

    def run(self) -> None:
        """Return when the client has left; raise what ended the connection otherwise."""
        name = threading.current_thread().name
        helpers = [
            threading.Thread(target=self._follow, name=f"{name}/w{index}", daemon=True)
            for index in range(1, self._threads)
        ]
        started = _start(helpers)
        self._follow()
        for helper in started:
            helper.join()
        if self._problem is not None:
            raise self._problem

    def _follow(self) -> None:
        try:
            session = self._open_session()
            try:
                self._serve(session)
            finally:
                session.close()
        except Exception as problem:  # the connection is over; run() tells why
            self._end(problem)

    def _serve(self, session: Session) -> None:
        follower = _Follower(self._wire.request.size, self._requests.account)
        try:
            while self._next(follower):
                began = time.perf_counter()
                self._send(follower, self._carry_out(session, follower))
                self._took(time.perf_counter() - began)
                follower.rest()
        finally:
            follower.end()  # others of this connection may wait for that memory

    def _send(self, follower: "_Follower", reply: Reply) -> None:
        with follower.waiting(), self._write_lock:
            if sum(len(part) for part in reply) <= PART_SIZE:
                send_all(self._stream, *reply)
                return
            for part in reply:
                for start in range(0, len(part), PART_SIZE):
                    follower.goes_on()
                    send_all(self._stream, part[start : start + PART_SIZE])

    def _end(self, problem: Exception) -> None:
        """Wake the other threads: none of them must wait for a request that never comes."""
        with self._count_lock:
            if self._over:
                return
            self._over = True
            self._problem = problem
        if self._requests.account is not None:
            self._requests.account.close()
        with contextlib.suppress(OSError):  # the peer may be gone already
            self._stream.shutdown(socket.SHUT_RDWR)

    def _next(self, follower: "_Follower") -> bool:
        """Read one request, with its payload; False when the client has left."""
        with self._read_lock:
            if self._over:
                return False
            try:
                recv_exact_into(self._stream, follower.head)
            except ConnectionClosed:
                self._over = True
                return False
            self._requests.look()
            self._parse(follower)
            if follower.kind == c.CMD_DISC:
                self._over = True
                return False
            if follower.payload:
                self._payload(follower)
            return True

    def _parse(self, f: "_Follower") -> None:
        """The fields, and whether a payload follows: see nbdwire.requests."""
        wire = self._wire
        magic, f.flags, f.kind, f.cookie, f.offset, f.length = wire.request.unpack(f.head)
        if magic != wire.request_magic:
            raise ProtocolError(f"a request begins with {magic:#010x}, which is not NBD")
        if not wire.extended:
            f.payload = f.length if f.kind == c.CMD_WRITE else 0
            return
        f.payload = f.length if f.flags & c.CMD_FLAG_PAYLOAD_LEN else 0
        if f.payload > max(self._requests.maximum_payload, c.MAX_PAYLOAD):
            raise ProtocolError(f"a request has {f.payload} bytes of payload, more than is allowed")
        if f.kind == c.CMD_WRITE:
            f.flags ^= c.CMD_FLAG_PAYLOAD_LEN

    def _payload(self, f: "_Follower") -> None:
        """Of a request that will be refused it is consumed, to stay in step with the client."""
        wanted = f.kind == c.CMD_WRITE and f.payload <= self._requests.maximum_payload
        wanted = wanted or self._requests.takes_payload(f.kind, f.payload)
        room = f.room(f.payload if wanted else min(f.payload, 1 << 20))
        left = f.payload
        with f.waiting():
            while left:
                step = min(left, PART_SIZE, len(room))
                start = f.payload - left if wanted else 0
                recv_exact_into(self._stream, room[start : start + step])
                f.goes_on()
                left -= step

    def _carry_out(self, session: Session, f: "_Follower") -> Reply:
        """The reply to the follower's request."""
        requests = self._requests
        self._count(f.kind)
        if f.flags & c.CMD_FLAG_PAYLOAD_LEN and requests.takes_payload(f.kind, f.payload):
            with session.gate:
                payload = bytes(f.room(f.payload))
                node = session.node
                return [requests.filtered_status(node, f.flags, f.cookie, f.offset, payload)]
        problem = requests.problem(f.kind, f.flags, f.offset, f.length)
        if problem is not None:
            return [requests.error(f.cookie, f.offset, *problem)]
        if f.kind == c.CMD_READ:
            return self._read(session, f)
        if f.kind == c.CMD_WRITE:
            return [self._write(session, f)]
        fields = f.kind, f.flags, f.cookie, f.offset, f.length
        if requests.is_long(f.kind, f.length):
            return [requests.execute_in_steps(session, *fields)]
        with session.gate:
            return [requests.execute(session.node, *fields)]

    def _write(self, session: Session, f: "_Follower") -> bytes:
        view = f.room(f.length)  # where the payload is
        try:
            with session.gate:
                session.node.pwrite(view, f.offset, bool(f.flags & c.CMD_FLAG_FUA))
        except Exception:  # every failure is answered; the connection goes on
            return self._requests.failure(f.cookie, f.offset)
        self._count_bytes(f)
        return self._wire.done(f.cookie, f.offset)

    def _read(self, session: Session, f: "_Follower") -> Reply:
        try:
            pieces = self._pieces(session, f)
        except Exception:  # every failure is answered; the connection goes on
            return [self._requests.failure(f.cookie, f.offset)]
        # It may wait for memory, so the gate is not held.
        view = f.room(sum(length for _, length, is_hole in pieces if not is_hole))
        try:
            with session.gate:
                reply = self._read_pieces(session.node, f, pieces, view)
        except Exception:  # every failure is answered; the connection goes on
            return [self._requests.failure(f.cookie, f.offset)]
        self._count_bytes(f)
        return reply

    def _pieces(self, session: Session, f: "_Follower") -> list[Piece]:
        """What of the read is data and what is known to be a hole, in order."""
        whole = [(f.offset, f.length, False)]
        if not self._wire.chunked or f.flags & c.CMD_FLAG_DF or f.length < HOLE_SIZE:
            return whole
        with session.gate:
            node = session.node
            if not isinstance(node, SupportsMap):
                return whole
            runs = node.map(f.offset, f.length)
        pieces = _holes(runs, f.offset, f.length)
        return pieces if len(pieces) <= MAX_PIECES else whole

    def _read_pieces(
        self, node: Export, f: "_Follower", pieces: list[Piece], view: memoryview
    ) -> Reply:
        """A chunk for each piece; ``view`` has room for their data."""
        reply: Reply = []
        for piece in pieces:
            offset, length, is_hole = piece
            done = c.REPLY_FLAG_DONE if piece is pieces[-1] else 0
            if is_hole:
                reply.append(self._wire.hole(f.cookie, f.offset, offset, length, done))
                continue
            node.pread_into(view[:length], offset)
            reply += [self._wire.data(f.cookie, f.offset, offset, length, done), view[:length]]
            view = view[length:]
        return reply

    def _took(self, seconds: float) -> None:
        if seconds > self.slowest:
            with self._count_lock:
                self.slowest = max(self.slowest, seconds)

    def _count(self, kind: int) -> None:
        with self._count_lock:
            if kind == c.CMD_READ:
                self.reads += 1
            elif kind == c.CMD_WRITE:
                self.writes += 1
            else:
                self.others += 1

    def _count_bytes(self, follower: "_Follower") -> None:
        with self._count_lock:
            if follower.kind == c.CMD_READ:
                self.bytes_read += follower.length
            else:
                self.bytes_written += follower.length


def _start(threads: Iterable[threading.Thread]) -> list[threading.Thread]:
    """Those that could be started: a system that is short of threads gets fewer of them."""
    started = []
    with contextlib.suppress(RuntimeError):
        for thread in threads:
            thread.start()
            started.append(thread)
    return started


def _holes(runs: Iterable[Run], offset: int, length: int) -> list[Piece]:
    """The range as pieces: holes of HOLE_SIZE and more, and all else, which is to be read."""
    pieces: list[Piece] = []
    end = offset + length

    def add(start: int, stop: int, is_hole: bool) -> None:
        if pieces and pieces[-1][2] == is_hole:
            start = pieces.pop()[0]
        if start < stop:
            pieces.append((start, stop - start, is_hole))

    for fd, _, count in runs:
        stop = min(offset + count, end)
        add(offset, stop, fd == ZERO_RUN and stop - offset >= HOLE_SIZE)
        offset = stop
    add(offset, end, False)  # the map may tell about less than was asked for
    return pieces


class _Follower:
    """One thread's request and buffer, used again for each request."""

    def __init__(self, header: int, account: Account | None = None) -> None:
        self.head = memoryview(bytearray(header))
        self.flags = self.kind = self.cookie = self.offset = self.length = self.payload = 0
        self._buffer = bytearray(BUFFER)
        self._share: Share | None = account.share() if account is not None else None

    def room(self, length: int) -> memoryview:
        """The first ``length`` bytes of the buffer; waits for memory. ConnectionClosed."""
        if len(self._buffer) < length:
            if self._share is not None:
                self._share.take(length)
            self._buffer = bytearray(length)
        return memoryview(self._buffer)[:length]

    def rest(self) -> None:
        """Give back what is too large to keep."""
        if len(self._buffer) > KEEP_SIZE:
            self._buffer = bytearray(BUFFER)
            self.end()

    def end(self) -> None:
        """The buffer is not used any longer."""
        if self._share is not None:
            self._share.keep(0)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Nothing goes on in the block unless the client does."""
        self.goes_on()
        try:
            yield
        finally:
            if self._share is not None:
                self._share.idle_since = None

    def goes_on(self) -> None:
        """The client has done something."""
        if self._share is not None and self._share.held:
            self._share.idle_since = time.monotonic()

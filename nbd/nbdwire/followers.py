# SPDX-License-Identifier: Apache-2.0
"""The loop that serves one connection whose node may wait long: a network, an object store.

Leader and followers: each of some threads reads one request under the read lock, carries it out
with no lock of the connection held, and replies under the write lock. So requests overlap and are
answered in the order in which they end; there is no queue and no hand-over between threads.
"""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterable
from typing import Final

from nbdwire import constants as c
from nbdwire.codec import CHUNK_OFFSET_DATA, REQUEST, SIMPLE_REPLY
from nbdwire.errors import ConnectionClosed, ProtocolError
from nbdwire.export import Export, Session
from nbdwire.requests import Requests
from nbdwire.transport import recv_exact_into, send_all

THREADS: Final = 8
BUFFER: Final = 64 << 10
KEEP_SIZE: Final = 1 << 20  # larger buffers are given back, lest idle clients pin them


class Followers:
    """Serves one connection in transmission with several threads until the client leaves."""

    def __init__(
        self,
        sock: socket.socket,
        open_session: Callable[[], Session],
        requests: Requests,
        threads: int = THREADS,
    ) -> None:
        self._sock = sock
        self._open_session = open_session
        self._requests = requests
        self._threads = threads
        self._read_lock = threading.Lock()
        self._write_lock = threading.Lock()
        self._count_lock = threading.Lock()
        self._over = False
        self._problem: Exception | None = None
        self.reads = self.writes = self.others = 0
        self.bytes_read = self.bytes_written = 0

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
        follower = _Follower()
        while self._next(follower):
            self._send(*self._carry_out(session, follower))
            follower.rest()

    def _send(self, reply: bytes, payload: bytes | memoryview) -> None:
        with self._write_lock:
            send_all(self._sock, reply, payload)

    def _end(self, problem: Exception) -> None:
        """Wake the other threads: none of them must wait for a request that never comes."""
        with self._count_lock:
            if self._over:
                return
            self._over = True
            self._problem = problem
        with contextlib.suppress(OSError):  # the peer may be gone already
            self._sock.shutdown(socket.SHUT_RDWR)

    def _next(self, follower: "_Follower") -> bool:
        """Read one request, with its payload; False when the client has left."""
        with self._read_lock:
            if self._over:
                return False
            try:
                recv_exact_into(self._sock, follower.head)
            except ConnectionClosed:
                self._over = True
                return False
            magic, *rest = REQUEST.unpack(follower.head)
            if magic != c.REQUEST_MAGIC:
                raise ProtocolError(f"a request begins with {magic:#010x}, which is not NBD")
            follower.flags, follower.kind, follower.cookie, follower.offset, follower.length = rest
            if follower.kind == c.CMD_DISC:
                self._over = True
                return False
            if follower.kind == c.CMD_WRITE:
                self._payload(follower)
            return True

    def _payload(self, follower: "_Follower") -> None:
        left = follower.length
        if left <= c.MAX_PAYLOAD:
            recv_exact_into(self._sock, follower.room(left))
            return
        while left:  # too much: consume it, to stay in step with the client
            step = min(left, 1 << 20)
            recv_exact_into(self._sock, follower.room(step))
            left -= step

    def _carry_out(
        self, session: Session, follower: "_Follower"
    ) -> tuple[bytes, bytes | memoryview]:
        """The reply to the follower's request, and the data behind it."""
        requests, f = self._requests, follower
        self._count(f.kind)
        number = requests.check(f.kind, f.flags, f.offset, f.length)
        if number:
            return requests.error(f.cookie, number), b""
        with session.gate:
            node = session.node
            if f.kind not in (c.CMD_READ, c.CMD_WRITE):
                return requests.execute(node, f.kind, f.flags, f.cookie, f.offset, f.length), b""
            try:
                return self._transfer(node, f)
            except Exception:  # every failure is answered; the connection goes on
                return requests.failure(f.cookie), b""

    def _transfer(self, node: Export, f: "_Follower") -> tuple[bytes, bytes | memoryview]:
        view = f.room(f.length)
        simple = SIMPLE_REPLY.pack(c.SIMPLE_REPLY_MAGIC, c.NBD_SUCCESS, f.cookie)
        if f.kind == c.CMD_WRITE:
            node.pwrite(view, f.offset, bool(f.flags & c.CMD_FLAG_FUA))
            self._count_bytes(f)
            return simple, b""
        node.pread_into(view, f.offset)
        self._count_bytes(f)
        if not self._requests.structured:
            return simple, view
        head = CHUNK_OFFSET_DATA.pack(
            c.STRUCTURED_REPLY_MAGIC, c.REPLY_FLAG_DONE, c.REPLY_OFFSET_DATA, f.cookie,
            f.length + 8, f.offset,
        )  # fmt: skip
        return head, view

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


class _Follower:
    """One thread's request and buffer, used again for each request."""

    def __init__(self) -> None:
        self.head = memoryview(bytearray(REQUEST.size))
        self.flags = self.kind = self.cookie = self.offset = self.length = 0
        self._buffer = bytearray(BUFFER)

    def room(self, length: int) -> memoryview:
        if len(self._buffer) < length:
            self._buffer = bytearray(length)
        return memoryview(self._buffer)[:length]

    def rest(self) -> None:
        if len(self._buffer) > KEEP_SIZE:
            self._buffer = bytearray(BUFFER)

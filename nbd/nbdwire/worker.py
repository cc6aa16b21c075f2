# SPDX-License-Identifier: Apache-2.0
"""The loop that serves one connection whose node answers from memory or a local file.

One thread, blocking socket, no queue. What makes it fast, in order of what it saves:

* one ``recv_into`` brings many requests, one ``send`` takes many replies away;
* small reads go from the page cache straight into their place in the reply buffer;
* large reads of file runs never enter this process (``sendfile``), holes travel as hole chunks;
* a write goes from the receive buffer to the file: its payload is not copied in between;
* the first read of a batch that would wait for storage makes the kernel start on all of them;
* while its client asks again within microseconds the loop does not sleep (`nbdwire.lookout`).

The session's gate is taken once for each batch and never held while the client is waited for.
"""

import errno
import os
import socket
import threading
from typing import Final

from nbdwire import constants as c
from nbdwire.codec import CHUNK, CHUNK_OFFSET_DATA, HOLE_CHUNK, REQUEST, SIMPLE_REPLY
from nbdwire.errors import ProtocolError
from nbdwire.export import (
    OPAQUE_RUN,
    ZERO_RUN,
    Export,
    Run,
    Session,
    SupportsMap,
    SupportsPrefetch,
)
from nbdwire.lookout import Lookout
from nbdwire.requests import Requests

HEADER: Final = REQUEST.size
IN_SIZE: Final = 512 << 10
OUT_SIZE: Final = 256 << 10
KEEP_SIZE: Final = 5 << 20  # buffers that grew beyond it are given back, lest idle clients pin them
SMALL_READ: Final = 32 << 10  # larger ones are sent with sendfile, or from a buffer of their own
SEND_AT: Final = 64 << 10  # replies that have piled up this high are sent before the batch ends
PREFETCH_MOST: Final = 64 << 20  # bytes asked of the storage ahead of one batch's replies
MAX_RUNS: Final = 64  # a read that is more fragmented than this is copied, not sent run by run
ZEROES: Final = bytes(64 << 10)

_CLIENT_IS_GONE: Final = frozenset(
    {errno.EPIPE, errno.ECONNRESET, errno.ECONNABORTED, errno.ENOTCONN, errno.EBADF}
)

# Why a batch ended
_MORE_INPUT: Final = 0
_SEND: Final = 1
_LARGE_READ: Final = 2
_LARGE_WRITE: Final = 3
_DISCONNECT: Final = 4
_GATE: Final = 5


class Worker:
    """Serves one connection in transmission until the client leaves or breaks the protocol."""

    def __init__(
        self, sock: socket.socket, session: Session, requests: Requests, turn: threading.Lock
    ) -> None:
        self._sock = sock
        self._session = session
        self._requests = requests
        self._in = bytearray(IN_SIZE)
        self._in_view = memoryview(self._in)
        self._start = 0
        self._end = 0
        self._out = bytearray(OUT_SIZE)
        self._out_view = memoryview(self._out)
        self._used = 0
        self._byte = memoryview(bytearray(1))
        self._data = bytearray()  # large reads that cannot be sent from a file
        self._size = requests.size
        self._structured = requests.structured
        self._head = CHUNK_OFFSET_DATA.size if requests.structured else SIMPLE_REPLY.size
        self._read_flags = requests.legal[c.CMD_READ]
        self._read_only = requests.read_only
        self._write_flags = requests.legal[c.CMD_WRITE]
        self._can_probe = isinstance(session.node, SupportsPrefetch)
        self._map = isinstance(session.node, SupportsMap)
        self._probe = False
        self._lookout = Lookout(sock, turn)
        self.reads = self.writes = self.others = 0
        self.bytes_read = self.bytes_written = 0

    def run(self) -> None:
        """Return when the client has left; ProtocolError if it broke the protocol."""
        session = self._session
        while True:
            with session.gate:
                reason = self._batch(session.node)
            if reason == _LARGE_READ:
                self._large_read()
                continue
            if reason == _GATE:
                continue
            if self._used:
                self._send()
            if reason == _MORE_INPUT:
                if not self._receive():
                    return
            elif reason == _LARGE_WRITE:
                self._discard_write()
            elif reason == _DISCONNECT:
                return

    def _batch(self, node: Export) -> int:
        """Carry out the complete requests of the buffer, up to one that needs the socket."""
        data, unpack = self._in, REQUEST.unpack_from
        self._probe = self._can_probe and self._end - self._start >= 2 * HEADER
        while self._end - self._start >= HEADER:
            magic, flags, kind, cookie, offset, length = unpack(data, self._start)
            if magic != c.REQUEST_MAGIC:
                raise ProtocolError(f"a request begins with {magic:#010x}, which is not NBD")
            if self._used >= SEND_AT:
                return _SEND
            if kind == c.CMD_READ:
                if length > SMALL_READ:
                    return _LARGE_READ
                self._start += HEADER
                self._read(node, flags, cookie, offset, length)
            elif kind == c.CMD_WRITE:
                body = self._start + HEADER
                if length > c.MAX_PAYLOAD:
                    return _LARGE_WRITE
                if self._end - body < length:
                    return _MORE_INPUT
                self._start = body + length
                self._write(node, flags, cookie, offset, self._in_view[body : self._start])
                if flags:
                    return _GATE  # with FUA it was slow, as below
            elif kind == c.CMD_DISC:
                return _DISCONNECT
            else:
                self._start += HEADER
                self._other(node, kind, flags, cookie, offset, length)
                return _GATE  # it may have been slow: many of them must not keep a drain waiting
        return _MORE_INPUT

    def _read(self, node: Export, flags: int, cookie: int, offset: int, length: int) -> None:
        """A small read, into its place in the reply buffer."""
        self.reads += 1
        if flags & ~self._read_flags or not length or offset + length > self._size:
            self._refuse(c.CMD_READ, flags, cookie, offset, length)
            return
        body = self._used + self._head
        view = self._out_view[body : body + length]
        try:
            if not self._probe:
                node.pread_into(view, offset)
            elif not node.pread_cached(view, offset):  # type: ignore[attr-defined]
                self._prefetch(node)
                node.pread_into(view, offset)
        except Exception:  # every failure is answered; the connection goes on
            self._append(self._requests.failure(cookie))
            return
        if self._structured:
            CHUNK_OFFSET_DATA.pack_into(
                self._out, self._used, c.STRUCTURED_REPLY_MAGIC, c.REPLY_FLAG_DONE,
                c.REPLY_OFFSET_DATA, cookie, length + 8, offset,
            )  # fmt: skip
        else:
            SIMPLE_REPLY.pack_into(self._out, self._used, c.SIMPLE_REPLY_MAGIC, 0, cookie)
        self._used = body + length
        self.bytes_read += length

    def _write(
        self, node: Export, flags: int, cookie: int, offset: int, payload: memoryview
    ) -> None:
        """A write whose payload is in the receive buffer."""
        self.writes += 1
        length = len(payload)
        if (
            self._read_only
            or flags & ~self._write_flags
            or not length
            or offset + length > self._size
        ):
            self._refuse(c.CMD_WRITE, flags, cookie, offset, length)
            return
        try:
            node.pwrite(payload, offset, bool(flags))
        except Exception:  # every failure is answered; the connection goes on
            self._append(self._requests.failure(cookie))
            return
        SIMPLE_REPLY.pack_into(self._out, self._used, c.SIMPLE_REPLY_MAGIC, 0, cookie)
        self._used += SIMPLE_REPLY.size
        self.bytes_written += length

    def _other(
        self, node: Export, kind: int, flags: int, cookie: int, offset: int, length: int
    ) -> None:
        self.others += 1
        if self._requests.check(kind, flags, offset, length):
            self._refuse(kind, flags, cookie, offset, length)
        else:
            self._append(self._requests.execute(node, kind, flags, cookie, offset, length))

    def _refuse(self, kind: int, flags: int, cookie: int, offset: int, length: int) -> None:
        number = self._requests.check(kind, flags, offset, length)
        self._append(self._requests.error(cookie, number))

    def _append(self, reply: bytes) -> None:
        """Put a reply behind the others; the buffer grows for one that is larger than it."""
        end = self._used + len(reply)
        if end > len(self._out):
            self._replace_out(end)
        self._out[self._used : end] = reply
        self._used = end

    def _replace_out(self, size: int) -> None:
        grown = bytearray(size)
        grown[: self._used] = self._out_view[: self._used]
        self._out, self._out_view = grown, memoryview(grown)

    def _prefetch(self, node: Export) -> None:
        """Storage has to be waited for: let the kernel start on every read of the batch at once."""
        self._probe = False
        position, budget = self._start - HEADER, PREFETCH_MOST
        while self._end - position >= HEADER and budget > 0:
            _, _, kind, _, offset, length = REQUEST.unpack_from(self._in, position)
            position += HEADER
            if kind == c.CMD_WRITE:
                position += length
            elif (
                kind == c.CMD_READ
                and 0 < length <= c.MAX_PAYLOAD  # length 0 would mean "to the end of the file"
                and offset + length <= self._size
            ):
                node.prefetch(offset, length)  # type: ignore[attr-defined]
                budget -= length

    # The socket: the gate is not held below, except around the verbs of a large read.

    def _receive(self) -> bool:
        """More input behind what is there; False at the end of it."""
        missing = self._make_room()
        if missing > SMALL_READ:
            # Exactly the rest of a large write: the next request then starts at the front, and
            # its payload need not be moved.
            got = self._sock.recv_into(self._in_view[self._end :], missing, socket.MSG_WAITALL)
        else:
            began = self._lookout.begin()
            got = self._sock.recv_into(self._in_view[self._end :])
            self._lookout.end(began)
        self._end += got
        return got > 0

    def _make_room(self) -> int:
        """Move or grow so that the request at the front fits; how many bytes of it are missing."""
        held = self._end - self._start
        needed = HEADER
        if held >= HEADER:
            needed += REQUEST.unpack_from(self._in, self._start)[5]
        if held == 0:
            self._start = self._end = 0
            if len(self._in) > KEEP_SIZE:
                self._in = bytearray(IN_SIZE)
                self._in_view = memoryview(self._in)
        elif self._start + needed > len(self._in):
            moved = self._in_view[self._start : self._end]
            if needed > len(self._in):
                grown = bytearray(needed + HEADER)
                grown[:held] = moved
                self._in, self._in_view = grown, memoryview(grown)
            else:
                self._in_view[:held] = moved
            self._start, self._end = 0, held
        return needed - held

    def _send(self) -> None:
        self._sock.sendall(self._out_view[: self._used])
        self._used = 0
        if len(self._out) > OUT_SIZE:
            self._out = bytearray(OUT_SIZE)
            self._out_view = memoryview(self._out)

    def _discard_write(self) -> None:
        """Consume a payload above the maximum, to stay in step with the client; then refuse."""
        _, flags, kind, cookie, offset, length = REQUEST.unpack_from(self._in, self._start)
        self._start += HEADER
        here = min(length, self._end - self._start)
        self._start += here
        left = length - here
        while left:
            got = self._sock.recv_into(self._in_view[: min(left, len(self._in))])
            if not got:
                raise ProtocolError("the client left in the middle of a write")
            left -= got
        if here < length:
            self._start = self._end = 0
        self.writes += 1
        self._refuse(kind, flags, cookie, offset, length)

    # Large reads

    def _large_read(self) -> None:
        """One read above SMALL_READ: by sendfile where its bytes lie in files."""
        _, flags, kind, cookie, offset, length = REQUEST.unpack_from(self._in, self._start)
        self._start += HEADER
        self.reads += 1
        if self._requests.check(kind, flags, offset, length):
            self._refuse(kind, flags, cookie, offset, length)
            return
        with self._session.gate:
            node = self._session.node
            try:
                cold = self._is_cold(node, offset, length)
                runs = self._runs(node, offset, length)
                if not runs:
                    self._read_aside(node, offset, length)
            except Exception:  # every failure is answered; the connection goes on
                self._append(self._requests.failure(cookie))
                return
        self.bytes_read += length
        if not runs:
            self._head_of_data(cookie, offset, length, c.REPLY_FLAG_DONE)
            self._send_with(memoryview(self._data)[:length])
            if length > KEEP_SIZE:
                self._data = bytearray()
        elif not self._structured or flags & c.CMD_FLAG_DF:
            self._send_one_chunk(runs, cookie, offset, length)
        else:
            self._send_chunks(runs, cookie, offset, cold)

    def _is_cold(self, node: Export, offset: int, length: int) -> bool:
        """Whether storage has to be waited for; if so, start on all reads of the batch."""
        if not self._can_probe or node.pread_cached(  # type: ignore[attr-defined]
            self._byte, offset + length - 1
        ):
            return False
        self._prefetch(node)
        return True

    def _runs(self, node: Export, offset: int, length: int) -> list[Run]:
        """The runs of the whole range; none where only ``pread_into`` can tell, or pays."""
        runs: list[Run] = []
        covered = 0
        while self._map and covered < length:
            more = node.map(offset + covered, length - covered)  # type: ignore[attr-defined]
            runs += more
            step = sum(run[2] for run in more)
            if not step or len(runs) > MAX_RUNS or any(run[0] == OPAQUE_RUN for run in more):
                return []
            covered += step
        return runs

    def _read_aside(self, node: Export, offset: int, length: int) -> None:
        if len(self._data) < length:
            self._data = bytearray(length)
        node.pread_into(memoryview(self._data)[:length], offset)

    def _head_of_data(self, cookie: int, offset: int, length: int, done: int) -> None:
        if self._structured:
            self._append(
                CHUNK_OFFSET_DATA.pack(
                    c.STRUCTURED_REPLY_MAGIC, done, c.REPLY_OFFSET_DATA, cookie, length + 8, offset
                )
            )
        else:
            self._append(SIMPLE_REPLY.pack(c.SIMPLE_REPLY_MAGIC, 0, cookie))

    def _send_with(self, payload: memoryview) -> None:
        """The reply buffer and ``payload`` behind it, without joining them."""
        sent = self._sock.sendmsg([self._out_view[: self._used], payload])
        if sent < self._used:
            self._sock.sendall(self._out_view[sent : self._used])
            sent = self._used
        if sent - self._used < len(payload):
            self._sock.sendall(payload[sent - self._used :])
        self._used = 0

    def _send_one_chunk(self, runs: list[Run], cookie: int, offset: int, length: int) -> None:
        """All runs as the data of one reply; an error inside of it ends the connection."""
        self._head_of_data(cookie, offset, length, c.REPLY_FLAG_DONE)
        for fd, host, count in runs:
            self._send_run(fd, host, count)

    def _send_chunks(self, runs: list[Run], cookie: int, offset: int, cold: bool) -> None:
        """A chunk for each run, holes without data.

        What is in the page cache cannot fail to be read. Where storage is waited for it can, after
        the chunk's header has been sent: then DONE comes in a chunk of its own, or the error does.
        """
        problem = None
        for index, (fd, host, count) in enumerate(runs):
            done = c.REPLY_FLAG_DONE if index == len(runs) - 1 and not cold else 0
            if fd == ZERO_RUN:
                self._append(
                    HOLE_CHUNK.pack(
                        c.STRUCTURED_REPLY_MAGIC, done, c.REPLY_OFFSET_HOLE, cookie, 12,
                        offset, count,
                    )
                )  # fmt: skip
            else:
                self._head_of_data(cookie, offset, count, done)
                problem = self._send_run(fd, host, count, may_fail=cold)
                if problem is not None:
                    self._append(self._requests.error(cookie, problem.errno))
                    return
            offset += count
        if cold:
            self._append(
                CHUNK.pack(c.STRUCTURED_REPLY_MAGIC, c.REPLY_FLAG_DONE, c.REPLY_NONE, cookie, 0)
            )

    def _send_run(
        self, fd: int, host: int, count: int, *, may_fail: bool = False
    ) -> OSError | None:
        """``count`` bytes of a run behind what the reply buffer holds.

        With ``may_fail`` an error of the file is returned, after the rest was filled with zeroes.
        """
        if fd == ZERO_RUN:
            self._send_zeroes(count)
            return None
        if self._used:
            self._sock.sendall(self._out_view[: self._used], socket.MSG_MORE)
            self._used = 0
        to = self._sock.fileno()
        while count:
            try:
                sent = os.sendfile(to, fd, host, count)
            except OSError as problem:
                if not may_fail or problem.errno in _CLIENT_IS_GONE:
                    raise
                self._send_zeroes(count)
                return problem
            if not sent:  # the file has become shorter: what is behind its end reads as zeroes
                self._send_zeroes(count)
                return None
            host += sent
            count -= sent
        return None

    def _send_zeroes(self, count: int) -> None:
        while count:
            step = min(count, len(ZEROES))
            self._send_with(memoryview(ZEROES)[:step])
            count -= step

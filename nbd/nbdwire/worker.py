# SPDX-License-Identifier: Apache-2.0
"""The loop that serves one connection whose node answers from memory or a local file.

One thread, blocking stream, no queue. What makes it fast, in order of what it saves:

* one ``recv_into`` brings many requests, one ``send`` takes many replies away;
* small reads go from the page cache straight into their place in the reply buffer;
* large reads of file runs never enter this process (``sendfile``), holes travel as hole chunks;
* a write goes from the receive buffer to the file: its payload is not copied in between;
* the first read of a batch that would wait for storage makes the kernel start on all of them;
* while its client asks again within microseconds the loop does not sleep (`nbdwire.lookout`).

Compact and extended headers share the loop: they differ in the `nbdwire.wire.Wire` that is chosen
once, and in how the heads of the two commonest replies are packed. A request that the quick tests
cannot vouch for is looked at closely by `nbdwire.requests`.

The session's gate is taken once for each batch and never held while the client is waited for.
"""

import socket
import threading
from time import perf_counter
from typing import Final

from nbdwire import constants as c
from nbdwire.codec import (
    CHUNK_OFFSET_DATA,
    EXTENDED_CHUNK,
    EXTENDED_CHUNK_SIZE,
    EXTENDED_OFFSET_DATA,
    SIMPLE_REPLY,
    SIMPLE_REPLY_SIZE,
)
from nbdwire.errors import ProtocolError
from nbdwire.export import OPAQUE_RUN, Export, Run, Session, SupportsMap, SupportsPrefetch
from nbdwire.lookout import look_at
from nbdwire.outgoing import KEEP_SIZE, Outgoing
from nbdwire.pages import give_back, pages
from nbdwire.requests import Requests
from nbdwire.transport import Stream

IN_SIZE: Final = 512 << 10
SMALL_READ: Final = 32 << 10  # larger ones are sent with sendfile, or from a buffer of their own
SEND_AT: Final = 64 << 10  # replies that have piled up this high are sent before the batch ends
PREFETCH_MOST: Final = 64 << 20  # bytes asked of the storage ahead of one batch's replies
MAX_RUNS: Final = 64  # a read that is more fragmented than this is copied, not sent run by run
PAYLOAD_PART: Final = 1 << 20  # a client that has sent so much of a payload is going on

# Why a batch ended
_MORE_INPUT: Final = 0
_SEND: Final = 1
_LARGE_READ: Final = 2
_LARGE_WRITE: Final = 3
_DISCONNECT: Final = 4
_GATE: Final = 5
_PAYLOAD: Final = 6
_LONG: Final = 7


class Worker(Outgoing):
    """Serves one connection in transmission until the client leaves or breaks the protocol.

    ``slowest`` is the longest batch of requests, in seconds, from when it had been received until
    its last reply was sent.
    """

    # More than 30 attributes in an instance's dict would make each access slower (CPython 3.11).
    __slots__ = (
        "_byte",
        "_can_probe",
        "_data_head",
        "_end",
        "_extended",
        "_grown",
        "_header",
        "_in",
        "_in_view",
        "_lookout",
        "_magic",
        "_map",
        "_most",
        "_probe",
        "_read_flags",
        "_read_only",
        "_received",
        "_request",
        "_session",
        "_start",
        "_structured",
        "_vouched",
        "_write_flags",
        "bytes_read",
        "bytes_written",
        "others",
        "reads",
        "slowest",
        "writes",
    )

    def __init__(
        self, stream: Stream, session: Session, requests: Requests, turn: threading.Lock
    ) -> None:
        super().__init__(stream, requests)
        self._session = session
        self._in = pages(IN_SIZE)
        self._in_view = memoryview(self._in)
        self._start = 0
        self._end = 0
        self._grown = False
        self._byte = memoryview(bytearray(1))
        self._structured = self._wire.chunked and not self._wire.extended
        self._extended = self._wire.extended
        self._magic = self._wire.request_magic
        self._request = self._wire.request
        self._header = self._wire.request.size
        self._data_head = self._wire.data_head
        self._vouched = requests.vouched(SMALL_READ)
        self._most = requests.maximum_payload
        self._read_flags = requests.legal[c.CMD_READ]
        self._read_only = requests.read_only
        self._write_flags = requests.legal[c.CMD_WRITE]
        self._can_probe = isinstance(session.node, SupportsPrefetch)
        self._map = isinstance(session.node, SupportsMap)
        self._probe = False
        self._lookout = look_at(stream, turn)
        self._received = perf_counter()
        self.reads = self.writes = self.others = 0
        self.bytes_read = self.bytes_written = 0
        self.slowest = 0.0

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
            elif reason == _LONG:
                self._long()
            elif reason == _DISCONNECT or (reason == _PAYLOAD and not self._payload()):
                return

    def _batch(self, node: Export) -> int:
        """Carry out the complete requests of the buffer, up to one that needs the stream."""
        data, unpack, header = self._in, self._request.unpack_from, self._header
        extended, form_magic = self._extended, self._magic
        self._probe = self._can_probe and self._end - self._start >= 2 * header
        while self._end - self._start >= header:
            magic, flags, kind, cookie, offset, length = unpack(data, self._start)
            if magic != form_magic:
                raise ProtocolError(f"a request begins with {magic:#010x}, which is not NBD")
            if self._used >= SEND_AT:
                return _SEND
            if extended:
                if kind == c.CMD_WRITE:
                    flags ^= c.CMD_FLAG_PAYLOAD_LEN  # see nbdwire.requests
                if flags & c.CMD_FLAG_PAYLOAD_LEN:
                    return _PAYLOAD
            if kind == c.CMD_READ:
                if length > SMALL_READ:
                    return _LARGE_READ
                self._start += header
                self._read(node, flags, cookie, offset, length)
            elif kind == c.CMD_WRITE:
                body = self._start + header
                if length > self._most:
                    return _LARGE_WRITE
                if self._end - body < length:
                    return _MORE_INPUT
                self._start = body + length
                self._write(node, flags, cookie, offset, self._in_view[body : self._start])
                if flags:
                    return _GATE  # with FUA it was slow, as below
            elif kind == c.CMD_DISC:
                return _DISCONNECT
            elif self._requests.is_long(kind, length):
                return _LONG
            else:
                self._start += header
                self._other(node, kind, flags, cookie, offset, length)
                return _GATE  # it may have been slow: many of them must not keep a drain waiting
        return _MORE_INPUT

    def _read(self, node: Export, flags: int, cookie: int, offset: int, length: int) -> None:
        """A small read, into its place in the reply buffer."""
        self.reads += 1
        if (
            flags & ~self._read_flags or not length or offset + length > self._vouched
        ) and self._refused(c.CMD_READ, flags, cookie, offset, length):
            return
        body = self._used + self._data_head
        view = self._out_view[body : body + length]
        try:
            if not self._probe:
                node.pread_into(view, offset)
            elif not node.pread_cached(view, offset):  # type: ignore[attr-defined]
                self._prefetch(node)
                node.pread_into(view, offset)
        except Exception:  # every failure is answered; the connection goes on
            self._append(self._requests.failure(cookie, offset))
            return
        if self._structured:
            CHUNK_OFFSET_DATA.pack_into(
                self._out, self._used, c.STRUCTURED_REPLY_MAGIC, c.REPLY_FLAG_DONE,
                c.REPLY_OFFSET_DATA, cookie, length + 8, offset,
            )  # fmt: skip
        elif self._extended:
            EXTENDED_OFFSET_DATA.pack_into(
                self._out, self._used, c.EXTENDED_REPLY_MAGIC, c.REPLY_FLAG_DONE,
                c.REPLY_OFFSET_DATA, cookie, offset, length + 8, offset,
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
            or offset + length > self._vouched
        ) and self._refused(c.CMD_WRITE, flags, cookie, offset, length):
            return
        try:
            node.pwrite(payload, offset, bool(flags))
        except Exception:  # every failure is answered; the connection goes on
            self._append(self._requests.failure(cookie, offset))
            return
        if self._extended:
            EXTENDED_CHUNK.pack_into(
                self._out, self._used, c.EXTENDED_REPLY_MAGIC, c.REPLY_FLAG_DONE,
                c.REPLY_NONE, cookie, offset, 0,
            )  # fmt: skip
            self._used += EXTENDED_CHUNK_SIZE
        else:
            SIMPLE_REPLY.pack_into(self._out, self._used, c.SIMPLE_REPLY_MAGIC, 0, cookie)
            self._used += SIMPLE_REPLY_SIZE
        self.bytes_written += length

    def _other(
        self, node: Export, kind: int, flags: int, cookie: int, offset: int, length: int
    ) -> None:
        self.others += 1
        if not self._refused(kind, flags, cookie, offset, length):
            self._append(self._requests.execute(node, kind, flags, cookie, offset, length))

    def _refused(self, kind: int, flags: int, cookie: int, offset: int, length: int) -> bool:
        """Whether the request must not be carried out; then its reply is made."""
        problem = self._requests.problem(kind, flags, offset, length)
        if problem is None:
            return False
        self._append(self._requests.error(cookie, offset, *problem))
        return True

    def _prefetch(self, node: Export) -> None:
        """Storage has to be waited for: let the kernel start on every read of the batch at once."""
        self._probe = False
        position, budget = self._start - self._header, PREFETCH_MOST
        while self._end - position >= self._header and budget > 0:
            _, flags, kind, _, offset, length = self._request.unpack_from(self._in, position)
            position += self._header
            if flags & c.CMD_FLAG_PAYLOAD_LEN if self._extended else kind == c.CMD_WRITE:
                position += length
            elif (
                kind == c.CMD_READ
                and 0 < length <= self._most  # length 0 would mean "to the end of the file"
                and offset + length <= self._requests.size
            ):
                node.prefetch(offset, length)  # type: ignore[attr-defined]
                budget -= length

    # The stream: the gate is not held below, except around the verbs of a large read.

    def _receive(self) -> bool:
        """More input behind what is there; False at the end of it."""
        missing = self._make_room()
        began = self._lookout.begin() if missing <= SMALL_READ else perf_counter()
        if began - self._received > self.slowest:
            self.slowest = began - self._received
        if missing > SMALL_READ:
            got = self._receive_payload(missing)
            self._received = perf_counter()
        else:
            if self._lookout.idle:
                self._rest()
            got = self._stream.recv_into(self._in_view[self._end :])
            self._received = self._lookout.end(began)
        self._end += got
        if self._requests.look():
            self._vouched = -1
        return got > 0

    def _receive_payload(self, missing: int) -> int:
        """Of the large write at the front no more than is missing: how many bytes have come.

        The next request then starts at the front, and its payload need not be moved.
        """
        if self._share is None or not self._share.held:
            return self._stream.recv_into(self._in_view[self._end :], missing, socket.MSG_WAITALL)
        self._wait_begins()
        step = min(missing, PAYLOAD_PART)
        got = self._stream.recv_into(self._in_view[self._end :], step, socket.MSG_WAITALL)
        self._wait_ends()
        return got

    def _make_room(self) -> int:
        """Move or grow so that the request at the front fits; how many bytes of it are missing."""
        held = self._end - self._start
        needed = self._header
        if held >= needed:
            needed += self._request.unpack_from(self._in, self._start)[5]
        if held == 0:
            self._start = self._end = 0
            if self._grown:
                self._shrink()
        elif self._start + needed > len(self._in):
            moved = self._in_view[self._start : self._end]
            if needed > len(self._in):
                self._grow(needed + self._header, moved)
            else:
                self._in_view[:held] = moved
            self._start, self._end = 0, held
        return needed - held

    def _grow(self, size: int, content: memoryview) -> None:
        """A larger receive buffer that begins with ``content``."""
        if self._share is not None:
            self._share.take(size + len(self._data))
        grown = pages(size)
        grown[: len(content)] = content
        self._in, self._in_view = grown, memoryview(grown)
        self._grown = True

    def _shrink(self) -> None:
        """The buffers are empty: keep no more of them than may be kept."""
        if len(self._in) > KEEP_SIZE:
            self._replace_in()
        mine = len(self._in) if len(self._in) > IN_SIZE else 0
        if not self._shrink_data(mine) and mine:
            self._replace_in()
        self._grown = False

    def _replace_in(self) -> None:
        self._in = pages(IN_SIZE)
        self._in_view = memoryview(self._in)

    def _rest(self) -> None:
        """The client is silent: what lies in the buffers is of no use, so have no memory for it."""
        self._lookout.idle = False
        if self._end:
            return  # half a request
        if len(self._in) > IN_SIZE:
            self._replace_in()
        else:
            give_back(self._in)
        self._rest_sending()

    def _take(self, length: int, keep: bool) -> bytes:
        """Consume ``length`` bytes behind the header at the front; return them if they are few."""
        here = min(length, self._end - self._start)
        kept = bytes(self._in_view[self._start : self._start + here]) if keep else b""
        self._start += here
        if here < length:
            self._start = self._end = 0
        left = length - here
        while left:
            view = self._in_view[: min(left, len(self._in))]
            got = self._stream.recv_into(view)
            if not got:
                raise ProtocolError("the client left in the middle of a request's payload")
            kept += bytes(view[:got]) if keep else b""
            left -= got
        return kept

    def _front(self) -> tuple[int, int, int, int, int]:
        """(flags, kind, cookie, offset, length) of the request at the front; go behind it."""
        _, *rest = self._request.unpack_from(self._in, self._start)
        self._start += self._header
        flags, kind, cookie, offset, length = rest
        return flags, kind, cookie, offset, length

    # Requests that are carried out, or refused, one by one

    def _discard_write(self) -> None:
        """Consume a payload above the maximum, to stay in step with the client; then refuse."""
        flags, kind, cookie, offset, length = self._front()
        self._check_payload(length)
        self._take(length, keep=False)
        self.writes += 1
        flags &= ~c.CMD_FLAG_PAYLOAD_LEN if self._extended else ~0
        self._refused(kind, flags, cookie, offset, length)

    def _check_payload(self, length: int) -> None:
        """Section "Request message": of these lengths no more than is reasonable is consumed."""
        if self._extended and length > max(self._most, c.MAX_PAYLOAD):
            raise ProtocolError(f"a request has {length} bytes of payload, more than is allowed")

    def _payload(self) -> bool:
        """A write without payload, or another command with one; False to disconnect."""
        flags, kind, cookie, offset, length = self._front()
        if kind == c.CMD_DISC:
            return False
        if kind == c.CMD_WRITE:
            self.writes += 1
            self._refused(kind, flags | c.CMD_FLAG_PAYLOAD_LEN, cookie, offset, length)
            return True
        self._check_payload(length)
        self.others += 1
        wanted = self._requests.takes_payload(kind, length)
        payload = self._take(length, keep=wanted)
        if not wanted:
            self._refused(kind, flags, cookie, offset, length)
            return True
        with self._session.gate:
            self._append(
                self._requests.filtered_status(self._session.node, flags, cookie, offset, payload)
            )
        return True

    def _long(self) -> None:
        """A request that takes the gate more than once."""
        flags, kind, cookie, offset, length = self._front()
        self.others += 1
        if not self._refused(kind, flags, cookie, offset, length):
            reply = self._requests.execute_in_steps(
                self._session, kind, flags, cookie, offset, length
            )
            self._append(reply)

    def _large_read(self) -> None:
        """One read above SMALL_READ: by sendfile where its bytes lie in files."""
        flags, kind, cookie, offset, length = self._front()
        self.reads += 1
        if self._refused(kind, flags, cookie, offset, length):
            return
        try:
            with self._session.gate:
                cold = self._is_cold(self._session.node, offset, length)
                runs = self._runs(self._session.node, offset, length)
        except Exception:  # every failure is answered; the connection goes on
            self._append(self._requests.failure(cookie, offset))
            return
        if not runs:
            self._read_aside(cookie, offset, length)
            return
        self.bytes_read += length
        if not self._wire.chunked or flags & c.CMD_FLAG_DF:
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

    def _read_aside(self, cookie: int, offset: int, length: int) -> None:
        """By way of the data buffer. It may have to wait for memory first, without the gate."""
        self._grow_data(length, len(self._in) if len(self._in) > IN_SIZE else 0)
        self._grown = True
        try:
            with self._session.gate:
                self._session.node.pread_into(memoryview(self._data)[:length], offset)
        except Exception:  # every failure is answered; the connection goes on
            self._append(self._requests.failure(cookie, offset))
            return
        self.bytes_read += length
        self._append(self._wire.data(cookie, offset, offset, length))
        self._send_data(length)

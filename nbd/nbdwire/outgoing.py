# SPDX-License-Identifier: Apache-2.0
"""What a worker sends: a buffer of replies, and the data of large reads behind it.

Large reads of file runs never enter this process (``sendfile``), and holes are told, not sent. A
stream that encrypts in this process gets the bytes of a run from a buffer instead.
"""

import errno
import os
import socket
import time
from typing import TYPE_CHECKING, Final

from nbdwire import constants as c
from nbdwire.errors import ConnectionClosed
from nbdwire.export import ZERO_RUN, Run
from nbdwire.limits import FREE, Share
from nbdwire.pages import give_back, pages
from nbdwire.requests import Requests
from nbdwire.transport import Stream
from nbdwire.wire import StructuredWire

if TYPE_CHECKING:
    import mmap
    from collections.abc import Callable

OUT_SIZE: Final = 256 << 10
KEEP_SIZE: Final = 5 << 20  # buffers that grew beyond it are given back, lest idle clients pin them
COPY_SIZE: Final = 256 << 10  # what sendfile cannot send passes through a buffer in such steps
PART_SIZE: Final = 4 << 20  # a client that has taken so much of what it asked for is going on
ZEROES: Final = bytes(64 << 10)

_CLIENT_IS_GONE: Final = frozenset(
    {
        errno.EPIPE,
        errno.ECONNRESET,
        errno.ECONNABORTED,
        errno.ENOTCONN,
        errno.EBADF,
        errno.EAGAIN,  # a time limit of the socket
        errno.ETIMEDOUT,
    }
)

# Not of this file system, or of this kind of file: its bytes are copied from now on.
_NO_SENDFILE: Final = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})


class Outgoing:
    """The sending half of `nbdwire.worker.Worker`, which is one object for the sake of speed."""

    __slots__ = (
        "_can_sendfile",
        "_data",
        "_out",
        "_out_view",
        "_requests",
        "_rest_stream",
        "_share",
        "_stream",
        "_used",
        "_wire",
    )

    def __init__(self, stream: Stream, requests: Requests) -> None:
        self._stream = stream
        self._requests = requests
        self._wire = requests.wire
        self._out = pages(OUT_SIZE)
        self._out_view = memoryview(self._out)
        self._used = 0
        # Large reads that cannot be sent from a file.
        self._data: mmap.mmap | bytearray = bytearray()
        self._share: Share | None = requests.account.share() if requests.account else None
        secure = getattr(stream, "secure", False)
        self._rest_stream: Callable[[], None] | None = getattr(stream, "rest", None)
        self._can_sendfile = not secure or getattr(stream, "can_sendfile", False)

    def _append(self, reply: bytes) -> None:
        """Put a reply behind the others; the buffer grows for one that is larger than it."""
        end = self._used + len(reply)
        if end > len(self._out):
            self._replace_out(end)
        self._out[self._used : end] = reply
        self._used = end

    def _replace_out(self, size: int) -> None:
        grown = pages(size)
        grown[: self._used] = self._out_view[: self._used]
        self._out, self._out_view = grown, memoryview(grown)

    def _send(self) -> None:
        self._stream.sendall(self._out_view[: self._used])
        self._used = 0
        if len(self._out) > OUT_SIZE:
            self._out = pages(OUT_SIZE)
            self._out_view = memoryview(self._out)

    def _send_with(self, payload: memoryview) -> None:
        """The reply buffer and ``payload`` behind it, without joining them."""
        sent = self._stream.sendmsg([self._out_view[: self._used], payload])
        if sent < self._used:
            self._stream.sendall(self._out_view[sent : self._used])
            sent = self._used
        if sent - self._used < len(payload):
            self._stream.sendall(payload[sent - self._used :])
        self._used = 0

    def _send_data(self, length: int) -> None:
        """The reply buffer, and behind it ``length`` bytes of the data buffer."""
        data = memoryview(self._data)
        for start in range(0, length, PART_SIZE):
            self._wait_begins()
            self._send_with(data[start : min(start + PART_SIZE, length)])
        self._wait_ends()

    # Memory: what the buffers hold above FREE is shared with the other connections of the server.

    def _wait_begins(self) -> None:
        """Nothing goes on now unless the client does."""
        if self._share is not None and self._share.held:
            self._share.idle_since = time.monotonic()

    def _wait_ends(self) -> None:
        if self._share is not None:
            self._share.idle_since = None

    def _grow_data(self, length: int, others: int) -> None:
        """Room for ``length`` bytes in the data buffer, beside ``others`` in another buffer.

        It may have to wait for memory, so no gate may be held. ConnectionClosed.
        """
        if len(self._data) >= length:
            return
        if self._share is not None:
            self._share.take(length + others)
        self._data = bytearray()  # not two of them at once
        self._data = pages(length)

    def _shrink_data(self, others: int) -> bool:
        """Give back what is too large to keep; whether ``others`` bytes elsewhere may be kept."""
        if len(self._data) > KEEP_SIZE:
            self._data = bytearray()
        if self._share is None or self._share.keep(len(self._data) + others):
            return True
        self._data = bytearray()
        return False

    def _rest_sending(self) -> None:
        """Have no memory for what was sent last; the other buffers have no more than FREE."""
        give_back(self._out)
        self._data = bytearray()
        if self._share is not None:
            self._share.keep(0)
        if self._rest_stream is not None:
            self._rest_stream()

    # Runs

    def _send_one_chunk(self, runs: list[Run], cookie: int, offset: int, length: int) -> None:
        """All runs as the data of one reply; an error inside of it ends the connection."""
        self._append(self._wire.data(cookie, offset, offset, length))
        for fd, host, count in runs:
            problem = self._send_run(fd, host, count)
            if problem is not None:
                raise problem[0]

    def _send_chunks(self, runs: list[Run], cookie: int, offset: int, cold: bool) -> None:
        """A chunk for each run, holes without data.

        What is in the page cache cannot fail to be read. Where storage is waited for it can, after
        the chunk's header has been sent: then DONE comes in a chunk of its own, or the error does.
        """
        wire, at = self._wire, offset
        assert isinstance(wire, StructuredWire)
        for index, (fd, host, count) in enumerate(runs):
            done = c.REPLY_FLAG_DONE if index == len(runs) - 1 and not cold else 0
            if fd == ZERO_RUN:
                self._append(wire.hole(cookie, offset, at, count, done))
            else:
                self._append(wire.data(cookie, offset, at, count, done))
                problem = self._send_run(fd, host, count)
                if problem is not None:
                    self._tell(problem, cookie, offset, at, count, cold)
                    return
            at += count
        if cold:
            self._append(wire.none(cookie, offset))

    def _tell(
        self,
        problem: tuple[OSError, int],
        cookie: int,
        offset: int,
        at: int,
        count: int,
        cold: bool,
    ) -> None:
        """Finish a chunk of ``count`` bytes at ``at`` in which a file failed, and tell where."""
        error, sent = problem
        if not cold:
            raise error  # its chunk has said DONE
        self._send_zeroes(count - sent)
        self._append(self._requests.error(cookie, offset, error.errno, at=at + sent))

    def _send_run(self, fd: int, host: int, count: int) -> tuple[OSError, int] | None:
        """``count`` bytes of a run behind what the reply buffer holds.

        An error of the file is returned with the number of bytes that were sent before it.
        """
        if fd == ZERO_RUN:
            self._send_zeroes(count)
            return None
        left = count
        while left:
            send = self._sendfile if self._can_sendfile else self._copy_file
            try:
                sent = send(fd, host, left)
            except OSError as problem:
                if problem.errno in _CLIENT_IS_GONE:
                    raise
                if self._can_sendfile and problem.errno in _NO_SENDFILE:
                    self._can_sendfile = False
                    continue
                return problem, count - left
            if not sent:  # the file has become shorter: what is behind its end reads as zeroes
                self._send_zeroes(left)
                return None
            host += sent
            left -= sent
        return None

    def _sendfile(self, fd: int, host: int, count: int) -> int:
        """The reply buffer and some bytes of a file; how many."""
        if self._used:
            try:
                self._stream.sendall(self._out_view[: self._used], socket.MSG_MORE)
            except OSError as problem:  # not the file's, which the caller would tell the client
                raise ConnectionClosed(f"the client does not receive: {problem}") from problem
            self._used = 0
        return os.sendfile(self._stream.fileno(), fd, host, count)

    def _copy_file(self, fd: int, host: int, count: int) -> int:
        """As `_sendfile`, through a buffer."""
        if len(self._data) < COPY_SIZE:
            self._data = pages(COPY_SIZE)
        view = memoryview(self._data)[: min(count, COPY_SIZE)]
        got = os.preadv(fd, [view], host)
        try:
            if got:
                self._send_with(view[:got])
        except OSError as problem:  # not the file's, which the caller would tell the client
            raise ConnectionClosed(f"the client does not receive: {problem}") from problem
        return got

    def _send_zeroes(self, count: int) -> None:
        while count:
            step = min(count, len(ZEROES))
            self._send_with(memoryview(ZEROES)[:step])
            count -= step


assert COPY_SIZE <= FREE, "a copy must not need the memory that connections share"

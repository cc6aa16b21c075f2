# SPDX-License-Identifier: Apache-2.0
"""One connection in transmission: requests go out, replies find their requests again.

A connection has no thread of its own. Of the threads that wait for replies, one leads: it reads,
and wakes the others as their replies come; when it has its own, another one leads. A thread starts
to wait when its request is sent, so a server that is held up by its replies always finds a reader.
For requests that nobody waits for (`nbdwire.pipeline`) a reader thread leads as long as it is
wanted.
"""

import contextlib
import socket
import threading
from typing import TYPE_CHECKING, Final, NoReturn, TypeAlias

from nbdwire import constants as c
from nbdwire.codec import EXTENDED_REQUEST, REQUEST
from nbdwire.errors import ConnectionClosed, NBDError
from nbdwire.negotiate_client import ClientSession
from nbdwire.pending import Pending
from nbdwire.replies import ReplyReader
from nbdwire.transport import Receiver, Stream, send_all
from nbdwire.watchdog import Watchdog

if TYPE_CHECKING:
    from collections.abc import Callable

_QUEUE_BYTES: Final = 32 << 10  # of payload: it must fit into the buffers of any socket
_SEND_BUFFER: Final = 2 << 20  # bytes; the kernel grants net.core.wmem_max at most


Sink: TypeAlias = "Callable[[Link, list[Pending]], None]"


class Link:
    """The requests in flight on one connection. All methods may be called from any thread."""

    def __init__(
        self, stream: Stream, session: ClientSession, timeout: float | None = None
    ) -> None:
        """Take over ``stream`` (a socket, or what looks like one), which is in transmission.

        ``timeout``: seconds that a request may take (None: for ever); then the connection is over.
        """
        self.session = session
        self._stream = stream
        _widen(stream)
        self._header = EXTENDED_REQUEST if session.extended else REQUEST
        self._magic = c.EXTENDED_REQUEST_MAGIC if session.extended else c.REQUEST_MAGIC
        self._send_lock = threading.Lock()
        self._state = threading.Lock()  # for all that follows
        self._left = threading.Condition(self._state)  # nobody leads any more
        self._work = threading.Condition(self._state)  # there is something for the reader thread
        self._pending: dict[int, Pending] = {}
        self._cookie = 0
        self._leading = False
        self._reader_wanted = False
        self._idle = False  # the reader thread waits for _work
        self._failure: NBDError | None = None
        self._closed = False
        self._replies = ReplyReader(
            Receiver(stream), self._pending, session.structured, session.extended
        )
        self._sink: Sink | None = None
        self._queue: list[bytes | memoryview] = []  # not sent yet
        self._queued = self._queued_bytes = 0  # requests in it, bytes
        self._watchdog = None if timeout is None else Watchdog(self, timeout)
        if self._watchdog is not None:
            self._watchdog.start()
        self._again = False  # a thread that sends looks at the queue once more

    @property
    def failure(self) -> NBDError | None:
        """Why the connection is over; None as long as it is not."""
        return self._failure

    def in_flight(self) -> tuple[int, int | None]:
        """The newest cookie, and the oldest in flight (None: nothing is)."""
        with self._state:
            return self._cookie, min(self._pending.copy(), default=None)

    # Requests

    def submit(self, pending: Pending, flags: int = 0, payload: memoryview | None = None) -> None:
        """Send a request. Its reply, or the loss of the connection, is told to ``pending``.

        Raises only if the connection was over before.
        """
        with self._state:
            self._register(pending)
        try:
            self._send(pending, flags, payload)
        except (NBDError, OSError) as error:
            self.fail(error)
        except BaseException as error:  # KeyboardInterrupt: nobody knows how far we came
            self.fail(error)
            raise

    def _register(self, pending: Pending) -> None:
        if self._failure is not None:
            self._raise_failure()
        self._cookie += 1
        pending.cookie = self._cookie
        self._pending[pending.cookie] = pending
        if self._idle:
            self._work.notify()

    def queue(self, pending: Pending, flags: int, payload: memoryview | None, most: int) -> None:
        """As `submit`, but the request may be sent later, together with others.

        It is, when there are ``most`` of them, when they are large, when somebody calls `push`,
        or when everything that has been sent is answered. Only while a reader thread runs.
        """
        with self._state:
            self._register(pending)
            self._queue.append(self._header_of(pending, flags, payload))
            if payload is not None:
                self._queue.append(payload)
                self._queued_bytes += len(payload)
            self._queued += 1
            later = (
                self._queued < most
                and self._queued_bytes < _QUEUE_BYTES
                and self._queued < len(self._pending)
            )
        if not later:
            self.push()

    def push(self) -> None:
        """Send what is queued."""
        while self._queue:
            with self._send_lock:
                self._send_queue()
            if not self._again:
                return

    def _send_queue(self) -> None:
        with self._state:
            queue, self._queue, payload = self._queue, [], self._queued_bytes
            self._queued = self._queued_bytes = 0
            self._again = False
        try:
            if payload:
                send_all(self._stream, *queue)
            else:
                send_all(self._stream, b"".join(queue))
        except (NBDError, OSError) as error:
            self.fail(error)
        except BaseException as error:
            self.fail(error)
            raise

    def _push_if_starving(self) -> None:
        """Nothing is on its way to the server, and so nobody else may come to push the queue.

        The reader may do that because it cannot be held up: the server has answered everything and
        a queue is small enough for the socket's buffers. A thread that is sending at this moment
        may be held up until we read; so that one is told to look again, and not waited for.
        """
        self._again = True
        if self._send_lock.acquire(blocking=False):
            try:
                self._send_queue()
            finally:
                self._send_lock.release()

    def _header_of(self, pending: Pending, flags: int, payload: memoryview | None) -> bytes:
        length = pending.length
        if payload is not None and self.session.extended:
            flags |= c.CMD_FLAG_PAYLOAD_LEN
            length = len(payload)
        return self._header.pack(
            self._magic, flags, pending.kind, pending.cookie, pending.offset, length
        )

    def _send(self, pending: Pending, flags: int, payload: memoryview | None) -> None:
        header = self._header_of(pending, flags, payload)
        with self._send_lock:
            if payload is None:
                send_all(self._stream, header)
            else:
                send_all(self._stream, header, payload)
        if self._again:
            self.push()

    def wait(self, pending: Pending) -> None:
        """Return when the reply is there. ProtocolError, ConnectionClosed: it never will be."""
        with self._state:
            follow = not pending.done and self._leading
            if follow:
                wake = pending.wake = threading.Lock()
                wake.acquire()
            elif not pending.done:
                pending.leads = self._leading = True
        if follow:
            try:
                wake.acquire()  # its reply is there, all is lost, or it leads now
            except BaseException as error:
                self.fail(error, leader=pending.leads)
                raise
        if pending.leads:
            self._lead(pending)
        if pending.lost:
            self._raise_failure()

    # Reading the replies

    def _lead(self, own: Pending) -> None:
        """Read replies until that of ``own`` is there; then let another thread lead."""
        try:
            while not own.done:
                self._read_some()
        except (NBDError, OSError) as error:
            self.fail(error, leader=True)
            return
        except BaseException as error:
            self.fail(error, leader=True)
            raise
        with self._state:
            lost = self._pass_on()
        self._tell(lost)

    def _read_some(self) -> None:
        finished: list[Pending] = []
        try:
            self._replies.read(finished)
        finally:  # what came before something was wrong has come
            self._finish(finished)

    def _finish(self, finished: list[Pending]) -> None:
        with self._state:
            for pending in finished:
                self._wake(pending)
            starving = 0 < self._queued == len(self._pending)
        if starving:
            self._push_if_starving()
        self._tell(finished)

    def start_reader(self, sink: Sink) -> threading.Thread:
        """A thread that reads all replies, until `stop_reader`. RuntimeError if there is one.

        ``sink`` is called, without a lock, with requests that have tickets and are done or lost.
        """
        with self._state:
            if self._reader_wanted:
                raise RuntimeError("this connection has a reader thread already")
            self._reader_wanted = True
            self._sink = sink
        thread = threading.Thread(target=self._read_all, name="nbd-reader", daemon=True)
        thread.start()
        return thread

    def stop_reader(self) -> None:
        """The reader thread ends when nothing is in flight any more."""
        with self._state:
            self._reader_wanted = False
            self._work.notify()

    def _read_all(self) -> None:
        with self._state:
            self._left.wait_for(lambda: not self._leading)
            self._leading = True
        try:
            while self._more_to_read():
                self._read_some()
        except BaseException as error:  # whatever it is, nobody else would read on
            self.fail(error, leader=True)

    def _more_to_read(self) -> bool:
        """Wait for a request in flight; False when the reader thread is to end."""
        with self._state:
            while not self._pending and self._reader_wanted and self._failure is None:
                self._idle = True
                self._work.wait()
                self._idle = False
            if self._pending and self._failure is None:
                return True
            lost = self._pass_on()
        self._tell(lost)
        return False

    def _tell(self, over: list[Pending]) -> None:
        """Those that have tickets go to the pipeline, which is one at a time."""
        mine = [pending for pending in over if pending.ticket is not None]
        if mine and self._sink is not None:
            self._sink(self, mine)

    # Helpers that want self._state to be held

    def _pass_on(self) -> list[Pending]:
        """Let another thread lead. Returns those that are lost, to be told without the lock."""
        if self._failure is not None:
            return self._abandon()
        heir = next((x for x in self._pending.values() if x.wake is not None), None)
        if heir is None or heir.wake is None or self._reader_wanted:
            self._stop_leading()
        else:
            heir.leads = True
            heir.wake.release()
        return []

    def _wake(self, pending: Pending) -> None:
        pending.view = None
        pending.done = True
        if pending.wake is not None:
            pending.wake.release()

    def _stop_leading(self) -> None:
        self._leading = False
        self._left.notify_all()

    def _abandon(self) -> list[Pending]:
        lost = list(self._pending.values())
        self._pending.clear()
        self._queue.clear()
        self._queued = self._queued_bytes = 0
        for pending in lost:
            pending.lost = True
            self._wake(pending)
        self._stop_leading()
        return lost

    # The end

    def fail(self, error: BaseException, leader: bool = False) -> None:
        """The connection is over; the first ``error`` is kept.

        While a thread leads, only that one wakes those who wait: it may still be filling their
        buffers. Shutting the stream down makes it stop.
        """
        with self._state:
            if self._failure is None:
                self._failure = _as_fatal(error)
                if self._watchdog is not None:
                    self._watchdog.stop()
                with contextlib.suppress(OSError):
                    self._stream.shutdown(socket.SHUT_RDWR)
            lost = self._abandon() if leader or not self._leading else []
            self._work.notify()
        self._tell(lost)

    def close(self) -> None:
        """Say good-bye if nothing is in flight, and close. What others wait for fails."""
        with self._state:
            if self._closed:
                return
            self._closed = True
            idle = self._failure is None and not self._pending
        if idle:
            self._say_goodbye()
        self.fail(ConnectionClosed("this client has been closed"))
        # The descriptor's number must not be used again while another thread sends or receives.
        with self._send_lock, self._left:
            self._left.wait_for(lambda: not self._leading)
            self._stream.close()

    def _say_goodbye(self) -> None:
        if not self._send_lock.acquire(blocking=False):
            return
        try:
            header = self._header.pack(self._magic, 0, c.CMD_DISC, 0, 0, 0)
            with contextlib.suppress(NBDError, OSError):
                self._stream.sendall(header, socket.MSG_DONTWAIT)
        finally:
            self._send_lock.release()

    def _raise_failure(self) -> NoReturn:
        failure = self._failure or ConnectionClosed("the connection is lost")
        raise type(failure)(*failure.args)  # a new one: several threads must not share a traceback


def _widen(stream: Stream) -> None:
    """Linux gives a Unix socket 208 KiB: less than one request, so that each took several turns."""
    if isinstance(stream, socket.socket) and stream.family == socket.AF_UNIX:
        with contextlib.suppress(OSError):
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)


def _as_fatal(error: BaseException) -> NBDError:
    if isinstance(error, NBDError) and not isinstance(error, OSError):
        return error
    return ConnectionClosed(f"the connection failed: {error or type(error).__name__}")

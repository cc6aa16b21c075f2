# SPDX-License-Identifier: Apache-2.0
"""One control client's connection: a socket, its session, and the thread that serves both."""

import logging
import select
import socket
import threading
import time
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from fleece.control.events import Events
from fleece.control.session import Session
from fleece.control.wakeup import Wakeup

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger(__name__)

_READ: Final = 64 << 10
_MAX_OUTPUT: Final = 4 << 20  # bytes that wait for a client who does not read
_FLUSH_SECONDS: Final = 1.0  # for the last replies, once it is over


class Connection:
    """Serves one accepted socket in a thread of its own, from ``start`` until the client leaves.

    Replies and events share one queue, so their order is the order in which they came about. Any
    thread may add an event; only the connection's own thread writes to the socket. A client who
    lets more than 4 MiB pile up is disconnected: events cannot be left out silently.
    """

    def __init__(self, sock: socket.socket, session: Session, events: Events, name: str) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._session = session
        self._events = events
        self._wakeup = Wakeup(sock)
        self._lock = threading.Lock()
        self._output: deque[memoryview] = deque()
        self._waiting = 0
        self._deadline: float | None = None
        self._unsubscribe: Callable[[], None] | None = None
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)

    def stop(self) -> None:
        """Ask it to send what is queued and to close. Returns at once; ``thread`` ends soon."""
        self._finish()
        self._wakeup.wake()

    def abort(self) -> None:
        """Cut the line, whatever is under way."""
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def _finish(self) -> None:
        with self._lock:
            self._deadline = self._deadline or time.monotonic() + _FLUSH_SECONDS

    def _run(self) -> None:
        try:
            self._queue(self._session.greeting())
            while self._deadline is None:
                self._turn()
            self._flush_all()
        except OSError as error:
            log.debug("control client gone", extra={"reason": str(error)})
        finally:
            self._close()

    def _turn(self) -> None:
        ready = self._wakeup.wait(select.POLLIN | (select.POLLOUT if self._output else 0))
        if ready & select.POLLOUT:
            self._write()
        if ready & select.POLLIN:
            self._read()

    def _read(self) -> None:
        try:
            data = self._sock.recv(_READ)
        except BlockingIOError:
            return
        for reply in self._session.receive(data):
            self._queue(reply)
            self._listen_to_events()
            self._flush_all()
            if self._deadline is not None:
                return
        if self._session.over or not data:
            self._finish()

    def _listen_to_events(self) -> None:
        # Not before the reply to qmp_capabilities is queued: a client waits for that one first.
        if self._session.negotiated and self._unsubscribe is None:
            self._unsubscribe = self._events.subscribe(self._event)

    def _event(self, line: bytes) -> None:
        self._queue(line)
        if self._waiting > _MAX_OUTPUT:
            log.warning("control client does not read its events: disconnected")
            self.abort()
        self._wakeup.wake()

    def _queue(self, line: bytes) -> None:
        with self._lock:
            self._output.append(memoryview(line))
            self._waiting += len(line)

    def _flush_all(self) -> None:
        """Send all that is queued before more is read; in bounded time once it is over."""
        while self._output:
            left = self._seconds_left()
            if self._wakeup.wait(select.POLLOUT, left):
                self._write()
            elif left == 0:
                return

    def _seconds_left(self) -> float | None:
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def _write(self) -> None:
        with self._lock:
            line = self._output[0]
            try:
                sent = self._sock.send(line, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return
            self._waiting -= sent
            if sent == len(line):
                self._output.popleft()
            else:
                self._output[0] = line[sent:]

    def _close(self) -> None:
        if self._unsubscribe is not None:
            self._unsubscribe()
        self._wakeup.close()
        self._sock.close()

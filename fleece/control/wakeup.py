# SPDX-License-Identifier: Apache-2.0
"""Waiting for a socket and for another thread at the same time."""

import os
import select
import socket
import threading
from contextlib import suppress


class Wakeup:
    """``wait`` until the socket is ready or another thread calls ``wake``. Costs nothing idle."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lock = threading.Lock()
        self._closed = False

    def wake(self) -> None:
        """Let the waiting thread go on, now or at its next wait. Harmless after ``close``."""
        with self._lock:
            if not self._closed:
                os.eventfd_write(self._event, 1)

    def wait(self, events: int, timeout: float | None = None) -> int:
        """Until one of ``events`` (``select.POLLIN``, ``POLLOUT``) is true for the socket.

        Returns those that are, 0 after ``wake`` or ``timeout`` seconds. An error or a hang-up
        counts as all of them: the read or write that follows will tell.
        """
        poller = select.poll()
        poller.register(self._event, select.POLLIN)
        if events:  # with none asked for, poll would still return at once for a hang-up
            poller.register(self._sock, events)
        ready = dict(poller.poll(None if timeout is None else max(0, round(timeout * 1000))))
        if ready.pop(self._event, 0):
            with suppress(BlockingIOError):
                os.eventfd_read(self._event)
        found = ready.get(self._sock.fileno(), 0)
        return events if found & ~events else found

    def close(self) -> None:
        """Release the descriptor; the socket is the caller's."""
        with self._lock:
            self._closed = True
            os.close(self._event)

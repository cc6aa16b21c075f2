# SPDX-License-Identifier: Apache-2.0
"""The QMP server: listens at a unix socket and gives each client a thread."""

import logging
import select
import socket
import threading
import time
from itertools import count
from typing import Final

from fleece.control.commands import REGISTRY
from fleece.control.connection import Connection
from fleece.control.events import Events
from fleece.control.listener import Listener
from fleece.control.registry import Registry
from fleece.control.service import Service
from fleece.control.session import Session
from fleece.control.wakeup import Wakeup

log = logging.getLogger(__name__)

_MAX_CLIENTS: Final = 64
_ACCEPT_RETRY_SECONDS: Final = 1.0


class ControlServer:
    """Serves ``service`` at the unix socket ``path`` (mode 0600), from ``start`` to ``stop``.

    Making one binds the socket, so that AddressError comes before anything else is started; the
    daemon answers only after ``start``. Events emitted on ``events`` reach every client that has
    negotiated.
    """

    def __init__(
        self,
        path: str,
        service: Service,
        events: Events | None = None,
        *,
        registry: Registry = REGISTRY,
    ) -> None:
        self.path = path
        self.events = events or Events()
        self._service = service
        self._registry = registry
        self._listener = Listener(path)
        self._wakeup = Wakeup(self._listener.socket)
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._numbers = count(1)
        self._connections: list[Connection] = []
        self._thread = threading.Thread(target=self._accept_all, name="control", daemon=True)

    def start(self) -> None:
        """Answer clients from now on."""
        self._thread.start()

    def stop(self, timeout: float = 2.0) -> None:
        """Send what is queued, close every connection and the socket, within ``timeout`` seconds.

        A command that runs longer than that is left to end by itself; its client is cut off.
        Stopping twice, or from within a command, is harmless.
        """
        with self._lock:
            if self._stopping.is_set():
                return
            self._stopping.set()
        self._wakeup.wake()
        deadline = time.monotonic() + timeout
        if self._thread.is_alive():
            self._thread.join(timeout)
        self._listener.close()
        self._wakeup.close()
        self._close_connections(deadline)

    def clients(self) -> int:
        """How many clients are connected."""
        return len(self._alive())

    def _close_connections(self, deadline: float) -> None:
        connections = [c for c in self._alive() if c.thread is not threading.current_thread()]
        for connection in connections:
            connection.stop()
        for connection in connections:
            connection.thread.join(max(0.0, deadline - time.monotonic()))
            if connection.thread.is_alive():
                connection.abort()

    def _alive(self) -> list[Connection]:
        with self._lock:
            self._connections = [c for c in self._connections if c.thread.is_alive()]
            return list(self._connections)

    def _accept_all(self) -> None:
        while not self._stopping.is_set():
            if self._wakeup.wait(select.POLLIN):
                self._accept()

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.socket.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:  # most often: no descriptors left. They may come back.
            log.warning("cannot accept a control client", extra={"reason": str(error)})
            self._wakeup.wait(0, _ACCEPT_RETRY_SECONDS)
            return
        if self.clients() >= _MAX_CLIENTS:
            log.warning("control client refused: too many", extra={"limit": _MAX_CLIENTS})
            sock.close()
            return
        self._serve(sock)

    def _serve(self, sock: socket.socket) -> None:
        session = Session(self._registry, self._service)
        name = f"control-{next(self._numbers)}"
        connection = Connection(sock, session, self.events, name)
        with self._lock:
            connection.thread.start()
            self._connections.append(connection)

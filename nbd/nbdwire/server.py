# SPDX-License-Identifier: Apache-2.0
"""The server: exports by name, listeners, and the clients that are connected."""

import contextlib
import errno
import logging
import os
import select
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from struct import Struct
from typing import Any, Final

from nbdwire.connection import HANDSHAKE_SECONDS, Connection, ServedExport
from nbdwire.export import Export, ExtentsFunction, SupportsSessions
from nbdwire.negotiate import ExportInfo
from nbdwire.uri import NBDURI, parse

log = logging.getLogger(__name__)

BACKLOG: Final = 128
MAX_CONNECTIONS: Final = 1024
STOP_SECONDS: Final = 5.0
_CREDENTIALS: Final = Struct("=iII")  # struct ucred: pid, uid, gid


class Server:
    """Exports under names, offered on any number of sockets.

    >>> server = Server()                                  # doctest: +SKIP
    >>> server.add("disk0", node)                          # doctest: +SKIP
    >>> server.listen("nbd+unix:///?socket=/run/x.sock")   # doctest: +SKIP

    ``default`` names the export that a client gets which asks for the empty name. All methods may
    be called from any thread and while clients are connected. At most ``max_connections`` clients
    are served at once, those that are still in the handshake included; a client that has chosen no
    export after ``handshake_seconds`` is hung up.
    """

    def __init__(
        self,
        *,
        default: str | None = None,
        max_connections: int = MAX_CONNECTIONS,
        handshake_seconds: float = HANDSHAKE_SECONDS,
    ) -> None:
        self.default = default
        self._max_connections = max_connections
        self._handshake_seconds = handshake_seconds
        self._exports: dict[str, ServedExport] = {}
        self._listeners: list[_Listener] = []
        self._connections: set[Connection] = set()
        self._lock = threading.Lock()
        self._turn = threading.Lock()  # of the connections: see nbdwire.lookout
        self._stopping = False

    # Exports

    def add(
        self,
        name: str,
        export: Export | SupportsSessions,
        *,
        description: str = "",
        contexts: Mapping[str, ExtentsFunction] | None = None,
    ) -> None:
        """Offer ``export`` under ``name``; ValueError if the name is taken or too long."""
        if len(name.encode()) > 4096 or "\0" in name:
            raise ValueError("an export name has at most 4096 bytes and no NUL")
        served = ServedExport(
            name=name,
            export=export,
            size=export.size,  # type: ignore[union-attr]
            read_only=export.read_only,  # type: ignore[union-attr]
            blocking=getattr(export, "blocking", False),
            description=description,
            contexts=dict(contexts or {}),
        )
        with self._lock:
            if name in self._exports:
                raise ValueError(f"there is an export named {name!r} already")
            self._exports[name] = served

    def remove(self, name: str, timeout: float = STOP_SECONDS) -> None:
        """Take the export away and hang up its clients. On return nobody is inside of it.

        KeyError if there is none of that name; TimeoutError if a client's request does not end
        within ``timeout`` seconds (the export is gone from the list all the same).
        """
        with self._lock:
            del self._exports[name]
            users = [conn for conn in self._connections if conn.export == name]
        self._hang_up(users, timeout, f"export {name!r}")

    @property
    def exports(self) -> list[str]:
        """The names on offer."""
        return list(self._exports)

    def clients(self, name: str | None = None) -> int:
        """How many clients are connected, to the export ``name`` or in all."""
        with self._lock:
            return sum(1 for conn in self._connections if name is None or conn.export == name)

    def listing(self) -> list[tuple[str, str]]:
        """For `nbdwire.negotiate.Catalog`: (name, description) of every export."""
        return [(served.name, served.description) for served in list(self._exports.values())]

    def lookup(self, name: str) -> ExportInfo | None:
        """For `nbdwire.negotiate.Catalog`: the export of that name; "" is the default one."""
        served = self._exports.get(name)
        if served is None and name == "" and self.default is not None:
            served = self._exports.get(self.default)
        return served.info() if served is not None else None

    # Listeners

    def listen(self, uri: str | NBDURI) -> NBDURI:
        """Accept clients at ``uri``; its export name does not matter. OSError if it cannot be had.

        Returns the address as it is now: port 0 has become the port that the system chose. A socket
        file that nobody listens on any more is replaced.
        """
        where = parse(uri) if isinstance(uri, str) else uri
        listener = _Listener(where, self._accepted)
        with self._lock:
            stopping = self._stopping
            if not stopping:
                self._listeners.append(listener)
                listener.thread.start()
        if stopping:
            listener.close()
            raise OSError(errno.ESHUTDOWN, "the server has been stopped")
        return listener.uri

    @property
    def listeners(self) -> list[NBDURI]:
        """Where clients are accepted."""
        return [listener.uri for listener in self._listeners]

    def _accepted(self, sock: socket.socket, peer: str) -> None:
        conn = Connection(
            sock, peer, self, self._enter, self._leave, self._turn, self._handshake_seconds
        )
        with self._lock:
            full = self._stopping or len(self._connections) >= self._max_connections
            if not full:
                self._connections.add(conn)
        if full:
            log.warning("refused peer=%s: %d clients are connected", peer, self._max_connections)
            sock.close()
            return
        try:
            conn.thread.start()
        except RuntimeError:  # the listener must outlive it
            log.warning("refused peer=%s: the system has no thread to spare", peer)
            self._leave(conn)
            sock.close()

    def _enter(self, conn: Connection, name: str) -> ServedExport | None:
        """The client has chosen an export; None if that is gone by now."""
        with self._lock:
            served = self._exports.get(name)
            if served is not None:
                conn.export = name
            return served

    def _leave(self, conn: Connection) -> None:
        with self._lock:
            self._connections.discard(conn)

    # The end

    def stop(self, timeout: float = STOP_SECONDS) -> None:
        """Accept nobody, answer what has been received, hang up. Bounded by ``timeout`` seconds.

        TimeoutError if a request does not end in time (its storage hangs). Idempotent.
        """
        with self._lock:
            self._stopping = True
            listeners, self._listeners = self._listeners, []
        for listener in listeners:
            listener.close()
        with self._lock:
            everybody = list(self._connections)
        self._hang_up(everybody, timeout, "the server")

    def _hang_up(self, connections: Iterable[Connection], timeout: float, what: str) -> None:
        """First let them answer what they have read; half of the time later cut them off."""
        waiting = [conn for conn in connections if conn.thread is not threading.current_thread()]
        deadline = time.monotonic() + timeout
        for how, until in ((socket.SHUT_RD, deadline - timeout / 2), (socket.SHUT_RDWR, deadline)):
            for conn in waiting:
                conn.hang_up(how)
            for conn in waiting:
                conn.thread.join(max(0.0, until - time.monotonic()))
            waiting = [conn for conn in waiting if conn.thread.is_alive()]
        if waiting:
            raise TimeoutError(f"{what}: requests of {len(waiting)} clients do not end")

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class _Listener:
    """A listening socket and the thread that accepts from it."""

    def __init__(self, uri: NBDURI, accepted: Callable[[socket.socket, str], None]) -> None:
        self._sock = _bind(uri)
        self._accepted = accepted
        self._wake, self._alarm = socket.socketpair()
        self._file = None if not uri.socket else _identity(uri.socket)
        self.uri = replace(uri, port=self._sock.getsockname()[1]) if not uri.socket else uri
        self.thread = threading.Thread(target=self._run, name="nbd-accept", daemon=True)

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll()}
            if self._wake.fileno() in ready:
                return
            try:
                sock, address = self._sock.accept()
            except OSError as problem:
                if problem.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                    log.warning("cannot accept a client: %s", problem.strerror)
                    time.sleep(0.1)  # the client stays in the backlog meanwhile
                continue
            sock.setblocking(True)
            self._accepted(sock, _peer_name(sock, address))

    def close(self) -> None:
        """Stop to accept; the socket file goes, unless somebody has put another in its place."""
        self._alarm.close()
        if self.thread.ident is not None:
            self.thread.join()
        self._sock.close()
        self._wake.close()
        if self._file is not None and _identity(self.uri.socket) == self._file:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.uri.socket)


def _bind(uri: NBDURI) -> socket.socket:
    if uri.socket:
        return _bind_unix(uri.socket)
    found = socket.getaddrinfo(uri.host or "localhost", uri.port, type=socket.SOCK_STREAM)
    for family, _, _, _, address in found[:-1]:
        try:
            return _bind_tcp(family, address)
        except OSError as problem:
            # localhost is often ::1 first, also where there is no IPv6.
            if problem.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                raise
    return _bind_tcp(found[-1][0], found[-1][4])


def _bind_tcp(family: int, address: Any) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    sock.setblocking(False)
    return sock


def _bind_unix(path: str) -> socket.socket:
    """A file that a killed server left behind is replaced; anything else is EADDRINUSE."""
    sock = socket.socket(socket.AF_UNIX)
    try:
        if _is_stale(path):
            os.unlink(path)
        sock.bind(path)
        sock.listen(BACKLOG)
    except OSError as problem:
        sock.close()
        number = problem.errno or errno.EINVAL
        raise OSError(number, problem.strerror or str(problem), path) from problem
    sock.setblocking(False)
    return sock


def _is_stale(path: str) -> bool:
    if path.startswith("\0"):  # the abstract name space has no files
        return False
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return False
    except FileNotFoundError:
        return False
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)  # a server that is too busy to accept is alive all the same
        return probe.connect_ex(path) == errno.ECONNREFUSED


def _identity(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino


def _peer_name(sock: socket.socket, address: object) -> str:
    if sock.family != socket.AF_UNIX:
        return f"{address[0]}:{address[1]}" if isinstance(address, tuple) else str(address)
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(raw)
    return f"unix:pid={pid},uid={uid}"

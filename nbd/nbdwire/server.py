# SPDX-License-Identifier: Apache-2.0
"""The server: exports by name, listeners, and the clients that are connected."""

import errno
import logging
import socket
import threading
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final, Literal, Unpack

from nbdwire.access import Rule, as_rules, peer_of
from nbdwire.catalogue import Terms
from nbdwire.connection import HANDSHAKE_SECONDS, Connection, House
from nbdwire.crew import Crew
from nbdwire.errors import URIError
from nbdwire.exports import Exports, OnExport
from nbdwire.idle import IdleWatch
from nbdwire.limits import Budget, Keepalive
from nbdwire.listeners import Listener, Where
from nbdwire.places import Places
from nbdwire.served import Exportable, Offer, serve
from nbdwire.uri import NBDURI, parse

if TYPE_CHECKING:
    from nbdwire.tls import ServerTLS

log = logging.getLogger(__name__)

MAX_CONNECTIONS: Final = 1024
MAX_HANDSHAKES: Final = 256
MAX_BYTES_IN_FLIGHT: Final = 512 << 20
STOP_SECONDS: Final = 5.0
LINGER_SECONDS: Final = 0.1

Access = Rule | Sequence[Rule] | None


class Server:
    """Exports under names, offered on any number of sockets.

    >>> server = Server()                                  # doctest: +SKIP
    >>> server.add("disk0", node)                          # doctest: +SKIP
    >>> server.listen("nbd+unix:///?socket=/run/x.sock")   # doctest: +SKIP

    With ``uri`` it listens there from the start. ``default`` names the export that a client gets
    which asks for the empty name. All methods may be called from any thread and while clients are
    connected.

    Limits: ``max_connections`` clients use exports at once (one more is told so and hung up),
    ``max_handshakes`` others have not chosen one yet (the oldest of these makes room for a new
    one) and have ``handshake_seconds`` for it, TLS included. Buffers above 1 MiB take
    ``max_bytes_in_flight`` together: a client for whose request that does not suffice waits.
    ``idle_seconds``: who asks for nothing so long is hung up (None: nobody is). ``keepalive`` is
    TCP's (None: off).

    ``tls`` is for all listeners that have none of their own. ``hide_exports``: no client is told
    what there is, and who may not use an export is told that there is none. ``on_export`` is called
    when a client asks for a name that was not added (never before it names an export, and never
    twice at once for the same name) and returns what it shall get, or None; when the last such
    client leaves, the export's ``close`` is called, if it has one.
    """

    def __init__(
        self,
        uri: str | NBDURI | None = None,
        *,
        default: str | None = None,
        max_connections: int = MAX_CONNECTIONS,
        max_handshakes: int = MAX_HANDSHAKES,
        handshake_seconds: float = HANDSHAKE_SECONDS,
        max_bytes_in_flight: int = MAX_BYTES_IN_FLIGHT,
        idle_seconds: float | None = None,
        keepalive: Keepalive | None = Keepalive(),  # noqa: B008 (it is frozen)
        tls: "ServerTLS | None" = None,
        hide_exports: bool = False,
        on_export: OnExport | None = None,
    ) -> None:
        self.default = default
        self._tls = tls
        self._hide_exports = hide_exports
        self._lock = threading.Lock()
        self._listeners: list[Listener] = []
        self._connections: set[Connection] = set()
        self._stopping = False
        self._places: Places[Connection] = Places(max_connections, max_handshakes)
        self._exports = Exports(on_export)
        self._crew = Crew()
        self._house = House(
            exports=self._exports,
            places=self._places,
            budget=Budget(max_bytes_in_flight),
            left=self._left,
            handshake_seconds=handshake_seconds,
            keepalive=keepalive,
        )
        self._idle = IdleWatch(idle_seconds, self._everybody) if idle_seconds is not None else None
        if uri is not None:
            self.listen(uri)

    # Exports

    def add(self, name: str, export: Exportable, **offer: Unpack[Offer]) -> None:
        """Offer ``export`` under ``name``; ValueError if the name is taken or too long.

        What else can be said of it (``description``, ``contexts``, ``read_only``, block sizes,
        ``access``, ``tls_required``) is listed at `nbdwire.served.Offer`. One export may be offered
        under several names.
        """
        self._exports.add(serve(name, export, **offer))

    def remove(self, name: str, *, hard: bool = True, timeout: float = STOP_SECONDS) -> None:
        """Take the export away. On return nobody is inside of it.

        ``hard`` answers what its clients have asked and hangs them up; otherwise BusyError if there
        are any. KeyError if there is no export of that name; TimeoutError if a client's request
        does not end within ``timeout`` seconds (the export is gone from the list all the same).
        """
        self._exports.remove(name, (lambda: 0) if hard else (lambda: self.clients(name)))
        users = [conn for conn in self._everybody() if conn.export == name]
        self._hang_up(users, timeout, f"export {name!r}")

    @property
    def exports(self) -> list[str]:
        """The names on offer."""
        return [served.name for served in self._exports.all()]

    def clients(self, name: str | None = None) -> int:
        """How many clients are connected, to the export ``name`` or in all."""
        return sum(1 for conn in self._everybody() if name is None or conn.export == name)

    # Listeners

    def listen(
        self,
        where: Where,
        *,
        tls: "ServerTLS | Literal[False] | None" = None,
        access: Access = None,
        exports: Collection[str] | None = None,
        default: str | None = None,
    ) -> NBDURI:
        """Accept clients at ``where``: a URI, or a bound socket or its descriptor (now ours).

        ``tls`` replaces the server's (False: none here); an ``nbds`` URI makes it required.
        ``access`` are the rules for this listener's clients (`nbdwire.access`), ``exports`` the
        names that are to be had here, ``default`` the one behind the empty name.

        Returns the address as it is now: port 0 has become the port that the system chose. A socket
        file that nobody listens on any more is replaced. OSError if the address cannot be had,
        URIError for an ``nbds`` URI without ``tls``.
        """
        where = parse(where) if isinstance(where, str) else where
        required = isinstance(where, NBDURI) and where.tls
        terms = self._terms(tls, access, exports, default, required=required)
        listener = Listener(where, lambda sock, address: self._accepted(sock, address, terms))
        if terms.mode == "required":
            listener.uri = replace(listener.uri, tls=True)
        with self._lock:
            stopping = self._stopping
            if not stopping:
                self._listeners.append(listener)
                listener.start()
        if stopping:
            listener.close()
            raise OSError(errno.ESHUTDOWN, "the server has been stopped")
        return listener.uri

    def serve_socket(
        self,
        sock: socket.socket,
        *,
        tls: "ServerTLS | Literal[False] | None" = None,
        access: Access = None,
        exports: Collection[str] | None = None,
        default: str | None = None,
    ) -> None:
        """Serve the client at the other end of a connected socket, which is now the server's.

        For a `socket.socketpair`, or one that a service manager accepted. Parameters as `listen`.
        """
        terms = self._terms(tls, access, exports, default)
        sock.setblocking(True)
        self._accepted(sock, _peer_address(sock), terms)

    def _terms(
        self,
        tls: "ServerTLS | Literal[False] | None",
        access: Access,
        exports: Collection[str] | None,
        default: str | None,
        *,
        required: bool = False,
    ) -> Terms:
        chosen = None if tls is False else tls or self._tls
        if required and (chosen is None or chosen.mode == "off"):
            raise URIError("an nbds URI needs tls=ServerTLS(...) to listen there")
        mode = "off" if chosen is None else chosen.mode
        return Terms(
            mode="required" if required else mode,
            tls=chosen,
            access=as_rules(access),
            exports=None if exports is None else frozenset(exports),
            default=default if default is not None else self.default,
            hidden=self._hide_exports,
        )

    @property
    def listeners(self) -> list[NBDURI]:
        """Where clients are accepted."""
        return [listener.uri for listener in self._listeners]

    # Connections

    def _accepted(self, sock: socket.socket, address: object, terms: Terms) -> None:
        try:
            conn = Connection(sock, peer_of(sock, address), terms, self._house)
        except OSError:  # it is gone already
            sock.close()
            return
        with self._lock:
            if self._stopping:
                sock.close()
                return
            self._connections.add(conn)
        oldest = self._places.arrive(conn, conn.peer.origin)
        if oldest is not None:
            oldest.hang_up(why="too many clients chose no export, and it was the first of them")
        try:
            conn.start(self._crew)
        except RuntimeError:  # the listener must outlive it
            log.warning("refused peer=%s: the system has no thread to spare", conn.peer)
            conn.close()
            conn.task.end()

    def _left(self, conn: Connection) -> None:
        with self._lock:
            self._connections.discard(conn)

    def _everybody(self) -> list[Connection]:
        with self._lock:
            return list(self._connections)

    # The end

    def stop(self, timeout: float = STOP_SECONDS) -> None:
        """Accept nobody, answer what has been received, hang up. Bounded by ``timeout`` seconds.

        Requests that come late get ESHUTDOWN. TimeoutError if a request does not end in time (its
        storage hangs). Idempotent.
        """
        with self._lock:
            self._stopping = True
            listeners, self._listeners = self._listeners, []
        for listener in listeners:
            listener.close()
        if self._idle is not None:
            self._idle.stop()
        self._crew.stop()
        until = time.monotonic() + timeout
        self._hang_up(self._everybody(), timeout, "the server")
        self._crew.join(until)

    def _hang_up(self, connections: Iterable[Connection], timeout: float, what: str) -> None:
        """Let them answer what they have read; half of the time later cut them off.

        For a moment in between they go on reading, to tell ESHUTDOWN to those who still ask.
        """
        waiting = [conn for conn in connections if not conn.task.is_mine()]
        now = time.monotonic()
        for conn in waiting:
            conn.stopping.set()
        waiting = _join(waiting, now + min(LINGER_SECONDS, timeout / 4))
        for how, until in ((socket.SHUT_RD, timeout / 2), (socket.SHUT_RDWR, timeout)):
            for conn in waiting:
                conn.hang_up(how, f"{what} was stopped")
            waiting = _join(waiting, now + until)
        if waiting:
            raise TimeoutError(f"{what}: requests of {len(waiting)} clients do not end")

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _join(connections: Iterable[Connection], until: float) -> list[Connection]:
    """Wait for their ends; those that are still there at ``until`` (`time.monotonic`)."""
    return [conn for conn in connections if not conn.task.wait(max(0.0, until - time.monotonic()))]


def _peer_address(sock: socket.socket) -> object:
    return sock.getpeername() if sock.family != socket.AF_UNIX else ""

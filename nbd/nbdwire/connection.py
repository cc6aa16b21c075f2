# SPDX-License-Identifier: Apache-2.0
"""One client from accept to close: handshake, the loop that suits the export, the log lines."""

import contextlib
import itertools
import logging
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeAlias

from nbdwire.access import Peer
from nbdwire.catalogue import TOO_MANY, Catalogue, Terms
from nbdwire.crew import Crew, Task
from nbdwire.errors import ConnectionClosed, NBDError, PolicyRefused
from nbdwire.exports import Exports
from nbdwire.followers import Followers
from nbdwire.limits import Budget, Keepalive
from nbdwire.negotiate import Negotiated, server_handshake, server_refusal
from nbdwire.requests import Requests
from nbdwire.served import PlainSession, ServedExport
from nbdwire.transport import Stream, Upgrader, establish, tune
from nbdwire.worker import Worker

if TYPE_CHECKING:
    from nbdwire.places import Places

__all__ = ["Connection", "House", "PlainSession", "ServedExport"]

log = logging.getLogger(__name__)

HANDSHAKE_SECONDS: Final = 10.0
UNTOLD: Final = (
    "it did not say why; often it does not trust whoever signed this server's certificate, or the "
    "certificate is for another name"
)
REFUSAL_SECONDS: Final = 2.0
SOCKET_BUFFER: Final = 2 << 20
_DRAIN_MOST: Final = 16  # receptions of what a client has sent and nobody will read

Loop: TypeAlias = Worker | Followers


@dataclass
class House:
    """What all connections of a server share. ``left`` is called at the end of each."""

    exports: Exports
    places: "Places[Connection]"
    budget: Budget
    left: Callable[["Connection"], None]
    handshake_seconds: float = HANDSHAKE_SECONDS
    keepalive: Keepalive | None = field(default_factory=Keepalive)
    turn: threading.Lock = field(default_factory=threading.Lock)  # see nbdwire.lookout


class Connection:
    """A client. `run` is the body of its thread; `hang_up` may be called from any other."""

    _numbers = itertools.count(1)

    def __init__(self, sock: socket.socket, peer: Peer, terms: Terms, house: House) -> None:
        self.number = next(self._numbers)
        self.export: str | None = None
        self.stopping = threading.Event()
        self._sock = sock
        self._stream: Stream = sock
        self._terms = terms
        self._house = house
        self._catalogue = Catalogue(
            house.exports,
            terms,
            peer,
            reserve=lambda: house.places.reserve(self),
            stopping=self.stopping.is_set,
        )
        self._account = house.budget.open(lambda why: self.hang_up(socket.SHUT_RDWR, why))
        self._loop: Loop | None = None
        self._why = ""
        self._turned = False  # to TLS, with or without success
        self._closing = threading.Lock()
        self.task = Task()

    @property
    def peer(self) -> Peer:
        """The other end, as far as it is known."""
        return self._catalogue.peer

    def start(self, crew: Crew) -> None:
        """Serve the client in a thread of ``crew``; RuntimeError if there is none to be had."""
        crew.do(self.run, self.task, f"nbd-{self.number}")

    def run(self) -> None:
        """Serve the client until it leaves, breaks the protocol, or is hung up."""
        try:
            negotiated = self._handshake()
            if negotiated is not None:
                self._transmit(negotiated)
            else:
                self._log_left("it chose no export")
        except ConnectionClosed as problem:
            self._log_left(str(problem))
        except (NBDError, OSError) as problem:
            self._log_refused(self._why or self._catalogue.refused or str(problem))
        except Exception as problem:  # a fault of ours must not end the server
            log.error("connection=%d ended by a fault of this program: %r", self.number, problem)
            log.debug("where it happened", exc_info=problem)
        finally:
            self.close()

    def close(self) -> None:
        """Give everything back. For the connection's thread, or if that could not be started."""
        self._house.places.leave(self)  # so that a client which sees the end may come again
        with self._closing:
            with contextlib.suppress(NBDError, OSError):
                if self._stream is self._sock:
                    self._drain()  # a TLS stream does it itself, after its close_notify
            with contextlib.suppress(NBDError, OSError):
                self._stream.close()
            self._sock.close()
        self._account.end()
        self._catalogue.release()
        self._house.left(self)

    def _drain(self) -> None:
        """To close a TCP socket with unread input would reset it, under replies on their way."""
        if self._sock.family == socket.AF_UNIX:
            return
        for _ in range(_DRAIN_MOST):
            if not self._sock.recv(1 << 16, socket.MSG_DONTWAIT):
                return

    def hang_up(self, how: int = socket.SHUT_RDWR, why: str = "") -> None:
        """Wake the thread out of the socket. SHUT_RD lets it answer what it has read."""
        self._why = self._why or why
        if how == socket.SHUT_RDWR:
            self._account.close()
        # The lock: a descriptor that is just being closed may already be another connection's.
        with self._closing, contextlib.suppress(OSError):  # the client may be gone already
            self._sock.shutdown(how)

    def activity(self) -> int | None:
        """A number that grows with each request; None before there can be any."""
        loop = self._loop
        return None if loop is None else loop.reads + loop.writes + loop.others

    # Before transmission

    def _handshake(self) -> Negotiated | None:
        self._tune()
        deadline = time.monotonic() + self._house.handshake_seconds
        if self._house.places.full():
            deadline = min(deadline, time.monotonic() + REFUSAL_SECONDS)
            self._catalogue.refused = TOO_MANY
            establish(self._sock, server_refusal(TOO_MANY), deadline)
            return None
        handshake = server_handshake(self._catalogue, tls=self._terms.mode, stopping=self.stopping)
        result, self._stream = establish(self._sock, handshake, deadline, self._upgrader())
        return result

    def _tune(self) -> None:
        sock, keepalive = self._sock, self._house.keepalive
        tune(sock)
        if sock.family == socket.AF_UNIX:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER)
        elif sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, keepalive is not None)
            if keepalive is not None:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, keepalive.idle)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, keepalive.interval)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, keepalive.count)

    def _upgrader(self) -> Upgrader | None:
        tls = self._terms.tls
        if tls is None or self._terms.mode == "off":
            return None

        def upgrade(sock: socket.socket) -> Stream:
            self._catalogue.refused = ""
            self._turned = True
            stream = tls.upgrade(sock)
            self._catalogue.peer = self.peer.with_tls(stream)
            return stream

        return upgrade

    # Transmission

    def _transmit(self, negotiated: Negotiated) -> None:
        served = self._enter(negotiated)
        requests = Requests(
            size=served.size,
            flags=negotiated.flags,
            structured=negotiated.structured,
            contexts=negotiated.contexts,
            functions=served.contexts,
            extended=negotiated.extended,
            minimum_block=served.minimum_block,
            maximum_payload=served.maximum_payload,
            stopping=self.stopping,
            account=self._account,
        )
        if served.blocking:
            loop = Followers(self._stream, served.open_session, requests)
            self._serve(loop, negotiated)
            return
        session = served.open_session()
        try:
            self._serve(Worker(self._stream, session, requests, self._house.turn), negotiated)
        finally:
            session.close()

    def _enter(self, negotiated: Negotiated) -> ServedExport:
        """Take a place at the export, which may have gone since it was negotiated."""
        served, house = self._catalogue.selected, self._house
        if served is None or served.name != negotiated.export.name:
            raise PolicyRefused(f"export {negotiated.export.name!r} was not granted")
        if not house.places.enter(self):
            raise PolicyRefused(TOO_MANY)
        if not house.exports.enter(served, self._entered):
            raise PolicyRefused(f"export {served.name!r} was removed meanwhile")
        return served

    def _entered(self) -> None:
        assert self._catalogue.selected is not None
        self.export = self._catalogue.selected.name

    def _serve(self, loop: Loop, negotiated: Negotiated) -> None:
        self._log_open(negotiated)
        began, reason = time.monotonic(), "the client left"
        self._loop = loop
        try:
            loop.run()
        except ConnectionClosed:
            reason = "the client left in the middle of a request"
        except (NBDError, OSError) as problem:
            reason = str(problem)
        finally:
            self._log_close(loop, time.monotonic() - began, self._why or reason)

    # The log

    def _log_left(self, why: str) -> None:
        """It left, or was hung up, before transmission."""
        refused = self._why or self._catalogue.refused
        if refused:
            self._log_refused(refused)
        elif self._turned and not self.peer.tls:
            self._log_refused(f"no TLS: {why} ({UNTOLD})")
        elif self._terms.mode == "required" and not self.peer.tls:
            self._log_refused(f"it did not turn to TLS, which is required here ({why})")
        else:
            log.info("left connection=%d peer=%s: %s", self.number, self.peer, why)

    def _log_refused(self, why: str) -> None:
        log.info("refused connection=%d peer=%s: %s", self.number, self.peer, why)

    def _log_open(self, negotiated: Negotiated) -> None:
        headers = "structured" if negotiated.structured else "simple"
        log.info(
            "open connection=%d peer=%s tls=%s export=%r headers=%s contexts=%s",
            self.number,
            self.peer,
            self.peer.tls or "no",
            self.export,
            "extended" if negotiated.extended else headers,
            ",".join(name for _, name in negotiated.contexts) or "none",
        )

    def _log_close(self, loop: Loop, seconds: float, reason: str) -> None:
        log.info(
            "close connection=%d reads=%d writes=%d others=%d bytes-read=%d bytes-written=%d "
            "seconds=%.3f slowest=%.6f: %s",
            self.number,
            loop.reads,
            loop.writes,
            loop.others,
            loop.bytes_read,
            loop.bytes_written,
            seconds,
            loop.slowest,
            reason,
        )

# SPDX-License-Identifier: Apache-2.0
"""One client from accept to close: handshake, the loop that suits the export, the log lines."""

import contextlib
import itertools
import logging
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Final

from nbdwire import constants as c
from nbdwire.errors import ConnectionClosed, NBDError
from nbdwire.export import Export, ExtentsFunction, Session, SupportsSessions
from nbdwire.followers import Followers
from nbdwire.negotiate import Catalog, ExportInfo, Negotiated, server_handshake
from nbdwire.requests import Requests
from nbdwire.transport import run_handshake, tune
from nbdwire.worker import Worker

log = logging.getLogger(__name__)

HANDSHAKE_SECONDS: Final = 10.0
SOCKET_BUFFER: Final = 2 << 20

_CAN: Final = (
    c.TFLAG_HAS_FLAGS
    | c.TFLAG_SEND_FLUSH
    | c.TFLAG_SEND_FUA
    | c.TFLAG_SEND_DF
    | c.TFLAG_SEND_CACHE
    | c.TFLAG_CAN_MULTI_CONN
)
_CAN_WRITE: Final = c.TFLAG_SEND_TRIM | c.TFLAG_SEND_WRITE_ZEROES | c.TFLAG_SEND_FAST_ZERO


@dataclass(frozen=True)
class PlainSession:
    """The session of an export that gives none: no gate, always the same node."""

    node: Export
    gate: contextlib.AbstractContextManager[object] = field(default_factory=nullcontext)

    def close(self) -> None:
        """Nothing to give back."""


@dataclass(frozen=True)
class ServedExport:
    """An export under a name. ``contexts``: what BLOCK_STATUS tells beside the allocation."""

    name: str
    export: Export | SupportsSessions
    size: int
    read_only: bool
    blocking: bool = False
    description: str = ""
    contexts: Mapping[str, ExtentsFunction] = field(default_factory=dict)

    def info(self) -> ExportInfo:
        """What the handshake tells clients."""
        return ExportInfo(
            name=self.name,
            size=self.size,
            flags=_CAN | (c.TFLAG_READ_ONLY if self.read_only else _CAN_WRITE),
            description=self.description,
            contexts=(c.CONTEXT_BASE_ALLOCATION, *self.contexts),
        )

    def open_session(self) -> Session:
        """An object for one connection, or for one of its threads."""
        if isinstance(self.export, SupportsSessions):
            return self.export.open_session()
        return PlainSession(self.export)


class Connection:
    """A client. `run` is the body of its thread; `hang_up` may be called from any other."""

    _numbers = itertools.count(1)

    def __init__(
        self,
        sock: socket.socket,
        peer: str,
        catalog: Catalog,
        enter: Callable[["Connection", str], ServedExport | None],
        leave: Callable[["Connection"], None],
        turn: threading.Lock,
        handshake_seconds: float = HANDSHAKE_SECONDS,
    ) -> None:
        self.number = next(self._numbers)
        self.peer = peer
        self.export: str | None = None
        self._sock = sock
        self._catalog = catalog
        self._enter = enter
        self._leave = leave
        self._turn = turn
        self._handshake_seconds = handshake_seconds
        self._closing = threading.Lock()
        self.thread = threading.Thread(target=self.run, name=f"nbd-{self.number}", daemon=True)

    def run(self) -> None:
        """Serve the client until it leaves, breaks the protocol, or is hung up."""
        try:
            negotiated = self._handshake()
            if negotiated is not None:
                self._transmit(negotiated)
        except (NBDError, OSError) as problem:
            log.info("refused connection=%d peer=%s: %s", self.number, self.peer, problem)
        except Exception as problem:  # a fault of ours must not end the server
            log.error("connection=%d ended by a fault of this program: %r", self.number, problem)
            log.debug("where it happened", exc_info=problem)
        finally:
            with self._closing:
                self._sock.close()
            self._leave(self)

    def hang_up(self, how: int = socket.SHUT_RDWR) -> None:
        """Wake the thread out of the socket. SHUT_RD lets it answer what it has read."""
        # The lock: a descriptor that is just being closed may already be another connection's.
        with self._closing, contextlib.suppress(OSError):  # the client may be gone already
            self._sock.shutdown(how)

    def _handshake(self) -> Negotiated | None:
        tune(self._sock)
        if self._sock.family == socket.AF_UNIX:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER)
        deadline = time.monotonic() + self._handshake_seconds
        return run_handshake(self._sock, server_handshake(self._catalog), deadline)

    def _transmit(self, negotiated: Negotiated) -> None:
        served = self._enter(self, negotiated.export.name)
        if served is None or served.info() != negotiated.export:
            return  # it was removed, or replaced by another, since it was negotiated
        requests = Requests(
            size=served.size,
            flags=negotiated.flags,
            structured=negotiated.structured,
            contexts=negotiated.contexts,
            functions=served.contexts,
        )
        log.info(
            "open connection=%d peer=%s export=%r structured=%s contexts=%s",
            self.number,
            self.peer,
            served.name,
            "yes" if negotiated.structured else "no",
            ",".join(name for _, name in negotiated.contexts) or "none",
        )
        if served.blocking:
            self._serve(Followers(self._sock, served.open_session, requests))
            return
        session = served.open_session()
        try:
            self._serve(Worker(self._sock, session, requests, self._turn))
        finally:
            session.close()

    def _serve(self, loop: Worker | Followers) -> None:
        began, reason = time.monotonic(), "the client left"
        try:
            loop.run()
        except ConnectionClosed:
            reason = "the client left in the middle of a request"
        except (NBDError, OSError) as problem:
            reason = str(problem)
        finally:
            log.info(
                "close connection=%d reads=%d writes=%d others=%d bytes-read=%d bytes-written=%d "
                "seconds=%.3f: %s",
                self.number,
                loop.reads,
                loop.writes,
                loop.others,
                loop.bytes_read,
                loop.bytes_written,
                time.monotonic() - began,
                reason,
            )

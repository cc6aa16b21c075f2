# SPDX-License-Identifier: Apache-2.0
"""Requests that need not be waited for one by one.

A `Pipeline` sends a request and returns a `Ticket`; up to ``depth`` requests are in flight, and
whoever submits more waits for a free place. One thread for each connection reads the replies, so a
server that is held up by its replies never holds up its requests for good.
"""

import threading
from collections.abc import Callable, Collection, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Final, TypeAlias

from nbdwire import constants as c
from nbdwire.checks import (
    check_range,
    check_writable,
    context_ids,
    cut,
    effect_limit,
    need,
    payload_limit,
    status_request,
)
from nbdwire.errors import ConnectionClosed, NBDError, RequestError
from nbdwire.extents import Extent
from nbdwire.replies import Pending

if TYPE_CHECKING:
    from nbdwire.client import Client
    from nbdwire.link import Link

DEPTH: Final = 64
"""Requests in flight."""

_REMEMBERED: Final = 1000  # failed tickets that are kept until somebody looks at them


class Ticket:
    """One submitted call, which may be several requests on the wire.

    When it is ``done``, ``error`` is None or what went wrong: RequestError, ProtocolError or
    ConnectionClosed.
    """

    __slots__ = ("_left", "_names", "_pipeline", "_then", "_wake", "done", "error", "statuses")

    def __init__(self, pipeline: "Pipeline", then: "Callback | None", parts: int = 1) -> None:
        self.done = False
        self.error: NBDError | None = None
        self.statuses: dict[str, list[Extent]] = {}
        self._names: dict[int, str] = {}
        self._pipeline = pipeline
        self._then = then
        self._left = parts
        self._wake = threading.Lock()
        self._wake.acquire()

    def result(self) -> dict[str, list[Extent]]:
        """Wait; raise ``error`` if there is one. Returns what `Pipeline.status` was asked for."""
        if not self.done:
            self._pipeline._not_in_a_callback()
            with self._wake:  # held from the beginning until it is done
                pass
        if self.error is not None:
            self._pipeline._seen(self)
            raise self.error
        return self.statuses


Callback: TypeAlias = Callable[[Ticket], None]
"""Called with a ticket that is done, in a thread that reads replies: it must neither wait for
the same pipeline nor submit to it (RuntimeError), nor close its client."""


class Pipeline:
    """Requests in flight on one connection or several to the same export (`nbdwire.pool`).

    The verbs are those of `Client`, but return at once, or as soon as fewer than ``depth`` requests
    are in flight. A buffer must not be touched until its ticket is done. Requests in flight may be
    carried out in any order: what must come after must be submitted after.

    ``then`` is called when the ticket is done and takes the error upon itself. Without it an error
    is raised by `Ticket.result`, and if nobody asks there, by `drain`, `flush` or the end of the
    ``with`` block: no completion goes unchecked.
    """

    def __init__(self, clients: "Sequence[Client]", depth: int = DEPTH) -> None:
        if depth < 1 or not clients:
            raise ValueError("a pipeline needs a connection and a depth of at least 1")
        self.session = clients[0].session
        self.depth = depth
        self._clients = list(clients)
        self._links: list[Link] = [client.link for client in clients]
        self._next = 0
        self._payload = payload_limit(self.session)
        self._effect_limit = effect_limit(self.session)
        # Whoever waits for a place is woken when a quarter is free: it then sends a batch.
        self._low = depth - max(1, depth // 4)
        self._lock = threading.Lock()
        self._room = threading.Condition(self._lock)
        self._empty = threading.Condition(self._lock)
        self._in_flight = 0
        self._waiting = 0
        self._failed: dict[Ticket, None] = {}
        self._closed = False
        self._readers = self._start_readers()

    def _start_readers(self) -> list[threading.Thread]:
        started: list[threading.Thread] = []
        try:
            for link in self._links:
                started.append(link.start_reader())
        except BaseException:
            for link in self._links[: len(started)]:
                link.stop_reader()
            raise
        return started

    def __enter__(self) -> "Pipeline":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self.drain()
        finally:
            self.close()

    # The verbs

    def pread_into(self, buf: memoryview, offset: int, then: Callback | None = None) -> Ticket:
        """READ: fill ``buf``."""
        view = memoryview(buf).cast("B")
        check_range(self.session, offset, len(view))
        return self._send_data(c.CMD_READ, view, offset, 0, then)

    def pwrite(
        self,
        buf: memoryview | bytes | bytearray,
        offset: int,
        fua: bool = False,
        then: Callback | None = None,
    ) -> Ticket:
        """WRITE; ``fua`` needs a server that has it (else EOPNOTSUPP: `flush` instead)."""
        view = memoryview(buf).cast("B")
        check_writable(self.session, offset, len(view))
        flags = c.CMD_FLAG_FUA if fua else 0
        self._check_flags(flags)
        return self._send_data(c.CMD_WRITE, view, offset, flags, then)

    def zero(
        self, offset: int, length: int, flags: int = 0, then: Callback | None = None
    ) -> Ticket:
        """WRITE_ZEROES, with flags as `Client.zero`; EOPNOTSUPP if the server does not have it."""
        check_writable(self.session, offset, length)
        need(self.session, c.TFLAG_SEND_WRITE_ZEROES, "writing zeroes")
        self._check_flags(flags)
        return self._send_effect(c.CMD_WRITE_ZEROES, offset, length, flags, then)

    def trim(
        self, offset: int, length: int, flags: int = 0, then: Callback | None = None
    ) -> Ticket:
        """TRIM."""
        check_writable(self.session, offset, length)
        need(self.session, c.TFLAG_SEND_TRIM, "trimming")
        self._check_flags(flags)
        return self._send_effect(c.CMD_TRIM, offset, length, flags, then)

    def cache(self, offset: int, length: int, then: Callback | None = None) -> Ticket:
        """CACHE."""
        check_range(self.session, offset, length)
        need(self.session, c.TFLAG_SEND_CACHE, "caching")
        return self._send_effect(c.CMD_CACHE, offset, length, 0, then, self._payload)

    def status(
        self,
        offset: int,
        length: int,
        contexts: Collection[str] | None = None,
        then: Callback | None = None,
    ) -> Ticket:
        """BLOCK_STATUS; `Ticket.result` returns what `Client.status` returns."""
        check_range(self.session, offset, length)
        ids = context_ids(self.session, contexts)
        if not ids or not length:
            return self._nothing(then)
        asked = min(length, self._effect_limit)
        pending, payload = status_request(self.session, offset, asked, ids)
        ticket = Ticket(self, then)
        ticket._names = {number: name for number, name in self.session.contexts if number in ids}
        self._submit(ticket, pending, 0, payload)
        return ticket

    def flush(self) -> None:
        """Wait for everything in flight, raise what went wrong, then make all of it stable."""
        self.drain()
        self._clients[0].flush()

    # Waiting

    def drain(self) -> None:
        """Wait until nothing is in flight; raise the first error that nobody has looked at."""
        self._not_in_a_callback()
        with self._lock:
            self._empty.wait_for(lambda: not self._in_flight)
            failed = next(iter(self._failed), None)
            self._failed.clear()
        if failed is not None and failed.error is not None:
            raise failed.error

    def close(self) -> None:
        """Wait until nothing is in flight, and end the threads. The clients stay open."""
        self._not_in_a_callback()
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._empty.wait_for(lambda: not self._in_flight)
        for link in self._links:
            link.stop_reader()
        for thread in self._readers:
            thread.join()

    def _not_in_a_callback(self) -> None:
        # Not by number: that of a reader that has ended may be another thread's by now.
        if threading.current_thread() in self._readers:
            raise RuntimeError("a callback must not use the pipeline that has called it")

    # Sending

    def _check_flags(self, flags: int) -> None:
        if flags & c.CMD_FLAG_FUA:
            need(self.session, c.TFLAG_SEND_FUA, "FUA")
        if flags & c.CMD_FLAG_FAST_ZERO:
            need(self.session, c.TFLAG_SEND_FAST_ZERO, "fast zeroing")

    def _nothing(self, then: Callback | None) -> Ticket:
        """A ticket that is done: there is nothing to ask."""
        ticket = Ticket(self, then)
        self._complete(ticket)
        return ticket

    def _send_data(
        self, kind: int, view: memoryview, offset: int, flags: int, then: Callback | None
    ) -> Ticket:
        length, step, write = len(view), self._payload, kind == c.CMD_WRITE
        if not length:
            return self._nothing(then)
        ticket = Ticket(self, then, -(-length // step))
        for start in range(0, length, step):
            part = view[start : start + step]
            pending = Pending(kind, offset + start, len(part), None if write else part)
            self._submit(ticket, pending, flags, part if write else None)
        return ticket

    def _send_effect(
        self,
        kind: int,
        offset: int,
        length: int,
        flags: int,
        then: Callback | None,
        step: int | None = None,
    ) -> Ticket:
        if not length:
            return self._nothing(then)
        step = step or self._effect_limit
        ticket = Ticket(self, then, -(-length // step))
        for start, size in cut(offset, length, step):
            self._submit(ticket, Pending(kind, start, size), flags, None)
        return ticket

    def _submit(
        self, ticket: Ticket, pending: Pending, flags: int, payload: memoryview | None
    ) -> None:
        link = self._take_place()
        pending.then = lambda done: self._part_done(ticket, done, link)
        try:
            link.submit(pending, flags, payload)
        except NBDError:  # it was over before: nobody will call back
            pending.lost = True
            self._part_done(ticket, pending, link)

    def _take_place(self) -> "Link":
        """Wait for a place among those in flight. Connections take turns."""
        self._not_in_a_callback()
        with self._lock:
            if self._closed:
                raise RuntimeError("this pipeline has been closed")
            if self._in_flight >= self.depth:
                self._waiting += 1
                self._room.wait_for(lambda: self._in_flight <= self._low)
                self._waiting -= 1
            self._in_flight += 1
            self._next = (self._next + 1) % len(self._links)
            return self._links[self._next]

    # Completions

    def _part_done(self, ticket: Ticket, pending: Pending, link: "Link") -> None:
        if pending.lost:
            failure = link.failure or ConnectionClosed("the connection is lost")
            ticket.error = ticket.error or type(failure)(*failure.args)
        elif pending.error is not None:
            ticket.error = ticket.error or RequestError(*pending.error)
        for number, extents in pending.status.items():
            if number in ticket._names:
                ticket.statuses[ticket._names[number]] = extents
        with self._lock:
            ticket._left -= 1
            last = not ticket._left
        try:
            if last:
                self._complete(ticket)
        finally:
            self._give_place()

    def _complete(self, ticket: Ticket) -> None:
        then = ticket._then
        if ticket.error is not None and then is None:
            self._remember(ticket)
        ticket.done = True
        ticket._wake.release()
        if then is None:
            return
        try:
            then(ticket)
        except Exception as error:  # a fault of the caller's: told to whoever drains
            failed = Ticket(self, None)
            failed.error = NBDError(f"a callback failed: {error!r}")
            failed.error.__cause__ = error
            self._remember(failed)

    def _remember(self, ticket: Ticket) -> None:
        with self._lock:
            if len(self._failed) < _REMEMBERED:
                self._failed[ticket] = None

    def _seen(self, ticket: Ticket) -> None:
        with self._lock:
            self._failed.pop(ticket, None)

    def _give_place(self) -> None:
        with self._lock:
            self._in_flight -= 1
            if self._waiting and self._in_flight <= self._low:
                self._room.notify()
            if not self._in_flight:
                self._empty.notify_all()

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
from nbdwire.pending import Pending

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

    # Not slots: what most tickets never need costs nothing when one is made.
    done = False
    error: NBDError | None = None
    _names: "dict[int, str] | None" = None  # of the contexts that were asked for
    _wake: "threading.Lock | None" = None  # of a thread that waits for it

    def __init__(self, pipeline: "Pipeline", then: "Callback | None", parts: int = 1) -> None:
        self.statuses: dict[str, list[Extent]] = {}
        self._pipeline = pipeline
        self._then = then
        self._left = parts

    def result(self) -> dict[str, list[Extent]]:
        """Wait; raise ``error`` if there is one. Returns what `Pipeline.status` was asked for."""
        if not self.done:
            self._pipeline._wait(self)
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
        # Whoever waits for a place is woken when a part is free: it then sends a batch.
        self._low = depth - max(1, depth // 4)
        self._batch = max(1, depth // 4 // len(clients))
        self._lock = threading.Lock()
        self._room = threading.Condition(self._lock)
        self._empty = threading.Condition(self._lock)
        self._in_flight = 0
        self._waiting = 0
        self._failed: dict[Ticket, None] = {}
        self._closed = False
        self._calling: set[int] = set()  # threads that are in a callback
        self._readers = self._start_readers()

    def _start_readers(self) -> list[threading.Thread]:
        started: list[threading.Thread] = []
        try:
            for link in self._links:
                started.append(link.start_reader(self._over))
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
        self._push()
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
        self._push()
        with self._lock:
            self._empty.wait_for(lambda: not self._in_flight)
        for link in self._links:
            link.stop_reader()
        for thread in self._readers:
            thread.join()

    def _not_in_a_callback(self) -> None:
        if self._calling and threading.get_ident() in self._calling:
            raise RuntimeError("a callback must not use the pipeline that has called it")

    def _push(self) -> None:
        """Send what is queued: somebody waits for it."""
        for link in self._links:
            link.push()

    def _wait(self, ticket: Ticket) -> None:
        self._not_in_a_callback()
        self._push()
        with self._lock:
            if ticket.done:
                return
            if ticket._wake is None:
                ticket._wake = threading.Lock()
                ticket._wake.acquire()
            wake = ticket._wake
        with wake:  # held until it is done
            pass

    # Sending

    def _check_flags(self, flags: int) -> None:
        if flags & c.CMD_FLAG_FUA:
            need(self.session, c.TFLAG_SEND_FUA, "FUA")
        if flags & c.CMD_FLAG_FAST_ZERO:
            need(self.session, c.TFLAG_SEND_FAST_ZERO, "fast zeroing")

    def _nothing(self, then: Callback | None) -> Ticket:
        """A ticket that is done: there is nothing to ask."""
        ticket = Ticket(self, then)
        self._call(ticket)
        return ticket

    def _send_data(
        self, kind: int, view: memoryview, offset: int, flags: int, then: Callback | None
    ) -> Ticket:
        length, step, write = len(view), self._payload, kind == c.CMD_WRITE
        if not length:
            return self._nothing(then)
        ticket = Ticket(self, then, -(-length // step))
        for start in range(0, length, step):
            part = view if length <= step else view[start : start + step]
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
        pending.ticket = ticket
        try:
            link.queue(pending, flags, payload, self._batch)
        except NBDError:  # it was over before: nobody will tell us
            pending.lost = True
            self._over(link, [pending])

    def _take_place(self) -> "Link":
        """Wait for a place among those in flight. Connections take turns."""
        self._not_in_a_callback()
        with self._lock:
            if self._in_flight >= self.depth:
                self._make_room()
            if self._closed:
                raise RuntimeError("this pipeline has been closed")
            self._in_flight += 1
            self._next = (self._next + 1) % len(self._links)
            return self._links[self._next]

    def _make_room(self) -> None:
        self._lock.release()
        try:
            self._push()
        finally:
            self._lock.acquire()
        self._waiting += 1
        self._room.wait_for(lambda: self._in_flight <= self._low)
        self._waiting -= 1

    # Completions

    def _over(self, link: "Link", parts: list[Pending]) -> None:
        """These requests are answered or lost."""
        called: list[Ticket] = []
        with self._lock:
            free = 0
            for pending in parts:
                ticket = pending.ticket
                if ticket is None:
                    continue
                if pending.lost or pending.error is not None or pending.status:
                    self._note(ticket, pending, link)
                ticket._left -= 1
                if ticket._left:
                    free += 1
                elif ticket._then is None:
                    self._complete(ticket)
                    free += 1
                else:
                    called.append(ticket)
            if free:
                self._give_places(free)
        for ticket in called:
            self._call(ticket)
            with self._lock:
                self._give_places(1)

    def _note(self, ticket: Ticket, pending: Pending, link: "Link") -> None:
        """What went wrong, or what was asked for."""
        if pending.lost:
            failure = link.failure or ConnectionClosed("the connection is lost")
            ticket.error = ticket.error or type(failure)(*failure.args)
        elif pending.error is not None:
            ticket.error = ticket.error or RequestError(*pending.error)
        for number, extents in pending.status.items():
            if ticket._names is not None and number in ticket._names:
                ticket.statuses[ticket._names[number]] = extents

    def _complete(self, ticket: Ticket) -> None:
        """The lock is held. A callback takes the error upon itself."""
        if ticket.error is not None and ticket._then is None:
            self._remember(ticket)
        ticket.done = True
        if ticket._wake is not None:
            ticket._wake.release()

    def _call(self, ticket: Ticket) -> None:
        me = threading.get_ident()
        with self._lock:
            self._complete(ticket)
        self._calling.add(me)
        try:
            if ticket._then is not None:
                ticket._then(ticket)
        except Exception as error:  # a fault of the caller's: told to whoever drains
            failed = Ticket(self, None)
            failed.error = NBDError(f"a callback failed: {error!r}")
            failed.error.__cause__ = error
            with self._lock:
                self._remember(failed)
        finally:
            self._calling.discard(me)

    def _remember(self, ticket: Ticket) -> None:
        if len(self._failed) < _REMEMBERED:
            self._failed[ticket] = None

    def _seen(self, ticket: Ticket) -> None:
        with self._lock:
            self._failed.pop(ticket, None)

    def _give_places(self, count: int) -> None:
        self._in_flight -= count
        if self._waiting and self._in_flight <= self._low:
            self._room.notify()
        if not self._in_flight:
            self._empty.notify_all()

# SPDX-License-Identifier: Apache-2.0
"""A pipeline on a connection that is opened again when it is lost.

What was in flight at the loss is submitted again on the new connection: every request reads or
writes the same bytes at the same place, so doing it twice is doing it once. Writes that the server
had acknowledged but not flushed are another matter: `nbdwire.reconnect` tells.

A reader thread cannot wait for a new connection, so whoever waits for a result, or submits, opens
it and submits what is lost. Nothing is opened while nobody does.
"""

import threading
from collections.abc import Callable, Collection
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Final, TypeAlias

from nbdwire import constants as c
from nbdwire.errors import ConnectionClosed, NBDError, is_loss
from nbdwire.extents import Extent
from nbdwire.pipeline import Pipeline, Ticket

if TYPE_CHECKING:
    from nbdwire.reconnect import Reconnecting

Start: TypeAlias = Callable[[Pipeline, Callable[[Ticket], None]], object]

_REMEMBERED: Final = 1000


class Attempt:
    """As `nbdwire.pipeline.Ticket`, of a call that may be made more than once."""

    def __init__(
        self,
        pipeline: "ResumingPipeline",
        start: Start,
        dirty: tuple[int, int],
        then: "Callable[[Attempt], None] | None",
    ) -> None:
        self.done = False
        self.error: NBDError | None = None
        self.statuses: dict[str, list[Extent]] = {}
        self._pipeline = pipeline
        self._start = start
        self._dirty = dirty
        self._then = then
        self._losses = 0

    def result(self) -> dict[str, list[Extent]]:
        """Wait; raise ``error`` if there is one. Returns what `status` was asked for."""
        self._pipeline._settle(lambda: self.done)
        if self.error is not None:
            self._pipeline._seen(self)
            raise self.error
        return self.statuses


class ResumingPipeline:
    """The verbs and promises of `nbdwire.pipeline.Pipeline`. Made by `Reconnecting.pipeline`."""

    def __init__(self, owner: "Reconnecting", depth: int) -> None:
        self._owner = owner
        self._depth = depth
        self._changed = threading.Condition()  # for all that follows
        self._left = 0  # calls that are not done
        self._lost: list[Attempt] = []
        self._failed: dict[Attempt, NBDError] = {}
        self._resuming = threading.RLock()  # held while the connection is opened again
        self._open()

    def _open(self) -> None:
        self._client, self._generation = self._owner._current()
        self._pipeline = self._client.pipeline(self._depth)

    def __enter__(self) -> "ResumingPipeline":
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

    def pread_into(
        self, buf: memoryview, offset: int, then: Callable[[Attempt], None] | None = None
    ) -> Attempt:
        """READ: fill ``buf``."""
        return self._submit(lambda line, done: line.pread_into(buf, offset, done), then)

    def pwrite(
        self,
        buf: memoryview | bytes | bytearray,
        offset: int,
        fua: bool = False,
        then: Callable[[Attempt], None] | None = None,
    ) -> Attempt:
        """WRITE; until it is flushed its place is remembered, unless ``fua``."""
        dirty = (offset, 0 if fua else memoryview(buf).nbytes)
        return self._submit(lambda line, done: line.pwrite(buf, offset, fua, done), then, dirty)

    def zero(
        self,
        offset: int,
        length: int,
        flags: int = 0,
        then: Callable[[Attempt], None] | None = None,
    ) -> Attempt:
        """WRITE_ZEROES."""
        dirty = (offset, 0 if flags & c.CMD_FLAG_FUA else length)
        return self._submit(lambda line, done: line.zero(offset, length, flags, done), then, dirty)

    def trim(
        self,
        offset: int,
        length: int,
        flags: int = 0,
        then: Callable[[Attempt], None] | None = None,
    ) -> Attempt:
        """TRIM."""
        return self._submit(lambda line, done: line.trim(offset, length, flags, done), then)

    def cache(
        self, offset: int, length: int, then: Callable[[Attempt], None] | None = None
    ) -> Attempt:
        """CACHE."""
        return self._submit(lambda line, done: line.cache(offset, length, done), then)

    def status(
        self,
        offset: int,
        length: int,
        contexts: Collection[str] | None = None,
        then: Callable[[Attempt], None] | None = None,
    ) -> Attempt:
        """BLOCK_STATUS."""
        return self._submit(lambda line, done: line.status(offset, length, contexts, done), then)

    def flush(self) -> None:
        """As that of `Pipeline`; WritesLost once after a loss, as `Reconnecting.flush`."""
        self.drain()
        self._owner.flush()

    # Waiting

    def drain(self) -> None:
        """Wait until every call is done; raise the first error that nobody has looked at."""
        self._settle(lambda: not self._left)
        with self._changed:
            failed = next(iter(self._failed.values()), None)
            self._failed.clear()
        if failed is not None:
            raise failed

    def close(self) -> None:
        """Wait until every call is done, and end the threads. The connection stays open."""
        self._settle(lambda: not self._left)
        self._pipeline.close()

    def _settle(self, settled: Callable[[], bool]) -> None:
        self._pipeline._not_in_a_callback()
        while True:
            self._pipeline._push()
            with self._changed:
                self._changed.wait_for(lambda: settled() or self._lost)
                if settled():
                    return
            self._resume()

    # Submitting

    def _submit(
        self,
        start: Start,
        then: Callable[[Attempt], None] | None,
        dirty: tuple[int, int] = (0, 0),
    ) -> Attempt:
        if self._lost:
            self._resume()
        attempt = Attempt(self, start, dirty, then)
        with self._changed:
            self._left += 1
        try:
            self._begin(attempt)
        except BaseException:
            with self._changed:
                self._left -= 1
                self._changed.notify_all()
            raise
        return attempt

    def _begin(self, attempt: Attempt) -> None:
        while True:
            line, generation = self._pipeline, self._generation
            try:
                attempt._start(line, partial(self._over, attempt, generation))
                return
            except RuntimeError:  # closed under us by a thread that resumes
                with self._resuming:
                    if line is self._pipeline:
                        raise

    def _over(self, attempt: Attempt, generation: int, ticket: Ticket) -> None:
        """In a reader thread: the call is answered, or lost."""
        error = ticket.error
        if error is not None and is_loss(error) and attempt._losses < self._owner.policy.attempts:
            attempt._losses += 1
            with self._changed:
                self._lost.append(attempt)
                self._changed.notify_all()
            return
        if error is None:
            self._owner._wrote(generation, *attempt._dirty)
        attempt.statuses = ticket.statuses
        self._finish(attempt, error)

    def _finish(self, attempt: Attempt, error: NBDError | None) -> None:
        attempt.error = error
        untold = error if attempt._then is None else None
        try:
            if attempt._then is not None:
                attempt._then(attempt)
        except Exception as problem:  # a fault of the caller's: told to whoever drains
            untold = NBDError(f"a callback failed: {problem!r}")
            untold.__cause__ = problem
        with self._changed:
            if untold is not None and len(self._failed) < _REMEMBERED:
                self._failed[attempt] = untold
            attempt.done = True
            self._left -= 1
            self._changed.notify_all()

    def _seen(self, attempt: Attempt) -> None:
        with self._changed:
            self._failed.pop(attempt, None)

    def _resume(self) -> None:
        """Open the connection again, and submit what was lost with it."""
        with self._resuming:
            with self._changed:
                if not self._lost:
                    return
            self._owner._lose(self._client)
            self._pipeline.close()  # all that was in flight has been lost by now
            with self._changed:
                lost, self._lost = self._lost, []
            try:
                self._open()
            except (NBDError, OSError) as problem:
                error = problem if isinstance(problem, NBDError) else ConnectionClosed(str(problem))
                for attempt in lost:
                    self._finish(attempt, type(error)(*error.args))
                return
            for attempt in lost:
                self._begin(attempt)

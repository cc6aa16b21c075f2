# SPDX-License-Identifier: Apache-2.0
"""A client that survives the loss of its connection, and is honest about what that may cost.

A call that was in flight is made again on the new connection: each writes or reads the same bytes
at the same place, so doing it twice is doing it once, unless somebody else writes there too.

What the server had acknowledged but not flushed is another matter. If the server's host went down,
those writes may be gone, and nobody else remembers them. So the next `Reconnecting.flush` after a
loss fails once with WritesLost (EIO), which names the ranges, as fsync does on a file; whoever
wants them stable writes them again and flushes.
"""

import threading
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from nbdwire.delegate import Delegate
from nbdwire.errors import (
    ConnectionClosed,
    ProtocolError,
    RequestError,
    ShuttingDown,
    UnknownExport,
    WritesLost,
    is_loss,
)
from nbdwire.pipeline import DEPTH
from nbdwire.resuming import ResumingPipeline

if TYPE_CHECKING:
    from nbdwire.client import Client

T = TypeVar("T")


@dataclass(frozen=True)
class Policy:
    """How hard to try. Times are in seconds.

    A lost connection is tried again ``attempts`` times, the first time at once, then after
    ``delay``, which grows by ``factor`` up to ``longest``. A call may be made again ``attempts``
    times too.
    """

    attempts: int = 10
    delay: float = 0.1
    factor: float = 2.0
    longest: float = 10.0

    def delays(self) -> list[float]:
        """How long to wait before each attempt."""
        grown = [min(self.delay * self.factor**n, self.longest) for n in range(self.attempts - 1)]
        return [0.0, *grown][: self.attempts]


class Ranges:
    """Ranges of bytes: in order, disjoint, at most ``most``; past that, gaps are filled."""

    def __init__(self, most: int = 1024) -> None:
        self._most = most
        self._found: list[tuple[int, int]] = []  # (start, stop)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def add(self, start: int, stop: int) -> None:
        """[start, stop) as well."""
        found = self._found
        first = bisect_left(found, start, key=lambda part: part[1])
        last = bisect_right(found, stop, key=lambda part: part[0])
        if first < last:
            start, stop = min(start, found[first][0]), max(stop, found[last - 1][1])
        found[first:last] = [(start, stop)]
        if len(found) > self._most:
            pairs = zip(found[::2], [*found[1::2], found[-1]], strict=False)
            self._found = [(left[0], right[1]) for left, right in pairs]

    def take_from(self, other: "Ranges") -> None:
        """Those of ``other`` as well; it has none afterwards."""
        taken, other._found = other._found, []
        for start, stop in taken:
            self.add(start, stop)


class Reconnecting(Delegate):
    """The verbs of `Client`, on a connection that is opened again when it is lost.

    For many threads. When the policy's attempts are used up, a call raises ConnectionClosed; the
    next call tries again. The export must be the same after a loss: ProtocolError if its size or
    what it can do has changed. `flush` raises WritesLost once after a loss, see above.
    """

    def __init__(self, open_client: "Callable[[], Client]", policy: Policy | None = None) -> None:
        """``open_client`` connects. The first time its errors are raised as they are."""
        self.policy = policy or Policy()
        self._open = open_client
        self._lock = threading.Lock()  # for all that follows; held while a connection is opened
        self._client: Client | None = open_client()
        self._generation = 0
        self._dirty = Ranges()  # acknowledged, not flushed
        self._doubtful = Ranges()  # the same, and the connection was lost
        self._flushing = threading.Lock()
        self._closed = threading.Event()
        self.session = self._client.session

    @property
    def losses(self) -> int:
        """How often the connection was lost."""
        return self._generation

    def _do(self, verb: "Callable[[Client], T]", dirty: tuple[int, int] = (0, 0)) -> T:
        for last in [*[False] * self.policy.attempts, True]:
            client, generation = self._current()
            try:
                result = verb(client)
            except (ConnectionClosed, RequestError) as error:
                if not is_loss(error):
                    raise
                self._lose(client)
                if last:
                    raise
                continue
            self._wrote(generation, *dirty)
            return result
        raise AssertionError("the last round has returned or raised")

    def pipeline(self, depth: int = DEPTH) -> ResumingPipeline:
        """Requests that need not be waited for, and outlive a loss: at most ``depth`` in flight."""
        return ResumingPipeline(self, depth)

    def flush(self) -> None:
        """`Client.flush`; WritesLost (once after a loss) names what may not have been stored."""
        with self._flushing:
            self._report()
            covered = self._begin_flush()
            try:
                self._do(lambda client: self._flush_once(client, covered))
            except BaseException:
                with self._lock:
                    self._dirty.take_from(covered)
                raise
            self._report()

    def _begin_flush(self) -> Ranges:
        covered = Ranges()
        with self._lock:
            covered.take_from(self._dirty)
        return covered

    def _flush_once(self, client: "Client", covered: Ranges) -> None:
        try:
            client.flush()
        except (ConnectionClosed, RequestError) as error:
            if is_loss(error):
                with self._lock:
                    self._doubtful.take_from(covered)
            raise

    def _report(self) -> None:
        with self._lock:
            found = [(start, stop - start) for start, stop in self._doubtful]
            self._doubtful = Ranges()
        if found:
            raise WritesLost(found)

    def _wrote(self, generation: int, offset: int, length: int) -> None:
        if not length:
            return
        with self._lock:
            ranges = self._dirty if generation == self._generation else self._doubtful
            ranges.add(offset, offset + length)

    # The connection

    def _current(self) -> "tuple[Client, int]":
        with self._lock:
            if self._client is None:
                self._client = self._open_again()
            return self._client, self._generation

    def _open_again(self) -> "Client":
        problem: Exception = ConnectionClosed("the connection is lost")
        for delay in self.policy.delays():
            if self._closed.wait(delay):
                raise ConnectionClosed("this client has been closed")
            try:
                return self._same(self._open())
            except (ConnectionClosed, ShuttingDown, UnknownExport, OSError) as error:
                problem = error
        raise ConnectionClosed(
            f"the connection was lost, and {self.policy.attempts} attempts to open it again "
            f"failed: {problem}"
        ) from problem

    def _same(self, client: "Client") -> "Client":
        """``client``, if it is connected to what we were connected to."""
        before, now = self.session, client.session
        if (before.size, before.flags) == (now.size, now.flags) and {
            name for _, name in before.contexts
        } <= set(client.contexts):
            return client
        client.close()
        raise ProtocolError(
            f"the export is not the same after the connection was lost: it had {before.size} "
            f"bytes and flags {before.flags:#x}, now {now.size} and {now.flags:#x}"
        )

    def _lose(self, client: "Client") -> None:
        with self._lock:
            current = self._client is client
            if current:
                self._client = None
                self._generation += 1
                self._doubtful.take_from(self._dirty)
        if current:
            client.close()

    def close(self) -> None:
        """Leave the server. Idempotent; calls in other threads fail: ConnectionClosed."""
        self._closed.set()
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            client.close()

# SPDX-License-Identifier: Apache-2.0
"""What can be copied from and to: an NBD export, a file or device, standard input and output.

Each end starts an operation and calls ``then(error)`` when that is done, at once or from another
thread; ``error`` is None or what went wrong. No completion is ever left out.
"""

import errno
import os
import stat
import threading
from collections.abc import Callable
from functools import partial
from typing import Final, Protocol, TypeAlias

from nbdwire import constants as c
from nbdwire.errors import NBDError, RequestError
from nbdwire.extents import Extent
from nbdwire.pipeline import Ticket
from nbdwire.pool import Pool
from nbdwire.tools.files import FileExport

Then: TypeAlias = Callable[[Exception | None], None]

_ZEROES: Final = bytes(1 << 18)
_ZERO_STEP: Final = 128 << 20
"""Bytes of one WRITE_ZEROES: a server that has to write them should answer within seconds."""


class Source(Protocol):
    """``size`` is in bytes, None for a stream; what begins at a multiple of ``block`` is readable.

    ``feeders``: how many threads may start reads at once and gain by it.
    """

    name: str
    size: int | None
    block: int
    feeders: int

    def extents(self, offset: int, length: int) -> list[Extent]:
        """As `nbdwire.export.Export.extents`."""
        ...

    def read(self, view: memoryview, offset: int, then: Then) -> None:
        """Fill ``view``."""
        ...

    def close(self, abort: bool) -> None:
        """Wait for all ``then``; with ``abort`` do not wait for answers."""
        ...


class Target(Protocol):
    """As `Source`. ``is_zero``: it reads as zeroes where nothing is written."""

    name: str
    size: int | None
    block: int
    is_zero: bool

    def write(self, view: memoryview, offset: int, then: Then) -> None:
        """Write all of ``view``."""
        ...

    def zero(self, offset: int, length: int, allocate: bool, then: Then) -> None:
        """Make the range read as zeroes; ``allocate``: it should take up room."""
        ...

    def drain(self) -> None:
        """Wait until every ``then`` was called."""
        ...

    def cancel(self) -> None:
        """The copy has failed: what waits for its turn need not be written."""
        ...

    def finish(self, size: int, flush: bool) -> None:
        """All is written, ``size`` bytes in all: make it stable if ``flush``."""
        ...

    def close(self, abort: bool) -> None:
        """As that of `Source`."""
        ...


class NbdEnd:
    """An export, over all connections of ``pool``."""

    feeders = 1

    def __init__(self, name: str, pool: Pool, depth: int) -> None:
        self.name = name
        self.size: int | None = pool.size
        self.is_zero = False
        self.block = pool.session.minimum_block
        self.read_only = pool.read_only
        self._pool = pool
        self._pipeline = pool.pipeline(depth * len(pool.clients))
        self._can_zero = bool(pool.flags & c.TFLAG_SEND_WRITE_ZEROES)
        self._can_flush = bool(pool.flags & c.TFLAG_SEND_FLUSH)

    def extents(self, offset: int, length: int) -> list[Extent]:
        """Where the server does not tell, all is data: to read too much is never wrong."""
        try:
            return self._pool.extents(offset, length)
        except RequestError:
            return [Extent(offset, min(length, 1 << 30), 0)]

    def read(self, view: memoryview, offset: int, then: Then) -> None:
        """READ."""
        self._pipeline.pread_into(view, offset, partial(_tell, then))

    def write(self, view: memoryview, offset: int, then: Then) -> None:
        """WRITE."""
        self._pipeline.pwrite(view, offset, then=partial(_tell, then))

    def zero(self, offset: int, length: int, allocate: bool, then: Then) -> None:
        """WRITE_ZEROES, or zeroes written where the server does not have that."""
        step = _ZERO_STEP if self._can_zero else len(_ZEROES)
        parts = Parts(-(-length // step), then)
        flags = c.CMD_FLAG_NO_HOLE if allocate else 0
        for start in range(offset, offset + length, step):
            size = min(step, offset + length - start)
            if self._can_zero:
                self._pipeline.zero(start, size, flags, partial(_tell, parts.done))
            else:
                self.write(memoryview(_ZEROES)[:size], start, parts.done)

    def cancel(self) -> None:
        """Nothing waits for a turn."""

    def drain(self) -> None:
        """Wait for all answers."""
        self._pipeline.drain()

    def finish(self, size: int, flush: bool) -> None:
        """FLUSH, if the server has it."""
        self._pipeline.drain()
        if flush and self._can_flush:
            self._pool.flush()

    def close(self, abort: bool) -> None:
        """Leave the server; with ``abort`` what is in flight fails."""
        if abort:
            self._pool.close()
        self._pipeline.close()
        self._pool.close()


class FileEnd:
    """A regular file or a block device. Its operations are done when they return."""

    def __init__(self, name: str, export: FileExport, *, feeders: int = 1) -> None:
        self.name = name
        self.size: int | None = export.size
        self.block = 1
        self.feeders = feeders
        self.is_zero = False
        self._export = export
        self._grows = False

    @classmethod
    def create(cls, path: str, size: int | None, *, keep: bool) -> "FileEnd":
        """As a target. A regular file begins empty unless ``keep``; a device is as it is."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        fd = os.open(path, flags, 0o666)
        mode = os.fstat(fd).st_mode
        os.close(fd)
        if not stat.S_ISREG(mode):
            return cls(path, FileExport.open(path))
        if not keep:
            os.truncate(path, 0)
        if size is not None and os.stat(path).st_size < size:
            os.truncate(path, size)
        end = cls(path, FileExport.open(path))
        end.is_zero, end._grows = not keep, size is None
        end.size = None if end._grows else end.size
        return end

    def extents(self, offset: int, length: int) -> list[Extent]:
        """The holes that the file system knows."""
        return self._export.extents(offset, length)

    def read(self, view: memoryview, offset: int, then: Then) -> None:
        """``preadv``."""
        _call(then, partial(self._export.pread_into, view, offset))

    def write(self, view: memoryview, offset: int, then: Then) -> None:
        """``pwrite``."""
        _call(then, partial(self._export.pwrite, view, offset))

    def zero(self, offset: int, length: int, allocate: bool, then: Then) -> None:
        """A hole, or zeroes that take up room."""
        flags = c.CMD_FLAG_NO_HOLE if allocate else 0
        _call(then, partial(self._export.zero, offset, length, flags))

    def cancel(self) -> None:
        """Nothing waits for a turn."""

    def drain(self) -> None:
        """Nothing is ever in flight."""

    def finish(self, size: int, flush: bool) -> None:
        """A file that was a stream's target gets its size now."""
        if self._grows:
            os.truncate(self.name, size)
        if flush:
            self._export.flush()

    def close(self, abort: bool) -> None:
        """Close the file."""
        self._export.close()


class StreamSource:
    """Standard input: a `Source` without a size, which is read in order."""

    name = "standard input"
    size: int | None = None
    block = 1
    feeders = 1

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def extents(self, offset: int, length: int) -> list[Extent]:
        """All is data."""
        return [Extent(offset, length, 0)]

    def read(self, view: memoryview, offset: int, then: Then) -> None:
        """Not used: see `take`."""
        raise OSError(errno.ESPIPE, os.strerror(errno.ESPIPE))

    def take(self, view: memoryview) -> int:
        """Fill ``view``; how many bytes there were before the end."""
        done = 0
        while done < len(view):
            got = os.readv(self._fd, [view[done:]])
            if not got:
                break
            done += got
        return done

    def close(self, abort: bool) -> None:
        """Not ours to close."""


class StreamTarget:
    """Standard output: what comes too early is kept until it is its turn."""

    name = "standard output"
    size: int | None = None
    block = 1

    def __init__(self, fd: int) -> None:
        self.is_zero = False
        self._fd = fd
        self._lock = threading.RLock()  # a failed write ends in `cancel`
        self._next = 0
        self._cancelled = False
        self._early: dict[int, tuple[memoryview | int, Then]] = {}

    def write(self, view: memoryview, offset: int, then: Then) -> None:
        """In order."""
        self._put(offset, view, then)

    def zero(self, offset: int, length: int, allocate: bool, then: Then) -> None:
        """Zeroes, written."""
        self._put(offset, length, then)

    def _put(self, offset: int, what: memoryview | int, then: Then) -> None:
        with self._lock:
            self._early[offset] = (what, then)
            while self._next in self._early:
                turn, tell = self._early.pop(self._next)
                self._next += turn if isinstance(turn, int) else len(turn)
                _call(tell, partial(_write_out, self._fd, turn))
            if self._cancelled:
                self._give_up()

    def cancel(self) -> None:
        """A piece before them may never come: those that came too early are given up."""
        with self._lock:
            if not self._cancelled:
                self._cancelled = True
                self._give_up()

    def _give_up(self) -> None:
        while self._early:
            _, (_, tell) = self._early.popitem()
            tell(OSError(errno.ECANCELED, os.strerror(errno.ECANCELED)))

    def drain(self) -> None:
        """Everything has been written, or failed to be."""

    def finish(self, size: int, flush: bool) -> None:
        """A pipe cannot be flushed."""

    def close(self, abort: bool) -> None:
        """Not ours to close."""


class Parts:
    """Counts the completions of what was cut: calls ``then`` once, with the first error."""

    __slots__ = ("_error", "_left", "_lock", "_then")

    def __init__(self, count: int, then: Then) -> None:
        self._left = count
        self._then = then
        self._error: Exception | None = None
        self._lock = threading.Lock()

    def done(self, error: Exception | None) -> None:
        """One of them."""
        with self._lock:
            self._error = self._error or error
            self._left -= 1
            last = not self._left
        if last:
            self._then(self._error)


def _write_out(fd: int, what: memoryview | int) -> None:
    if isinstance(what, int):
        for start in range(0, what, len(_ZEROES)):
            _write_out(fd, memoryview(_ZEROES)[: what - start])
        return
    while what:
        what = what[os.write(fd, what) :]


def _tell(then: Then, ticket: Ticket) -> None:
    then(ticket.error)


def _call(then: Then, operation: Callable[[], None]) -> None:
    """Do it now, and tell how it went."""
    error: Exception | None = None
    try:
        operation()
    except (OSError, NBDError) as problem:
        error = problem
    then(error)

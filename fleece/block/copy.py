# SPDX-License-Identifier: Apache-2.0
"""`Copy`: the bytes of one node into another, by several threads.

The source says what it has in `Region`: data is read, what reads as zeroes is not. A piece of data
goes through three steps: it is read, and prepared (compressed, hashed), by any thread; then it is
stored, which happens in the order of the disk unless the plan says that it need not. So there are
as many pieces in memory as there are threads, and reading, compressing and writing overlap. All of
them happen in C and without the GIL.

The first error stops the copy, and is told with the place. What is in the target then is a part.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, Protocol

from fleece.block import zeroes
from fleece.block.node import Node
from fleece.block.null import clear
from fleece.errors import ImageError
from fleece.units import MiB, align_down, align_up

DATA: Final = 0
ZERO: Final = 1
SKIP: Final = 2
"""Kinds of `Region`; SKIP: the target has it already, by what lies below it."""

_SECTOR: Final = 512
_BLOCK: Final = 4096


class Region(NamedTuple):
    """``length`` bytes from ``offset`` of one ``kind``."""

    offset: int
    length: int
    kind: int


Regions = Callable[[int, int], Iterable[Region]]
"""``(offset, length)`` -> the beginning of the range, in order, at least one region."""


class Sink(Protocol):
    """Where the pieces go. ``block``: pieces begin and end at multiples of so many bytes."""

    block: int

    def prepare(self, view: memoryview, offset: int) -> Any:
        """In any thread, and any order; what it returns is handed to `store`."""

    def store(self, prepared: Any, view: memoryview, offset: int) -> None:
        """Write a piece of data."""

    def zero(self, offset: int, length: int) -> None:
        """Make this range read as zeroes."""


@dataclass(frozen=True)
class Plan:
    """How to copy. ``piece``: bytes of one read. ``rate``: bytes a second, 0 for no limit.

    ``ordered``: store in the order of the disk. ``whole``: zeroes are data too. ``salvage`` is told
    ``(offset, length, error)`` of what cannot be read, which becomes zeroes; if it is None, the
    copy fails.
    """

    workers: int = 4
    ordered: bool = True
    whole: bool = False
    piece: int = 2 * MiB
    rate: int = 0
    salvage: Callable[[int, int, OSError], None] | None = None


def regions_of(node: Node) -> Regions:
    """What ``node`` says by its extents: data, or zeroes."""

    def regions(offset: int, length: int) -> Iterator[Region]:
        for extent in node.extents(offset, length):
            yield Region(extent.offset, extent.length, ZERO if extent.is_zero else DATA)

    return regions


class Writer:
    """The plain sink. ``sparse``: runs of so many zero bytes are not written as data; 0: all is.

    ``is_zero``: the target reads as zeroes where nothing was written yet.
    """

    def __init__(self, target: Node, *, sparse: int = _BLOCK, is_zero: bool = False) -> None:
        self.block = _BLOCK
        self._target = target
        self._sparse = sparse
        self._is_zero = is_zero

    def prepare(self, view: memoryview, offset: int) -> Any:
        """Where the zeroes are."""
        return list(zeroes.split(view, self._sparse))

    def store(self, prepared: Any, view: memoryview, offset: int) -> None:
        """The data as it is, and `zero` for the rest."""
        for start, stop, is_zero in prepared:
            if is_zero:
                self.zero(offset + start, stop - start)
            else:
                self._target.pwrite(view[start:stop], offset + start)

    def zero(self, offset: int, length: int) -> None:
        """Nothing, where the target is zero."""
        if not self._is_zero:
            self._target.zero(offset, length)


class _Stopped(Exception):
    """Another thread has failed."""


class _Order:
    """Lets holders of tickets through one by one, in the order of the tickets."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._next = 0
        self._waiting: dict[int, threading.Lock] = {}
        self._stopped = False

    def wait(self, ticket: int) -> None:
        """Until all tickets before this one are done."""
        with self._lock:
            if self._stopped or ticket == self._next:
                return
            gate = self._waiting[ticket] = threading.Lock()
            gate.acquire()
        gate.acquire()

    def done(self, ticket: int) -> None:
        """The next one may go."""
        with self._lock:
            self._next = ticket + 1
            gate = self._waiting.pop(self._next, None)
        if gate is not None:
            gate.release()

    def stop(self) -> None:
        """Nobody waits any more."""
        with self._lock:
            self._stopped = True
            waiting, self._waiting = self._waiting, {}
        for gate in waiting.values():
            gate.release()


@dataclass
class Copy:
    """One copy of bytes [``start``, ``stop``) of ``source`` into ``sink``.

    ``progress`` is called with ``(bytes done, bytes in all)`` by one thread at a time.
    """

    source: Node
    sink: Sink
    regions: Regions
    stop: int
    plan: Plan = field(default_factory=Plan)
    progress: Callable[[int, int], None] | None = None
    start: int = 0

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._turn = threading.Lock()
        self._order = _Order()
        self._error: BaseException | None = None
        self._ended = threading.Event()
        self._done = 0
        self._began = time.monotonic()
        self._piece = max(self.sink.block, align_down(self.plan.piece, self.sink.block))
        self._work = enumerate(self._pieces())

    def run(self) -> None:
        """Copy all of it. `ImageError` says what failed, and where."""
        threads = [
            threading.Thread(target=self._feed, name=f"copy-{number}", daemon=True)
            for number in range(max(1, self.plan.workers))
        ]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        except BaseException as error:
            self._fail(error)
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
            raise
        if self._error is not None:
            raise self._error

    # What is to be done

    def _pieces(self) -> Iterator[Region]:
        """The whole range; data is rounded outwards to blocks of the sink, the rest inwards."""
        block, position = self.sink.block, self.start
        for offset, length, kind in self._stretches():
            end = offset + length
            end = end if end >= self.stop else align_down(end, block)
            begin = max(position, align_up(offset, block)) if kind != DATA else position
            if end <= position:
                continue
            if begin < end and kind != DATA:
                yield from self._cut(position, begin)
                yield Region(begin, end - begin, kind)
                position = end
            elif kind == DATA:
                yield from self._cut(position, end)
                position = end
        yield from self._cut(position, self.stop)

    def _stretches(self) -> Iterator[Region]:
        offset = self.start
        while offset < self.stop:
            for region in self._ask(offset):
                kind = DATA if self.plan.whole and region.kind == ZERO else region.kind
                yield Region(region.offset, region.length, kind)
                offset = region.offset + region.length

    def _ask(self, offset: int) -> list[Region]:
        try:
            return list(self.regions(offset, self.stop - offset))
        except OSError as error:
            raise self._told("asking where the data are", offset, error) from error

    def _cut(self, start: int, stop: int) -> Iterator[Region]:
        step = self._piece
        while start < stop:
            end = min(stop, align_down(start, self.sink.block) // step * step + step)
            yield Region(start, end - start, DATA)
            start = end

    # Who does it

    def _feed(self) -> None:
        buffer = memoryview(bytearray(self._piece))
        try:
            while self._error is None:
                with self._turn:
                    item = next(self._work, None)
                if item is None:
                    return
                self._do(*item, buffer)
        except _Stopped:
            return
        except BaseException as error:
            self._fail(error)

    def _do(self, ticket: int, region: Region, buffer: memoryview) -> None:
        offset, length, kind = region
        if kind == DATA:
            view = buffer[:length]
            self._read(view, offset)
            prepared = self.sink.prepare(view, offset)
            self._wait(ticket, length)
            self._guarded(self.sink.store, "writing", offset, prepared, view, offset)
        else:
            self._wait(ticket, 0)
            if kind == ZERO:
                self._guarded(self.sink.zero, "writing zeroes", offset, offset, length)
        if self.plan.ordered:
            self._order.done(ticket)
        self._count(length)

    def _wait(self, ticket: int, length: int) -> None:
        if self.plan.ordered:
            self._order.wait(ticket)
        if self.plan.rate and length:
            self._slow_down(length)
        if self._error is not None:
            raise _Stopped

    def _slow_down(self, length: int) -> None:
        """Until ``length`` more bytes are due."""
        with self._lock:
            now = time.monotonic()
            due = max(self._began, now - 0.1)  # what was not used is lost
            self._began = due + length / self.plan.rate
        self._ended.wait(max(0.0, due - now))

    def _read(self, view: memoryview, offset: int) -> None:
        try:
            self.source.pread_into(view, offset)
        except OSError as error:
            if self.plan.salvage is None:
                raise self._told("reading", offset, error) from error
            self._salvage(view, offset, error)

    def _salvage(self, view: memoryview, offset: int, error: OSError) -> None:
        """What can be read of it, in halves down to a sector; zeroes for the rest."""
        assert self.plan.salvage is not None
        if self._error is not None:
            raise _Stopped
        if len(view) <= _SECTOR:
            with self._lock:
                self.plan.salvage(offset, len(view), error)
            clear(view)
            return
        half = max(_SECTOR, align_down(len(view) // 2, _SECTOR))
        for part, at in ((view[:half], offset), (view[half:], offset + half)):
            try:
                self.source.pread_into(part, at)
            except OSError as failure:
                self._salvage(part, at, failure)

    def _guarded(self, verb: Callable[..., None], doing: str, offset: int, *args: Any) -> None:
        try:
            verb(*args)
        except OSError as error:
            raise self._told(doing, offset, error) from error

    @staticmethod
    def _told(doing: str, offset: int, error: OSError) -> ImageError:
        return ImageError(f"error while {doing} at byte {offset}: {error.strerror or error}")

    def _count(self, length: int) -> None:
        with self._lock:
            self._done += length
            if self.progress is not None:
                self.progress(self._done, self.stop - self.start)

    def _fail(self, error: BaseException) -> None:
        """The first error counts."""
        with self._lock:
            if self._error is None:
                self._error = error
        self._ended.set()
        self._order.stop()

# SPDX-License-Identifier: Apache-2.0
"""The engine of ``copy``: lanes that read and write, and no completion unchecked.

A lane is a thread that does all of its part: it takes pieces of the disk from a common list, asks
for several of them ahead, takes the data of the oldest, writes them, and checks the answers.
Nothing is handed from thread to thread, and the memory a lane uses stays in its processor's cache.
"""

import math
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from nbdwire.errors import NBDError
from nbdwire.extents import Extent
from nbdwire.tools.ends import CopyFailed, Reader, Source, Target, Writer, text

_ZEROES: Final = bytearray(64 << 10)  # a bytearray, not bytes: that compares at memory's speed

Piece: TypeAlias = tuple[int, int, bool]
"""(offset, length, whether it reads as zeroes)"""

Ask: TypeAlias = Callable[[int, int], list[Extent]]
"""The extents from an offset, of a length."""


@dataclass(frozen=True)
class Plan:
    """How to copy: in requests of ``request_size`` bytes.

    ``allocate``: zeroes take up room in the target. Blocks of ``sparse`` bytes that are all zero
    are not sent as data (0: all are). ``flush`` at the end.
    """

    request_size: int = 512 << 10
    allocate: bool = False
    sparse: int = 64 << 10
    flush: bool = True


@dataclass
class Totals:
    """Bytes: read from the source, written as data, made zero, known to be zero already."""

    read: int = 0
    written: int = 0
    zeroed: int = 0
    skipped: int = 0

    @property
    def done(self) -> int:
        """How much of the source is dealt with."""
        return self.written + self.zeroed + self.skipped


class _Stopped(Exception):
    """Another lane has failed: start nothing more."""


def pieces(ask: Ask, size: int, block: int, request_size: int) -> Iterator[Piece]:
    """The whole of a source in order, data in pieces of at most ``request_size`` bytes.

    What is zero begins and ends at multiples of ``block``; the rest is rounded outwards.
    """
    position = 0
    for start, stop, is_zero in _stretches(ask, size):
        end = stop if stop == size else stop - stop % block
        if is_zero:
            begin = -(-start // block) * block
            if begin >= end:
                continue
            yield from _cut(position, begin, request_size)
            yield begin, end - begin, True
        elif end > position:
            yield from _cut(position, end, request_size)
        position = max(position, end)
    yield from _cut(position, size, request_size)


def _stretches(ask: Ask, size: int) -> Iterator[tuple[int, int, bool]]:
    offset = 0
    while offset < size:
        for extent in ask(offset, size - offset):
            yield extent.offset, extent.end, extent.is_zero
            offset = extent.end


def _cut(start: int, stop: float, step: int) -> Iterator[Piece]:
    """Pieces that end at multiples of ``step``."""
    while start < stop:
        end = min(stop, start - start % step + step)
        yield start, int(end) - start, False
        start = int(end)


class _Work:
    """The pieces that nobody has taken yet. A lane that needs extents for it asks for them."""

    def __init__(self, size: int | None, block: int, step: int) -> None:
        self._turn = threading.Lock()
        self._reader: Reader | None = None
        if size is None:
            self._pieces = _cut(0, math.inf, step)
        else:
            self._pieces = pieces(self._extents, size, block, step)

    def _extents(self, offset: int, length: int) -> list[Extent]:
        assert self._reader is not None
        return self._reader.extents(offset, length)

    def take(self, reader: Reader) -> Piece | None:
        """The next one. On ``reader``, whose lane is calling, extents are asked for."""
        with self._turn:
            self._reader = reader
            return next(self._pieces, None)


@dataclass
class Copy:
    """One copy. ``progress`` is called with the bytes done, from any thread, one at a time."""

    source: Source
    target: Target
    plan: Plan
    progress: Callable[[int], None]
    totals: Totals = field(default_factory=Totals)

    def __post_init__(self) -> None:
        # A zero is skipped only by a target that has it already and need not make room for it.
        self._skips = self.target.is_zero and not self.plan.allocate
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        self._size = self.source.size or 0

    def run(self) -> Totals:
        """Copy everything; CopyFailed tells the first thing that went wrong."""
        block = max(self.source.block, self.target.block)
        step = min(self.plan.request_size, self.source.maximum)
        work = _Work(self.source.size, block, max(block, step - step % block))
        threads = [
            threading.Thread(target=self._lane, args=(work, lane), name="copy", daemon=True)
            for lane in range(1, self.lanes())
        ]
        try:
            for thread in threads:
                thread.start()
            self._lane(work, 0)
        except BaseException as error:  # KeyboardInterrupt, or no thread to be had
            self._fail(error)
        for thread in threads:
            if thread.ident is not None:
                thread.join()
        if self._error is not None:
            raise self._error
        self._finish()
        return self.totals

    def lanes(self) -> int:
        """Threads that copy."""
        if self.source.ordered or self.target.ordered:
            return 1
        return min(self.source.lanes, self.target.lanes)

    def _finish(self) -> None:
        try:
            self.target.finish(self._size, self.plan.flush)
        except (OSError, NBDError) as error:
            raise CopyFailed(f"cannot flush {self.target.name}: {text(error)}") from error

    # A lane

    def _lane(self, work: _Work, number: int) -> None:
        try:
            reader = self.source.reader(number)
            writer = self.target.writer(number, self._done)
            with suppress(_Stopped):
                self._copy(work, reader, writer)
                writer.drain()
        except BaseException as error:  # told by `run`
            self._fail(error)

    def _copy(self, work: _Work, reader: Reader, writer: Writer) -> None:
        asked: deque[Piece] = deque()
        while True:
            while len(asked) < reader.depth:
                if self._error is not None:
                    raise _Stopped
                piece = work.take(reader)
                if piece is None:
                    break
                if not piece[2]:
                    reader.ask(*piece[:2])
                asked.append(piece)
            if not asked:
                return
            offset, length, is_zero = asked.popleft()
            if is_zero:
                self._zero(writer, offset, length)
                continue
            view = reader.take()
            self._put(writer, view, offset)
            if len(view) < length:  # the end of a stream
                return

    def _put(self, writer: Writer, view: memoryview, offset: int) -> None:
        """``view`` has been read."""
        end = offset + len(view)
        if self.source.size is None:
            if self.target.size is not None and end > self.target.size:
                reason = f"{self.target.name} has only {self.target.size} bytes"
                raise CopyFailed(f"{self.source.name} is too large: {reason}")
            self._size = end
        with self._lock:
            self.totals.read += len(view)
        for start, stop, is_zero in self._runs(view, offset):
            if is_zero:
                self._zero(writer, offset + start, stop - start)
            else:
                writer.write(view[start:stop], offset + start)

    def _runs(self, view: memoryview, offset: int) -> Iterator[tuple[int, int, bool]]:
        """(start, stop, whether it is all zero) of the parts of ``view``."""
        step, length = self.plan.sparse, len(view)
        if not step or offset % self.target.block or not length:
            yield 0, length, False
            return
        begin, state = 0, is_zero(view[:step])
        for start in range(step, length, step):
            now = is_zero(view[start : start + step])
            if now != state:
                yield begin, start, state
                begin, state = start, now
        yield begin, length, state

    def _zero(self, writer: Writer, offset: int, length: int) -> None:
        if self._skips:
            self._done(0, True, length)
        else:
            writer.zero(offset, length, self.plan.allocate)

    def _done(self, length: int, zero: bool, skipped: int = 0) -> None:
        """The target has it."""
        with self._lock:
            if zero:
                self.totals.zeroed += length
            else:
                self.totals.written += length
            self.totals.skipped += skipped
            self.progress(self.totals.done)

    def _fail(self, error: BaseException) -> None:
        """The first error counts; whatever else is in flight is given up."""
        with self._lock:
            if self._error is None:
                self._error = error
        self.source.cancel()
        self.target.cancel()


def is_zero(view: memoryview) -> bool:
    """Whether all bytes are zero."""
    for start in range(0, len(view), len(_ZEROES)):
        part = view[start : start + len(_ZEROES)]
        zeroes = _ZEROES if len(part) == len(_ZEROES) else _ZEROES[: len(part)]
        if zeroes != part:
            return False
    return True

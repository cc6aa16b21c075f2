# SPDX-License-Identifier: Apache-2.0
"""The engine of ``copy``: many reads and writes in flight, and none of them unchecked.

A piece of data waits for a buffer, is read, then written, and gives the buffer back when the write
has succeeded. So there is as much in memory as there are buffers, and the slower end sets the pace.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from nbdwire.errors import NBDError
from nbdwire.tools.ends import Parts, Source, StreamSource, Target

_ZEROES: Final = bytearray(64 << 10)  # a bytearray, not bytes: that compares at memory's speed


@dataclass(frozen=True)
class Plan:
    """How to copy: ``buffers`` of ``request_size`` bytes each.

    ``allocate``: zeroes take up room in the target. Blocks of ``sparse`` bytes that are all zero
    are not sent as data (0: all are). ``flush`` at the end.
    """

    buffers: int = 16
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


class CopyFailed(NBDError):
    """The target is incomplete; the text says what failed, and where."""

    code = "nbd-copy-failed"


class _Stopped(Exception):
    """Something has failed: start nothing more."""


Piece = tuple[int, int, bool]
"""(offset, length, whether it reads as zeroes)"""


def pieces(source: Source, size: int, block: int, request_size: int) -> Iterator[Piece]:
    """The whole of ``source`` in order, data in pieces of at most ``request_size`` bytes.

    What is zero begins and ends at multiples of ``block``; the rest is rounded outwards.
    """
    position = 0
    for start, stop, is_zero in _stretches(source, size):
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


def _stretches(source: Source, size: int) -> Iterator[tuple[int, int, bool]]:
    offset = 0
    while offset < size:
        for extent in source.extents(offset, size - offset):
            yield extent.offset, extent.end, extent.is_zero
            offset = extent.end


def _cut(start: int, stop: int, step: int) -> Iterator[Piece]:
    """Pieces that end at multiples of ``step``."""
    while start < stop:
        end = min(stop, start - start % step + step)
        yield start, end - start, False
        start = end


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
        self._room = threading.Condition(self._lock)
        self._free = [bytearray(0)] * self.plan.buffers
        self._low = max(1, self.plan.buffers // 4)
        self._waiting = 0
        self._error: CopyFailed | None = None

    def run(self) -> Totals:
        """Copy everything; CopyFailed tells the first thing that went wrong."""
        if isinstance(self.source, StreamSource):
            size = self._from_stream(self.source)
        else:
            size = self.source.size or 0
            self._from_pieces(size)
        self._wait_for_buffers()
        self.target.drain()
        if self._error is not None:
            raise self._error
        try:
            self.target.finish(size, self.plan.flush)
        except (OSError, NBDError) as error:
            raise CopyFailed(f"cannot flush {self.target.name}: {text(error)}") from error
        return self.totals

    # What is to be done, and who does it

    def _from_pieces(self, size: int) -> None:
        block = max(self.source.block, self.target.block)
        step = max(block, self.plan.request_size - self.plan.request_size % block)
        work, turn = pieces(self.source, size, block, step), threading.Lock()
        threads = [
            threading.Thread(target=self._feed, args=(work, turn), name="copy", daemon=True)
            for _ in range(self.source.feeders - 1)
        ]
        for thread in threads:
            thread.start()
        self._feed(work, turn)
        for thread in threads:
            thread.join()

    def _feed(self, work: Iterator[Piece], turn: threading.Lock) -> None:
        """Take pieces until there are none."""
        with suppress(_Stopped):
            while self._error is None:
                try:
                    with turn:
                        piece = next(work, None)
                except (OSError, NBDError) as error:
                    self._fail(f"cannot ask {self.source.name} where its data are", error)
                    return
                if piece is None:
                    return
                self._start(*piece)

    def _start(self, offset: int, length: int, is_zero: bool) -> None:
        if is_zero:
            self._zero(offset, length, partial(self._zeroed, offset, length))
            return
        buffer = self._take_buffer(length)
        view = memoryview(buffer)[:length]
        self.source.read(view, offset, partial(self._have, buffer, view, offset))

    def _from_stream(self, source: StreamSource) -> int:
        """Returns how many bytes there were."""
        offset, step = 0, self.plan.request_size
        with suppress(_Stopped):
            while True:
                buffer = self._take_buffer(step)
                view = memoryview(buffer)[:step]
                try:
                    view = view[: source.take(view)]
                except OSError as error:
                    self._fail(f"cannot read {source.name} at offset {offset}", error)
                    view = view[:0]
                if not view:
                    self._give_buffer(buffer)
                    return offset
                if self.target.size is not None and offset + len(view) > self.target.size:
                    text = f"{self.target.name} has only {self.target.size} bytes"
                    self._fail(f"{source.name} is too large", CopyFailed(text))
                    self._give_buffer(buffer)
                    return offset
                self._have(buffer, view, offset, None)
                offset += len(view)
        return offset

    # Completions

    def _have(
        self, buffer: bytearray, view: memoryview, offset: int, error: Exception | None
    ) -> None:
        """``view`` has been read."""
        if error is not None:
            where = f"cannot read {len(view)} bytes at offset {offset} of {self.source.name}"
            self._fail(where, error)
            self._give_buffer(buffer)
            return
        with self._lock:
            self.totals.read += len(view)
        runs = list(self._runs(view, offset))
        parts = Parts(len(runs), lambda _: self._give_buffer(buffer))
        for start, stop, is_zero in runs:
            at, length = offset + start, stop - start
            if is_zero:
                self._zero(at, length, partial(self._zeroed, at, length, parts=parts))
            else:
                then = partial(self._written, at, length, parts)
                self.target.write(view[start:stop], at, then)

    def _runs(self, view: memoryview, offset: int) -> Iterator[tuple[int, int, bool]]:
        """(start, stop, whether it is all zero) of the parts of ``view``."""
        step, length = self.plan.sparse, len(view)
        if not step or offset % self.target.block:
            yield 0, length, False
            return
        begin, state = 0, is_zero(view[:step])
        for start in range(step, length, step):
            now = is_zero(view[start : start + step])
            if now != state:
                yield begin, start, state
                begin, state = start, now
        yield begin, length, state

    def _zero(self, offset: int, length: int, then: Callable[[Exception | None], None]) -> None:
        if self._skips:
            with self._lock:
                self.totals.zeroed -= length
                self.totals.skipped += length
            then(None)
        else:
            self.target.zero(offset, length, self.plan.allocate, then)

    def _zeroed(
        self, offset: int, length: int, error: Exception | None, parts: Parts | None = None
    ) -> None:
        if error is not None:
            where = f"cannot zero {length} bytes at offset {offset} of {self.target.name}"
            self._fail(where, error)
        else:
            self._count(zeroed=length)
        if parts is not None:
            parts.done(None)

    def _written(self, offset: int, length: int, parts: Parts, error: Exception | None) -> None:
        if error is not None:
            where = f"cannot write {length} bytes at offset {offset} of {self.target.name}"
            self._fail(where, error)
        else:
            self._count(written=length)
        parts.done(None)

    def _count(self, written: int = 0, zeroed: int = 0) -> None:
        with self._lock:
            self.totals.written += written
            self.totals.zeroed += zeroed
            self.progress(self.totals.done)

    def _fail(self, where: str, error: Exception) -> None:
        """The first error counts; nobody starts anything after it."""
        with self._lock:
            if self._error is None:
                self._error = CopyFailed(f"{where}: {text(error)}")
            self._room.notify_all()
        self.target.cancel()

    # Buffers

    def _take_buffer(self, length: int) -> bytearray:
        with self._lock:
            if not self._free:  # then wait for several: to be woken for each costs more
                self._waiting += 1
                self._room.wait_for(lambda: len(self._free) >= self._low or self._error)
                self._waiting -= 1
            if self._error is not None:
                raise _Stopped
            buffer = self._free.pop()
        return buffer if len(buffer) >= length else bytearray(max(length, self.plan.request_size))

    def _give_buffer(self, buffer: bytearray) -> None:
        with self._lock:
            self._free.append(buffer)
            whole = len(self._free) == self.plan.buffers
            if whole or (self._waiting and len(self._free) >= self._low):
                self._room.notify_all()

    def _wait_for_buffers(self) -> None:
        """Until every read is written, or has failed."""
        with self._lock:
            self._room.wait_for(lambda: len(self._free) == self.plan.buffers)


def is_zero(view: memoryview) -> bool:
    """Whether all bytes are zero."""
    for start in range(0, len(view), len(_ZEROES)):
        part = view[start : start + len(_ZEROES)]
        zeroes = _ZEROES if len(part) == len(_ZEROES) else _ZEROES[: len(part)]
        if zeroes != part:
            return False
    return True


def text(error: Exception) -> str:
    """An error in words, without its number."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error)

# SPDX-License-Identifier: Apache-2.0
"""Whether two disks have the same contents, as ``qemu-img compare`` says it (QEMU 7.2).

What is known to read as zeroes on both sides is not read; several threads read and compare the
rest. The place that is reported is the first sector of 512 bytes that differs.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fleece.block.node import Node
from fleece.block.null import clear
from fleece.formats.mapping import DATA, OFFSET, PRESENT, ZERO, Batch
from fleece.units import GiB, MiB, align_down, align_up

Told: TypeAlias = Callable[[int, int], object]
"""``told(done, total)``, in bytes."""
Words: TypeAlias = NDArray[np.uint64]

_SECTOR: Final = 512
_PIECE: Final = 1 * MiB
_MOST_PIECES: Final = 256
_WINDOW: Final = 1 * GiB
_AHEAD: Final = 4  # batches that wait, for each thread


class CompareError(Exception):
    """The two cannot be compared; ``status`` is QEMU's: 3 what is where, 4 reading failed."""

    def __init__(self, status: int, what: str, node: Node, error: OSError) -> None:
        super().__init__(f"{what} {node.name}: {error.strerror or error}")
        self.status = status


class Piece(NamedTuple):
    """Bytes to compare; where ``zero`` names a side (0 or 1), that one reads as zeroes."""

    offset: int
    length: int
    zero: int | None


class Comparer:
    """``run()`` compares the disks ``nodes``; their ``size`` is taken up to a whole sector."""

    def __init__(self, nodes: tuple[Node, Node], told: Told = lambda done, total: None) -> None:
        self._nodes = nodes
        self._sizes = tuple(align_up(node.size, _SECTOR) for node in nodes)
        self._told = told
        self._local = threading.local()
        self._known: list[list[tuple[int, int, bool]]] = [[], []]
        self._threads = 8 if any(node.blocking for node in nodes) else 2

    @property
    def sizes_differ(self) -> bool:
        """Whether one disk is larger than the other: what it has more must be zeroes."""
        return self._sizes[0] != self._sizes[1]

    def run(self) -> int | None:
        """Where the first sector is that differs; None: nowhere. `CompareError`."""
        waiting: deque[Future[int | None]] = deque()
        pool = ThreadPoolExecutor(self._threads, "compare")
        try:
            for batch in self._batches():
                waiting.append(pool.submit(self._compare, batch))
                if len(waiting) >= self._threads * _AHEAD:
                    found = waiting.popleft().result()
                    if found is not None:
                        return found
                self._told(batch[0].offset, max(self._sizes))
            found = next((f for w in waiting if (f := w.result()) is not None), None)
            self._told(max(self._sizes), max(self._sizes))
            return found
        finally:
            pool.shutdown(cancel_futures=True)

    def _batches(self) -> Iterator[list[Piece]]:
        """Pieces, of 1 MiB together: small ones would cost more to hand over than to compare."""
        batch: list[Piece] = []
        bytes_in = 0
        for piece in self._pieces(max(self._sizes)):
            batch.append(piece)
            bytes_in += piece.length
            if bytes_in >= _PIECE or len(batch) >= _MOST_PIECES:
                yield batch
                batch, bytes_in = [], 0
        if batch:
            yield batch

    def _pieces(self, total: int) -> Iterator[Piece]:
        """What has to be read, in order."""
        offset = 0
        while offset < total:
            (stop, zero), (other, zero_too) = self._zeroes(0, offset), self._zeroes(1, offset)
            stop = min(stop, other)
            if not (zero and zero_too):
                side = 0 if zero else 1 if zero_too else None
                for start in range(offset, stop, _PIECE):
                    yield Piece(start, min(_PIECE, stop - start), side)
            offset = stop

    def _zeroes(self, side: int, offset: int) -> tuple[int, bool]:
        """``(stop, zero)``: up to where the disk is known to be zero, or not known to be."""
        node, known = self._nodes[side], self._known[side]
        if offset >= node.size:
            return max(self._sizes), True
        while known and known[-1][0] <= offset:
            known.pop()
        if not known:
            try:
                extents = node.extents(offset, min(_WINDOW, node.size - offset))
            except OSError as error:
                raise CompareError(3, "sector allocation test failed for", node, error) from error
            known += [(e.offset + e.length, e.offset, e.is_zero) for e in reversed(extents)]
        stop, _, zero = known[-1]
        return stop, zero

    def _compare(self, batch: list[Piece]) -> int | None:
        """The first sector in the batch that differs; None if there is none."""
        for piece in batch:
            found = self._difference(piece)
            if found is not None:
                return align_down(piece.offset + found, _SECTOR)
        return None

    def _difference(self, piece: Piece) -> int | None:
        """How many bytes of the piece are equal before the first that is not; None: all."""
        if piece.zero is not None:
            words = self._read(1 - piece.zero, piece)
            return _position(words) if words.any() else None
        first, second = self._read(0, piece), self._read(1, piece)
        return None if np.array_equal(first, second) else _position(first ^ second)

    def _read(self, side: int, piece: Piece) -> Words:
        """The bytes as words, in a buffer of the thread; zeroes behind the end of the disk."""
        node, (view, words) = self._nodes[side], self._buffer(side)
        there = max(0, min(piece.length, node.size - piece.offset))
        whole = align_up(piece.length, 8)
        try:
            if there:
                node.pread_into(view[:there], piece.offset)
        except OSError as error:
            what = f"error while reading offset {piece.offset} of"
            raise CompareError(4, what, node, error) from error
        if there < whole:
            clear(view[there:whole])
        return words[: whole // 8]

    def _buffer(self, side: int) -> tuple[memoryview, Words]:
        buffers: list[Any] | None = getattr(self._local, "buffers", None)
        if buffers is None:
            views = [memoryview(bytearray(_PIECE)) for _ in range(2)]
            buffers = [(view, np.frombuffer(view, np.uint64)) for view in views]
            self._local.buffers = buffers
        view, words = buffers[side]
        return view, words


def _position(words: Words) -> int:
    """The byte where the first word lies that is not zero."""
    return int(np.flatnonzero(words)[0]) * 8


def first_status_difference(first: Iterator[Batch], second: Iterator[Batch]) -> int | None:
    """Where two maps of equal disks begin to differ in what kind of data is there (``-s``)."""
    one, two = _kinds(first), _kinds(second)
    (stop, kind), (stop2, kind2) = next(one, _END), next(two, _END)
    at = 0
    while kind == kind2 and kind >= 0:
        at = min(stop, stop2)
        if stop == at:
            stop, kind = next(one, _END)
        if stop2 == at:
            stop2, kind2 = next(two, _END)
    return None if kind == kind2 else at


_END: Final = (1 << 64, -1)


def _kinds(batches: Iterator[Batch]) -> Iterator[tuple[int, int]]:
    """``(stop, kind)`` of each entry; the kind is without the depth."""
    for batch in batches:
        stops = batch.starts + batch.lengths
        kinds = batch.codes & (DATA | ZERO | PRESENT | OFFSET)
        yield from zip(stops.tolist(), kinds.tolist(), strict=True)

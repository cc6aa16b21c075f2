# SPDX-License-Identifier: Apache-2.0
"""`HoleMap`: where a sparse file has data, asked of the kernel and remembered."""

import errno
import os
import sys
import threading
from bisect import bisect_left, bisect_right
from os import lseek
from typing import Final, TypeAlias

from fleece.units import MiB

Stretch: TypeAlias = tuple[int, int, bool]
"""``(start, stop, data)``: bytes [start, stop) hold data, or lie in a hole."""

MOST_STRETCHES: Final = 16384
"""How many stretches one `HoleMap.walk` returns: some 20 ms of system calls."""

_WORTH: Final = 1 * MiB
_MOST_KNOWN: Final = 1024


class HoleMap:
    """Stretches of data and holes of one open file, with ``SEEK_HOLE`` and ``SEEK_DATA``.

    The kernel may have to walk a whole file to find the next hole (4 ms for 512 MiB on tmpfs), so
    long stretches of data are remembered. A stale "data" is never wrong, for reading a hole gives
    its zeroes; holes are never remembered. Whoever makes holes calls `punched` afterwards.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._lock = threading.Lock()
        self._generation = 0
        # Disjoint, sorted, replaced as a whole: readers take no lock.
        self._known: tuple[list[int], list[int]] = ([], [])

    def walk(self, offset: int, length: int) -> list[Stretch]:
        """Alternating stretches from ``offset``, without gaps, at most `MOST_STRETCHES`.

        What lies behind the end of the file is a hole. OSError if the file cannot be asked.
        """
        out: list[Stretch] = []
        position, end = offset, offset + length
        data_end = min(end, lseek(self._fd, 0, os.SEEK_END))
        while position < data_end and len(out) < MOST_STRETCHES:
            position = self._step(out, position, data_end)
        if position < end and position >= data_end:
            _append(out, position, end, False)
        return out

    def _step(self, out: list[Stretch], position: int, end: int) -> int:
        stop = min(self._data_until(position), end)
        data = stop > position
        if not data:
            stop = min(self._hole_until(position), end)
        if stop == position:
            # Changed between the two calls: "data" is always a right answer.
            stop, data = end, True
        _append(out, position, stop, data)
        return stop

    def _data_until(self, position: int) -> int:
        """The end of the data at ``position``; ``position`` itself if a hole is there."""
        starts, stops = self._known
        index = bisect_right(starts, position) - 1
        if index >= 0 and stops[index] > position:
            return stops[index]
        generation = self._generation
        try:
            stop = lseek(self._fd, position, os.SEEK_HOLE)
        except OSError as error:
            return _end_or_raise(error, position)
        if stop - position >= _WORTH:
            self._remember(position, stop, generation)
        return stop

    def _hole_until(self, position: int) -> int:
        try:
            return lseek(self._fd, position, os.SEEK_DATA)
        except OSError as error:
            return _end_or_raise(error, sys.maxsize)

    def _remember(self, start: int, stop: int, generation: int) -> None:
        with self._lock:
            if generation == self._generation:
                self._put(*self._overlapping(start, stop), [(start, stop)])

    def punched(self, start: int, stop: int) -> None:
        """There may be new holes in [start, stop). Call it when they are there, not before."""
        with self._lock:
            self._generation += 1
            first, last = self._overlapping(start, stop)
            if first < last:
                starts, stops = self._known
                self._put(first, last, [(starts[first], start), (stop, stops[last - 1])])

    def _overlapping(self, start: int, stop: int) -> tuple[int, int]:
        """Which of the known stretches overlap [start, stop): a slice of their numbers."""
        starts, stops = self._known
        return bisect_right(stops, start), bisect_left(starts, stop)

    def _put(self, first: int, last: int, new: list[tuple[int, int]]) -> None:
        """Replace the known stretches [first:last] by those of ``new`` that are long enough."""
        starts, stops = self._known
        new = [pair for pair in new if pair[1] - pair[0] >= _WORTH]
        if len(starts) - (last - first) + len(new) > _MOST_KNOWN:
            new = []
        self._known = (
            starts[:first] + [start for start, _ in new] + starts[last:],
            stops[:first] + [stop for _, stop in new] + stops[last:],
        )


def _append(out: list[Stretch], start: int, stop: int, data: bool) -> None:
    if out and out[-1][2] is data:
        out[-1] = (out[-1][0], stop, data)
    else:
        out.append((start, stop, data))


def _end_or_raise(error: OSError, no_more: int) -> int:
    """ENXIO: nothing of that kind up to the end of the file. EINVAL: the file system cannot say."""
    if error.errno == errno.ENXIO:
        return no_more
    if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
        return sys.maxsize
    raise error

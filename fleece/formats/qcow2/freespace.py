# SPDX-License-Identifier: Apache-2.0
"""Which free clusters may be given to new data, and where the next ones are.

A cluster whose last reference is gone goes through a quarantine: the removal of the reference is
durable (`Refcounts` sees to it), the caller has punched it if it wants to, and `GRACE` seconds have
gone by, because a read that was told by ``map`` where the data lies may still be under way.

What is free is found in the refcount blocks, a segment of 32768 clusters at a time, by next-fit.
Memory: one byte for each cluster of a segment in which something was freed in this session, and
four for each segment of the file.
"""

import time
from collections.abc import Callable
from typing import Final, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

GRACE: Final = 30.0
"""Seconds that a freed cluster waits at least; at most twice as long."""

# Why a cluster became free, as QEMU's pass-discard-* options tell them apart
REQUEST: Final = 1
SNAPSHOT: Final = 2
OTHER: Final = 3

_SHIFT: Final = 15
SEGMENT: Final = 1 << _SHIFT
# Segments that one search looks into, so that no write waits for a walk through all counts.
_MOST_LOOKS: Final = 4
# Freed runs that the caller may still punch; more are reused without.
_MOST_FREED: Final = 16384

# What is known of a cluster. From _YOUNG on it must not be given out.
_NORMAL: Final = 0
_USED_BEFORE: Final = 1  # may hold old data, whether it is free or not
_OLD: Final = 2
_YOUNG: Final = 3
_PUNCHING: Final = 4
_HELD: Final = _OLD
_AGED: Final = bytes([0, 1, 1, 2, 4, *range(5, 256)])

IsFree: TypeAlias = Callable[[int, int], NDArray[np.bool_]]
"""``(first, count)`` -> for each of these clusters, whether its count is 0 and it may be used."""


class Freed(NamedTuple):
    """``clusters`` host clusters from ``first`` that nothing refers to any more, and why."""

    first: int
    clusters: int
    reason: int


class FreeSpace:
    """Free clusters in front of the end of the file. The caller holds the metadata lock.

    ``end``: the first cluster that was never used when the file was opened. ``clock`` counts
    seconds.
    """

    def __init__(self, end: int, is_free: IsFree, clock: Callable[[], float] = time.monotonic):
        self._is_free = is_free
        self._clock = clock
        self._states: dict[int, bytearray] = {}
        self._touched: set[int] = set()  # segments with clusters in quarantine
        self._turned = clock()
        self._freed: list[Freed] = []  # since the last turn
        self._freed_before: list[Freed] = []
        # The longest free run of a segment is at most this.
        self._longest = np.full((end + SEGMENT - 1) >> _SHIFT, SEGMENT, np.int32)
        self._cursor = 0  # the segment to look into next
        self._window = (0, 0)  # the run that clusters are taken from
        self._runs: list[tuple[int, int]] = []  # more of them, the nearest last
        self._futile = SEGMENT + 1  # no run of so many was found anywhere
        self.reused = False

    def used_before(self, first: int, count: int) -> bool:
        """Whether one of the clusters had other data in this session."""
        return any(
            states is not None and states.count(0, low, high) < high - low
            for states, low, high in self._pieces(first, count)
        )

    def _pieces(self, first: int, count: int) -> list[tuple[bytearray | None, int, int]]:
        stop, pieces = first + count, []
        while first < stop:
            base = first >> _SHIFT << _SHIFT
            high = min(stop, base + SEGMENT)
            pieces.append((self._states.get(first >> _SHIFT), first - base, high - base))
            first = high
        return pieces

    def hold(self, first: int, count: int, reason: int) -> None:
        """These have no reference any more, durably."""
        self._mark(first, count, _YOUNG)
        last = self._freed[-1] if self._freed else None
        if last and last.first + last.clusters == first and last.reason == reason:
            self._freed[-1] = Freed(last.first, last.clusters + count, reason)
        elif len(self._freed) < _MOST_FREED:
            self._freed.append(Freed(first, count, reason))

    def _mark(self, first: int, count: int, state: int) -> None:
        for number in range(first >> _SHIFT, ((first + count - 1) >> _SHIFT) + 1):
            if number not in self._states:
                self._states[number] = bytearray(SEGMENT)
            self._touched.add(number)
        for states, low, high in self._pieces(first, count):
            assert states is not None
            states[low:high] = bytes([state]) * (high - low)

    def take_freed(self) -> list[Freed]:
        """What may be punched now. It stays out of use until `punched` is called with it."""
        freed = self._freed_before + self._freed
        self._freed, self._freed_before = [], []
        for first, count, _ in freed:
            self._mark(first, count, _PUNCHING)
        return freed

    def punched(self, freed: list[Freed]) -> None:
        """The holes are there, or will never be: the grace period begins."""
        for first, count, _ in freed:
            self._mark(first, count, _YOUNG)

    def forget_window(self) -> None:
        """Counts were changed by somebody else: what was found free may not be so."""
        self._cursor = max(0, self._cursor - 1) if self._runs else self._cursor
        self._window, self._runs = (0, 0), []

    def _turn(self) -> None:
        """When it is time, free what has waited long enough, and let the rest grow old."""
        now = self._clock()
        if not self._touched or now - self._turned < GRACE:
            if not self._touched:
                self._turned = now
            return
        self._turned = now
        self._freed_before, self._freed = self._freed, []
        for number in list(self._touched):
            states = self._states[number]
            if states.find(_OLD) >= 0:
                self._set_longest(number)
            states[:] = states.translate(_AGED)
            if not any(states.find(state) >= 0 for state in (_OLD, _YOUNG, _PUNCHING)):
                self._touched.discard(number)

    def _set_longest(self, number: int) -> None:
        missing = number + 1 - len(self._longest)
        if missing > 0:  # clusters behind the old end were all in use until now
            self._longest = np.append(self._longest, np.zeros(missing, np.int32))
        self._longest[number] = SEGMENT
        self._futile = SEGMENT + 1

    def find(self, count: int, end: int) -> int:
        """The first of ``count`` free clusters in a row in front of ``end``; -1 if none are found.

        They are not free any more for this object: use them, or call `hold`.
        """
        first, stop = self._window
        if stop - first < count and not self._next_window(count):
            if self._touched:
                self._turn()
            if count >= self._futile or not self._search(count, end):
                return -1
        first, stop = self._window
        self._window = (first + count, stop)
        self.reused = True
        return first

    def _next_window(self, count: int) -> bool:
        """Go on to the next run of ``count`` or more of those that the last look found."""
        while self._runs:
            first, stop = self._runs.pop()
            if stop - first >= count:
                self._window = (first, stop)
                return True
        return False

    def _search(self, count: int, end: int) -> bool:
        """Set the window to a run of ``count`` or more, from the cursor on, and once around."""
        for _ in range(_MOST_LOOKS):
            able = np.flatnonzero(self._longest >= count)
            if not len(able):
                self._futile = count
                return False
            at = int(np.searchsorted(able, self._cursor))
            number = int(able[at % len(able)])
            self._look(number, end)
            self._cursor = number + 1
            if self._next_window(count):
                return True
        return False

    def _look(self, number: int, end: int) -> None:
        """Find the runs of one segment. What it has is exact then."""
        base, runs = number << _SHIFT, np.zeros((0, 2), np.int64)
        stop = min(base + SEGMENT, end)
        if base < stop:
            free = self._is_free(base, stop - base)
            states = self._states.get(number)
            if states is not None:
                free = free & (np.frombuffer(states, np.uint8)[: stop - base] < _HELD)
            if base == 0:
                free[0] = False  # the header's, whatever its count says
            edges = np.flatnonzero(np.diff(np.concatenate(([False], free, [False]))))
            runs = edges.reshape(-1, 2)
        self._longest[number] = int((runs[:, 1] - runs[:, 0]).max(initial=0))
        self._runs = [(base + first, base + last) for first, last in runs[::-1].tolist()]

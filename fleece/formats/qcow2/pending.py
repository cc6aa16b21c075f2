# SPDX-License-Identifier: Apache-2.0
"""Copy on write, delayed: clusters of which only parts were written so far.

A write into a part of a cluster that is not the image's own yet (it is the backing file's, shared
with a snapshot, or compressed) gets a new host cluster and goes there at once, but what belongs
around it is not copied yet, and no table refers to the new cluster. If later writes cover the rest,
nothing is ever copied. What is still missing at a flush, or when too many clusters wait, is copied
then. Until then the writes are as durable as any write before its flush: they are not.
"""

from typing import Final, TypeAlias

Span: TypeAlias = tuple[int, int]
"""``(start, stop)``, in bytes from the start of a cluster."""

MOST: Final = 1024
"""Clusters that wait at most; a writer that finds more settles some."""


class Pending:
    """One guest cluster; its bytes ``spans`` are at ``host``, a new cluster of the data file.

    ``fresh``: what was not written there reads as zeroes.
    """

    __slots__ = ("fresh", "host", "spans")

    def __init__(self, host: int, *, fresh: bool) -> None:
        self.host = host
        self.fresh = fresh
        self.spans: list[Span] = []

    def add(self, start: int, stop: int) -> None:
        """These bytes were written."""
        before = [span for span in self.spans if span[1] < start]
        after = [span for span in self.spans if span[0] > stop]
        touched = self.spans[len(before) : len(self.spans) - len(after)]
        if touched:
            start, stop = min(start, touched[0][0]), max(stop, touched[-1][1])
        self.spans = [*before, (start, stop), *after]

    def covers(self, size: int) -> bool:
        """Whether all of a cluster of ``size`` bytes was written."""
        return self.spans == [(0, size)]

    def gaps(self, size: int) -> list[Span]:
        """What was not."""
        ends = [0, *(stop for _, stop in self.spans)]
        starts = [*(start for start, _ in self.spans), size]
        return [(a, b) for a, b in zip(ends, starts, strict=True) if a < b]

    def cut(self, start: int, stop: int) -> list[tuple[int, int, bool]]:
        """The bytes ``[start, stop)`` as ``(start, stop, whether written)``, in order."""
        found, at = [], start
        for low, high in self.spans:
            low, high = max(low, start), min(high, stop)
            if low >= high:
                continue
            if at < low:
                found.append((at, low, False))
            found.append((low, high, True))
            at = high
        if at < stop:
            found.append((at, stop, False))
        return found


class PendingClusters(dict[int, Pending]):
    """By guest cluster, the oldest first. The caller holds the metadata lock."""

    @property
    def crowded(self) -> bool:
        """Whether some should be settled."""
        return len(self) > MOST

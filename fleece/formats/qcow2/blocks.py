# SPDX-License-Identifier: Apache-2.0
"""The refcount table and the refcount blocks: where each count lies, and counts in ranges."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Final

import numpy as np

from fleece.block.node import Node
from fleece.formats.qcow2 import constants as c
from fleece.formats.qcow2.cache import DEFAULT_LIMIT, Table, TableCache
from fleece.formats.qcow2.entries import corrupt
from fleece.formats.qcow2.header import Header
from fleece.formats.qcow2.tally import Counts, Numbers
from fleece.formats.qcow2.widths import Width

_TABLE_MASK: Final = ~0x1FF & (1 << 64) - 1
# How much of the refcount blocks is searched, from the end, for the last cluster in use. Past
# it the end of the file is taken, which is right too, and costs only the space in between.
_MOST_SEARCHED: Final = 64 << 20


class Blocks:
    """Counts by host cluster; a cluster without a block has none. The caller holds a lock.

    ``limit``: bytes of blocks that are kept although they could be read again.
    """

    def __init__(self, file: Node, header: Header, limit: int = DEFAULT_LIMIT) -> None:
        self._size = header.cluster_size
        self.width = Width(header.refcount_order)
        self.per_block = self._size * 8 // self.width.bits
        self.cache = TableCache(file, self._size, limit)
        data = bytearray(header.refcount_table_clusters << header.cluster_bits)
        file.pread_into(memoryview(data), header.refcount_table_offset)
        self.table = np.frombuffer(data, ">u8").astype(np.uint64) & np.uint64(_TABLE_MASK)

    def block(self, index: int) -> Table:
        """Block ``index``, which is there. OSError (EIO) if it cannot be where it should."""
        offset = int(self.table[index])
        if offset & (self._size - 1) or offset > c.MAX_SIZE - self._size:
            raise corrupt(f"refcount block {index} cannot be at {offset:#x}")
        return self.cache.get(offset)

    def place(self, cluster: int) -> tuple[Table, int] | None:
        """The block of a cluster and its place within; None if there is no block."""
        index, at = divmod(cluster, self.per_block)
        if index >= len(self.table) or not self.table[index]:
            return None
        return self.block(index), at

    def get(self, cluster: int) -> int:
        """One count."""
        place = self.place(cluster)
        return 0 if place is None else self.width.get(place[0].data, place[1])

    def put(self, block: Table, at: int, value: int) -> None:
        """Set one count of a block."""
        self.width.put(block.data, at, value)
        self.cache.touch(block, *self.width.span(at, at + 1))

    def fill(self, first: int, count: int, value: int) -> None:
        """Set the counts of a range, as far as there are blocks."""
        if count == 1:
            place = self.place(first)
            if place is not None:
                self.put(*place, value)
            return
        for block, low, high in self.ranges(first, count):
            if block is not None:
                self.width.fill(block.data, low, high, value)
                self.cache.touch(block, *self.width.span(low, high))

    def ranges(self, first: int, count: int) -> Iterator[tuple[Table | None, int, int]]:
        """``(block, low, high)`` for a range of clusters, in order; None where there is none."""
        while count:
            index, at = divmod(first, self.per_block)
            n = min(count, self.per_block - at)
            there = index < len(self.table) and self.table[index]
            yield self.block(index) if there else None, at, at + n
            first, count = first + n, count - n

    def in_use(self, first: int, count: int) -> Numbers:
        """For each cluster of a range, 0 if its count is 0 and can be set, else not 0."""
        out = np.ones(count, np.int64)
        at = 0
        for block, low, high in self.ranges(first, count):
            if block is not None:
                out[at : at + high - low] = self.width.read(block.data, low, high) != 0
            at += high - low
        return out

    def tallied(self, clusters: Numbers) -> Iterator[tuple[int, int, Numbers]]:
        """``(index, low, times)`` per block: how often each cluster from ``low`` of it occurs."""
        ordered = np.sort(clusters)
        indexes = ordered // self.per_block
        edges = np.flatnonzero(np.diff(indexes, prepend=-1, append=-1)).tolist()
        for low, high in pairwise(edges):
            index = int(indexes[low])
            within = ordered[low:high] - index * self.per_block
            first = int(within[0])
            yield index, first, np.bincount(within - first)

    def counts_of(self, index: int, low: int, length: int) -> Counts | None:
        """``length`` counts of block ``index`` from ``low``; None if there is no such block."""
        if index >= len(self.table) or not self.table[index]:
            return None
        return self.width.read(self.block(index).data, low, low + length)

    def lookup(self, clusters: Numbers) -> Counts:
        """The count of each of ``clusters``; 0 where there is no block."""
        out = np.zeros(len(clusters), np.uint64)
        indexes = clusters // self.per_block
        cuts = [0, *(np.flatnonzero(np.diff(indexes)) + 1).tolist(), len(clusters)]
        for low, high in pairwise(cuts):
            if low == high:
                continue
            within = clusters[low:high] - int(indexes[low]) * self.per_block
            first = int(within.min())
            counts = self.counts_of(int(indexes[low]), first, int(within.max()) + 1 - first)
            if counts is not None:
                out[low:high] = counts[within - first]
        return out

    def write(self, index: int, low: int, counts: Counts) -> None:
        """Set counts of block ``index`` from ``low``."""
        block = self.block(index)
        self.width.write(block.data, low, counts)
        self.cache.touch(block, *self.width.span(low, low + len(counts)))

    def last_used(self) -> int:
        """The highest host cluster with a count; 0 (the header's) if the search is given up."""
        searched = 0
        for index in np.flatnonzero(self.table)[::-1].tolist():
            used = np.flatnonzero(self.width.read(self.block(index).data, 0, self.per_block))
            if len(used):
                return int(index * self.per_block + used[-1])
            searched += self._size
            if searched > _MOST_SEARCHED:
                break
        return 0

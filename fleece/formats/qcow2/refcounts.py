# SPDX-License-Identifier: Apache-2.0
"""Reference counts of host clusters, and the allocator that stands on them.

New clusters always come from behind the last one in use. A host cluster that was ever handed out
is not given to other data while the image is open, which is what lets ``map`` promise that its
runs are stable, and what makes a freed cluster need no quarantine. (Reuse of free space across
sessions belongs to the full driver.)
"""

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fleece.block.node import Node
from fleece.errors import ImageCorrupt
from fleece.formats.qcow2 import constants as c
from fleece.formats.qcow2.cache import Piece, Table, TableCache
from fleece.formats.qcow2.header import Header
from fleece.formats.qcow2.tables import corrupt

_TABLE_MASK: Final = ~0x1FF & (1 << 64) - 1
# How much of the refcount blocks is searched, from the end, for the last cluster in use. Past
# it the end of the file is taken, which is right too, and costs only the space in between.
_MOST_SEARCHED: Final = 64 << 20


class TableMove(NamedTuple):
    """The refcount table has a new place: what bytes 48..59 of the header have to say."""

    offset: int
    clusters: int


class RefcountChanges(NamedTuple):
    """What one write-back has to write, in this order, with a sync before ``entries``/``move``.

    ``blocks``: counts. ``entries``: ``(index, value)`` of the refcount table, for blocks that are
    new. ``move``: the whole table lies elsewhere, ``table`` is its contents.
    """

    blocks: list[Piece]
    entries: dict[int, int]
    move: TableMove | None
    table: bytes


class Refcounts:
    """Counts of 8, 16, 32 or 64 bits. Not thread-safe: the caller holds the metadata lock.

    ``file_end`` is the length of a regular file, 0 for anything whose length says nothing about
    what is in use (a device).
    """

    def __init__(self, file: Node, header: Header, file_end: int) -> None:
        self._file = file
        self._bits = header.cluster_bits
        self._size = header.cluster_size
        self._dtype = np.dtype(f">u{(1 << header.refcount_order) // 8}")
        self._per_block = self._size // self._dtype.itemsize
        self.cache = TableCache(file, self._size)
        self.table_offset = header.refcount_table_offset
        data = bytearray(header.refcount_table_clusters << self._bits)
        file.pread_into(memoryview(data), self.table_offset)
        self._table = np.frombuffer(data, ">u8").astype(np.uint64) & np.uint64(_TABLE_MASK)
        self._new_entries: dict[int, int] = {}
        self._move: TableMove | None = None
        self._next = max(-(-file_end // self._size), self._last_used() + 1)

    @property
    def end(self) -> int:
        """The host offset behind everything that is in use."""
        return self._next << self._bits

    @property
    def lowest_width(self) -> int:
        """Bytes of one count."""
        return self._dtype.itemsize

    def _last_used(self) -> int:
        """The highest host cluster with a count; 0 (the header's) if the search is given up."""
        searched = 0
        for index in np.flatnonzero(self._table)[::-1].tolist():
            used = np.flatnonzero(self._counts(self._block(index)))
            if len(used):
                return int(index * self._per_block + used[-1])
            searched += self._size
            if searched > _MOST_SEARCHED:
                break
        return 0

    def _block(self, index: int) -> Table:
        offset = int(self._table[index])
        if offset & (self._size - 1):
            raise corrupt(f"refcount block {index} at {offset:#x} is not aligned")
        return self.cache.get(offset)

    def _counts(self, block: Table) -> NDArray[np.unsignedinteger]:
        return np.frombuffer(block.data, self._dtype)

    def get(self, cluster: int) -> int:
        """The count of host cluster ``cluster``."""
        index, at = divmod(cluster, self._per_block)
        if index >= len(self._table) or not self._table[index]:
            return 0
        return int(self._counts(self._block(index))[at])

    def allocate(self, count: int) -> int:
        """The host offset of ``count`` new clusters in a row, each with one reference.

        OSError (ENOSPC, EFBIG) if a block that they need cannot be written.
        """
        while (missing := self._missing_block(count)) is not None:
            self._add_block(missing)
        first = self._next
        self._next += count
        self._add(first, count, 1)
        return first << self._bits

    def _missing_block(self, count: int) -> int | None:
        first, last = self._next // self._per_block, (self._next + count - 1) // self._per_block
        if last >= len(self._table):
            self._grow_table(last + 1)
            return self._missing_block(count)
        absent = np.flatnonzero(self._table[first : last + 1] == 0)
        return first + int(absent[0]) if len(absent) else None

    def _add_block(self, index: int) -> None:
        """Put a block into the next free cluster. If that is one of its own, it counts itself."""
        here = self._next // self._per_block
        index = here if not self._table[here] else index
        offset = self.end
        # Written at once, so that a full disk shows here and not at a later flush.
        self._file.pwrite(memoryview(bytes(self._size)), offset)
        self.cache.add(offset, bytearray(self._size))
        self._table[index] = offset
        self._new_entries[index] = offset
        self._next += 1
        self._add(offset >> self._bits, 1, 1)

    def _grow_table(self, entries: int) -> None:
        """Move the table to the end of the file, half as large again and at least ``entries``."""
        old_clusters = len(self._table) * 8 >> self._bits
        old_offset = self.table_offset
        # Its own clusters, and the blocks for them, need entries too: some slack covers both.
        wanted = max(entries + entries // 8 + 16, len(self._table) * 3 // 2)
        clusters = -(-wanted * 8 // self._size)
        if clusters << self._bits > c.MAX_REFCOUNT_TABLE_BYTES:
            raise OSError(27, "the refcount table is as large as the format allows")
        grown = np.zeros(clusters * self._size // 8, np.uint64)
        grown[: len(self._table)] = self._table
        self._table = grown
        self.table_offset = self.allocate(clusters)
        self._file.pwrite(memoryview(bytes(clusters << self._bits)), self.table_offset)
        self._move = TableMove(self.table_offset, clusters)
        self._retired.append((old_offset >> self._bits, old_clusters))

    def _add(self, first: int, count: int, delta: int) -> None:
        """Change the counts of ``count`` clusters whose blocks are all there."""
        while count:
            index, at = divmod(first, self._per_block)
            n = min(count, self._per_block - at)
            block = self._block(index)
            counts = self._counts(block)[at : at + n]
            counts += np.array(delta, np.int64).astype(self._dtype)
            width = self._dtype.itemsize
            self.cache.touch(block, at * width, (at + n) * width)
            first, count = first + n, count - n

# SPDX-License-Identifier: Apache-2.0
"""Reference counts of host clusters, and the allocator that stands on them.

New clusters always come from behind the last one in use. A host cluster that was ever handed out
is not given to other data while the image is open, which is what lets ``map`` promise that its
runs are stable, and what makes a freed cluster need no quarantine. (Reuse of free space across
sessions belongs to the full driver.)
"""

import errno
from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fleece.block.node import Node
from fleece.formats.qcow2 import constants as c
from fleece.formats.qcow2.cache import Piece, Table, TableCache
from fleece.formats.qcow2.header import Header
from fleece.formats.qcow2.hosting import regular_end
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
    """What one write-back has to write: the fields in this order, with a sync after ``blocks``.

    ``blocks``: counts. ``entries``: ``(index, offset)`` of blocks that are new to the table at
    ``table_offset``; or, if it moves, ``table`` is all of it and ``move`` its place. ``retired``:
    ``(first, count)`` of host clusters, one reference to each of which is gone once the write-back
    is durable.
    """

    blocks: list[Piece]
    table_offset: int
    entries: list[tuple[int, int]]
    table: bytes
    move: TableMove | None
    retired: list[tuple[int, int]]


class Refcounts:
    """Counts of 8, 16, 32 or 64 bits. Not thread-safe: the caller holds the metadata lock.

    New clusters lie behind the end of a regular file, so there they are holes and read as zeroes
    (``fresh_is_zero``); on anything else, whose length says nothing, behind the last one in use.
    """

    def __init__(self, file: Node, header: Header) -> None:
        file_end = regular_end(file)
        self.fresh_is_zero = file_end > 0
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
        # Entries of the table as the header has it, or will have it after ``_move``.
        self._capacity = len(self._table)
        self._new_entries: dict[int, int] = {}
        self._move: TableMove | None = None
        self._retired: list[tuple[int, int]] = []
        self._next = max(-(-file_end // self._size), self._last_used() + 1)

    @property
    def end(self) -> int:
        """The host offset behind everything that is in use."""
        return self._next << self._bits

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
        if offset & (self._size - 1) or offset > c.MAX_SIZE - self._size:
            raise corrupt(f"refcount block {index} cannot be at {offset:#x}")
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
        self._set(first, count, 1)
        return first << self._bits

    def _missing_block(self, count: int) -> int | None:
        first, last = self._next // self._per_block, (self._next + count - 1) // self._per_block
        if last >= self._capacity:
            self._grow_table(last + 1)
            return self._missing_block(count)
        return next((i for i in range(first, last + 1) if not self._table[i]), None)

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
        self._set(offset >> self._bits, 1, 1)

    def _grow_table(self, entries: int) -> None:
        """Move the table to the end of the file, half as large again and at least ``entries``."""
        old = (self.table_offset >> self._bits, self._capacity * 8 >> self._bits)
        # Its own clusters, and the blocks for them, need entries too: some slack covers both.
        wanted = max(entries + entries // 8 + 16, self._capacity * 3 // 2)
        clusters = -(-wanted * 8 // self._size)
        if clusters << self._bits > c.MAX_REFCOUNT_TABLE_BYTES:
            raise OSError(errno.EFBIG, "the refcount table is as large as the format allows")
        capacity, self._capacity = self._capacity, clusters * self._size // 8
        missing = self._capacity - len(self._table)
        self._table = np.append(self._table, np.zeros(max(0, missing), np.uint64))
        try:
            self._place_table(clusters)
        except BaseException:
            self._capacity = capacity
            raise
        self._retired.append(old)

    def _place_table(self, clusters: int) -> None:
        offset = self.allocate(clusters)
        try:
            self._file.pwrite(memoryview(bytes(clusters << self._bits)), offset)
        except BaseException:
            self.release(offset, clusters)
            raise
        self.table_offset = offset
        self._move = TableMove(offset, clusters)

    def release(self, offset: int, count: int) -> None:
        """Undo an `allocate` whose clusters nothing refers to, in memory or on disk.

        They may hold a part of a failed write by now, so they are not given out again.
        """
        self._set(offset >> self._bits, count, 0)

    def retire(self, first: int, count: int) -> None:
        """Host clusters from ``first`` lose one reference when the next write-back is durable."""
        self._retired.append((first, count))

    def _set(self, first: int, count: int, value: int) -> None:
        width = self._dtype.itemsize
        for block, low, high in self._ranges(first, count):
            block.data[low * width : high * width] = value.to_bytes(width, "big") * (high - low)

    def _drop(self, first: int, count: int) -> None:
        """One reference less. A count that is 0 already stays so: the image was corrupt before."""
        for block, low, high in self._ranges(first, count):
            counts = self._counts(block)[low:high]
            counts -= (counts != 0).astype(self._dtype)

    def _ranges(self, first: int, count: int) -> Iterator[tuple[Table, int, int]]:
        """The blocks of a range of clusters, where there are any, each marked as changed."""
        width = self._dtype.itemsize
        while count:
            index, at = divmod(first, self._per_block)
            n = min(count, self._per_block - at)
            if index < len(self._table) and self._table[index]:
                block = self._block(index)
                self.cache.touch(block, at * width, (at + n) * width)
                yield block, at, at + n
            first, count = first + n, count - n

    @property
    def changed(self) -> bool:
        """Whether there is anything to write."""
        return bool(self.cache.dirty_bytes or self._new_entries or self._retired or self._move)

    def take(self) -> RefcountChanges:
        """What has to be written, which counts as written from now on; then call `settle`."""
        move, self._move = self._move, None
        fitting = {i: v for i, v in self._new_entries.items() if i < self._capacity}
        self._new_entries = {i: v for i, v in self._new_entries.items() if i not in fitting}
        retired, self._retired = self._retired, []
        table = self._table[: self._capacity].astype(">u8").tobytes() if move else b""
        entries = [] if move else sorted(fitting.items())
        return RefcountChanges(
            self.cache.take_dirty(), self.table_offset, entries, table, move, retired
        )

    def take_retired(self) -> RefcountChanges:
        """As `take` with lazy refcounts: nothing is written, references still go."""
        retired, self._retired = self._retired, []
        return RefcountChanges([], self.table_offset, [], b"", None, retired)

    def settle(self, changes: RefcountChanges, *, written: bool) -> None:
        """The write-back is durable, or has failed and everything has to be written again."""
        self.cache.settle(changes.blocks, written=written)
        if written:
            for first, count in changes.retired:
                self._drop(first, count)
            return
        self._move = self._move or changes.move
        self._retired = changes.retired + self._retired
        self._new_entries.update(changes.entries)

# SPDX-License-Identifier: Apache-2.0
"""Reference counts of host clusters, and the allocator that stands on them.

New clusters come from free space where a run is long enough, else from behind the last one in use.
A cluster whose last reference went is not given to other data before three things have happened:
the tables without that reference are on stable storage; the caller has punched the cluster, if it
asked for what it may punch (`take_freed`); and `freespace.GRACE` seconds have gone by, so that a
read that began with what ``map`` said before is over. The first keeps what is on disk right after
a crash, the second keeps a hole out of new data, the third keeps reads right while the image is
open.
"""

import errno
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fleece.block.node import Node
from fleece.formats.qcow2 import constants as c
from fleece.formats.qcow2.blocks import Blocks
from fleece.formats.qcow2.cache import DEFAULT_LIMIT, Piece
from fleece.formats.qcow2.entries import corrupt
from fleece.formats.qcow2.freespace import OTHER, Freed, FreeSpace
from fleece.formats.qcow2.header import Header
from fleece.formats.qcow2.hosting import regular_end
from fleece.formats.qcow2.overlap import REFCOUNT_BLOCK, REFCOUNT_TABLE, MetadataMap
from fleece.formats.qcow2.tally import Counts, Numbers


class TableMove(NamedTuple):
    """The refcount table has a new place: what bytes 48..59 of the header have to say."""

    offset: int
    clusters: int


class RefcountChanges(NamedTuple):
    """What one write-back has to write: the fields in this order, with a sync after ``blocks``.

    ``blocks``: counts. ``entries``: ``(index, offset)`` of blocks that are new to the table at
    ``table_offset``; or, if it moves, ``table`` is all of it and ``move`` its place. ``retired``:
    host clusters, one reference to each of which is gone once the write-back is durable.
    """

    blocks: list[Piece]
    table_offset: int
    entries: list[tuple[int, int]]
    table: bytes
    move: TableMove | None
    retired: list[Freed]


class Refcounts:
    """Counts of 1 to 64 bits. Not thread-safe: the caller holds the metadata lock.

    New clusters behind the end of a regular file are holes and read as zeroes (`is_fresh`); on
    anything else, whose length says nothing, they lie behind the last one in use. ``guard`` may be
    set: what it knows is never given out, and it is told of new refcount blocks and tables.
    """

    def __init__(
        self,
        file: Node,
        header: Header,
        *,
        limit: int = DEFAULT_LIMIT,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        file_end = regular_end(file)
        self.guard: MetadataMap | None = None
        self._grows_zeroed = file_end > 0
        self._file = file
        self._bits = header.cluster_bits
        self._size = header.cluster_size
        self._blocks = Blocks(file, header, limit)
        self.cache = self._blocks.cache
        self.table_offset = header.refcount_table_offset
        # Entries of the table as the header has it, or will have it after ``_move``.
        self._capacity = len(self._blocks.table)
        self._new_entries: dict[int, int] = {}
        self._move: TableMove | None = None
        self._retired: list[Freed] = []
        self._old_tables: list[Freed] = []
        self._next = max(-(-file_end // self._size), self._blocks.last_used() + 1)
        self._fresh_from = self._next
        self._free = FreeSpace(self._next, self._is_free, clock)
        # Where compressed data goes on inside of the last cluster of it, in bytes; 0: nowhere.
        self._packed_at = 0

    @property
    def end(self) -> int:
        """The host offset behind everything that is in use."""
        return self._next << self._bits

    @property
    def most(self) -> int:
        """The largest count."""
        return self._blocks.width.most

    @property
    def fresh_is_zero(self) -> bool:
        """Whether everything that was allocated so far lay behind the end: see `is_fresh`."""
        return self._grows_zeroed and not self._free.reused

    def is_fresh(self, offset: int, count: int = 1) -> bool:
        """Whether ``count`` clusters that were just allocated read as zeroes where not written."""
        first = offset >> self._bits
        fresh = self._grows_zeroed and first >= self._fresh_from
        return fresh and not self._free.used_before(first, count)

    def get(self, cluster: int) -> int:
        """The count of host cluster ``cluster``."""
        return self._blocks.get(cluster)

    def lookup(self, clusters: Numbers) -> Counts:
        """The count of each of ``clusters``."""
        return self._blocks.lookup(clusters)

    def _is_free(self, first: int, count: int) -> NDArray[np.bool_]:
        free = self._blocks.in_use(first, count) == 0
        if self.guard is not None:
            free &= ~self.guard.known(first, count)
        return np.asarray(free)

    def allocate(self, count: int) -> int:
        """The host offset of ``count`` new clusters in a row, each with one reference.

        OSError (ENOSPC, EFBIG) if a block that they need cannot be written.
        """
        first = self._free.find(count, self._next)
        if first < 0:
            return self._allocate_at_end(count)
        if first <= self._packed_at >> self._bits < first + count:
            self._packed_at = 0  # what was packed there is gone
        self._blocks.fill(first, count, 1)
        return first << self._bits

    def _allocate_at_end(self, count: int) -> int:
        while (missing := self._missing_block(count)) is not None:
            self._add_block(missing)
        first = self._next
        self._next += count
        self._blocks.fill(first, count, 1)
        return first << self._bits

    def _missing_block(self, count: int) -> int | None:
        per_block = self._blocks.per_block
        first, last = self._next // per_block, (self._next + count - 1) // per_block
        if last >= self._capacity:
            self._grow_table(last + 1)
            return self._missing_block(count)
        for index in range(first, last + 1):
            if not self._blocks.table[index]:
                return index
        return None

    def _add_block(self, index: int) -> None:
        """Put a block into the next free cluster. If that is one of its own, it counts itself."""
        here = self._next // self._blocks.per_block
        index = here if not self._blocks.table[here] else index
        offset = self.end
        # Written at once, so that a full disk shows here and not at a later flush.
        self._file.pwrite(memoryview(bytes(self._size)), offset)
        self.cache.add(offset, bytearray(self._size))
        self._blocks.table[index] = offset
        self._new_entries[index] = offset
        self._next += 1
        self._blocks.fill(offset >> self._bits, 1, 1)
        if self.guard is not None:
            self.guard.claim(REFCOUNT_BLOCK, offset, self._size)

    def _grow_table(self, entries: int) -> None:
        """Move the table to the end of the file, half as large again and at least ``entries``."""
        old = Freed(self.table_offset >> self._bits, self._capacity * 8 >> self._bits, OTHER)
        # Its own clusters, and the blocks for them, need entries too: some slack covers both.
        wanted = max(entries + entries // 8 + 16, self._capacity * 3 // 2)
        clusters = -(-wanted * 8 // self._size)
        if clusters << self._bits > c.MAX_REFCOUNT_TABLE_BYTES:
            raise OSError(errno.EFBIG, "the refcount table is as large as the format allows")
        capacity, self._capacity = self._capacity, clusters * self._size // 8
        missing = self._capacity - len(self._blocks.table)
        more = np.zeros(max(0, missing), np.uint64)
        self._blocks.table = np.append(self._blocks.table, more)
        try:
            self._place_table(clusters)
        except BaseException:
            self._capacity = capacity
            raise
        self._retired.append(old)
        self._old_tables.append(old)

    def _place_table(self, clusters: int) -> None:
        offset = self._allocate_at_end(clusters)
        try:
            self._file.pwrite(memoryview(bytes(clusters << self._bits)), offset)
        except BaseException:
            self.release(offset, clusters)
            raise
        self.table_offset = offset
        self._move = TableMove(offset, clusters)
        if self.guard is not None:
            self.guard.claim(REFCOUNT_TABLE, offset, clusters << self._bits)

    def allocate_bytes(self, length: int) -> int:
        """The host byte offset for ``length`` bytes of compressed data, at most a cluster.

        It goes on behind the last such data where it can; a cluster that is shared gets one more
        reference. OSError as `allocate`.
        """
        offset, inside = self._packed_at, self._packed_at & (self._size - 1)
        if inside and self._may_share(offset >> self._bits):
            if inside + length <= self._size:
                self._add_one(offset >> self._bits)
                self._packed_at = offset + length
                return offset
        else:
            inside = 0
        host = self.allocate(1)
        if inside and host == offset - inside + self._size:
            self._add_one(offset >> self._bits)  # the data begins in one and ends in the next
        else:
            offset = host
        self._packed_at = offset + length
        return offset

    def _may_share(self, cluster: int) -> bool:
        return 0 < self.get(cluster) < self.most

    def _add_one(self, cluster: int) -> None:
        place = self._blocks.place(cluster)
        assert place is not None
        self._blocks.put(*place, self._blocks.width.get(place[0].data, place[1]) + 1)

    def release_bytes(self, offset: int, length: int) -> None:
        """Undo an `allocate_bytes` whose data nothing refers to."""
        first, last = offset >> self._bits, (offset + length - 1) >> self._bits
        self._packed_at = 0
        self._drop(first, last - first + 1, OTHER)

    def release(self, offset: int, count: int) -> None:
        """Undo an `allocate` whose clusters nothing refers to, in memory or on disk.

        They may hold a part of a failed write by now, and go through the quarantine.
        """
        self._blocks.fill(offset >> self._bits, count, 0)
        self._hold(offset >> self._bits, count, OTHER)

    def retire(self, first: int, count: int, reason: int = OTHER) -> None:
        """Host clusters from ``first`` lose one reference when the next write-back is durable.

        ``reason``: `freespace.REQUEST`, ``SNAPSHOT`` or ``OTHER``; `take_freed` gives it back.
        """
        last = self._retired[-1] if self._retired else None
        if last and last.first + last.clusters == first and last.reason == reason:
            self._retired[-1] = Freed(last.first, last.clusters + count, reason)
        else:
            self._retired.append(Freed(first, count, reason))

    def _drop(self, first: int, count: int, reason: int) -> None:
        """One reference less. A count that is 0 already stays so: the image was corrupt before."""
        if count == 1:
            self._drop_one(first, reason)
            return
        for index, low, times in self._blocks.tallied(np.arange(first, first + count)):
            self._drop_many(index, low, times, reason)

    def _drop_one(self, cluster: int, reason: int) -> None:
        place = self._blocks.place(cluster)
        if place is None:
            return
        count = self._blocks.width.get(place[0].data, place[1])
        if count:
            self._blocks.put(*place, count - 1)
        if count == 1:
            self._hold(cluster, 1, reason)

    def _drop_many(self, index: int, low: int, times: Numbers, reason: int) -> None:
        counts = self._blocks.counts_of(index, low, len(times))
        if counts is None:
            return
        before = counts.astype(np.uint64)
        after = before - np.minimum(before, times.astype(np.uint64))
        self._blocks.write(index, low, after)
        gone = (before != 0) & (after == 0)
        edges = np.flatnonzero(np.diff(np.concatenate(([False], gone, [False]))))
        base = index * self._blocks.per_block + low
        for start, stop in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            self._hold(base + start, stop - start, reason)

    def _hold(self, first: int, count: int, reason: int) -> None:
        """Nothing refers to these any more."""
        if first <= self._packed_at >> self._bits < first + count:
            self._packed_at = 0  # whoever gets the cluster next has it for itself
        self._free.hold(first, count, reason)

    def drop_references(self, clusters: Numbers, reason: int = OTHER) -> None:
        """Each of ``clusters`` (as often as it occurs) loses a reference at once.

        That nothing on disk has these references any more must be durable already.
        """
        for index, low, times in self._blocks.tallied(clusters):
            self._drop_many(index, low, times, reason)

    def add_references(self, clusters: Numbers) -> None:
        """Each of ``clusters`` (as often as it occurs) gets a reference; all of them or none.

        OSError: EINVAL if a count would not fit into its width, EIO if a cluster has no count.
        """
        for index, low, times in self._blocks.tallied(clusters):
            counts = self._blocks.counts_of(index, low, len(times))
            if counts is None:
                where = (index * self._blocks.per_block + low) << self._bits
                raise corrupt(f"the cluster at {where:#x} is in use and has no refcount block")
            room = np.uint64(self.most) - counts.astype(np.uint64)
            if (times.astype(np.uint64) > room).any():
                bits = self._blocks.width.bits
                raise OSError(
                    errno.EINVAL,
                    f"a cluster would have over {self.most} references, the most that {bits} bit "
                    "refcounts can hold",
                )
        for index, low, times in self._blocks.tallied(clusters):
            counts = self._blocks.counts_of(index, low, len(times))
            assert counts is not None
            self._blocks.write(index, low, counts.astype(np.uint64) + times.astype(np.uint64))
        self._free.forget_window()

    def take_freed(self) -> list[Freed]:
        """Clusters to punch. They stay out of use until `punched` gets the same list."""
        return self._free.take_freed()

    def punched(self, freed: list[Freed]) -> None:
        """The caller has punched these, or gave up to."""
        self._free.punched(freed)

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
        table = self._blocks.table[: self._capacity].astype(">u8").tobytes() if move else b""
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
            for first, count, reason in changes.retired:
                self._drop(first, count, reason)
            if changes.move is not None:
                self._forget_tables()
            return
        self._move = self._move or changes.move
        self._retired = changes.retired + self._retired
        self._new_entries.update(changes.entries)

    def _forget_tables(self) -> None:
        """The header points at the new table durably; where the old ones were is no metadata."""
        old, self._old_tables = self._old_tables, []
        for first, count, _ in old:
            if self.guard is not None and first << self._bits != self.table_offset:
                self.guard.release(REFCOUNT_TABLE, first << self._bits, count << self._bits)

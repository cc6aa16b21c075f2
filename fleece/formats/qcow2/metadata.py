# SPDX-License-Identifier: Apache-2.0
"""The metadata of an open image, and the order in which changes of it reach the disk.

The tables are written back: changes live in memory until a flush, or until 8 MiB are dirty. Each
write-back is a consistent cut, taken under the lock, and goes to the file in this order:

1. the data of the clusters concerned, and the first contents of new L2 tables and refcount blocks,
   were written before the change was made in memory;
2. counts (of old and new refcount blocks), the contents of a moved refcount table; **sync**;
3. entries of the refcount table, or the header's pointer to the moved one; **sync** if any;
4. L2 entries, then L1 entries; **sync**;
5. in memory only: what nothing refers to any more is counted down, for the next write-back.

What that promises. After SIGKILL, at any prefix of these writes, and after a power cut, with any
subset of the writes since the last sync: nothing that the tables refer to has a count of 0 (leaks
are possible), and all data that was flushed reads as it was flushed or as it was overwritten since.
Writes that were not flushed may be lost, as with QEMU: also by SIGKILL. Whoever needs a point that
survives it (a checkpoint, a snapshot) calls ``flush``.

An image with lazy refcounts is marked dirty before its first change; then step 2 and 3 wait until
it is closed, and the promise about counts is kept by `rebuild` at the next open.
"""

import struct
import threading
from typing import Final

from fleece.block.node import Node
from fleece.formats.qcow2 import compressed
from fleece.formats.qcow2 import constants as c
from fleece.formats.qcow2.cache import DIRTY_LIMIT, Piece
from fleece.formats.qcow2.header import Header
from fleece.formats.qcow2.refcounts import RefcountChanges, Refcounts
from fleece.formats.qcow2.tables import ClusterMap

_ENTRY: Final = struct.Struct(">Q")


class Metadata:
    """Tables and counts of one image. ``lock`` guards them and is not held during data I/O.

    ``counts`` is None in an image that is only read.
    """

    def __init__(self, file: Node, header: Header, counts: Refcounts | None) -> None:
        self.lock = threading.Lock()
        self.map = ClusterMap(file, header)
        self._counts = counts
        self._file = file
        self._header = header
        self._flush_lock = threading.Lock()
        self._writing = False
        self.begun = False

    @property
    def counts(self) -> Refcounts:
        """The counts of a writable image."""
        assert self._counts is not None
        return self._counts

    @property
    def clean(self) -> bool:
        """Whether the tables on stable storage are those in memory (call it with the lock)."""
        return not (self.map.cache.dirty_bytes or self.map.l1_dirty or self._writing)

    @property
    def crowded(self) -> bool:
        """Whether so much is dirty that it should be written now."""
        return self.map.cache.dirty_bytes > DIRTY_LIMIT

    def begin(self) -> None:
        """Before the first change of any kind: the header must not promise what we do not keep.

        Autoclear features go, and an image with lazy refcounts is marked dirty.
        """
        with self._flush_lock:
            if self.begun:
                return
            header = self._header
            if header.version == 3 and header.autoclear:
                self._write_header(c.AT_AUTOCLEAR, _ENTRY.pack(0))
            if header.lazy_refcounts:
                self._write_header(
                    c.AT_INCOMPATIBLE, _ENTRY.pack(header.incompatible | c.INCOMPATIBLE_DIRTY)
                )
            self.begun = True

    def _write_header(self, at: int, data: bytes) -> None:
        self._file.pwrite(memoryview(data), at)
        self._file.flush()

    def own_table(self, index: int) -> None:
        """See to it that L1 entry ``index`` has an L2 table that may be changed (with the lock).

        A shared one is copied. OSError, with nothing changed, if the disk is full.
        """
        if self.map.is_own(index):
            return
        old = self.map.table_at(index)
        data = bytearray(self._header.cluster_size) if old is None else bytearray(old.data)
        offset = self.counts.allocate(1)
        try:
            # The first contents are on disk before anything can point there (step 1).
            self._file.pwrite(memoryview(data), offset)
        except BaseException:
            self.counts.release(offset, 1)
            raise
        self.map.cache.add(offset, data)
        self.map.set_l1_entry(index, offset)
        if old is not None:
            self.counts.retire(old.offset >> self._header.cluster_bits, 1)

    def publish(self, cluster: int, entries: list[int]) -> None:
        """Set L2 entries from ``cluster`` (with the lock); their data has been written.

        What the old entries referred to loses a reference when that is durable.
        """
        for old in self.map.store(cluster, entries):
            if old & c.COMPRESSED:
                self.counts.retire(*compressed.span(old, self._header.cluster_bits))
            else:
                self.counts.retire((old & c.OFFSET_MASK) >> self._header.cluster_bits, 1)

    def flush(self) -> None:
        """Steps 2 to 5: on return, all changes and all data of before are on stable storage."""
        with self._flush_lock:
            self._write_back(lazy=self._header.lazy_refcounts)

    def close(self) -> None:
        """Write everything; an image with lazy refcounts is not dirty any more."""
        with self._flush_lock:
            self._write_back(lazy=False)
            if self.counts.changed:  # what the last write-back counted down
                self._write_back(lazy=False)
            if self._header.lazy_refcounts and self.begun:
                bits = self._header.incompatible & ~c.INCOMPATIBLE_DIRTY
                self._write_header(c.AT_INCOMPATIBLE, _ENTRY.pack(bits))

    def _write_back(self, *, lazy: bool) -> None:
        with self.lock:
            changes = self.counts.take_retired() if lazy else self.counts.take()
            tables = self.map.cache.take_dirty()
            pointers, self.map.l1_dirty = self.map.l1_dirty, set()
            l1 = [(index, self.map.l1_entry(index)) for index in sorted(pointers)]
            self._writing = True
        written = False
        try:
            self._write(changes, tables, l1)
            written = True
        finally:
            with self.lock:
                self.counts.settle(changes, written=written)
                self.map.cache.settle(tables, written=written)
                if not written:
                    self.map.l1_dirty |= pointers
                self._writing = False

    def _write(
        self, changes: RefcountChanges, tables: list[Piece], l1: list[tuple[int, int]]
    ) -> None:
        self._write_counts(changes)
        for _, offset, data in tables:
            self._file.pwrite(memoryview(data), offset)
        self._write_entries(self._header.l1_offset, l1)
        if tables or l1:
            self._file.flush()

    def _write_counts(self, changes: RefcountChanges) -> None:
        for _, offset, data in changes.blocks:
            self._file.pwrite(memoryview(data), offset)
        if changes.table:
            self._file.pwrite(memoryview(changes.table), changes.table_offset)
        self._file.flush()
        self._write_entries(changes.table_offset, changes.entries)
        if changes.move is not None:
            pointer = struct.pack(">QI", changes.move.offset, changes.move.clusters)
            self._file.pwrite(memoryview(pointer), c.AT_REFCOUNT_TABLE)
        if changes.entries or changes.move:
            self._file.flush()

    def _write_entries(self, base: int, entries: list[tuple[int, int]]) -> None:
        """8-byte entries of the table at ``base``, neighbours in one write."""
        at = 0
        while at < len(entries):
            stop = at + 1
            while stop < len(entries) and entries[stop][0] == entries[stop - 1][0] + 1:
                stop += 1
            values = [value for _, value in entries[at:stop]]
            data = struct.pack(f">{len(values)}Q", *values)
            self._file.pwrite(memoryview(data), base + entries[at][0] * 8)
            at = stop

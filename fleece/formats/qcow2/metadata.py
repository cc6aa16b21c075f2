# SPDX-License-Identifier: Apache-2.0
"""The metadata of an open image, and the order in which changes of it reach the disk.

The tables are written back: changes live in memory until a flush, or until 8 MiB are dirty. Each
write-back is a consistent cut, taken under the lock, and goes to the file in this order:

1. the data of the clusters concerned, and the first contents of new L2 tables and refcount blocks,
   were written before the change was made in memory;
2. counts (of old and new refcount blocks), the contents of a moved refcount table; **sync**;
3. entries of the refcount table, or the header's pointer to the moved one; **sync** if any;
4. L2 entries, then L1 entries; **sync**;
5. what nothing refers to any more is counted down, and punched. This is not synced: to lose it is
   a leak.

What that promises. After SIGKILL, at any prefix of these writes, and after a power cut, with any
subset of the writes since the last sync: nothing that the tables refer to has a count of 0 (leaks
are possible), and all data that was flushed reads as it was flushed or as it was overwritten since.
Writes that were not flushed may be lost, as with QEMU: also by SIGKILL. Whoever needs a point that
survives it (a checkpoint, a snapshot) calls ``flush``.

An image with lazy refcounts is marked dirty before its first change; then step 2 and 3 wait until
it is closed, and the promise about counts is kept by `rebuild` at the next open.
"""

import contextlib
import errno
import logging
import struct
import threading
from dataclasses import replace
from typing import Final

from fleece.block.node import Node
from fleece.formats.qcow2 import compressed, overlap
from fleece.formats.qcow2 import constants as c
from fleece.formats.qcow2 import header as headers
from fleece.formats.qcow2.cache import DIRTY_LIMIT, Piece
from fleece.formats.qcow2.entries import CorruptEntry
from fleece.formats.qcow2.freespace import OTHER
from fleece.formats.qcow2.header import Header
from fleece.formats.qcow2.options import Qcow2Options
from fleece.formats.qcow2.overlap import MetadataMap
from fleece.formats.qcow2.refcounts import RefcountChanges, Refcounts, TableMove
from fleece.formats.qcow2.sharing import Sharing
from fleece.formats.qcow2.tables import ClusterMap

_KEPT_AUTOCLEAR: Final = c.AUTOCLEAR_BITMAPS | c.AUTOCLEAR_RAW_DATA_FILE

log = logging.getLogger(__name__)


class Metadata:
    """Tables and counts of one image. ``lock`` guards them and is not held during data I/O.

    ``header`` is the header as it is on disk.
    ``broken`` says why the image is closed to writes; it is empty while all is well.
    """

    counts: Refcounts
    """Only in an image that is written."""

    def __init__(
        self,
        file: Node,
        header: Header,
        counts: Refcounts | None,
        *,
        name: str,
        options: Qcow2Options,
        l1: tuple[int, int] | None = None,
    ) -> None:
        self.lock = threading.Lock()
        self.header = header
        self.map = ClusterMap(file, header, limit=options.l2_cache_bytes, l1=l1)
        self.overlap = MetadataMap(header, options.overlap_check)
        if counts is not None:
            self.overlap.load(file)
            counts.guard = self.overlap
        self.begun = False
        self.broken = ""
        self._counts = counts
        if counts is not None:
            self.counts = counts
        self._file = file
        # Where the guest's data lies if it is not in ``file``; set by the reader.
        self.data_file: Node | None = None
        self._name = name
        self._options = options
        lazy = options.lazy_refcounts
        self._lazy = header.version == 3 and (header.lazy_refcounts if lazy is None else lazy)
        self._flush_lock = threading.RLock()  # mark_corrupt may be called in a flush
        self._writing = False
        self.sharing = Sharing(self, file)

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
            self.check_usable()
            if self.begun:
                return
            header = self.header
            changed = replace(header, autoclear=header.autoclear & _KEPT_AUTOCLEAR)
            if self._lazy:
                changed = replace(changed, incompatible=header.incompatible | c.INCOMPATIBLE_DIRTY)
            if changed != header:
                self.set_header(changed)
            self.begun = True

    def set_header(self, header: Header) -> None:
        """Write what differs from the header on disk, durably. `ImageError` if it does not fit.

        Where the refcount table lies is not the caller's to say: it may have moved since he
        looked at the header.
        """
        header = replace(
            header,
            refcount_table_offset=self.header.refcount_table_offset,
            refcount_table_clusters=self.header.refcount_table_clusters,
        )
        self.header = headers.rewrite(self._file, self.header, header, self._name)

    def check_usable(self) -> None:
        """OSError (EIO) if the image was found to be corrupt."""
        if self.broken:
            raise OSError(errno.EIO, f"closed to writes: {self.broken}", self._name)

    def mark_corrupt(self, why: str) -> None:
        """Nothing is written from now on; the image says so. Never raises; not with the lock."""
        with self._flush_lock:
            if not self.broken and self._counts is not None:
                self._mark_corrupt(why)

    def _mark_corrupt(self, why: str) -> None:
        self.broken, self.begun = why, False
        log.error("%s: %s; it is marked corrupt and closed to writes", self._name, why)
        bits = self.header.incompatible | c.INCOMPATIBLE_CORRUPT
        try:
            if self.header.version == 3:
                self.set_header(replace(self.header, incompatible=bits))
        except Exception as error:
            log.error("%s: it cannot be marked corrupt: %s", self._name, error)
        if self._options.on_corrupt is not None:
            self._options.on_corrupt(why)

    def own_table(self, index: int) -> None:
        """See to it that L1 entry ``index`` has an L2 table that may be changed (with the lock).

        A shared one is copied. OSError, with nothing changed, if the disk is full.
        """
        if self.map.is_own(index):
            return
        old = self.map.table_at(index)
        data = bytearray(self.header.cluster_size) if old is None else bytearray(old.data)
        offset = self.counts.allocate(1)
        try:
            # The first contents are on disk before anything can point there (step 1).
            self._file.pwrite(memoryview(data), offset)
        except BaseException:
            self.counts.release(offset, 1)
            raise
        self.map.cache.add(offset, data)
        self.map.set_l1_entry(index, offset)
        self.overlap.claim(overlap.ACTIVE_L2, offset, len(data))
        if old is not None:
            self.counts.retire(old.offset >> self.header.cluster_bits, 1)
            self.overlap.release(overlap.ACTIVE_L2, old.offset, len(data))

    def publish(self, cluster: int, words: list[int], reason: int = OTHER) -> list[int]:
        """Set L2 entries from ``cluster`` (with the lock); their data has been written.

        What the old entries referred to loses a reference, for ``reason``, when that is durable.
        Returns those of them that were compressed.
        """
        packed = []
        bits = self.header.cluster_bits
        for old in self.map.store(cluster, words):
            if old & c.COMPRESSED:
                packed.append(old)
                self.counts.retire(*compressed.span(old, bits), reason)
            elif not self.header.has_data_file:
                self.counts.retire((old & c.OFFSET_MASK) >> bits, 1, reason)
                if not old & c.COPIED:
                    self.sharing.lost_one(old)
        return packed

    def flush(self) -> None:
        """Steps 2 to 5: on return, all changes and all data of before are on stable storage."""
        with self._flush_lock:
            self.check_usable()
            try:
                self._write_back(lazy=self._lazy)
            except CorruptEntry as error:
                self._mark_corrupt(str(error.strerror))
                raise

    def write_all(self) -> None:
        """As `flush`, and the counts of an image with lazy refcounts as well."""
        with self._flush_lock:
            self.check_usable()
            self._write_back(lazy=False)

    def close(self) -> None:
        """Write everything; an image with lazy refcounts is not dirty any more."""
        with self._flush_lock:
            if self.broken:
                return
            self._write_back(lazy=False)
            if self._lazy and self.begun:
                bits = self.header.incompatible & ~c.INCOMPATIBLE_DIRTY
                self.set_header(replace(self.header, incompatible=bits))

    def _write_back(self, *, lazy: bool) -> None:
        with self.lock:
            changes = self.counts.take_retired() if lazy else self.counts.take()
            tables = self.map.cache.take_dirty()
            pointers, self.map.l1_dirty = self.map.l1_dirty, set()
            l1 = [(index, self.map.l1_entry(index)) for index in sorted(pointers)]
            self._writing = True
            lost = set() if lazy else self.sharing.take()
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
                    self.sharing.give_back(lost)
                self._writing = False
        if not lazy:
            self._write_lowered_counts()
        if lost:
            self.sharing.settle(lost)
        self._punch()

    def _write_lowered_counts(self) -> None:
        with self.lock:
            blocks = self.counts.cache.take_dirty()
        written = False
        try:
            for _, offset, data in blocks:
                self._write_piece(offset, data, overlap.REFCOUNT_BLOCK)
            written = True
        finally:
            with self.lock:
                self.counts.cache.settle(blocks, written=written)

    def _punch(self) -> None:
        """Give the space of clusters that nothing refers to back to the file system."""
        with self.lock:
            freed = self.counts.take_freed()
        if not freed:
            return
        bits = self.header.cluster_bits
        for first, count, reason in freed:
            if self._options.passes_discard(reason):
                with contextlib.suppress(OSError):  # not every file can have holes
                    self._file.trim(first << bits, count << bits)
        with self.lock:
            self.counts.punched(freed)

    def _write(
        self, changes: RefcountChanges, tables: list[Piece], l1: list[tuple[int, int]]
    ) -> None:
        self._write_counts(changes)
        for _, offset, data in tables:
            self._write_piece(offset, data, overlap.ACTIVE_L2)
        self._write_entries(self.header.l1_offset, l1, overlap.ACTIVE_L1)
        if tables or l1:
            self._file.flush()

    def _write_piece(self, offset: int, data: bytes, kind: int) -> None:
        """Metadata of this kind; `CorruptEntry` if it would overwrite another kind."""
        self.check_place(offset, len(data), ignore=kind)
        self._file.pwrite(memoryview(data), offset)

    def check_place(self, offset: int, length: int, *, ignore: int = 0) -> None:
        """`CorruptEntry` if a write of these bytes of the file would hit metadata."""
        what = self.overlap.hit(offset, length, ignore=ignore)
        if what is not None:
            raise CorruptEntry(
                errno.EIO, f"Preventing invalid write on metadata (overlaps with {what})"
            )

    def _write_counts(self, changes: RefcountChanges) -> None:
        for _, offset, data in changes.blocks:
            self._write_piece(offset, data, overlap.REFCOUNT_BLOCK)
        if changes.table:
            self._write_piece(changes.table_offset, changes.table, overlap.REFCOUNT_TABLE)
        self._file.flush()
        if self.data_file is not None:
            self.data_file.flush()
        self._write_entries(changes.table_offset, changes.entries, overlap.REFCOUNT_TABLE)
        if changes.move is not None:
            self._point_at_table(changes.move)
        if changes.entries or changes.move:
            self._file.flush()

    def _point_at_table(self, move: TableMove) -> None:
        pointer = struct.pack(">QI", move.offset, move.clusters)
        self._file.pwrite(memoryview(pointer), c.AT_REFCOUNT_TABLE)
        self.header = replace(
            self.header,
            refcount_table_offset=move.offset,
            refcount_table_clusters=move.clusters,
        )

    def _write_entries(self, base: int, entries: list[tuple[int, int]], kind: int) -> None:
        """8-byte entries of the table at ``base``, neighbours in one write."""
        at = 0
        while at < len(entries):
            stop = at + 1
            while stop < len(entries) and entries[stop][0] == entries[stop - 1][0] + 1:
                stop += 1
            values = [value for _, value in entries[at:stop]]
            data = struct.pack(f">{len(values)}Q", *values)
            self._write_piece(base + entries[at][0] * 8, data, kind)
            at = stop

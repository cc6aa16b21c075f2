# SPDX-License-Identifier: Apache-2.0
"""From guest clusters to host clusters: the L1 table and the L2 tables."""

import struct
from typing import Final

from fleece.block.node import Node
from fleece.formats.qcow2 import constants as c
from fleece.formats.qcow2.cache import DEFAULT_LIMIT, Table, TableCache
from fleece.formats.qcow2.entries import ClusterRun, append_run, corrupt, scanner_of
from fleece.formats.qcow2.header import Header

_ENTRY: Final = struct.Struct(">Q")
# One call of `lookup` ends after so many runs: its cost and its result stay bounded.
_MOST_RUNS: Final = 16384


class ClusterMap:
    """The tables of a disk. Not thread-safe: the caller holds the metadata lock.

    ``l1_offset`` and ``l1_size`` (entries) are those of the active disk, unless an internal
    snapshot's are given. A *unit* is a cluster, or a subcluster in an image that has them.
    """

    def __init__(
        self,
        file: Node,
        header: Header,
        *,
        limit: int = DEFAULT_LIMIT,
        l1: tuple[int, int] | None = None,
    ) -> None:
        self._file = file
        self._cluster_size = header.cluster_size
        self._per_table = header.l2_entries
        self._shift = header.l2_entries.bit_length() - 1
        self._units = header.subclusters
        self._entry_size = header.l2_entry_size
        self.unit_size = header.cluster_size // header.subclusters
        self.scanner = scanner_of(header)
        self.cache = TableCache(file, header.cluster_size, limit)
        self.l1_dirty: set[int] = set()
        self.reload(*((header.l1_offset, header.l1_size) if l1 is None else l1))

    def reload(self, l1_offset: int, l1_size: int) -> None:
        """Read all tables again; nothing is dirty."""
        self.l1 = bytearray(l1_size * 8)
        if self.l1:
            self._file.pread_into(memoryview(self.l1), l1_offset)
        self.cache.forget()

    def l1_entry(self, index: int) -> int:
        """Entry ``index`` of the L1 table as it is."""
        return int(_ENTRY.unpack_from(self.l1, index * 8)[0])

    def set_l1_entry(self, index: int, offset: int) -> None:
        """Point at the L2 table at ``offset``, of which this is the only user."""
        _ENTRY.pack_into(self.l1, index * 8, offset | c.COPIED)
        self.l1_dirty.add(index)

    def table_at(self, index: int) -> Table | None:
        """The L2 table of L1 entry ``index``; None if there is none."""
        offset = self.l1_entry(index) & c.OFFSET_MASK
        if offset == 0:
            return None
        if offset & (self._cluster_size - 1):
            raise corrupt(f"L1 entry {index} points at {offset:#x}, inside a cluster")
        return self.cache.get(offset)

    def is_own(self, index: int) -> bool:
        """Whether L1 entry ``index`` has a table that may be changed in place."""
        entry = self.l1_entry(index)
        return bool(entry & c.COPIED and entry & c.OFFSET_MASK)

    def lookup(self, unit: int, count: int) -> list[ClusterRun]:
        """Runs from guest unit ``unit``, of ``count`` units in all, or fewer if many.

        `CorruptEntry` (EIO) for an entry that cannot be.
        """
        runs: list[ClusterRun] = []
        per_table = self._per_table * self._units
        while count and len(runs) < _MOST_RUNS:
            index = unit & (per_table - 1)
            n = min(count, per_table - index)
            table = self.table_at(unit // per_table)
            if table is None:
                append_run(runs, c.UNALLOCATED, 0, n, 0)
            else:
                self.scanner.scan(runs, table.data, index, n)
            unit, count = unit + n, count - n
        return runs

    def entry(self, cluster: int) -> int:
        """The L2 entry (its first word) of one guest cluster; 0 without a table."""
        table = self.table_at(cluster >> self._shift)
        if table is None:
            return 0
        at = (cluster & (self._per_table - 1)) * self._entry_size
        return int(_ENTRY.unpack_from(table.data, at)[0])

    def is_vacant(self, cluster: int, count: int) -> bool:
        """Whether all of these L2 entries are empty. False may also mean: see `lookup`."""
        index = cluster & (self._per_table - 1)
        if index + count > self._per_table:
            return False
        table = self.table_at(cluster >> self._shift)
        if table is None:
            return True
        low, length = index * self._entry_size, count * self._entry_size
        return table.data.count(0, low, low + length) == length

    def bitmap(self, cluster: int) -> int:
        """The second word of an extended L2 entry; 0 without a table."""
        table = self.table_at(cluster >> self._shift)
        if table is None:
            return 0
        at = (cluster & (self._per_table - 1)) * self._entry_size
        return int(_ENTRY.unpack_from(table.data, at + 8)[0])

    def store(self, cluster: int, words: list[int]) -> list[int]:
        """Set the L2 entries from ``cluster``; their tables are there and may be changed.

        ``words``: one for each entry, two in an image with subclusters. Returns the old entries
        that had a host cluster which the new ones do not have any more: each was one reference.
        """
        replaced: list[int] = []
        per_entry = self._entry_size // 8
        at = 0
        while at < len(words):
            index = (cluster + at // per_entry) & (self._per_table - 1)
            part = words[at : at + (self._per_table - index) * per_entry]
            table = self.table_at((cluster + at // per_entry) >> self._shift)
            assert table is not None
            replaced += self._store_in(table, index * self._entry_size, part)
            at += len(part)
        return replaced

    def _store_in(self, table: Table, low: int, part: list[int]) -> list[int]:
        high = low + len(part) * 8
        old = table.data[low:high]
        if len(part) == 1:
            _ENTRY.pack_into(table.data, low, part[0])
        else:
            struct.pack_into(f">{len(part)}Q", table.data, low, *part)
        self.cache.touch(table, low, high)
        if old == bytes(len(old)):
            return []
        step = self._entry_size // 8
        before = struct.unpack(f">{len(part)}Q", old)[::step]
        pairs = zip(before, part[::step], strict=True)
        return [was for was, now in pairs if _host_bits(was) and _host_bits(was) != _host_bits(now)]


def _host_bits(entry: int) -> int:
    return entry & ~c.COPIED if entry & c.COMPRESSED else entry & c.OFFSET_MASK

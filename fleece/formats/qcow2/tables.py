# SPDX-License-Identifier: Apache-2.0
"""From guest clusters to host clusters: the L1 table, the L2 tables, and runs of equal kind."""

import errno
import struct
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fleece.block.node import Node
from fleece.formats.qcow2 import constants as c
from fleece.formats.qcow2.cache import DEFAULT_LIMIT, Table, TableCache
from fleece.formats.qcow2.header import Header

_ENTRY: Final = struct.Struct(">Q")
# Below this many entries a loop is faster than eight numpy calls (measured: break-even near 30).
_VECTOR_FROM: Final = 32
# One call of `lookup` ends after so many runs: its cost and its result stay bounded.
_MOST_RUNS: Final = 16384


class ClusterRun(NamedTuple):
    """``clusters`` guest clusters of one ``kind`` (see `constants`).

    ``host`` is where the first one lies, and the others behind it, for ZERO_ALLOC, NORMAL and
    SHARED; the L2 entry itself for PACKED, which is alone; else 0.
    """

    kind: int
    host: int
    clusters: int


class Scanner:
    """Decodes L2 entries of an image of ``version`` with clusters of ``cluster_size`` bytes."""

    def __init__(self, cluster_size: int, version: int = 3) -> None:
        self._size = cluster_size
        self._reserved = c.L2_RESERVED | (c.ZERO if version == 2 else 0) | (cluster_size - 1)
        self._reserved &= ~(c.ZERO if version == 3 else 0)

    def decode(self, entry: int) -> tuple[int, int]:
        """``(kind, host)`` of an L2 entry; OSError (EIO) if it is not valid."""
        if entry & c.COMPRESSED:
            return c.PACKED, entry
        if entry & self._reserved:
            raise corrupt(f"L2 entry {entry:#018x} is not valid")
        host = entry & c.OFFSET_MASK
        if entry & c.ZERO:
            # Without COPIED the cluster has other users, so it is not kept for a later write.
            return (c.ZERO_ALLOC, host) if host and entry & c.COPIED else (c.ZERO_PLAIN, 0)
        if host == 0:
            return c.UNALLOCATED, 0
        return (c.NORMAL if entry & c.COPIED else c.SHARED), host

    def scan(self, runs: list[ClusterRun], data: bytes | bytearray, index: int, count: int) -> None:
        """Add the runs of ``count`` entries of ``data``, a table, from ``index``."""
        if count >= _VECTOR_FROM:
            self._scan_vector(runs, data, index, count)
            return
        first = expected = -1
        n, size = 0, self._size
        for (entry,) in _ENTRY.iter_unpack(data[index * 8 : (index + count) * 8]):
            if entry != expected:
                if n:
                    _append(runs, *self.decode(first), n, self._size)
                first, n = entry, 0
            n += 1
            if entry & c.COMPRESSED:
                expected = -1  # such a cluster is a run of its own
            else:
                expected = entry + size if entry & c.OFFSET_MASK else entry
        _append(runs, *self.decode(first), n, self._size)

    def _scan_vector(
        self, runs: list[ClusterRun], data: bytes | bytearray, index: int, count: int
    ) -> None:
        entries = np.frombuffer(data, ">u8", count, index * 8).astype(np.uint64)
        for start, stop in self._pieces(entries):
            _append(runs, *self.decode(int(entries[start])), stop - start, self._size)

    def _pieces(self, entries: NDArray[np.uint64]) -> list[tuple[int, int]]:
        """Where in ``entries`` runs begin and end.

        Entries of one run are equal (nothing allocated) or step by the cluster size. Two equal
        entries with a host offset are two references to one cluster, and stay apart.
        """
        step = np.diff(entries)
        has_host = (entries[:-1] & np.uint64(c.OFFSET_MASK | c.COMPRESSED)) != 0
        wanted = np.where(has_host, np.uint64(self._size), np.uint64(0))
        packed = (entries[:-1] & np.uint64(c.COMPRESSED)) != 0
        cuts = (np.flatnonzero((step != wanted) | packed) + 1).tolist()
        return list(zip([0, *cuts], [*cuts, len(entries)], strict=True))


class ClusterMap:
    """The tables of the active disk. Not thread-safe: the caller holds the metadata lock."""

    def __init__(self, file: Node, header: Header, *, limit: int = DEFAULT_LIMIT) -> None:
        self._header = header
        self._bits = header.cluster_bits
        self._per_table = header.l2_entries
        self._shift = self._bits - 3
        self.scanner = Scanner(header.cluster_size, header.version)
        self.cache = TableCache(file, header.cluster_size, limit)
        self.l1 = bytearray(header.l1_size * 8)
        if self.l1:
            file.pread_into(memoryview(self.l1), header.l1_offset)
        self.l1_dirty: set[int] = set()

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
        if offset & (self._header.cluster_size - 1):
            raise corrupt(f"L1 entry {index} points at {offset:#x}, inside a cluster")
        return self.cache.get(offset)

    def is_own(self, index: int) -> bool:
        """Whether L1 entry ``index`` has a table that may be changed in place."""
        entry = self.l1_entry(index)
        return bool(entry & c.COPIED and entry & c.OFFSET_MASK)

    def lookup(self, cluster: int, count: int) -> list[ClusterRun]:
        """Runs from guest cluster ``cluster``, of ``count`` clusters in all, or fewer if many.

        OSError (EIO) for an entry that cannot be.
        """
        runs: list[ClusterRun] = []
        while count and len(runs) < _MOST_RUNS:
            index = cluster & (self._per_table - 1)
            n = min(count, self._per_table - index)
            table = self.table_at(cluster >> self._shift)
            if table is None:
                _append(runs, c.UNALLOCATED, 0, n, 0)
            else:
                self.scanner.scan(runs, table.data, index, n)
            cluster, count = cluster + n, count - n
        return runs

    def entry(self, cluster: int) -> int:
        """The L2 entry of one guest cluster; 0 without a table."""
        table = self.table_at(cluster >> self._shift)
        if table is None:
            return 0
        at = (cluster & (self._per_table - 1)) * 8
        return int(_ENTRY.unpack_from(table.data, at)[0])

    def store(self, cluster: int, entries: list[int]) -> list[int]:
        """Set the L2 entries from ``cluster``; their tables are there and may be changed.

        Returns the old entries that had a host cluster which the new ones do not have any more:
        each was one reference to it.
        """
        replaced: list[int] = []
        at = 0
        while at < len(entries):
            index = (cluster + at) & (self._per_table - 1)
            part = entries[at : at + self._per_table - index]
            table = self.table_at((cluster + at) >> self._shift)
            assert table is not None
            replaced += self._store_in(table, index, part)
            at += len(part)
        return replaced

    def _store_in(self, table: Table, index: int, part: list[int]) -> list[int]:
        low, high = index * 8, (index + len(part)) * 8
        old = table.data[low:high]
        struct.pack_into(f">{len(part)}Q", table.data, low, *part)
        self.cache.touch(table, low, high)
        if old == bytes(len(old)):
            return []
        pairs = zip(struct.unpack(f">{len(part)}Q", old), part, strict=True)
        return [was for was, now in pairs if _host_bits(was) and _host_bits(was) != _host_bits(now)]


def _host_bits(entry: int) -> int:
    return entry & ~c.COPIED if entry & c.COMPRESSED else entry & c.OFFSET_MASK


def _append(runs: list[ClusterRun], kind: int, host: int, count: int, size: int) -> None:
    """Add a run, joined to the last one where it goes on from there."""
    if runs and kind != c.PACKED:
        last = runs[-1]
        expected = last.host + last.clusters * size if last.host else 0
        if last.kind == kind and host == expected:
            runs[-1] = ClusterRun(kind, last.host, last.clusters + count)
            return
    runs.append(ClusterRun(kind, host, count))


def corrupt(what: str) -> OSError:
    """The error of the data path for metadata that contradicts itself."""
    return OSError(errno.EIO, f"the qcow2 image is corrupt: {what}; see: qemu-img check")

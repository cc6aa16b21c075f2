# SPDX-License-Identifier: Apache-2.0
"""L2 entries decoded into runs of equal kind, without subclusters and with them.

Source: QEMU's ``docs/interop/qcow2``, "L1 table, L2 table and clusters" and "Extended L2 entries".
"""

import errno
import struct
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fleece.formats.qcow2 import constants as c
from fleece.formats.qcow2.header import Header

_ENTRY: Final = struct.Struct(">Q")
_EXTENDED: Final = struct.Struct(">QQ")
# Below this many entries a loop is faster than eight numpy calls (measured: break-even near 30).
_VECTOR_FROM: Final = 32


class ClusterRun(NamedTuple):
    """``units`` guest clusters (with extended L2 entries: subclusters) of one ``kind``.

    The kinds are in `constants`. ``host`` is where the first unit lies, and the others behind it,
    for the kinds that have a place; the L2 entry itself for PACKED, of which one run is one
    cluster; else 0.
    """

    kind: int
    host: int
    units: int


class CorruptEntry(OSError):
    """Metadata that cannot be (EIO)."""


def corrupt(what: str) -> CorruptEntry:
    """The error of the data path for metadata that contradicts itself."""
    return CorruptEntry(errno.EIO, f"the qcow2 image is corrupt: {what}; see: fleece image check")


class Scanner:
    """Decodes L2 entries of 8 bytes, of an image with clusters of ``cluster_size`` bytes.

    ``data_file``: the guest's data lies in a file of its own, where even offset 0 is a place.
    """

    def __init__(self, cluster_size: int, version: int = 3, *, data_file: bool = False) -> None:
        self._size = cluster_size
        self._reserved = c.L2_RESERVED | (cluster_size - 1)
        if version == 3:
            self._reserved &= ~c.ZERO
        else:
            self._reserved |= c.ZERO
        self._data_file = data_file

    def decode(self, entry: int) -> tuple[int, int]:
        """``(kind, host)`` of an L2 entry; `CorruptEntry` if it is not valid."""
        if entry & c.COMPRESSED:
            if self._data_file:
                raise corrupt("a compressed cluster, and the data lies in a file of its own")
            return c.PACKED, entry
        if entry & self._reserved:
            raise corrupt(f"L2 entry {entry:#018x} is not valid")
        host = entry & c.OFFSET_MASK
        if entry & c.ZERO:
            # Without COPIED the cluster has other users, so it is not kept for a later write.
            has_place = entry & c.COPIED and (host or self._data_file)
            return (c.ZERO_ALLOC, host) if has_place else (c.ZERO_PLAIN, 0)
        if host == 0 and not (self._data_file and entry & c.COPIED):
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
                    append_run(runs, *self.decode(first), n, size)
                first, n = entry, 0
            n += 1
            if entry & c.COMPRESSED:
                expected = -1  # such a cluster is a run of its own
            else:
                expected = entry + size if entry & c.OFFSET_MASK else entry
        append_run(runs, *self.decode(first), n, size)

    def _scan_vector(
        self, runs: list[ClusterRun], data: bytes | bytearray, index: int, count: int
    ) -> None:
        entries = np.frombuffer(data, ">u8", count, index * 8).astype(np.uint64)
        for start, stop in _pieces(entries, self._size):
            append_run(runs, *self.decode(int(entries[start])), stop - start, self._size)


class SubclusterScanner:
    """Decodes L2 entries of 16 bytes; a unit is a subcluster, 1/32 of ``cluster_size``."""

    def __init__(self, cluster_size: int, *, data_file: bool = False) -> None:
        self._size = cluster_size
        self._unit = cluster_size // c.SUBCLUSTERS
        self._reserved = c.L2_RESERVED | c.ZERO | (cluster_size - 1)
        self._data_file = data_file

    def scan(self, runs: list[ClusterRun], data: bytes | bytearray, index: int, count: int) -> None:
        """Add the runs of ``count`` subclusters of ``data``, a table, from ``index``."""
        first, last = index // c.SUBCLUSTERS, (index + count - 1) // c.SUBCLUSTERS
        if last - first < _VECTOR_FROM:
            self._scan_few(runs, data[first * 16 : (last + 1) * 16], index % c.SUBCLUSTERS, count)
            return
        words = np.frombuffer(data, ">u8", 2 * (last - first + 1), first * 16).astype(np.uint64)
        skip, left = index % c.SUBCLUSTERS, count
        for start, stop in self._pieces(words):
            entry, bitmap = int(words[2 * start]), int(words[2 * start + 1])
            n = min((stop - start) * c.SUBCLUSTERS - skip, left)
            self._add(runs, entry, bitmap, skip, n)
            skip, left = 0, left - n

    def _scan_few(
        self, runs: list[ClusterRun], entries: bytes | bytearray, skip: int, left: int
    ) -> None:
        for entry, bitmap in _EXTENDED.iter_unpack(entries):
            n = min(c.SUBCLUSTERS - skip, left)
            self._add(runs, entry, bitmap, skip, n)
            skip, left = 0, left - n

    def _pieces(self, words: NDArray[np.uint64]) -> list[tuple[int, int]]:
        """Entries that go on from each other and are the same all over; others stand alone."""
        bitmaps = words[1::2]
        uniform = (bitmaps == 0) | (bitmaps == c.ALL_ALLOCATED) | (bitmaps == c.ALL_ZERO)
        breaks = (bitmaps[1:] != bitmaps[:-1]) | ~uniform[1:] | ~uniform[:-1]
        return _pieces(words[0::2], self._size, breaks)

    def _add(self, runs: list[ClusterRun], entry: int, bitmap: int, skip: int, count: int) -> None:
        """``count`` units, of one entry or of several that are uniform, from unit ``skip``."""
        self._check(entry, bitmap)
        if entry & c.COMPRESSED:
            runs.append(ClusterRun(c.PACKED, entry, count))
            return
        if bitmap in (0, c.ALL_ALLOCATED, c.ALL_ZERO):
            self._add_run(runs, entry, bitmap & c.BITS_OF_FIRST, skip, count)
            return
        for unit in range(skip, skip + count):
            self._add_run(runs, entry, bitmap >> unit & c.BITS_OF_FIRST, unit, 1)

    def _add_run(
        self, runs: list[ClusterRun], entry: int, bits: int, unit: int, count: int
    ) -> None:
        host = entry & c.OFFSET_MASK
        place = host + unit * self._unit
        own = bool(entry & c.COPIED) and bool(host or self._data_file)
        if bits & 1:
            append_run(runs, c.NORMAL if own else c.SHARED, place, count, self._unit)
        elif bits:
            kind = c.ZERO_ALLOC if own else c.ZERO_PLAIN
            append_run(runs, kind, place if own else 0, count, self._unit)
        else:
            kind = c.UNALLOCATED_OWN if own else c.UNALLOCATED
            append_run(runs, kind, place if own else 0, count, self._unit)

    def _check(self, entry: int, bitmap: int) -> None:
        if entry & c.COMPRESSED:
            if bitmap or self._data_file:
                raise corrupt(f"compressed L2 entry {entry:#018x} has subclusters or a data file")
            return
        if entry & self._reserved:
            raise corrupt(f"L2 entry {entry:#018x} is not valid")
        allocated, zero = bitmap & 0xFFFFFFFF, bitmap >> 32
        if allocated & zero:
            raise corrupt(f"subclusters of L2 entry {entry:#018x} are both data and zero")
        if allocated and not entry & c.OFFSET_MASK and not self._data_file:
            raise corrupt(f"L2 entry {entry:#018x} has subclusters and no place for them")


def scanner_of(header: Header) -> Scanner | SubclusterScanner:
    """What decodes the L2 entries of the image."""
    if header.extended_l2:
        return SubclusterScanner(header.cluster_size, data_file=header.has_data_file)
    return Scanner(header.cluster_size, header.version, data_file=header.has_data_file)


def _pieces(
    entries: NDArray[np.uint64], size: int, breaks: NDArray[np.bool_] | None = None
) -> list[tuple[int, int]]:
    """Where in ``entries`` runs begin and end; also where ``breaks`` says so.

    Entries of one run are equal (nothing allocated) or step by the cluster size. Two equal
    entries with a host offset are two references to one cluster, and stay apart.
    """
    step = np.diff(entries)
    has_host = (entries[:-1] & np.uint64(c.OFFSET_MASK | c.COMPRESSED)) != 0
    wanted = np.where(has_host, np.uint64(size), np.uint64(0))
    cut = (step != wanted) | ((entries[:-1] & np.uint64(c.COMPRESSED)) != 0)
    if breaks is not None:
        cut |= breaks
    cuts = (np.flatnonzero(cut) + 1).tolist()
    return list(zip([0, *cuts], [*cuts, len(entries)], strict=True))


def append_run(runs: list[ClusterRun], kind: int, host: int, count: int, size: int) -> None:
    """Add a run, joined to the last one where it goes on from there; ``size`` is a unit's."""
    if runs and kind != c.PACKED:
        last = runs[-1]
        expected = last.host + last.units * size if kind in c.KINDS_WITH_A_PLACE else 0
        if last.kind == kind and host == expected:
            runs[-1] = ClusterRun(kind, last.host, last.units + count)
            return
    runs.append(ClusterRun(kind, host, count))

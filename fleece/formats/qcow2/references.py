# SPDX-License-Identifier: Apache-2.0
"""Every reference of an image to its host clusters, counted: for `rebuild` and for the checker.

Each table is read once, whatever the number of its users: a table that a thousand L1 entries point
at is scanned once and counts a thousand times. So the work is bounded by what the file holds, and
the memory by one number for each host cluster. Nothing here trusts the image; what is wrong is
reported as a `Problem` and left out.

Source: QEMU's ``docs/interop/qcow2`` ("L1 and L2 table entries", "Snapshots", "Bitmaps"); what is a
problem is what ``qemu-img check`` counts as one.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fleece.block.node import Node
from fleece.formats.qcow2 import constants as c
from fleece.formats.qcow2.header import Header
from fleece.formats.qcow2.scan import EntryScan
from fleece.formats.qcow2.structures import bitmap_tables, crypto_header, snapshot_l1_tables
from fleece.formats.qcow2.tally import Counts, Numbers, Problem, ProblemKind, Tally

_L1_RESERVED: Final = 0x7F000000000001FF
_REFCOUNT_RESERVED: Final = 0x1FF
_BATCH: Final = 512 << 10


@dataclass(frozen=True)
class References:
    """``counts[n]``: references to host cluster ``n`` (at most what the refcount width can hold).

    ``tables``: host offsets of all L2 tables in use, ascending, each once, with as many
    ``table_users`` (of L1 tables). ``fixed``: ``(first, count)`` of the clusters of what the header
    refers to: itself, L1 tables, snapshot table, bitmap directory and tables, LUKS header, refcount
    table if counted.
    """

    counts: Counts
    tables: Numbers
    table_users: Numbers
    fixed: tuple[tuple[int, int], ...]


def count_references(
    file: Node,
    header: Header,
    *,
    data_file: bool,
    on_problem: Callable[[Problem], None] | None = None,
    refcounts: bool = True,
) -> References:
    """Count the references of the active disk, the snapshots, the bitmaps and everything else.

    ``data_file``: guest data lies in another file, so data clusters are not counted. ``refcounts``:
    the refcount table and its blocks count too. `UnsupportedFeature` if the file has over 2^31
    clusters; OSError if it cannot be read.
    """
    walk = _Walk(file, header, Tally(header, file.size, on_problem))
    walk.fixed(0, header.cluster_size)
    tables, users = walk.l1_tables()
    walk.structures()
    if refcounts:
        walk.refcount_table()
    scan = EntryScan(header, walk.tally, data_file=data_file)
    for times in np.unique(users).tolist():
        for offsets, words in read_tables(file, header, tables[users == times]):
            scan.add(offsets, words, times)
    if refcounts:
        walk.refcount_blocks()
    return References(walk.tally.counts, tables, users, tuple(walk.ranges))


def read_tables(
    file: Node, header: Header, offsets: Numbers
) -> Iterator[tuple[Numbers, NDArray[np.uint64]]]:
    """The L2 tables at ``offsets``, some at a time: ``(offsets, words)``.

    ``words`` has the shape (tables, entries), or (tables, entries, 2) with extended entries, and is
    good until the next step. Neighbours in the file are read at once.
    """
    size = header.cluster_size
    most = max(1, _BATCH // size)
    width = 2 if header.incompatible & c.INCOMPATIBLE_EXTENDED_L2 else 1
    shape = (-1, size // (8 * width), 2) if width == 2 else (-1, size // 8)
    buffer = memoryview(bytearray(min(most, len(offsets)) * size))
    for start in range(0, len(offsets), most):
        part = offsets[start : start + most]
        cuts = [0, *(np.flatnonzero(np.diff(part) != size) + 1).tolist(), len(part)]
        for low, high in pairwise(cuts):
            file.pread_into(buffer[low * size : high * size], int(part[low]))
        words = np.frombuffer(buffer[: len(part) * size], ">u8").astype(np.uint64)
        yield part, words.reshape(shape)


class _Walk:
    """What lies outside of the L2 tables."""

    def __init__(self, file: Node, header: Header, tally: Tally) -> None:
        self.tally = tally
        self.ranges: list[tuple[int, int]] = []
        self._file = file
        self._header = header
        self._blocks: Numbers = np.zeros(0, np.int64)
        self._block_indexes: Numbers = self._blocks

    def fixed(self, offset: int, length: int) -> bool:
        """Count something that the header, or what it refers to, points at."""
        ok = self.tally.add_range(offset, length)
        if ok and length > 0:
            first = offset >> self._header.cluster_bits
            last = (offset + length - 1) >> self._header.cluster_bits
            self.ranges.append((first, last - first + 1))
        return ok

    def l1_tables(self) -> tuple[Numbers, Numbers]:
        """Count all L1 tables and all L2 tables; the latter's offsets, and how many users each."""
        header = self._header
        spans = [(header.l1_offset, header.l1_size)]
        spans += snapshot_l1_tables(self._file, header, self.fixed, self.tally.problem)
        good = [(start, n * 8) for start, n in spans if n and self.fixed(start, n * 8)]
        found = [self._l2_offsets(*segment) for segment in _layers(good)]
        offsets = np.concatenate([np.zeros(0, np.int64), *(f[0] for f in found)])
        times = np.concatenate([np.zeros(0, np.int64), *(f[1] for f in found)])
        tables, where = np.unique(offsets, return_inverse=True)
        users = np.zeros(len(tables), np.int64)
        np.add.at(users, where, times)
        return self._count_tables(tables, users)

    def _l2_offsets(self, start: int, end: int, users: int) -> tuple[Numbers, Numbers]:
        """Of the entries in bytes [start, end) of the file: where tables are, ``users`` of each."""
        entries = _read(self._file, start, end - start)
        reserved = entries & np.uint64(_L1_RESERVED)
        self._flag(ProblemKind.L1_RESERVED, entries, start, reserved, users)
        inside = np.uint64(self._header.cluster_size - 1)
        places = entries & np.uint64(c.OFFSET_MASK)
        self._flag(ProblemKind.L1_UNALIGNED, entries, start, places & inside, users)
        good = places[(places != 0) & (places & inside == 0)].astype(np.int64)
        return good, np.full(len(good), users, np.int64)

    def _flag(
        self,
        kind: ProblemKind,
        entries: NDArray[np.uint64],
        start: int,
        bad: NDArray[np.uint64],
        users: int,
    ) -> None:
        def make(i: int) -> Problem:
            entry = int(entries[i])
            place = entry & c.OFFSET_MASK
            return Problem(kind, at=start + i * 8, entry=entry, offset=place, times=users)

        if bad.any():
            self.tally.problems(kind, make, np.flatnonzero(bad), users)

    def _count_tables(self, tables: Numbers, users: Numbers) -> tuple[Numbers, Numbers]:
        there = self.tally.inside(tables, self._header.cluster_size, 1)
        tables, users = tables[there], users[there]
        for times in np.unique(users).tolist():
            self.tally.add(tables[users == times] >> self._header.cluster_bits, times)
        return tables, users

    def structures(self) -> None:
        """LUKS header and bitmaps."""
        if span := crypto_header(self._header, self.tally.problem):
            self.fixed(*span)
        for places in bitmap_tables(self._file, self._header, self.fixed, self.tally.problem):
            there = self.tally.inside(places, self._header.cluster_size, 1)
            self.tally.add(places[there] >> self._header.cluster_bits)

    def refcount_table(self) -> None:
        """Count the refcount table and the blocks that it names."""
        header = self._header
        start = header.refcount_table_offset
        length = header.refcount_table_clusters << header.cluster_bits
        if not self.fixed(start, length):
            return
        entries = _read(self._file, start, min(length, max(0, self._file.size - start) & ~7))
        reserved = entries & np.uint64(_REFCOUNT_RESERVED)
        places = entries & ~np.uint64(_REFCOUNT_RESERVED)
        inside = (places & np.uint64(header.cluster_size - 1) != 0) & (reserved == 0)
        outside = (places >= np.uint64(self._file.size)) & ~inside & (reserved == 0)
        for kind, bad in (
            (ProblemKind.REFCOUNT_RESERVED, reserved != 0),
            (ProblemKind.REFCOUNT_UNALIGNED, inside),
            (ProblemKind.REFCOUNT_OUTSIDE, outside & (places != 0)),
        ):
            self._flag_blocks(kind, entries, np.flatnonzero(bad))
        good = np.flatnonzero((places != 0) & ~inside & ~outside & (reserved == 0))
        self._blocks, self._block_indexes = places[good].astype(np.int64), good
        self.tally.add(self._blocks >> header.cluster_bits)

    def refcount_blocks(self) -> None:
        """When everything was counted: a block must have one reference."""
        counts = self.tally.counts[self._blocks >> self._header.cluster_bits]
        bad = np.flatnonzero(counts != 1)
        places = np.zeros(int(self._block_indexes.max(initial=-1)) + 1, np.uint64)
        places[self._block_indexes] = self._blocks.astype(np.uint64)
        self._flag_blocks(ProblemKind.REFCOUNT_SHARED, places, self._block_indexes[bad])

    def _flag_blocks(
        self, kind: ProblemKind, entries: NDArray[np.uint64], bad: NDArray[np.int64]
    ) -> None:
        base = self._header.refcount_table_offset

        def make(i: int) -> Problem:
            entry = int(entries[i])
            place = entry & ~_REFCOUNT_RESERVED
            size = self._header.cluster_size
            return Problem(kind, at=base + i * 8, entry=entry, offset=place, length=size, index=i)

        self.tally.problems(kind, make, bad, 1)


def _layers(spans: list[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """``(start, end, users)``: what bytes of the file how many of ``(offset, length)`` cover.

    Pieces of at most 512 KiB, in order, each byte of the file once.
    """
    edges = sorted([(start, 1) for start, _ in spans] + [(at + n, -1) for at, n in spans])
    users = position = 0
    for at, change in edges:
        while users and position < at:
            end = min(at, position + _BATCH)
            yield position, end, users
            position = end
        users, position = users + change, at


def _read(file: Node, offset: int, length: int) -> NDArray[np.uint64]:
    data = bytearray(length)
    if length:
        file.pread_into(memoryview(data), offset)
    return np.frombuffer(data, ">u8").astype(np.uint64)

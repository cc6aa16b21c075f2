# SPDX-License-Identifier: Apache-2.0
"""New reference counts for an image whose dirty bit says that the old ones are not to be trusted.

They are counted from the L1 and L2 tables and written behind everything else, with a new refcount
table; then the header points there; then the dirty bit goes. A sync stands between each of these
steps, so a crash at any point leaves an image that is dirty still and can be rebuilt again. The old
blocks and the old table are referred to by nothing then, and count as free.
"""

import struct
from dataclasses import replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fleece.block.node import Node
from fleece.errors import ImageCorrupt, UnsupportedFeature
from fleece.formats.qcow2 import compressed
from fleece.formats.qcow2 import constants as c
from fleece.formats.qcow2.header import Header
from fleece.formats.qcow2.hosting import regular_end

# 16 TiB of clusters of 64 KiB: 512 MiB of counts, of which only what is in use is ever touched.
_MOST_CLUSTERS: Final = 1 << 28
_REPAIR: Final = "repair it with: qemu-img check -r all"


def rebuild(file: Node, header: Header, name: str) -> Header:
    """Write new counts and clear the dirty bit; the header as it is afterwards.

    `ImageCorrupt` if the tables contradict each other, `UnsupportedFeature` if the image is too
    large; nothing is written then. Memory: 2 bytes for each host cluster.
    """
    counts = _Counter(header, file.size, name).run(file)
    regular = regular_end(file) > 0
    first = len(counts) if regular else int(np.flatnonzero(counts)[-1]) + 1
    table_offset, clusters = _write_counts(file, header, counts, first, name)
    pointer = struct.pack(">QI", table_offset, clusters)
    bits = header.incompatible & ~c.INCOMPATIBLE_DIRTY
    for at, data in ((c.AT_REFCOUNT_TABLE, pointer), (c.AT_INCOMPATIBLE, struct.pack(">Q", bits))):
        file.flush()
        file.pwrite(memoryview(data), at)
    file.flush()
    return replace(
        header,
        refcount_table_offset=table_offset,
        refcount_table_clusters=clusters,
        incompatible=bits,
    )


class _Counter:
    """References to each host cluster of the file."""

    def __init__(self, header: Header, file_size: int, name: str) -> None:
        self._header = header
        self._name = name
        self._bits = header.cluster_bits
        clusters = (file_size + header.cluster_size - 1) >> self._bits
        if clusters > _MOST_CLUSTERS:
            raise UnsupportedFeature(f"{name}: too large to count its references here; {_REPAIR}")
        self._counts = np.zeros(clusters, np.uint16)
        # Clusters of which nobody else may have a part: all but those of compressed data.
        self._whole = np.zeros(clusters, np.bool_)

    def run(self, file: Node) -> NDArray[np.uint16]:
        """Count everything that the header refers to, but the old counts."""
        header = self._header
        self._add_whole(np.zeros(1, np.int64))
        l1_clusters = (header.l1_size * 8 + header.cluster_size - 1) >> self._bits
        first = header.l1_offset >> self._bits
        self._add_whole(np.arange(first, first + l1_clusters, dtype=np.int64))
        l1 = _entries(file, header.l1_offset, header.l1_size)
        tables = l1[(l1 & np.uint64(c.OFFSET_MASK)) != 0] & np.uint64(c.OFFSET_MASK)
        self._add_whole(self._numbers(tables))
        for offset in tables.tolist():
            self._add_table(_entries(file, offset, header.l2_entries))
        if (self._counts[self._whole] > 1).any():
            self._fail("two tables refer to one cluster")
        if int(self._counts.max()) >= 1 << (1 << header.refcount_order):
            self._fail("a cluster has more references than can be counted")
        return self._counts

    def _add_table(self, entries: NDArray[np.uint64]) -> None:
        packed = (entries & np.uint64(c.COMPRESSED)) != 0
        for entry in entries[packed].tolist():
            first, count = compressed.span(entry, self._bits)
            self._add(np.arange(first, first + count, dtype=np.int64))
        plain = entries[~packed] & np.uint64(c.OFFSET_MASK)
        self._add_whole(self._numbers(plain[plain != 0]))

    def _numbers(self, offsets: NDArray[np.uint64]) -> NDArray[np.int64]:
        if (offsets & np.uint64(self._header.cluster_size - 1)).any():
            self._fail("a table points into the middle of a cluster")
        return (offsets >> np.uint64(self._bits)).astype(np.int64)

    def _add_whole(self, numbers: NDArray[np.int64]) -> None:
        self._add(numbers)
        self._whole[numbers] = True

    def _add(self, numbers: NDArray[np.int64]) -> None:
        unique, found = np.unique(numbers, return_counts=True)
        if not len(unique):
            return
        if int(unique[-1]) >= len(self._counts):
            self._fail("a table points behind the end of the file")
        total = self._counts[unique] + found
        if int(total.max()) > 0xFFFF:
            self._fail("a cluster has more references than can be counted")
        self._counts[unique] = total

    def _fail(self, what: str) -> None:
        raise ImageCorrupt(f"{self._name}: {what}; {_REPAIR}")


def _entries(file: Node, offset: int, count: int) -> NDArray[np.uint64]:
    data = bytearray(count * 8)
    if data:
        file.pread_into(memoryview(data), offset)
    return np.frombuffer(data, ">u8").astype(np.uint64)


def _write_counts(
    file: Node, header: Header, counts: NDArray[np.uint16], first: int, name: str
) -> tuple[int, int]:
    """Blocks and table from host cluster ``first``; where the table is, and its clusters."""
    per_block = header.cluster_size * 8 >> header.refcount_order
    blocks, clusters = _plan(header, counts, first, per_block)
    if clusters << header.cluster_bits > c.MAX_REFCOUNT_TABLE_BYTES:
        raise UnsupportedFeature(f"{name}: its refcount table would be too large; {_REPAIR}")
    end = first + clusters + len(blocks)
    dtype = f">u{(1 << header.refcount_order) // 8}"
    table = np.zeros(clusters * header.cluster_size // 8, ">u8")
    for number, index in enumerate(blocks):
        offset = (first + clusters + number) << header.cluster_bits
        table[index] = offset
        block = _block(counts, index * per_block, per_block, first, end).astype(dtype)
        file.pwrite(memoryview(block.tobytes()), offset)
    file.pwrite(memoryview(table.tobytes()), first << header.cluster_bits)
    return first << header.cluster_bits, clusters


def _block(
    counts: NDArray[np.uint16], start: int, length: int, first: int, end: int
) -> NDArray[np.uint16]:
    """Counts of ``length`` clusters from ``start``; those of [first, end) are in use too."""
    block = np.zeros(length, np.uint16)
    old = counts[start : start + length]
    block[: len(old)] = old
    block[max(0, first - start) : max(0, end - start)] = 1
    return block


def _plan(
    header: Header, counts: NDArray[np.uint16], first: int, per_block: int
) -> tuple[list[int], int]:
    """Which blocks have to exist, and of how many clusters the table is, both counted in."""
    used = {
        index
        for index in range(-(-len(counts) // per_block))
        if counts[index * per_block : (index + 1) * per_block].any()
    }
    blocks, clusters = used, 1
    while True:
        end = first + clusters + len(blocks)
        wanted = used | set(range(first // per_block, (end - 1) // per_block + 1))
        needed = max(clusters, -(-((end - 1) // per_block + 1) * 8 // header.cluster_size))
        if (len(wanted), needed) == (len(blocks), clusters):
            return sorted(wanted), clusters
        blocks, clusters = wanted, needed

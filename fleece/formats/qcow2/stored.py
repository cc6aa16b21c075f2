# SPDX-License-Identifier: Apache-2.0
"""The reference counts that an image holds, a refcount block at a time, for the checker.

Source: QEMU's ``docs/interop/qcow2``, "Host cluster management".
"""

import errno
from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fleece.block.node import Node
from fleece.formats.qcow2 import constants as c
from fleece.formats.qcow2.header import Header
from fleece.formats.qcow2.tally import Counts, Numbers

Stored = NDArray[np.unsignedinteger]

_OFFSET_MASK: Final = ~0x1FF & (1 << 64) - 1


class Stretch(NamedTuple):
    """Host clusters [first, stop), of refcount block ``block``; -1: of blocks that do not exist."""

    first: int
    stop: int
    block: int


class StoredCounts:
    """Reads and changes refcounts where they lie. Blocks that do not exist are never made."""

    def __init__(self, file: Node, header: Header) -> None:
        self._file = file
        self._size = header.cluster_size
        self._width = 1 << header.refcount_order
        self.per_block = self._size * 8 // self._width
        self.table = self._read_table(header)

    def _read_table(self, header: Header) -> NDArray[np.uint64]:
        """The table without what lies behind the end of the file; empty if it cannot be there."""
        length = header.refcount_table_clusters << header.cluster_bits
        there = max(0, min(length, self._file.size - header.refcount_table_offset)) & ~7
        if header.refcount_table_offset % self._size or not header.refcount_table_offset:
            there = 0
        data = bytearray(there)
        if there:
            self._file.pread_into(memoryview(data), header.refcount_table_offset)
        return np.frombuffer(data, ">u8").astype(np.uint64) & np.uint64(_OFFSET_MASK)

    def stretches(self, clusters: int) -> Iterator[Stretch]:
        """Host clusters [0, ``clusters``) in order: one block each, or all between two blocks."""
        known = self.table[: -(-clusters // self.per_block)]
        position = 0
        for index in np.flatnonzero(known).tolist():
            first = index * self.per_block
            if position < first:
                yield Stretch(position, first, -1)
            position = min(clusters, first + self.per_block)
            yield Stretch(first, position, index)
        if position < clusters:
            yield Stretch(position, clusters, -1)

    def offset(self, index: int) -> int:
        """Where block ``index`` lies. OSError (EIO) for a place where none can be."""
        offset = int(self.table[index])
        if offset & (self._size - 1) or offset > c.MAX_SIZE - self._size:
            raise OSError(errno.EIO, f"refcount block {index} cannot be at {offset:#x}")
        return offset

    def read(self, index: int) -> Stored:
        """The counts of block ``index``: a new array. OSError."""
        data = bytearray(self._size)
        self._file.pread_into(memoryview(data), self.offset(index))
        return unpack(data, self._width)

    def write(self, index: int, counts: Stored) -> None:
        """Put ``counts``, all of the block, in the place of block ``index``."""
        self._file.pwrite(memoryview(pack(counts, self._width)), self.offset(index))

    def flush(self) -> None:
        """Make what was written durable."""
        self._file.flush()

    def lookup(self, clusters: Numbers) -> Counts:
        """The counts of any clusters; those in a block that cannot be read come out as 0."""
        out = np.zeros(len(clusters), np.uint64)
        indexes = clusters // self.per_block
        for index in np.unique(indexes).tolist():
            if index < len(self.table) and self.table[index]:
                chosen = indexes == index
                try:
                    block = self.read(index)
                except OSError:
                    continue
                out[chosen] = block[clusters[chosen] - index * self.per_block]
        return out


def unpack(data: bytes | bytearray, width: int) -> Stored:
    """Counts of ``width`` bits; below 8 the first is in the least significant bits of a byte."""
    if width >= 8:
        return np.frombuffer(data, f">u{width // 8}").astype(f"u{width // 8}")
    packed = np.frombuffer(data, np.uint8)
    shifts = np.arange(0, 8, width, dtype=np.uint8)
    parts = (packed[:, None] >> shifts) & np.uint8((1 << width) - 1)
    return np.asarray(parts.reshape(-1), np.uint8)


def pack(counts: Stored, width: int) -> bytes:
    """The inverse of `unpack`."""
    if width >= 8:
        return counts.astype(f">u{width // 8}").tobytes()
    parts = counts.astype(np.uint8).reshape(-1, 8 // width)
    shifts = np.arange(0, 8, width, dtype=np.uint8)
    packed = np.bitwise_or.reduce(parts << shifts, axis=1)
    return bytes(packed.astype(np.uint8).tobytes())

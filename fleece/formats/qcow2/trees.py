# SPDX-License-Identifier: Apache-2.0
"""The L2 tables below one L1 table, in bulk: what they refer to, and their COPIED flags.

For internal snapshots. Works on the tables as they are on disk, so the caller has flushed the
image and nothing else uses it. Some tables at a time: memory does not grow with the image.
Source: QEMU's ``docs/interop/qcow2``, "L1 table, L2 table and clusters".
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fleece.block.node import Node
from fleece.formats.qcow2 import constants as c
from fleece.formats.qcow2.entries import corrupt
from fleece.formats.qcow2.header import Header
from fleece.formats.qcow2.references import read_tables
from fleece.formats.qcow2.scan import packed_spans
from fleece.formats.qcow2.tally import Numbers

Words: TypeAlias = NDArray[np.uint64]
Write: TypeAlias = Callable[[int, bytes], None]
"""Takes ``(offset, data)``: a table, or several that follow each other in the file."""

_L1_RESERVED: Final = 0x7F000000000001FF
_COPIED: Final = np.uint64(c.COPIED)
_COMPRESSED: Final = np.uint64(c.COMPRESSED)
_OFFSET: Final = np.uint64(c.OFFSET_MASK)
# References that are counted at a time.
_MANY: Final = 1 << 20


class Tree:
    """One L1 table (``l1``, its entries) and its L2 tables. `CorruptEntry` if it cannot be."""

    def __init__(self, file: Node, header: Header, l1: Words) -> None:
        self.l1 = l1
        self._file = file
        self._header = header
        self._bits = header.cluster_bits
        self._plain_reserved = c.L2_RESERVED | (header.cluster_size - 1)
        if header.version == 3 and not header.extended_l2:
            self._plain_reserved &= ~c.ZERO
        self.tables = self._tables()

    @classmethod
    def at(cls, file: Node, header: Header, offset: int, entries: int) -> "Tree":
        """The tree of the L1 table at ``offset``."""
        data = bytearray(entries * 8)
        if offset + len(data) > file.size:
            raise corrupt(f"the L1 table at {offset:#x} lies outside of the file")
        if data:
            file.pread_into(memoryview(data), offset)
        return cls(file, header, np.frombuffer(data, ">u8").astype(np.uint64))

    def _tables(self) -> Numbers:
        """Where the L2 tables lie, ascending."""
        used = self.l1[self.l1 != 0]
        size = self._header.cluster_size
        if (used & np.uint64(_L1_RESERVED)).any():
            raise corrupt("an L1 entry has reserved bits set")
        tables: Numbers = np.sort((used & _OFFSET).astype(np.int64))
        tables = tables[tables != 0]
        if (tables & (size - 1)).any() or (len(tables) and tables[-1] + size > self._file.size):
            raise corrupt("an L2 table is not aligned, or lies outside of the file")
        if (np.diff(tables) == 0).any():
            raise corrupt("two entries of an L1 table point at one L2 table")
        return tables

    def references(self) -> Iterator[Numbers]:
        """All host clusters that the tree has references to, with the L2 tables, in portions.

        A cluster occurs once for each reference. `CorruptEntry` for entries that cannot be.
        """
        found = [self.tables >> self._bits]
        waiting = len(found[0])
        for _, words in read_tables(self._file, self._header, self.tables):
            more = self._of_entries(self._entries(words).reshape(-1))
            found.append(more)
            waiting += len(more)
            if waiting >= _MANY:
                yield np.concatenate(found)
                found, waiting = [], 0
        if waiting:
            yield np.concatenate(found)

    def check(self) -> None:
        """`CorruptEntry` if `references` would raise it."""
        for _ in self.references():
            pass

    def _entries(self, words: Words) -> Words:
        return words[..., 0] if self._header.extended_l2 else words

    def _of_entries(self, entries: Words) -> Numbers:
        packed = entries & _COMPRESSED != 0
        if not packed.any():
            return self._of_plain(entries)
        first, last = packed_spans(entries[packed], self._bits)
        first, last = first >> (self._bits - 9), last >> (self._bits - 9)
        parts = [self._of_plain(entries[~packed]), first]
        # Two clusters of sectors touch three clusters at the most.
        parts += [(first + step)[first + step <= last] for step in range(1, 4)]
        return np.concatenate(parts)

    def _of_plain(self, entries: Words) -> Numbers:
        if len(entries) and int(np.bitwise_or.reduce(entries)) & self._plain_reserved:
            raise corrupt("an L2 entry has reserved bits set, or is not aligned to a cluster")
        hosts = entries & _OFFSET
        clusters: Numbers = (hosts[hosts != 0] >> np.uint64(self._bits)).astype(np.int64)
        return clusters

    def clear_copied(self, write: Write) -> None:
        """No entry of an L2 table, or of `l1`, has the flag; ``write`` gets tables that change."""
        self._set_copied(write, lambda clusters: np.zeros(len(clusters), np.bool_))

    def refresh_copied(
        self, write: Write, is_single: Callable[[Numbers], NDArray[np.bool_]]
    ) -> None:
        """The flag says for each cluster what ``is_single`` does: that its count is 1."""
        self._set_copied(write, is_single)

    def _set_copied(self, write: Write, is_single: Callable[[Numbers], NDArray[np.bool_]]) -> None:
        self._flag(self.l1, is_single)
        for offsets, words in read_tables(self._file, self._header, self.tables):
            entries = self._entries(words)
            rows = self._flag(entries, is_single)
            for low, high in _neighbours(offsets[rows], self._header.cluster_size):
                data = words[rows[low:high]].astype(">u8").tobytes()
                write(int(offsets[rows[low]]), data)

    def _flag(self, entries: Words, is_single: Callable[[Numbers], NDArray[np.bool_]]) -> Numbers:
        """Change ``entries`` in place; the rows in which something changed."""
        placed = (entries & _OFFSET != 0) & (entries & _COMPRESSED == 0)
        copied = entries & _COPIED != 0
        wanted = np.zeros_like(copied)
        clusters = (entries[placed] & _OFFSET) >> np.uint64(self._bits)
        wanted[placed] = is_single(clusters.astype(np.int64))
        wrong = copied != wanted
        entries[wrong] ^= _COPIED
        return np.flatnonzero(wrong.any(axis=1)) if wrong.ndim == 2 else np.flatnonzero(wrong)


def _neighbours(offsets: Numbers, size: int) -> Iterator[tuple[int, int]]:
    """``[low, high)`` of tables that follow each other in the file, in order."""
    if not len(offsets):
        return
    cuts = [0, *(np.flatnonzero(np.diff(offsets) != size) + 1).tolist(), len(offsets)]
    yield from pairwise(cuts)

# SPDX-License-Identifier: Apache-2.0
"""The tables of the active disk once more: COPIED flags against counts, and allocation figures.

COPIED says that the count is 1, so that a write may go to the cluster in place. Set wrongly, it
lets a write destroy what a snapshot refers to. Snapshots' own tables may say anything.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fleece.block.node import Node
from fleece.formats.qcow2 import constants as c
from fleece.formats.qcow2.comparing import MOST_LINES, Report
from fleece.formats.qcow2.header import Header
from fleece.formats.qcow2.references import read_tables
from fleece.formats.qcow2.stored import StoredCounts
from fleece.formats.qcow2.tally import Counts, Numbers

Flags = NDArray[np.bool_]
Entries = NDArray[np.uint64]

# Tables are looked at so many entries at a time: what numpy makes of them stays in the CPU's cache.
_ENTRIES: Final = 1 << 16


@dataclass(frozen=True)
class Flagged:
    """``wrong`` flags, of which ``fixed`` were repaired, and the figures of the active disk."""

    wrong: int = 0
    fixed: int = 0
    allocated: int = 0
    fragmented: int = 0
    compressed: int = 0


class CopiedPass:
    """``found``: the counts as they are on disk. ``forbidden`` holds clusters not to be written."""

    def __init__(
        self,
        file: Node,
        header: Header,
        stored: StoredCounts,
        found: Counts,
        forbidden: Callable[[int, int], bool],
        report: Report,
    ) -> None:
        self._file = file
        self._header = header
        self._stored = stored
        self._found = found
        self._forbidden = forbidden
        self._report = report
        self._result = Flagged()
        self._lines = 0

    def run(self, *, repair: bool) -> Flagged:
        """Look at all tables, and with ``repair`` put the flags right, durably.

        OSError (EIO) if a table that would have to be written lies on other metadata.
        """
        l1 = self._l1()
        self._check_l1(l1, repair=repair)
        offsets = (l1 & np.uint64(c.OFFSET_MASK)).astype(np.int64)
        size = self._header.cluster_size
        offsets = offsets[(offsets != 0) & (offsets & (size - 1) == 0)]
        tables, users = np.unique(offsets, return_counts=True)
        there = tables < self._file.size
        tables, users = tables[there], users[there]
        done = 0
        for places, words in read_tables(self._file, self._header, tables):
            step = max(1, _ENTRIES // words.shape[1])
            for at in range(0, len(places), step):
                part = slice(at, at + step)
                self._table(places[part], words[part], users[done:][part], repair=repair)
            done += len(places)
        if self._result.fixed:
            self._file.flush()
        return self._result

    def _l1(self) -> Entries:
        length = self._header.l1_size * 8
        there = max(0, min(length, self._file.size - self._header.l1_offset)) & ~7
        data = bytearray(there)
        if there:
            self._file.pread_into(memoryview(data), self._header.l1_offset)
        return np.frombuffer(data, ">u8").astype(np.uint64)

    def _counts(self, clusters: Numbers) -> Counts:
        """What the image says; behind the clusters that were counted it is looked up."""
        inside = clusters < len(self._found)
        if inside.all():
            return self._found[clusters]
        out = np.zeros(len(clusters), np.uint64)
        out[inside] = self._found[clusters[inside]]
        out[~inside] = self._stored.lookup(clusters[~inside])
        return out

    def _check_l1(self, l1: Entries, *, repair: bool) -> None:
        used = np.flatnonzero(l1 & np.uint64(c.OFFSET_MASK))
        entries = l1[used]
        clusters = (entries & np.uint64(c.OFFSET_MASK)).astype(np.int64) >> self._bits
        counts = self._counts(clusters)
        wrong = np.flatnonzero((counts == 1) != (entries & np.uint64(c.COPIED) != 0))
        for i in self._shown(wrong):
            place = f"l1_index={used[i]} l1_entry={entries[i]:x}"
            self._say(repair, f"OFLAG_COPIED L2 cluster: {place} refcount={counts[i]}")
        fixed = len(wrong) if repair else 0
        if fixed:
            self._guard(self._header.l1_offset, self._header.l1_size * 8)
            l1[used[wrong]] ^= np.uint64(c.COPIED)
            self._file.pwrite(memoryview(l1.astype(">u8").tobytes()), self._header.l1_offset)
        self._add(wrong=len(wrong), fixed=fixed)

    @property
    def _bits(self) -> int:
        return self._header.cluster_bits

    def _table(self, places: Numbers, words: Entries, users: Numbers, *, repair: bool) -> None:
        extended = self._header.extended_l2
        entries = words[..., 0] if extended else words
        packed = entries & np.uint64(c.COMPRESSED) != 0
        hosts = entries & np.uint64(c.OFFSET_MASK)
        placed = self._placed(entries, hosts) & ~packed
        self._add_figures(words, hosts, placed, packed, users)
        copied = entries & np.uint64(c.COPIED) != 0
        if self._header.has_data_file:
            single = placed
        else:
            single = np.zeros_like(placed)
            clusters = hosts[placed].astype(np.int64) >> self._bits
            single[placed] = self._counts(clusters) == 1
        wrong = placed & (single != copied)
        if wrong.any():
            self._wrong(places, words, wrong, users, repair=repair)

    def _placed(self, entries: Entries, hosts: Entries) -> Flags:
        placed = hosts != 0
        if self._header.has_data_file:
            at_zero = entries & np.uint64(c.COPIED) != 0
            if not self._header.extended_l2:
                at_zero &= entries & np.uint64(c.ZERO) == 0
            placed |= at_zero
        return np.asarray(placed)

    def _add_figures(
        self, words: Entries, hosts: Entries, placed: Flags, packed: Flags, users: Numbers
    ) -> None:
        if self._header.extended_l2:
            packed = packed & (words[..., 1] == 0)
        if self._header.has_data_file:
            packed = np.zeros_like(packed)
        per_table = words.shape[1]
        at = np.flatnonzero(placed)
        where = hosts.reshape(-1)[at]
        breaks = where[1:] != where[:-1] + np.uint64(self._header.cluster_size)
        breaks &= at[1:] // per_table == at[:-1] // per_table
        compressed = int(packed.sum(axis=1) @ users)
        broken = np.bincount(at[1:][breaks] // per_table, minlength=len(users))
        self._add(
            allocated=int(placed.sum(axis=1) @ users) + compressed,
            fragmented=int(broken @ users) + compressed,
            compressed=compressed,
        )

    def _wrong(
        self, places: Numbers, words: Entries, wrong: Flags, users: Numbers, *, repair: bool
    ) -> None:
        entries = words[..., 0] if self._header.extended_l2 else words
        flat = entries[wrong]
        clusters = (flat & np.uint64(c.OFFSET_MASK)).astype(np.int64) >> self._bits
        data_file = self._header.has_data_file
        counts = np.ones(len(flat), np.uint64) if data_file else self._counts(clusters)
        for i in self._shown(np.arange(len(flat))):
            self._say(
                repair, f"OFLAG_COPIED data cluster: l2_entry={flat[i]:x} refcount={counts[i]}"
            )
        per_table = wrong.sum(axis=1)
        if not repair:
            self._add(wrong=int(per_table @ users))
            return
        entries[wrong] ^= np.uint64(c.COPIED)
        for row in np.flatnonzero(per_table).tolist():
            self._guard(int(places[row]), self._header.cluster_size)
            data = words[row].astype(">u8").tobytes()
            self._file.pwrite(memoryview(data), int(places[row]))
        # Seen through a second L1 entry, the table is right already.
        self._add(wrong=int(per_table.sum()), fixed=int(per_table.sum()))

    def _guard(self, offset: int, length: int) -> None:
        if self._forbidden(offset, length):
            raise OSError(5, f"the table at {offset:#x} lies on other metadata; not repaired")

    def _shown(self, found: Numbers) -> list[int]:
        room = max(0, MOST_LINES - self._lines)
        self._lines += len(found)
        return list(found[:room].tolist())

    def _say(self, repair: bool, text: str) -> None:
        self._report(f"{'Repairing' if repair else 'ERROR'} {text}")

    def _add(self, **figures: int) -> None:
        now = self._result
        self._result = replace(now, **{k: getattr(now, k) + v for k, v in figures.items()})

# SPDX-License-Identifier: Apache-2.0
"""The entries of L2 tables, many tables at a time: what they refer to, and what is wrong."""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from fleece.formats.qcow2 import constants as c
from fleece.formats.qcow2.header import Header
from fleece.formats.qcow2.tally import Numbers, Problem, ProblemKind, Tally

_HIGH_RESERVED: Final = 0x3F00000000000000
_LOW_RESERVED: Final = 0x1FE
_SECTOR: Final = 512


class EntryScan:
    """Adds what L2 entries refer to to a `Tally`."""

    def __init__(self, header: Header, tally: Tally, *, data_file: bool) -> None:
        self._tally = tally
        self._bits = header.cluster_bits
        self._inside = np.uint64(header.cluster_size - 1)
        self._data_file = data_file
        self._extended = bool(header.incompatible & c.INCOMPATIBLE_EXTENDED_L2)
        self._has_zero = header.version == 3 and not self._extended
        self._split = 62 - (header.cluster_bits - 8)

    def add(self, offsets: Numbers, words: NDArray[np.uint64], times: int) -> None:
        """``words`` as `read_tables` gives them; each table counts ``times`` times."""
        flat = words.reshape(-1, 2) if self._extended else words.reshape(-1)
        entries = flat[:, 0] if self._extended else flat
        used = np.flatnonzero(entries)
        report = _Report(self._tally, offsets, len(entries) // len(offsets), times, flat)
        if self._extended:
            self._check_bitmaps(report, entries, flat[:, 1])
        chosen = entries[used]
        if (chosen & np.uint64(c.COMPRESSED)).any():
            packed = chosen & np.uint64(c.COMPRESSED) != 0
            self._add_packed(report, chosen[packed], used[packed], times)
            chosen, used = chosen[~packed], used[~packed]
        self._add_plain(report, chosen, used, times)

    def _add_plain(
        self, report: "_Report", entries: NDArray[np.uint64], at: Numbers, times: int
    ) -> None:
        self._check_plain(report, entries, at)
        if self._data_file:
            return
        hosts = entries & np.uint64(c.OFFSET_MASK)
        places = hosts[hosts != 0].astype(np.int64)
        if not len(places):
            return
        size = 1 << self._bits
        if int(places.max()) + size - self._tally.file_size >= size:
            places = places[self._tally.inside(places, size, times)]
        self._tally.add(places >> self._bits, times)
        crooked = places[places & (size - 1) != 0]  # such a one reaches into the next cluster
        self._tally.add((crooked >> self._bits) + 1, times)

    def _check_plain(self, report: "_Report", entries: NDArray[np.uint64], at: Numbers) -> None:
        every = int(np.bitwise_or.reduce(entries)) if len(entries) else 0
        if every & (_HIGH_RESERVED | _LOW_RESERVED):
            bad = entries & np.uint64(_HIGH_RESERVED | _LOW_RESERVED) != 0
            report.add(ProblemKind.L2_RESERVED, at[bad])
        if every & c.ZERO and not self._has_zero:
            report.add(ProblemKind.ZERO_FLAG, at[entries & np.uint64(c.ZERO) != 0])
        if every & c.OFFSET_MASK & int(self._inside):
            bad = entries & np.uint64(c.OFFSET_MASK) & self._inside != 0
            zero = self._without_data(report, entries, at)
            report.add(ProblemKind.ZERO_UNALIGNED, at[bad & zero])
            report.add(ProblemKind.DATA_UNALIGNED, at[bad & ~zero])

    def _without_data(
        self, report: "_Report", entries: NDArray[np.uint64], at: Numbers
    ) -> NDArray[np.bool_]:
        if self._extended:
            return np.asarray(report.flat[at, 1] & np.uint64(0xFFFFFFFF) == 0)
        return np.asarray(entries & np.uint64(c.ZERO) != 0)

    def _check_bitmaps(
        self, report: "_Report", entries: NDArray[np.uint64], bitmaps: NDArray[np.uint64]
    ) -> None:
        plain = entries & np.uint64(c.COMPRESSED) == 0
        both = bitmaps & (bitmaps >> np.uint64(32)) & np.uint64(0xFFFFFFFF) != 0
        homeless = (entries & np.uint64(c.OFFSET_MASK) == 0) & plain
        homeless &= bitmaps & np.uint64(0xFFFFFFFF) != 0
        if self._data_file:  # a cluster at offset 0 is legal there, and has COPIED
            homeless &= entries & np.uint64(c.COPIED) == 0
        for kind, bad in (
            (ProblemKind.SUBCLUSTER_BOTH, both & plain),
            (ProblemKind.SUBCLUSTER_NO_HOST, homeless),
            (ProblemKind.COMPRESSED_BITMAP, (bitmaps != 0) & ~plain),
        ):
            if bad.any():
                report.add(kind, np.flatnonzero(bad))

    def _add_packed(
        self, report: "_Report", entries: NDArray[np.uint64], at: Numbers, times: int
    ) -> None:
        copied = entries & np.uint64(c.COPIED) != 0
        report.add(ProblemKind.COMPRESSED_COPIED, at[copied])
        if self._data_file:
            report.add(ProblemKind.COMPRESSED_DATA_FILE, at)
            return
        if self._extended:
            entries = entries[report.flat[at, 1] == 0]
        first, last = packed_spans(entries, self._bits)
        starts = (entries & np.uint64((1 << self._split) - 1)).astype(np.int64)
        lengths = ((last + 1) << 9) - starts
        ok = self._tally.inside(starts, lengths, times)
        shift = self._bits - 9
        first, last = first[ok] >> shift, last[ok] >> shift
        self._tally.add(first, times)
        for step in range(1, 4):  # two clusters of sectors touch three clusters at the most
            self._tally.add((first + step)[first + step <= last], times)


def packed_spans(entries: NDArray[np.uint64], cluster_bits: int) -> tuple[Numbers, Numbers]:
    """First and last 512-byte sector of the file that each of these compressed entries names."""
    split = np.uint64(62 - (cluster_bits - 8))
    first = ((entries & np.uint64((1 << int(split)) - 1)) >> np.uint64(9)).astype(np.int64)
    more = ((entries & np.uint64(c.COMPRESSED - 1)) >> split).astype(np.int64)
    return first, first + more


class _Report:
    """Problems of the entries of one batch of tables."""

    def __init__(
        self, tally: Tally, offsets: Numbers, per: int, times: int, flat: NDArray[np.uint64]
    ) -> None:
        self.flat = flat
        self._tally = tally
        self._offsets = offsets
        self._per = per
        self._times = times

    def add(self, kind: ProblemKind, positions: Numbers) -> None:
        """A problem for each of ``positions`` (numbers of entries within the batch)."""
        if len(positions):
            self._tally.problems(kind, lambda i: self._problem(kind, i), positions, self._times)

    def _problem(self, kind: ProblemKind, i: int) -> Problem:
        table, index = divmod(i, self._per)
        words = self.flat[i].reshape(-1).tolist()
        return Problem(
            kind,
            at=int(self._offsets[table]) + index * 8 * len(words),
            entry=words[0],
            offset=words[0] & c.OFFSET_MASK,
            times=self._times,
            bitmap=words[1] if len(words) > 1 else 0,
        )

# SPDX-License-Identifier: Apache-2.0
"""What the checker writes, in an order in which a crash leaves an image that can be repaired.

1. Header: features that a writer may not leave as they are. The clusters of bitmaps that are not
   valid are about to be freed, so nothing may name them any more.
2. Entries that cannot be right become "reads as zeroes"; a snapshot table that lacks fields is
   written anew. **Sync.**
3. Counts that are too low are raised. **Sync.** Then those that are too high are lowered. **Sync.**
   If there are no blocks for them, or blocks that cannot be believed, all counts are written to new
   blocks behind everything that is in use, and the header points there afterwards.
4. COPIED flags. **Sync.** Then the dirty and the corrupt mark go.

No table is written that lies on other metadata (`Writer.forbidden`).
"""

import struct
from collections.abc import Iterable
from dataclasses import replace
from typing import Final, NamedTuple

import numpy as np

from fleece.block.node import Node
from fleece.errors import UnsupportedFeature
from fleece.formats.qcow2 import constants as c
from fleece.formats.qcow2 import header as headers
from fleece.formats.qcow2.comparing import Report
from fleece.formats.qcow2.header import Header
from fleece.formats.qcow2.references import References, count_references
from fleece.formats.qcow2.stored import StoredCounts, pack
from fleece.formats.qcow2.tally import Counts, Numbers, Problem, ProblemKind

_KNOWN_AUTOCLEAR: Final = c.AUTOCLEAR_BITMAPS | c.AUTOCLEAR_RAW_DATA_FILE
_SEGMENT: Final = 1 << 20
_SNAPSHOT: Final = struct.Struct(">QIHHIIQII")
_WANTED_EXTRA: Final = 16
_MOST_EXTRA: Final = 1024
_MOST_TABLE: Final = 64 << 20


class Writer:
    """Knows where metadata lies that the header refers to."""

    def __init__(self, file: Node, header: Header, found: References) -> None:
        self.file = file
        self.header = header
        self._fixed = found.fixed
        self._tables = found.tables >> header.cluster_bits
        table = StoredCounts(file, header).table
        self._blocks = np.unique(table >> np.uint64(header.cluster_bits)).astype(np.int64)

    def forbidden(self, offset: int, length: int) -> bool:
        """Whether these bytes, a table of its own, lie on a table that the header refers to."""
        bits = self.header.cluster_bits
        first, stop = offset >> bits, ((offset + length - 1) >> bits) + 1
        for start, count in self._fixed:
            if first < start + count and start < stop and (start, count) != (first, stop - first):
                return True
        if length > self.header.cluster_size or offset == self.header.l1_offset:
            return _any_between(self._blocks, first, stop) or _any_between(
                self._tables, first, stop
            )
        return _any_between(self._blocks, first, stop)


def _any_between(numbers: Numbers, first: int, stop: int) -> bool:
    at = int(np.searchsorted(numbers, first))
    return at < len(numbers) and int(numbers[at]) < stop


def drop_stale(file: Node, header: Header, name: str) -> Header:
    """Without autoclear features that are unknown, and without bitmaps that are not valid."""
    new = replace(header, autoclear=header.autoclear & _KNOWN_AUTOCLEAR)
    if not new.autoclear & c.AUTOCLEAR_BITMAPS:
        new = headers.with_extension(new, c.EXT_BITMAPS, None)
    return header if new == header else headers.rewrite(file, header, new, name)


def set_incompatible(file: Node, header: Header, bits: int) -> Header:
    """Write the incompatible features, durably, after everything that was written before."""
    file.flush()
    file.pwrite(memoryview(struct.pack(">Q", bits)), c.AT_INCOMPATIBLE)
    file.flush()
    return replace(header, incompatible=bits)


def zero_entries(writer: Writer, problems: Iterable[Problem], report: Report) -> int:
    """Let L2 entries read as zeroes which have no data and a place that cannot be; how many."""
    extended, size = writer.header.extended_l2, writer.header.cluster_size
    entry = struct.pack(">QQ", 0, c.ALL_ZERO) if extended else struct.pack(">Q", c.ZERO)
    fixed = 0
    for problem in problems:
        if problem.kind is not ProblemKind.ZERO_UNALIGNED or problem.at < 0:
            continue
        if writer.forbidden(problem.at & -size, size):
            continue
        report(f"Repairing {problem.kind.value}: entry {problem.entry:#x} at {problem.at:#x}")
        writer.file.pwrite(memoryview(entry), problem.at)
        fixed += problem.times
    if fixed:
        writer.file.flush()
    return fixed


def mend_snapshots(file: Node, header: Header, report: Report) -> tuple[Header, int]:
    """Complete the entries of the snapshot table, and drop those that cannot be; how many."""
    entries, incomplete = _snapshot_entries(file, header)
    dropped = header.snapshots - len(entries)
    if not incomplete + dropped:
        return header, 0
    report(f"Repairing the snapshot table: {incomplete} incomplete entries, {dropped} dropped")
    data = b"".join(entries)
    # Behind the end: nothing can lie there, and the counts are put right next.
    offset = -(-file.size // header.cluster_size) << header.cluster_bits if entries else 0
    if entries:
        file.pwrite(memoryview(data.ljust(-(-len(data) // 512) * 512, b"\0")), offset)
    file.flush()
    file.pwrite(memoryview(struct.pack(">IQ", len(entries), offset)), c.AT_SNAPSHOTS)
    file.flush()
    return replace(header, snapshots=len(entries), snapshots_offset=offset), incomplete + dropped


def incomplete_snapshots(file: Node, header: Header) -> int:
    """How many entries of the snapshot table lack fields that version 3 demands."""
    return _snapshot_entries(file, header)[1]


def _snapshot_entries(file: Node, header: Header) -> tuple[list[bytes], int]:
    """The entries up to the first that cannot be, completed; and how many were not complete."""
    entries, incomplete = [], 0
    at = header.snapshots_offset
    end = min(file.size, at + _MOST_TABLE)
    if at % header.cluster_size or not at:
        return [], 0
    for _ in range(min(header.snapshots, c.MAX_SNAPSHOTS)):
        found = _snapshot_entry(file, at, end)
        if found is None:
            break
        fields, extra, names = found
        at += -(-(_SNAPSHOT.size + found.length) // 8) * 8
        if header.version >= 3 and len(extra) < _WANTED_EXTRA:
            incomplete += 1
            extra += struct.pack(">QQ", fields[7], header.size)[len(extra) :]
        entry = _SNAPSHOT.pack(*fields, len(extra)) + extra + names
        entries.append(entry + bytes(-len(entry) % 8))
    return entries, incomplete


class _Entry(NamedTuple):
    """The fixed fields but the last, extra data, and id and name."""

    fields: tuple[int, ...]
    extra: bytes
    names: bytes

    @property
    def length(self) -> int:
        """Bytes behind the fixed fields."""
        return len(self.extra) + len(self.names)


def _snapshot_entry(file: Node, at: int, end: int) -> _Entry | None:
    """The entry at ``at``; None if it is longer than an entry, or than the table, can be."""
    if at + _SNAPSHOT.size > end:
        return None
    *fields, extra = _SNAPSHOT.unpack(_bytes(file, at, _SNAPSHOT.size))
    length = extra + fields[2] + fields[3]
    if extra > _MOST_EXTRA or at + _SNAPSHOT.size + length > end:
        return None
    rest = _bytes(file, at + _SNAPSHOT.size, length)
    return _Entry(tuple(fields), rest[:extra], rest[extra:])


def _bytes(file: Node, offset: int, length: int) -> bytes:
    data = bytearray(length)
    if length:
        file.pread_into(memoryview(data), offset)
    return bytes(data)


def rebuild_counts(file: Node, header: Header, highest: int, name: str) -> Header:
    """Count everything but the refcounts, and write that to new blocks behind ``highest``.

    The header as it is afterwards. `UnsupportedFeature` if the table would be too large. A crash
    leaves the old structures or the new ones.
    """
    found = count_references(file, header, data_file=header.has_data_file, refcounts=False)
    counts = found.counts
    first = max(highest, _highest(counts)) + 1
    indexes, clusters = _plan(header, counts, first)
    if clusters << header.cluster_bits > c.MAX_REFCOUNT_TABLE_BYTES:
        raise UnsupportedFeature(
            f"{name}: it needs a larger refcount table than the format allows; "
            "copy it with: fleece image convert"
        )
    _write_blocks(file, header, counts, (first, clusters), indexes)
    offset = first << header.cluster_bits
    file.flush()
    file.pwrite(memoryview(struct.pack(">QI", offset, clusters)), c.AT_REFCOUNT_TABLE)
    file.flush()
    return replace(header, refcount_table_offset=offset, refcount_table_clusters=clusters)


def _highest(counts: Counts) -> int:
    for stop in range(len(counts), 0, -_SEGMENT):
        part = counts[max(0, stop - _SEGMENT) : stop]
        if part.any():
            return max(0, stop - _SEGMENT) + int(np.flatnonzero(part)[-1])
    return 0


def _used_blocks(counts: Counts, per_block: int) -> set[int]:
    used: set[int] = set()
    for start in range(0, len(counts), _SEGMENT):
        part = counts[start : start + _SEGMENT]
        if part.any():
            at = np.flatnonzero(part) + start
            used.update(np.unique(at // per_block).tolist())
    return used


def _plan(header: Header, counts: Counts, first: int) -> tuple[list[int], int]:
    """Which blocks there have to be, and of how many clusters the table is, both counted in."""
    per_block = header.cluster_size * 8 >> header.refcount_order
    used = _used_blocks(counts, per_block)
    blocks, clusters = used, 1
    while True:
        end = first + clusters + len(blocks)
        wanted = used | set(range(first // per_block, (end - 1) // per_block + 1))
        needed = max(clusters, -(-(max(wanted) + 1) * 8 // header.cluster_size))
        if (len(wanted), needed) == (len(blocks), clusters):
            return sorted(wanted), clusters
        blocks, clusters = wanted, needed


def _write_blocks(
    file: Node, header: Header, counts: Counts, place: tuple[int, int], indexes: list[int]
) -> None:
    """The table at cluster ``place[0]``, of ``place[1]`` clusters, and behind it its blocks."""
    first, clusters = place
    width = 1 << header.refcount_order
    per_block = header.cluster_size * 8 // width
    end = first + clusters + len(indexes)
    table = np.zeros(clusters * header.cluster_size // 8, ">u8")
    for number, index in enumerate(indexes):
        offset = (first + clusters + number) << header.cluster_bits
        table[index] = offset
        start = index * per_block
        block = np.zeros(per_block, counts.dtype)
        old = counts[start : start + per_block]
        block[: len(old)] = old
        block[max(0, first - start) : max(0, end - start)] = 1
        file.pwrite(memoryview(pack(block, width)), offset)
    file.pwrite(memoryview(table.tobytes()), first << header.cluster_bits)

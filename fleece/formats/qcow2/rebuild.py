# SPDX-License-Identifier: Apache-2.0
"""New reference counts for an image whose dirty bit says that the old ones are not to be trusted.

They are counted from everything that the header refers to, and written behind everything else, with
a new refcount table; then the header points there; then the dirty bit goes. A sync stands between
each of these steps, so a crash at any point leaves an image that is dirty still and can be rebuilt
again. The old blocks and the old table are referred to by nothing then, and count as free.

What contradicts itself is not rebuilt: a cluster that two tables call their own, say, would be
written in place by one and lost by the other. That is for ``fleece image check -r all``.
"""

import struct
from dataclasses import replace
from typing import Final, NoReturn

import numpy as np
from numpy.typing import NDArray

from fleece.block.node import Node
from fleece.errors import ImageCorrupt, UnsupportedFeature
from fleece.formats.qcow2 import constants as c
from fleece.formats.qcow2.header import Header
from fleece.formats.qcow2.hosting import regular_end
from fleece.formats.qcow2.references import References, count_references, read_tables
from fleece.formats.qcow2.tally import Counts, Numbers, Problem
from fleece.formats.qcow2.widths import Width

_REPAIR: Final = "repair it with: fleece image check -r all (or qemu-img check -r all)"
_STEP: Final = 1 << 22


def rebuild(file: Node, header: Header, name: str) -> Header:
    """Write new counts and clear the dirty bit; the header as it is afterwards.

    `ImageCorrupt` if the tables contradict each other, `UnsupportedFeature` if the image is too
    large; nothing is written then. Memory: 1 to 4 bytes for each host cluster.
    """
    references = _count(file, header, name)
    counts = references.counts
    regular = regular_end(file) > 0
    # As long as the file is; a device is longer than what is in use of it.
    first = len(counts) if regular else _last_used(counts) + 1
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


def _count(file: Node, header: Header, name: str) -> References:
    """All references but those of the old counts, which agree with each other."""

    def fail(problem: Problem) -> NoReturn:
        where = problem.at if problem.at >= 0 else problem.offset
        raise ImageCorrupt(f"{name}: {problem.kind.value} (at {where:#x}); {_REPAIR}")

    data_file = header.has_data_file
    try:
        found = count_references(
            file, header, data_file=data_file, on_problem=fail, refcounts=False
        )
    except UnsupportedFeature as error:
        raise UnsupportedFeature(f"{name}: {error}; {_REPAIR}") from None
    clusters = found.tables >> header.cluster_bits
    clash = (found.counts[clusters] != found.table_users).any() or any(
        (found.counts[first : first + n] != 1).any() for first, n in found.fixed
    )
    if clash or not _flags_agree(file, header, found):
        raise ImageCorrupt(f"{name}: two tables refer to one cluster; {_REPAIR}")
    return found


def _flags_agree(file: Node, header: Header, found: References) -> bool:
    """Whether all that the active disk may write in place has one reference."""
    data = bytearray(header.l1_size * 8)
    if data:
        file.pread_into(memoryview(data), header.l1_offset)
    l1 = np.frombuffer(data, ">u8").astype(np.uint64)
    own = l1[l1 & np.uint64(c.COPIED) != 0]
    if not _single(own, found.counts, header):
        return False
    if header.has_data_file:
        return True
    tables = np.unique(_offsets(l1))
    for _, words in read_tables(file, header, tables[tables != 0]):
        entries = words[..., 0] if header.extended_l2 else words
        owned = entries & np.uint64(c.COPIED | c.COMPRESSED) == np.uint64(c.COPIED)
        if not _single(entries[owned], found.counts, header):
            return False
    return True


def _offsets(entries: NDArray[np.uint64]) -> Numbers:
    return (entries & np.uint64(c.OFFSET_MASK)).astype(np.int64)


def _single(entries: NDArray[np.uint64], counts: Counts, header: Header) -> bool:
    hosts = _offsets(entries)
    hosts = hosts[hosts != 0]
    return bool((counts[hosts >> header.cluster_bits] == 1).all())


def _write_counts(
    file: Node, header: Header, counts: Counts, first: int, name: str
) -> tuple[int, int]:
    """Blocks and table from host cluster ``first``; where the table is, and its clusters."""
    width = Width(header.refcount_order)
    per_block = header.cluster_size * 8 // width.bits
    blocks, clusters = _plan(header, counts, first, per_block)
    if clusters << header.cluster_bits > c.MAX_REFCOUNT_TABLE_BYTES:
        raise UnsupportedFeature(f"{name}: its refcount table would be too large; {_REPAIR}")
    end = first + clusters + len(blocks)
    table = np.zeros(clusters * header.cluster_size // 8, ">u8")
    for number, index in enumerate(blocks):
        offset = (first + clusters + number) << header.cluster_bits
        table[index] = offset
        block = bytearray(header.cluster_size)
        width.write(block, 0, _block(counts, index * per_block, per_block, first, end))
        file.pwrite(memoryview(block), offset)
    file.pwrite(memoryview(table.tobytes()), first << header.cluster_bits)
    return first << header.cluster_bits, clusters


def _block(counts: Counts, start: int, length: int, first: int, end: int) -> Counts:
    """Counts of ``length`` clusters from ``start``; those of [first, end) are in use too."""
    block = np.zeros(length, counts.dtype)
    old = counts[start : start + length]
    block[: len(old)] = old
    block[max(0, first - start) : max(0, end - start)] = 1
    return block


def _used_blocks(counts: Counts, per_block: int) -> set[int]:
    used: set[int] = set()
    for start in range(0, len(counts), _STEP):
        found = (np.flatnonzero(counts[start : start + _STEP]) + start) // per_block
        used.update(np.unique(found).tolist())
    return used


def _last_used(counts: Counts) -> int:
    return int(np.flatnonzero(counts)[-1])


def _plan(header: Header, counts: Counts, first: int, per_block: int) -> tuple[list[int], int]:
    """Which blocks have to exist, and of how many clusters the table is, both counted in."""
    used = _used_blocks(counts, per_block)
    blocks, clusters = used, 1
    while True:
        end = first + clusters + len(blocks)
        wanted = used | set(range(first // per_block, (end - 1) // per_block + 1))
        needed = max(clusters, -(-((end - 1) // per_block + 1) * 8 // header.cluster_size))
        if (len(wanted), needed) == (len(blocks), clusters):
            return sorted(wanted), clusters
        blocks, clusters = wanted, needed

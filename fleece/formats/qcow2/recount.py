# SPDX-License-Identifier: Apache-2.0
"""Write all refcounts of an image anew, of any width, and switch over to them in one write.

For what changes so much that the counts are not updated but made again: another width, clusters
that are added in bulk. Nobody else uses the image meanwhile.
"""

import struct
from dataclasses import replace
from typing import Final, NamedTuple

import numpy as np

from fleece.block.node import Filter, Node
from fleece.errors import ImageError, UnsupportedFeature
from fleece.formats.qcow2 import constants as c
from fleece.formats.qcow2.header import Header
from fleece.formats.qcow2.hosting import regular_end
from fleece.formats.qcow2.references import count_references
from fleece.formats.qcow2.tally import Counts
from fleece.formats.qcow2.widths import Width

# Behind the refcount order, which lies in the same sector as the place of the table.
_FIELDS_END: Final = 104


class Added(NamedTuple):
    """Clusters from ``first`` on that are about to be used: so many references to each."""

    first: int
    counts: Counts


def recount(
    file: Node, header: Header, name: str, *, order: int | None = None, added: Added | None = None
) -> Header:
    """Count all references, and write that as counts of ``1 << order`` bits behind the end.

    Returns the header as it is on disk then. The old table and blocks are free afterwards, and so
    is what leaked. `ImageError` if a count does not fit the width, `UnsupportedFeature` if the
    table would be too large: nothing has changed then. A crash leaves the old counts or the new.
    """
    new = header if order is None else replace(header, refcount_order=order)
    file = grown(file)
    # Counted with the widest limit, so that what is too much shows instead of being cut.
    widest = replace(header, refcount_order=6)
    counts = count_references(file, widest, data_file=header.has_data_file, refcounts=False).counts
    if added is not None:
        counts = _with_added(counts, added)
    width = Width(new.refcount_order)
    if int(counts.max()) > width.most:
        raise ImageError(
            f"{name}: a cluster has {int(counts.max())} references, and {width.bits} bits hold "
            f"{width.most} at most"
        )
    first = max(len(counts), -(-file.size // header.cluster_size))
    indexes, clusters = _plan(new, counts, first)
    if clusters << header.cluster_bits > c.MAX_REFCOUNT_TABLE_BYTES:
        raise UnsupportedFeature(
            f"{name}: the refcount table would be larger than the format allows"
        )
    _write(file, new, counts, first, clusters, indexes)
    file.flush()
    new = replace(
        new, refcount_table_offset=first << new.cluster_bits, refcount_table_clusters=clusters
    )
    _switch(file, header, new)
    return new


def grown(file: Node) -> Node:
    """``file`` with its present size: we have written behind the end that it was opened with."""
    view = Filter(file.name, file)
    view.size = max(file.size, regular_end(file))
    return view


def _with_added(counts: Counts, added: Added) -> Counts:
    stop = added.first + len(added.counts)
    grown = np.zeros(max(stop, len(counts)), np.promote_types(counts.dtype, added.counts.dtype))
    grown[: len(counts)] = counts
    grown[added.first : stop] += added.counts.astype(grown.dtype)
    return grown


def _plan(header: Header, counts: Counts, first: int) -> tuple[list[int], int]:
    """Which blocks there must be, and the clusters of the table: they count themselves too."""
    per_block = header.cluster_size * 8 >> header.refcount_order
    total = -(-len(counts) // per_block)
    used = {i for i in range(total) if counts[i * per_block : (i + 1) * per_block].any()}
    blocks, clusters = used, 1
    while True:
        end = first + clusters + len(blocks)
        wanted = used | set(range(first // per_block, (end - 1) // per_block + 1))
        needed = max(clusters, -(-(max(wanted) + 1) * 8 // header.cluster_size))
        if (wanted, needed) == (blocks, clusters):
            return sorted(wanted), clusters
        blocks, clusters = wanted | blocks, needed


def _write(
    file: Node, header: Header, counts: Counts, first: int, clusters: int, indexes: list[int]
) -> None:
    """The table from cluster ``first``, its blocks behind it."""
    width, bits = Width(header.refcount_order), header.cluster_bits
    per_block = header.cluster_size * 8 >> header.refcount_order
    end = first + clusters + len(indexes)
    table = np.zeros(clusters << bits >> 3, ">u8")
    for number, index in enumerate(indexes):
        start = index * per_block
        values = np.zeros(per_block, counts.dtype)
        known = counts[start : start + per_block]
        values[: len(known)] = known
        values[max(0, first - start) : max(0, end - start)] = 1
        data = bytearray(header.cluster_size)
        width.write(data, 0, values)
        offset = (first + clusters + number) << bits
        file.pwrite(memoryview(data), offset)
        table[index] = offset
    file.pwrite(memoryview(table.tobytes()), first << bits)


def _switch(file: Node, old: Header, new: Header) -> None:
    """Table and width in one write, inside one sector."""
    start = bytearray(_FIELDS_END if new.version == 3 else 60)
    file.pread_into(memoryview(start), 0)
    struct.pack_into(
        ">QI", start, c.AT_REFCOUNT_TABLE, new.refcount_table_offset, new.refcount_table_clusters
    )
    if new.refcount_order != old.refcount_order:
        struct.pack_into(">I", start, 96, new.refcount_order)
    file.pwrite(memoryview(start)[c.AT_REFCOUNT_TABLE :], c.AT_REFCOUNT_TABLE)
    file.flush()

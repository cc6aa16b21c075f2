# SPDX-License-Identifier: Apache-2.0
"""Another size for the disk of a qcow2 image. The caller has drained the node.

A crash at any moment leaves a disk of the old size or of the new one, with all of its data, and
leaks at most (formats.md §1.8, §1.10):

* grow: a larger L1 table is written, and the header points at it (with the old size); what would
  shine through behind the old end becomes zero; preallocated clusters are mapped; **sync**; then
  the header says the new size. What lies behind its size is not part of a disk.
* shrink: the header says the new size, **sync**; then the L2 entries, or whole L2 tables, behind
  it go; **sync**; then their clusters are counted down, and the file is cut behind the last one.
"""

import os
import struct
from dataclasses import replace
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fleece.errors import ImageError, UnsupportedFeature
from fleece.formats.qcow2 import bitmaps, compressed, overlap, preallocate
from fleece.formats.qcow2 import constants as c
from fleece.formats.qcow2.cache import Table
from fleece.formats.qcow2.freespace import OTHER
from fleece.formats.qcow2.hosting import refresh_size, regular_descriptor
from fleece.formats.qcow2.image import Qcow2Node
from fleece.formats.qcow2.tally import Numbers
from fleece.units import align_up

Entries: TypeAlias = NDArray[np.uint64]
Flags: TypeAlias = NDArray[np.bool_]

PREALLOCATIONS: Final = ("off", "metadata", "falloc", "full")

_SECTOR: Final = 512
# L2 tables that go before what they refer to is counted down.
_TABLES_AT_ONCE: Final = 256


def resize(node: Qcow2Node, size: int, *, preallocation: str = "off", shrink: bool = False) -> None:
    """The disk gets ``size`` bytes, a multiple of 512; what is new reads as zeroes.

    ``shrink``: it may get smaller, and what is behind the new end is gone. An image of version 2
    that has internal snapshots keeps its size. `ImageError`, `UnsupportedFeature` or OSError.
    """
    _check(node, size, preallocation, shrink)
    bitmaps.check_resize(node, size)
    node._begin()
    node.flush()
    node._meta.write_all()
    bitmaps.resize(node, size)
    # What becomes zero behind the end of the disk is nothing that a bitmap should know.
    node._record = None
    try:
        if size < node.size:
            _shrink(node, size)
        else:
            _grow(node, size, preallocation)
    finally:
        node.refresh_recorder()


def _check(node: Qcow2Node, size: int, preallocation: str, shrink: bool) -> None:
    if size % _SECTOR:
        raise ImageError(f"{node.name}: The new size must be a multiple of 512")
    if node.header.version < 3 and node.header.snapshots:
        raise UnsupportedFeature(
            f"{node.name}: Can't resize a version 2 image which has snapshots; first use: "
            "fleece image amend -o compat=1.1"
        )
    if preallocation not in PREALLOCATIONS:
        raise UnsupportedFeature(f"there is no preallocation {preallocation!r}")
    if size < node.size and not shrink:
        raise ImageError(f"{node.name}: Use the --shrink option to perform a shrink operation.")
    if size < node.size and preallocation != "off":
        raise ImageError("Preallocation can only be used for growing images")
    if _l1_entries(node, size) * 8 > c.MAX_L1_BYTES:
        raise ImageError(f"{node.name}: {size} bytes are too many for clusters of this size")


def _span(node: Qcow2Node) -> int:
    """Bytes of the disk that one L2 table describes."""
    return node.header.l2_entries << node.header.cluster_bits


def _l1_entries(node: Qcow2Node, size: int) -> int:
    return -(-size // _span(node))


# Grow


def _grow(node: Qcow2Node, size: int, preallocation: str) -> None:
    old = node.size
    if _l1_entries(node, size) > node.header.l1_size:
        _move_l1(node, _l1_entries(node, size))
    node.size = size
    try:
        _resize_data_file(node, size)
        _zero_new(node, old, size)
        if preallocation != "off" or node.header.raw_data_file:
            _preallocate(node, old, size, preallocation)
        node.flush()
        node._meta.write_all()
    except BaseException:
        node.size = old
        bitmaps.resize(node, old)
        raise
    node.set_header(replace(node.header, size=size))


def _move_l1(node: Qcow2Node, entries: int) -> None:
    """The table at a new place, with room for ``entries``; the old one is free then."""
    meta, header = node._meta, node.header
    clusters = align_up(entries * 8, header.cluster_size) >> header.cluster_bits
    with meta.lock:
        offset = meta.counts.allocate(clusters)
        meta.overlap.claim(overlap.ACTIVE_L1, offset, clusters << header.cluster_bits)
        data = bytes(meta.map.l1).ljust(clusters << header.cluster_bits, b"\0")
    try:
        meta.check_place(offset, len(data), ignore=overlap.ACTIVE_L1)
        node.file.pwrite(memoryview(data), offset)
        meta.write_all()  # the counts, and with them the table, are durable
        refresh_size(node.file)
    except BaseException:
        with meta.lock:
            meta.counts.release(offset, clusters)
        raise
    node.set_header(replace(header, l1_offset=offset, l1_size=entries))
    old = align_up(header.l1_size * 8, header.cluster_size) >> header.cluster_bits
    with meta.lock:
        if old:
            meta.counts.retire(header.l1_offset >> header.cluster_bits, old, OTHER)
    node.reload()


def _zero_new(node: Qcow2Node, old: int, size: int) -> None:
    """What the tables, or the backing file, have behind the old end."""
    edge = min(size, align_up(old, node.header.cluster_size))
    if old < edge:
        node._write_zeroes(old, edge)
        node.flush()  # what waits for the rest of its cluster is merged with the right size
    if node.backing is not None and edge < min(size, node.backing.size):
        node.zero(edge, min(size, node.backing.size) - edge)
    _zero_left_over(node, edge, size)


def _zero_left_over(node: Qcow2Node, start: int, stop: int) -> None:
    """L2 tables that are there, of a disk that was larger once, or of a virtual machine's state."""
    span = _span(node)
    for index in range(start // span, _l1_entries(node, stop)):
        if node._map.l1_entry(index):
            low, high = max(start, index * span), min(stop, (index + 1) * span)
            if low < high:
                node.zero(low, high - low)


def _resize_data_file(node: Qcow2Node, size: int) -> None:
    if not node.header.has_data_file:
        return
    fd = regular_descriptor(node.data)
    if fd < 0:
        return
    os.ftruncate(fd, size)
    refresh_size(node.data)
    node._data_end = node.data.size


def _preallocate(node: Qcow2Node, old: int, size: int, mode: str) -> None:
    """Clusters for all that is not there yet from ``old`` to ``size``, table by table."""
    bits, per_table = node.header.cluster_bits, node.header.l2_entries
    first = old >> bits if old & (node.header.cluster_size - 1) == 0 else (old >> bits) + 1
    last = align_up(size, 1 << bits) >> bits
    while first < last:
        stop = min(last, (first // per_table + 1) * per_table)
        _preallocate_table(node, first, stop - first, mode)
        if node._meta.crowded:
            node.flush()
        first = stop
    refresh_size(node.file)


def _preallocate_table(node: Qcow2Node, first: int, count: int, mode: str) -> None:
    bits, meta = node.header.cluster_bits, node._meta
    with meta.lock:
        meta.own_table(first // node.header.l2_entries)
        host = first << bits if node.header.has_data_file else meta.counts._allocate_at_end(count)
    length = count << bits
    _reserve(node, host, length, mode)
    words = list(range(host | c.COPIED, (host | c.COPIED) + length, 1 << bits))
    if node.data is not node.file and not node.header.has_data_file and not node.header.extended_l2:
        words = [word | c.ZERO for word in words]  # what is there would be decrypted, to noise
    if node.header.extended_l2:
        bitmap = c.ALL_ALLOCATED if node.header.raw_data_file else c.ALL_ZERO
        words = [word for entry in words for word in (entry, bitmap)]
    with meta.lock:
        node._publish(first, words)


def _reserve(node: Qcow2Node, host: int, length: int, mode: str) -> None:
    """The file is long enough, reads as zeroes there, and has space as ``mode`` says."""
    file = node.data if node.header.has_data_file else node.file
    fd = regular_descriptor(file)
    if fd < 0:
        file.zero(host, length)
        return
    end = min(host + length, node.size) if node.header.has_data_file else host + length
    if os.fstat(fd).st_size < end:
        os.ftruncate(fd, end)
    preallocate.reserve(fd, host, end - host, mode)
    refresh_size(file)
    node._data_end = max(node._data_end, end)


# Shrink


def _shrink(node: Qcow2Node, size: int) -> None:
    node.set_header(replace(node.header, size=size))
    _drop_tail(node, align_up(size, node.header.cluster_size) >> node.header.cluster_bits)
    _drop_tables(node, _l1_entries(node, size))
    node.flush()
    node._meta.write_all()
    _resize_data_file(node, size)
    _cut_file(node)
    node.reload()


def drop_everything(node: Qcow2Node) -> None:
    """All of the disk becomes what the backing file has; internal snapshots keep what they have.

    No bitmap records it: who empties an overlay has put its data below it. OSError.
    """
    node._begin()
    node.flush()
    node._meta.write_all()
    _drop_tables(node, 0)
    node.flush()
    node._meta.write_all()
    _cut_file(node)
    node.reload()


def _drop_tail(node: Qcow2Node, first: int) -> None:
    """The clusters from ``first`` on that are described by the table of the last byte."""
    per_table, meta = node.header.l2_entries, node._meta
    stop = align_up(first, per_table)
    if first == stop or node._map.table_at(first // per_table) is None:
        return
    with meta.lock:
        meta.own_table(first // per_table)
        node._publish(first, [0] * ((stop - first) * node._per_entry))
    node.flush()


def _drop_tables(node: Qcow2Node, first: int) -> None:
    """L1 entries from ``first`` on, and all that they refer to."""
    meta = node._meta
    used = [i for i in range(first, len(meta.map.l1) // 8) if meta.map.l1_entry(i)]
    for at in range(0, len(used), _TABLES_AT_ONCE):
        gone: list[Numbers] = []
        with meta.lock:
            for index in used[at : at + _TABLES_AT_ONCE]:
                gone.append(_take_table(node, index))
        meta.flush()  # from here on nothing on disk refers to them
        with meta.lock:
            meta.counts.drop_references(np.concatenate(gone), OTHER)


def _take_table(node: Qcow2Node, index: int) -> Numbers:
    """L1 entry ``index`` becomes 0; the host clusters that it had references to."""
    table = node._map.table_at(index)
    assert table is not None
    bits = node.header.cluster_bits
    struct.pack_into(">Q", node._map.l1, index * 8, 0)
    node._map.l1_dirty.add(index)
    node._meta.overlap.release(overlap.ACTIVE_L2, table.offset, node.header.cluster_size)
    own = np.array([table.offset >> bits], np.int64)
    return own if node.header.has_data_file else np.concatenate([own, _references(node, table)])


def _references(node: Qcow2Node, table: Table) -> Numbers:
    bits = node.header.cluster_bits
    entries = np.frombuffer(table.data, ">u8").astype(np.uint64)[:: node._per_entry]
    packed = entries & np.uint64(c.COMPRESSED) != 0
    hosts = entries[~packed] & np.uint64(c.OFFSET_MASK)
    for entry in entries[
        ~packed & (entries & np.uint64(c.COPIED) == 0) & _placed(entries)
    ].tolist():
        node._meta.sharing.lost_one(entry)
    parts = [(hosts[hosts != 0] >> np.uint64(bits)).astype(np.int64)]
    for entry in entries[packed].tolist():
        first, count = compressed.span(entry, bits)
        parts.append(np.arange(first, first + count, dtype=np.int64))
    return np.concatenate(parts)


def _placed(entries: Entries) -> Flags:
    return np.asarray(entries & np.uint64(c.OFFSET_MASK) != 0)


def _cut_file(node: Qcow2Node) -> None:
    """Nothing of a regular file lies behind the last cluster in use."""
    fd = regular_descriptor(node.file)
    if fd < 0:
        return
    with node._meta.lock:
        last = node._meta.counts._blocks.last_used()
    end = (last + 1) << node.header.cluster_bits
    if end < os.fstat(fd).st_size:
        os.ftruncate(fd, end)
        refresh_size(node.file)
    node._data_end = min(node._data_end, node.data.size)

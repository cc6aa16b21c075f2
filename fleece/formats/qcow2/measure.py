# SPDX-License-Identifier: Apache-2.0
"""How large an image will be: QEMU's numbers, with its rounding (``qemu-img measure``)."""

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from fleece.block.node import Node
from fleece.errors import UnsupportedFeature
from fleece.formats.qcow2 import constants as c
from fleece.formats.qcow2.create import CreateOptions, check, l1_size
from fleece.formats.qcow2.layout import count_blocks
from fleece.units import align_up
from nbdwire.constants import STATE_ZERO

if TYPE_CHECKING:
    from collections.abc import Callable

_STEP: Final = 1 << 30


class Measure(NamedTuple):
    """Bytes: what the data that is there needs, what a full disk does, and persistent bitmaps.

    ``bitmaps`` is None where there can be none to copy.
    """

    required: int
    fully_allocated: int
    bitmaps: int | None = None


def of_raw(size: int) -> Measure:
    """A raw image of ``size`` bytes, which is rounded up to 512."""
    return Measure(align_up(size, 512), align_up(size, 512))


def of_luks(size: int, header_bytes: int) -> Measure:
    """A LUKS file."""
    total = align_up(size, 512) + header_bytes
    return Measure(total, total)


def of_qcow2(size: int, options: CreateOptions, luks_bytes: int = 0) -> Measure:
    """An empty qcow2 image of ``size`` bytes. `UnsupportedFeature` as `create`."""
    check(align_up(size, 512), options)
    full = _fully_allocated(size, options, luks_bytes)
    total = align_up(size, options.cluster_size)
    reserved = options.preallocation in ("falloc", "full")
    return Measure(full if reserved else full - total, full)


def of_copy(
    source: Node,
    options: CreateOptions,
    luks_bytes: int = 0,
    progress: "Callable[[int, int], None] | None" = None,
) -> Measure:
    """The qcow2 image that a copy of ``source`` becomes. OSError if that cannot be read."""
    empty = of_qcow2(source.size, options, luks_bytes)
    bitmaps = _bitmaps(source, options.cluster_size)
    total = align_up(source.size, options.cluster_size)
    if options.preallocation in ("falloc", "full"):
        return Measure(empty.fully_allocated, empty.fully_allocated, bitmaps)
    # With a backing file QEMU takes for granted that all of the disk will be there.
    data = total if options.backing else data_bytes(source, options.cluster_size, progress)
    return Measure(empty.required + data, empty.fully_allocated, bitmaps)


def data_bytes(
    source: Node, cluster_size: int, progress: "Callable[[int, int], None] | None" = None
) -> int:
    """Bytes of the clusters of ``source`` that do not read as zeroes, as far as it knows."""
    clusters = counted_to = offset = 0
    while offset < source.size:
        for extent in source.extents(offset, min(_STEP, source.size - offset)):
            if not extent.status & STATE_ZERO:
                # The first cluster may have been counted with the extent before.
                first = max(counted_to, extent.offset // cluster_size)
                stop = -(-extent.end // cluster_size)
                clusters += max(0, stop - first)
                counted_to = max(counted_to, stop)
            offset = extent.end
        if progress is not None:
            progress(offset, source.size)
    return clusters * cluster_size


def _fully_allocated(size: int, options: CreateOptions, luks_bytes: int) -> int:
    bits = options.cluster_size.bit_length() - 1
    tables = l1_size(size, options)
    clusters = align_up(size, 1 << bits) >> bits
    others = 1 + tables + (align_up(tables * 8, 1 << bits) >> bits) + clusters
    # QEMU does not count the LUKS header here; its blocks may be a cluster more for it.
    blocks, table = count_blocks(bits, options.refcount_bits, others)
    if table << bits > c.MAX_REFCOUNT_TABLE_BYTES and options.preallocated:
        raise UnsupportedFeature("a preallocated image of this size needs larger clusters")
    return ((others + blocks + table) << bits) + align_up(luks_bytes, 1 << bits)


def _bitmaps(source: Node, cluster_size: int) -> int | None:
    """What copies of the persistent bitmaps take, each as if all of it were set."""
    header = getattr(source, "header", None)
    if header is None or header.version < 3:
        return None
    if not header.has_bitmaps:
        return 0
    total = directory = 0
    for bitmap in _stored(source):
        if bitmap.in_use:
            continue
        clusters = -(-source.size // (bitmap.granularity * 8 * cluster_size))
        total += clusters * cluster_size + align_up(clusters * 8, cluster_size)
        directory += align_up(24 + len(bitmap.packed_name), 8)
    return total + align_up(directory, cluster_size)


def _stored(source: Any) -> Any:
    from fleece.formats.qcow2 import bitmap_directory

    return bitmap_directory.read(source.file, source.header, source.name)

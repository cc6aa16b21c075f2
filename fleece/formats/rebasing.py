# SPDX-License-Identifier: Apache-2.0
"""Another backing file for an overlay.

The safe way keeps what a guest sees: where the overlay has nothing and the two backing files
differ, the old data is written into the overlay first, whole clusters of it, and stable; then the
header names the new one. A crash leaves the old backing file, and clusters that could be spared.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Final

from fleece.block.copy import SKIP
from fleece.block.node import Node
from fleece.block.zeroes import is_zero
from fleece.errors import ImageError, UnsupportedFeature
from fleece.formats.layers import image_of, own_regions
from fleece.formats.qcow2.image import Qcow2Node
from fleece.units import MiB, align_down

_PIECE: Final = 1 * MiB


def overlay_of(node: Node) -> Qcow2Node:
    """The image that is to be changed. `UnsupportedFeature` for what has no backing file."""
    image = image_of(node)
    if not isinstance(image, Qcow2Node):
        raise UnsupportedFeature(f"{node.name}: images of its format have no backing file")
    return image


def change_backing(node: Qcow2Node, name: str | None, fmt: str | None) -> None:
    """The header names another backing file (None: none), durably; nothing is compared."""
    if name is not None:
        if fmt is None:
            raise ImageError(
                f"Could not change the backing file to '{name}': backing format must be "
                "specified: add -F FORMAT"
            )
        if node.header.raw_data_file:
            raise UnsupportedFeature(f"{node.name}: a raw data file cannot have a backing file")
    node._begin()
    node.flush()
    header = replace(node.header, backing_file=name, backing_format=fmt if name else None)
    node.set_header(header)


def copy_what_differs(
    node: Qcow2Node, new: Node | None, progress: Callable[[int, int], None] | None = None
) -> None:
    """Write into the overlay what ``new`` would change of the disk, and wait for the storage."""
    # What is zero now has to be said where the new one has data: so the node must know of that.
    old, node.backing = node.backing, new
    try:
        _copy(node, old, new, progress)
        node.flush()
    finally:
        node.backing = old


def _copy(
    node: Qcow2Node,
    old: Node | None,
    new: Node | None,
    progress: Callable[[int, int], None] | None,
) -> None:
    step = max(_PIECE, node.header.cluster_size)
    offset = 0
    while offset < node.size:
        for start, length, kind in list(own_regions(node, offset, node.size - offset)):
            offset = start + length
            while kind == SKIP and start < offset:
                # Pieces end at whole clusters.
                count = min(offset, align_down(start, step) + step) - start
                _settle(node, _contents(old, start, count), _contents(new, start, count), start)
                start += count
            if progress is not None:
                progress(offset, node.size)


def _contents(node: Node | None, offset: int, length: int) -> bytearray | None:
    """The bytes, zeroes behind the end; None if all of them are zero, which costs nothing."""
    there = 0 if node is None else max(0, min(length, node.size - offset))
    if not there or _reads_zero(node, offset, there):
        return None
    assert node is not None
    data = bytearray(length)
    node.pread_into(memoryview(data)[:there], offset)
    return data


def _reads_zero(node: Node | None, offset: int, length: int) -> bool:
    if node is None:
        return True
    end = offset + length
    while offset < end:
        for extent in node.extents(offset, end - offset):
            if not extent.is_zero:
                return False
            offset = extent.end
    return True


def _settle(node: Qcow2Node, old: bytearray | None, new: bytearray | None, offset: int) -> None:
    """Write what ``old`` has and ``new`` has not, in whole clusters. None means zeroes."""
    if old is None and new is None:
        return
    length = len(old or new or b"")
    before, after = old or bytearray(length), new or bytearray(length)
    size = node.header.cluster_size
    start = 0
    while start < length:
        stop = min(length, align_down(offset + start, size) + size - offset)
        part = before[start:stop]
        if part != after[start:stop]:
            if old is None or is_zero(memoryview(part)):
                node.zero(offset + start, stop - start)
            else:
                node.pwrite(memoryview(part), offset + start)
        start = stop

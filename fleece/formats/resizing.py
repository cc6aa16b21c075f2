# SPDX-License-Identifier: Apache-2.0
"""Another size for the disk of an image, whatever its format."""

import os
import stat
from typing import Final

from fleece.block.file import FileNode
from fleece.block.node import Filter, Node
from fleece.errors import ImageError, UnsupportedFeature
from fleece.formats.qcow2 import preallocate
from fleece.formats.qcow2.hosting import refresh_size

_RAW_MODES: Final = ("off", "falloc", "full")


def resize(node: Node, size: int, *, preallocation: str = "off", shrink: bool = False) -> None:
    """The disk gets ``size`` bytes, and what is new reads as zeroes. Nothing else uses the node.

    ``shrink``: it may get smaller. `ImageError`, `UnsupportedFeature` or OSError.
    """
    inner = node
    while isinstance(inner, Filter):
        inner = inner.next
    if isinstance(inner, FileNode):
        _resize_file(inner, size, preallocation, shrink)
        return
    from fleece.formats.qcow2.image import Qcow2Node
    from fleece.formats.qcow2.resize import resize as resize_qcow2

    if not isinstance(inner, Qcow2Node):
        raise UnsupportedFeature(f"{node.name}: its size cannot be changed from here")
    resize_qcow2(inner, size, preallocation=preallocation, shrink=shrink)


def _resize_file(node: FileNode, size: int, preallocation: str, shrink: bool) -> None:
    if preallocation not in _RAW_MODES:
        raise UnsupportedFeature(f"Unsupported preallocation mode: {preallocation}")
    if size < node.size and not shrink:
        raise ImageError(f"{node.name}: Use the --shrink option to perform a shrink operation.")
    if size <= node.size and preallocation != "off":
        raise ImageError("Preallocation can only be used for growing images")
    if not stat.S_ISREG(os.fstat(node.fileno()).st_mode):
        if size > node.size:
            raise ImageError(f"{node.name}: Cannot grow device files")
        return
    old = node.size
    os.ftruncate(node.fileno(), size)
    try:
        preallocate.reserve(node.fileno(), old, size - old, preallocation)
    except OSError:
        os.ftruncate(node.fileno(), old)
        raise
    os.fsync(node.fileno())
    node.size = size
    refresh_size(node)

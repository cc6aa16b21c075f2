# SPDX-License-Identifier: Apache-2.0
"""Raw images, and how they are told from others.

There is nothing between a raw disk and its file, so the node is the file node itself; with
``offset`` or ``size`` it is a `fleece.block.window.Window` over it.
"""

import errno
import os
from typing import Final

from fleece.block.file import FileNode
from fleece.block.node import Filter, Node

QCOW2_MAGIC: Final = b"QFI\xfb"


def magic_of(node: Node) -> bytes:
    """The first four bytes; zeroes stand for what the node does not have."""
    start = bytearray(len(QCOW2_MAGIC))
    there = min(len(start), node.size)
    if there:
        node.pread_into(memoryview(start)[:there], 0)
    return bytes(start)


def format_of(node: Node) -> str:
    """``"qcow2"`` if it begins like one, else ``"raw"``."""
    return "qcow2" if magic_of(node) == QCOW2_MAGIC else "raw"


def _check_start(node: Node, buf: memoryview, offset: int) -> None:
    """EPERM if the write of ``buf`` would make ``node`` look like qcow2."""
    start = bytearray(magic_of(node))
    part = buf[: len(start) - offset]
    start[offset : offset + len(part)] = part
    if start == QCOW2_MAGIC:
        raise OSError(
            errno.EPERM, os.strerror(errno.EPERM) + ": it would look like qcow2", node.name
        )


class GuessedRawNode(FileNode):
    """A raw image that nobody called raw: it only did not look like another format.

    Whoever writes such a disk could make its first bytes those of a qcow2 image with a backing file
    of his choice, and the next guess would serve him that file (CVE-2008-2004). So the write that
    would do this fails with EPERM, as in QEMU. Costs one call for each write; name the format, and
    it is not paid.
    """

    def pwrite(self, buf: memoryview, offset: int, fua: bool = False) -> None:
        """As `FileNode.pwrite`, except at the very start."""
        if offset < len(QCOW2_MAGIC):
            _check_start(self, buf, offset)
        super().pwrite(buf, offset, fua)


class GuardedRaw(Filter):
    """The same for a disk that is no file. Takes over ``child``."""

    def __init__(self, child: Node) -> None:
        super().__init__(child.name, child)

    def pwrite(self, buf: memoryview, offset: int, fua: bool = False) -> None:
        """Passed on, except at the very start."""
        if offset < len(QCOW2_MAGIC):
            _check_start(self.next, buf, offset)
        self.next.pwrite(buf, offset, fua)

    def close(self) -> None:
        """Close the child."""
        self.next.close()

# SPDX-License-Identifier: Apache-2.0
"""Raw images. There is nothing between the disk and the file, so the node is the file node itself.

(A window into a file, by offset and size, would be a filter over it; nothing needs one yet.)
"""

import errno
import os
from typing import Final

from fleece.block.file import FileNode

QCOW2_MAGIC: Final = b"QFI\xfb"


def magic_of(node: FileNode) -> bytes:
    """The first four bytes; zeroes stand for what the file does not have."""
    start = bytearray(4)
    node.pread_into(memoryview(start), 0)
    return bytes(start)


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
            start = bytearray(magic_of(self))
            part = buf[: len(start) - offset]
            start[offset : offset + len(part)] = part
            if start == QCOW2_MAGIC:
                raise OSError(
                    errno.EPERM, os.strerror(errno.EPERM) + ": it would look like qcow2", self.name
                )
        super().pwrite(buf, offset, fua)

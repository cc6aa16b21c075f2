# SPDX-License-Identifier: Apache-2.0
"""What the file under an image is: a regular file of this host, or anything else."""

import os
import stat

from fleece.block.file import FileNode
from fleece.block.node import Filter, Node
from nbdwire.export import OPAQUE_RUN


def descriptor(file: Node) -> int:
    """The descriptor whose offsets are those of ``file``; OPAQUE_RUN if there is none."""
    if _under_filters(file) is None:
        return OPAQUE_RUN
    fd, offset, _ = file.map(0, 1)[0]
    return fd if fd >= 0 and offset == 0 else OPAQUE_RUN


def regular_end(file: Node) -> int:
    """The length of a regular file, which grows when it is written behind its end; else 0."""
    node = _under_filters(file)
    if node is None:
        return 0
    status = os.fstat(node.fileno())
    return status.st_size if stat.S_ISREG(status.st_mode) else 0


def refresh_size(file: Node) -> None:
    """Set ``size``, which is that at open, to the length that a regular file has now."""
    if end := regular_end(file):
        while isinstance(file, Filter):
            file.size = end
            file = file.next
        file.size = end


def regular_descriptor(file: Node) -> int:
    """That of the regular file under the filters of ``file``; -1 if it is anything else."""
    node = _under_filters(file)
    if node is None or not stat.S_ISREG(os.fstat(node.fileno()).st_mode):
        return -1
    return node.fileno()


def _under_filters(file: Node) -> FileNode | None:
    while isinstance(file, Filter):
        file = file.next
    return file if isinstance(file, FileNode) else None


def write_all(fd: int, view: bytes | memoryview, offset: int) -> None:
    """``pwrite`` all of it; the kernel may take less at a time."""
    done = os.pwrite(fd, view, offset)
    while done < len(view):
        done += os.pwrite(fd, view[done:], offset + done)

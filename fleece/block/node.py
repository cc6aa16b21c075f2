# SPDX-License-Identifier: Apache-2.0
"""`Node`, a running image or device, and `Filter`, a node with one child and the same data.

Both have the verbs of `nbdwire.export.Export`, plus the optional ones with a default that is right
for every node. A filter overrides what it changes; a hop through one that does not costs 30 ns.
"""

import errno
import os

from nbdwire.export import OPAQUE_RUN, Run
from nbdwire.extents import Extent


class Node:
    """A leaf of the block graph. ``size`` is in bytes and does not change while it is open.

    ``blocking``: the verbs may wait long (a network, an object store), so a server should run
    several requests of one connection at once.
    """

    blocking: bool = False

    def __init__(self, name: str, size: int, *, read_only: bool = False) -> None:
        self.name = name
        self.size = size
        self.read_only = read_only

    def pread_into(self, buf: memoryview, offset: int) -> None:
        """Fill ``buf`` with the bytes from ``offset``."""
        raise NotImplementedError

    def pread_cached(self, buf: memoryview, offset: int) -> bool:
        """As `pread_into` if nothing has to be waited for; else False, and ``buf`` is undefined."""
        self.pread_into(buf, offset)
        return True

    def pwrite(self, buf: memoryview, offset: int, fua: bool = False) -> None:
        """Write ``buf`` at ``offset``; with ``fua`` it is stable on return."""
        raise OSError(errno.EPERM, os.strerror(errno.EPERM), self.name)

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        """Make the range read as zeroes; ``flags``: CMD_FLAG_FUA, _NO_HOLE, _FAST_ZERO."""
        raise OSError(errno.EPERM, os.strerror(errno.EPERM), self.name)

    def trim(self, offset: int, length: int, flags: int = 0) -> None:
        """The contents are not needed any more; ``flags``: CMD_FLAG_FUA."""
        raise OSError(errno.EPERM, os.strerror(errno.EPERM), self.name)

    def flush(self) -> None:
        """Return when every completed write is on stable storage."""

    def extents(self, offset: int, length: int) -> list[Extent]:
        """Allocation of the range, in order, at least one extent and never past its end."""
        return [Extent(offset, length, 0)]

    def map(self, offset: int, length: int) -> list[Run]:
        """Where the bytes live: runs in order that add up to at most ``length``, at least one."""
        return [(OPAQUE_RUN, 0, length)]

    def prefetch(self, offset: int, length: int) -> None:
        """Start to bring the range into memory; do not wait."""

    def close(self) -> None:
        """Give back what the node holds. Idempotent. No verb may be called afterwards."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r} {self.size} bytes>"


class Filter(Node):
    """A node whose data is that of ``next``. Closing a filter does not close its child."""

    def __init__(self, name: str, child: Node) -> None:
        super().__init__(name, child.size, read_only=child.read_only)
        self.next = child
        self.blocking = child.blocking

    def pread_into(self, buf: memoryview, offset: int) -> None:
        """Pass on."""
        self.next.pread_into(buf, offset)

    def pread_cached(self, buf: memoryview, offset: int) -> bool:
        """Pass on."""
        return self.next.pread_cached(buf, offset)

    def pwrite(self, buf: memoryview, offset: int, fua: bool = False) -> None:
        """Pass on."""
        self.next.pwrite(buf, offset, fua)

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        """Pass on."""
        self.next.zero(offset, length, flags)

    def trim(self, offset: int, length: int, flags: int = 0) -> None:
        """Pass on."""
        self.next.trim(offset, length, flags)

    def flush(self) -> None:
        """Pass on."""
        self.next.flush()

    def extents(self, offset: int, length: int) -> list[Extent]:
        """Pass on."""
        return self.next.extents(offset, length)

    def map(self, offset: int, length: int) -> list[Run]:
        """Pass on."""
        return self.next.map(offset, length)

    def prefetch(self, offset: int, length: int) -> None:
        """Pass on."""
        self.next.prefetch(offset, length)

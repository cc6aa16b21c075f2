# SPDX-License-Identifier: Apache-2.0
"""`Window`: a part of another node as a disk of its own (``offset`` and ``size`` of ``raw``)."""

from fleece.block.node import Node
from fleece.errors import UsageError
from nbdwire.export import Run
from nbdwire.extents import Extent


class Window(Node):
    """``size`` bytes of ``child`` from ``offset``; without a size all that is behind it.

    Takes over ``child``: it is closed with it. `UsageError` if the child has no such part.
    """

    def __init__(self, child: Node, offset: int = 0, size: int | None = None) -> None:
        left = child.size - offset
        size = left if size is None else size
        if not 0 <= size <= left:
            raise UsageError(
                f"{child.name}: it has {child.size} bytes, no {max(size, 0)} bytes from {offset}; "
                "change offset= and size="
            )
        super().__init__(child.name, size, read_only=child.read_only)
        self.blocking = child.blocking
        self.child = child
        self.offset = offset

    def pread_into(self, buf: memoryview, offset: int) -> None:
        """Passed on, moved."""
        self.child.pread_into(buf, self.offset + offset)

    def pread_cached(self, buf: memoryview, offset: int) -> bool:
        """Passed on, moved."""
        return self.child.pread_cached(buf, self.offset + offset)

    def pwrite(self, buf: memoryview, offset: int, fua: bool = False) -> None:
        """Passed on, moved."""
        self.child.pwrite(buf, self.offset + offset, fua)

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        """Passed on, moved."""
        self.child.zero(self.offset + offset, length, flags)

    def trim(self, offset: int, length: int, flags: int = 0) -> None:
        """Passed on, moved."""
        self.child.trim(self.offset + offset, length, flags)

    def flush(self) -> None:
        """Passed on."""
        self.child.flush()

    def extents(self, offset: int, length: int) -> list[Extent]:
        """Those of the child, moved back."""
        found = self.child.extents(self.offset + offset, length)
        return [Extent(start - self.offset, count, status) for start, count, status in found]

    def map(self, offset: int, length: int) -> list[Run]:
        """Those of the child: host offsets are what they are."""
        return self.child.map(self.offset + offset, length)

    def prefetch(self, offset: int, length: int) -> None:
        """Passed on, moved."""
        self.child.prefetch(self.offset + offset, length)

    def close(self) -> None:
        """Close the child."""
        self.child.close()

# SPDX-License-Identifier: Apache-2.0
"""`Concat`: several disks behind each other, as one that is read."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from fleece.block.node import Node
from fleece.block.null import clear
from fleece.units import align_up
from nbdwire.constants import STATE_HOLE, STATE_ZERO
from nbdwire.extents import Extent

_SECTOR = 512


class Concat(Node):
    """``parts`` in order, each filled up with zeroes to whole sectors. Closing closes all."""

    def __init__(self, parts: Sequence[Node]) -> None:
        ends = list(accumulate(align_up(part.size, _SECTOR) for part in parts))
        super().__init__(" + ".join(part.name for part in parts), ends[-1], read_only=True)
        self.parts = list(parts)
        self.starts = [0, *ends[:-1]]
        self.blocking = any(part.blocking for part in parts)

    def find(self, offset: int) -> tuple[Node, int]:
        """The part that ``offset`` lies in, and where that part begins."""
        # Of parts of no length, which begin at the same place, the last one has the bytes.
        index = bisect_right(self.starts, offset) - 1
        return self.parts[index], self.starts[index]

    def pread_into(self, buf: memoryview, offset: int) -> None:
        """From each part that the range touches."""
        while len(buf):
            part, start = self.find(offset)
            n = min(len(buf), align_up(part.size, _SECTOR) - (offset - start))
            there = max(0, min(n, part.size - (offset - start)))
            if there:
                part.pread_into(buf[:there], offset - start)
            clear(buf[there:n])
            buf, offset = buf[n:], offset + n

    def extents(self, offset: int, length: int) -> list[Extent]:
        """Those of the part that ``offset`` lies in."""
        part, start = self.find(offset)
        inside = min(length, part.size - (offset - start))
        if inside <= 0:
            rest = align_up(part.size, _SECTOR) - (offset - start)
            return [Extent(offset, min(length, rest), STATE_HOLE | STATE_ZERO)]
        found = part.extents(offset - start, inside)
        return [Extent(start + one.offset, one.length, one.status) for one in found]

    def close(self) -> None:
        """Close the parts."""
        for part in self.parts:
            part.close()

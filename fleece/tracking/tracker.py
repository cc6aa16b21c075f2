# SPDX-License-Identifier: Apache-2.0
"""The filter that marks what is written."""

from fleece.block.node import Filter, Node
from fleece.tracking.epochs import EpochMap


class Tracker(Filter):
    """Marks a range in an epoch map before its write, zero or trim is passed on.

    Before, because a request that fails or never ends may have reached the disk all the same. One
    that failed stays marked: more is copied, nothing is missed.
    """

    def __init__(self, name: str, child: Node, changes: EpochMap) -> None:
        super().__init__(name, child)
        self._mark = changes.mark

    def pwrite(self, buf: memoryview, offset: int, fua: bool = False) -> None:
        """Mark and pass on."""
        self._mark(offset, buf.nbytes)
        self.next.pwrite(buf, offset, fua)

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        """Mark and pass on."""
        self._mark(offset, length)
        self.next.zero(offset, length, flags)

    def trim(self, offset: int, length: int, flags: int = 0) -> None:
        """Mark and pass on: a trim changes what reads return."""
        self._mark(offset, length)
        self.next.trim(offset, length, flags)

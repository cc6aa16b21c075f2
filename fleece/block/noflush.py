# SPDX-License-Identifier: Apache-2.0
"""`NoFlush`: the node option ``cache.no-flush``: nothing waits for stable storage."""

from fleece.block.node import Filter, Node
from nbdwire.constants import CMD_FLAG_FUA


class NoFlush(Filter):
    """For a target that is thrown away if the host crashes. Closing it closes the child."""

    def __init__(self, child: Node) -> None:
        super().__init__(child.name, child)

    def pwrite(self, buf: memoryview, offset: int, fua: bool = False) -> None:
        """Without FUA."""
        self.next.pwrite(buf, offset)

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        """Without FUA."""
        self.next.zero(offset, length, flags & ~CMD_FLAG_FUA)

    def trim(self, offset: int, length: int, flags: int = 0) -> None:
        """Without FUA."""
        self.next.trim(offset, length, flags & ~CMD_FLAG_FUA)

    def flush(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Close the child."""
        self.next.close()

# SPDX-License-Identifier: Apache-2.0
"""`NullNode`: reads as zeroes, forgets what is written. To measure what all the rest costs."""

from typing import Final

from fleece.block.node import Node
from nbdwire.constants import STATE_HOLE, STATE_ZERO
from nbdwire.export import ZERO_RUN, Run
from nbdwire.extents import Extent

_ZEROES: Final = bytes(1 << 20)


def clear(buf: memoryview) -> None:
    """Fill ``buf`` with zeroes, with no more memory than a constant."""
    for start in range(0, len(buf), len(_ZEROES)):
        part = buf[start : start + len(_ZEROES)]
        part[:] = _ZEROES[: len(part)]


class NullNode(Node):
    """``size`` bytes that are always zero; writes succeed and are lost."""

    def __init__(self, size: int, name: str = "null") -> None:
        super().__init__(name, size)

    def pread_into(self, buf: memoryview, offset: int) -> None:
        """Zeroes."""
        clear(buf)

    def pwrite(self, buf: memoryview, offset: int, fua: bool = False) -> None:
        """Lost."""

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        """It is zero."""

    def trim(self, offset: int, length: int, flags: int = 0) -> None:
        """There is nothing."""

    def extents(self, offset: int, length: int) -> list[Extent]:
        """One hole."""
        return [Extent(offset, length, STATE_HOLE | STATE_ZERO)]

    def map(self, offset: int, length: int) -> list[Run]:
        """One run of zeroes."""
        return [(ZERO_RUN, 0, length)]

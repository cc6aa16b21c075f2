# SPDX-License-Identifier: Apache-2.0
"""`DetectZeroes`: the node option ``detect-zeroes``: zeroes are not written as data."""

from typing import Final

from fleece.block.node import Filter, Node
from nbdwire.constants import CMD_FLAG_FUA, CMD_FLAG_NO_HOLE

MODES: Final = ("off", "on", "unmap")
_ZEROES: Final = bytes(1 << 16)


def all_zero(buf: memoryview) -> bool:
    """Whether every byte of ``buf`` is 0; ends at the first piece that has another one.

    Comparing bytes takes 1.3 us for 64 KiB; a memoryview would be compared item by item.
    """
    return buf[0] == 0 == buf[-1] and all(
        bytes(buf[at : at + len(_ZEROES)]) == _ZEROES[: len(buf) - at]
        for at in range(0, len(buf), len(_ZEROES))
    )


class DetectZeroes(Filter):
    """A write of nothing but zeroes becomes `zero`. ``mode``: one of `MODES` but "off".

    ``on`` keeps the space allocated (NO_HOLE), ``unmap`` lets it go: QEMU's meaning, except that
    ``unmap`` does not ask for ``discard=unmap`` as well. ``owns``: closing closes the child too.
    """

    def __init__(self, child: Node, mode: str, *, owns: bool = False) -> None:
        if mode not in MODES[1:]:
            raise ValueError(f"mode {mode!r} is not one of {', '.join(MODES[1:])}")
        super().__init__(child.name, child)
        self._flags = CMD_FLAG_NO_HOLE if mode == "on" else 0
        self._owns = owns

    def pwrite(self, buf: memoryview, offset: int, fua: bool = False) -> None:
        """Data is passed on as it is."""
        if all_zero(buf):
            self.next.zero(offset, len(buf), self._flags | (CMD_FLAG_FUA if fua else 0))
        else:
            self.next.pwrite(buf, offset, fua)

    def close(self) -> None:
        """Close the child if it is ours."""
        if self._owns:
            self.next.close()

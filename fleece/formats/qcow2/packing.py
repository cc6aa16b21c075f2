# SPDX-License-Identifier: Apache-2.0
"""The sink of a copy that compresses: in many threads, and stored in order, so that it packs."""

from typing import Final, TypeAlias

from fleece.block import zeroes
from fleece.formats.qcow2 import compressed
from fleece.formats.qcow2.image import Qcow2Node

Prepared: TypeAlias = list[tuple[int, int, bytes | None, bool]]
"""``(start, stop, packed, is zero)`` of each cluster of a piece."""

_NOTHING: Final = b""


class Packer:
    """Writes compressed clusters into ``target``, a new image. A `fleece.block.copy.Sink`.

    ``is_zero``: it reads as zeroes where nothing was written.
    """

    def __init__(self, target: Qcow2Node, *, is_zero: bool) -> None:
        self.block = target.header.cluster_size
        self._target = target
        self._bits = target.header.cluster_bits
        self._type = target.header.compression_type
        self._is_zero = is_zero

    def prepare(self, view: memoryview, offset: int) -> Prepared:
        """Compress each cluster."""
        found: Prepared = []
        for start in range(0, len(view), self.block):
            part = view[start : start + self.block]
            is_zero = zeroes.is_zero(part)
            packed = None if is_zero else compressed.pack(part, self._type, self._bits)
            found.append((start, start + len(part), packed, is_zero))
        return found

    def store(self, prepared: Prepared, view: memoryview, offset: int) -> None:
        """A cluster that does not shrink is stored as it is."""
        for start, stop, packed, is_zero in prepared:
            if is_zero:
                self.zero(offset + start, stop - start)
            elif packed is None:
                self._target.pwrite(view[start:stop], offset + start)
            else:
                self._target.write_packed(packed, offset + start)

    def zero(self, offset: int, length: int) -> None:
        """Nothing, where the target is zero."""
        if not self._is_zero:
            self._target.zero(offset, length)

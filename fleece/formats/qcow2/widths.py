# SPDX-License-Identifier: Apache-2.0
"""Reference counts of 1 to 64 bits as they lie in a refcount block.

From 8 bits on they are big-endian integers; smaller ones fill a byte from its least significant
bits. Source: QEMU's ``docs/interop/qcow2``, "Host cluster management".
"""

import numpy as np
from numpy.typing import NDArray

from fleece.formats.qcow2.tally import Counts


class Width:
    """Counts of ``1 << order`` bits; ``most`` is the largest."""

    def __init__(self, order: int) -> None:
        self.bits = 1 << order
        self.most = (1 << self.bits) - 1
        self._bytes = self.bits // 8
        self._dtype = np.dtype(f">u{max(1, self._bytes)}")
        self._per_byte = 8 // self.bits if self.bits < 8 else 1
        self._shifts = np.arange(0, 8, self.bits if self.bits < 8 else 8, dtype=np.uint8)

    def span(self, low: int, high: int) -> tuple[int, int]:
        """The bytes of a block that hold the counts [low, high)."""
        return low * self.bits // 8, -(-high * self.bits // 8)

    def get(self, data: bytearray, at: int) -> int:
        """One count."""
        if self._bytes:
            return int.from_bytes(data[at * self._bytes : (at + 1) * self._bytes], "big")
        return data[at * self.bits >> 3] >> (at * self.bits & 7) & self.most

    def put(self, data: bytearray, at: int, value: int) -> None:
        """Set one count."""
        if self._bytes:
            data[at * self._bytes : (at + 1) * self._bytes] = value.to_bytes(self._bytes, "big")
            return
        where, shift = at * self.bits >> 3, at * self.bits & 7
        data[where] = data[where] & ~(self.most << shift) | value << shift

    def read(self, data: bytes | bytearray, low: int, high: int) -> Counts:
        """The counts [low, high); do not write to the result."""
        if self._bytes:
            return np.frombuffer(data, self._dtype, high - low, low * self._bytes)
        first, stop = self.span(low, high)
        packed = np.frombuffer(data, np.uint8, stop - first, first)
        counts = self._unpacked(packed)
        skipped = first * self._per_byte
        return counts[low - skipped : high - skipped]

    def write(self, data: bytearray, low: int, counts: NDArray[np.unsignedinteger]) -> None:
        """Set the counts from ``low``; each is ``most`` or less."""
        high = low + len(counts)
        first, stop = self.span(low, high)
        if self._bytes:
            data[first:stop] = counts.astype(self._dtype).tobytes()
            return
        skipped = first * self._per_byte
        whole = self._unpacked(np.frombuffer(data, np.uint8, stop - first, first)).copy()
        whole[low - skipped : high - skipped] = counts
        shifted = whole.reshape(-1, self._per_byte) << self._shifts
        data[first:stop] = np.bitwise_or.reduce(shifted, axis=1).astype(np.uint8).tobytes()

    def fill(self, data: bytearray, low: int, high: int, value: int) -> None:
        """Set the counts [low, high) to one value."""
        if high - low == 1:
            self.put(data, low, value)
        elif self._bytes:
            data[low * self._bytes : high * self._bytes] = value.to_bytes(self._bytes, "big") * (
                high - low
            )
        else:
            self.write(data, low, np.full(high - low, value, np.uint8))

    def _unpacked(self, packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
        shifted = packed[:, None] >> self._shifts & np.uint8(self.most)
        return shifted.reshape(-1)

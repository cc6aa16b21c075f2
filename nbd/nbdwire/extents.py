# SPDX-License-Identifier: Apache-2.0
"""Extents: stretches of an export that have one status."""

from collections.abc import Iterable
from typing import NamedTuple

from nbdwire.constants import STATE_DIRTY, STATE_HOLE, STATE_ZERO


class Extent(NamedTuple):
    """``length`` bytes from ``offset`` that share ``status``, the flags of one metadata context."""

    offset: int
    length: int
    status: int

    @property
    def end(self) -> int:
        """The first byte behind it."""
        return self.offset + self.length

    @property
    def is_hole(self) -> bool:
        """Not allocated (context ``base:allocation``)."""
        return bool(self.status & STATE_HOLE)

    @property
    def is_zero(self) -> bool:
        """Reads as zeroes (context ``base:allocation``)."""
        return bool(self.status & STATE_ZERO)

    @property
    def is_dirty(self) -> bool:
        """Changed (context ``qemu:dirty-bitmap:NAME``)."""
        return bool(self.status & STATE_DIRTY)


def coalesce(extents: Iterable[Extent]) -> list[Extent]:
    """Join neighbours of equal status. Extents must be in order and without gaps."""
    out: list[Extent] = []
    for extent in extents:
        if out and out[-1].status == extent.status:
            last = out[-1]
            out[-1] = Extent(last.offset, last.length + extent.length, last.status)
        elif extent.length:
            out.append(extent)
    return out


def clip(extents: Iterable[Extent], offset: int, length: int) -> list[Extent]:
    """What of ``extents`` lies within ``[offset, offset + length)``."""
    end = offset + length
    out = []
    for extent in extents:
        start, stop = max(extent.offset, offset), min(extent.end, end)
        if start < stop:
            out.append(Extent(start, stop - start, extent.status))
    return out

# SPDX-License-Identifier: Apache-2.0
"""What a change of a part of a cluster means for its extended L2 entry.

Source: QEMU's ``docs/interop/qcow2``, "Extended L2 entries".
"""

from typing import NamedTuple

from fleece.formats.qcow2 import constants as c
from fleece.formats.qcow2.pending import Span

_ALL = c.ALL_ALLOCATED


class WritePlan(NamedTuple):
    """What to do.

    ``host``: where the cluster is, None if it needs a new place. ``low``, ``high``: the bytes of
    it, whole subclusters, that the new data lies in. ``copied``: bytes that move to the new place.
    ``bitmap``: the second word of the entry afterwards.
    """

    host: int | None
    low: int
    high: int
    copied: list[Span]
    bitmap: int


def mask_of(first: int, stop: int) -> int:
    """The bits of subclusters ``[first, stop)``."""
    return (1 << stop) - (1 << first)


def plan_write(
    entry: int, bitmap: int, inside: int, length: int, cluster_size: int, *, data_file: bool
) -> WritePlan:
    """For ``length`` bytes from ``inside`` of the cluster with this entry."""
    unit = cluster_size // c.SUBCLUSTERS
    packed = bool(entry & c.COMPRESSED)
    first, stop = inside // unit, -(-(inside + length) // unit)
    if packed:
        first, stop = 0, c.SUBCLUSTERS  # there is no part of a compressed cluster
    allocated, zero = bitmap & _ALL, bitmap >> 32
    host = entry & c.OFFSET_MASK
    own = bool(entry & c.COPIED) and not packed and bool(host or data_file)
    written = mask_of(first, stop)
    copied = [] if own or packed else _spans(allocated & ~written, unit)
    after = (allocated | written) | (zero & ~written) << 32
    return WritePlan(host if own else None, first * unit, stop * unit, copied, after)


def _spans(bits: int, unit: int) -> list[Span]:
    """The runs of set bits, in bytes."""
    spans: list[Span] = []
    for x in range(c.SUBCLUSTERS):
        if not bits >> x & 1:
            continue
        if spans and spans[-1][1] == x * unit:
            spans[-1] = (spans[-1][0], (x + 1) * unit)
        else:
            spans.append((x * unit, (x + 1) * unit))
    return spans


def zeroed(bitmap: int, first: int, stop: int) -> int:
    """The bitmap after subclusters ``[first, stop)`` became zeroes."""
    written = mask_of(first, stop)
    return (bitmap & _ALL & ~written) | ((bitmap >> 32) | written) << 32

# SPDX-License-Identifier: Apache-2.0
"""Which layer of a chain has what: for who copies between the layers of it."""

from collections.abc import Iterator

from fleece.block.copy import DATA, SKIP, ZERO, Region, Regions, regions_of
from fleece.block.node import Filter, Node
from fleece.formats.qcow2 import constants as c
from fleece.formats.qcow2.reader import Qcow2Reader


def image_of(node: Node) -> Qcow2Reader | None:
    """The qcow2 image under the filters of ``node``; None if it is something else."""
    while isinstance(node, Filter):
        node = node.next
    return node if isinstance(node, Qcow2Reader) else None


def backing_of(node: Node) -> Node | None:
    """The node below, None if there is none."""
    image = image_of(node)
    return None if image is None else image.backing


def chain_of(node: Node) -> list[Node]:
    """``node`` and all below it."""
    found: list[Node] = []
    current: Node | None = node
    while current is not None:
        found.append(current)
        current = backing_of(current)
    return found


def regions_above(node: Node, base: Node | None) -> Regions:
    """What the layers from ``node`` down to the one above ``base`` have; SKIP is what they lack.

    Without a base all of the chain counts, and what no layer has is ZERO.
    """
    if base is None:
        return regions_of(node)

    def regions(offset: int, length: int) -> Iterator[Region]:
        yield from _above(node, base, offset, length)

    return regions


def _above(node: Node, base: Node, offset: int, length: int) -> Iterator[Region]:
    if node is base:
        yield Region(offset, length, SKIP)
        return
    image = image_of(node)
    if image is None:
        yield from regions_of(node)(offset, length)
        return
    for kind, _, start, count in image._some_parts(offset, length):
        if kind in c.KINDS_OF_ZEROES:
            yield Region(start, count, ZERO)
        elif kind in c.KINDS_UNALLOCATED:
            yield from _below(image.backing, base, start, count)
        else:
            yield Region(start, count, DATA)


def _below(backing: Node | None, base: Node, offset: int, length: int) -> Iterator[Region]:
    """What lies behind the end of the backing file is zero for the layers above it."""
    end = offset + length
    inside = offset if backing is None else max(offset, min(end, backing.size))
    while backing is not None and offset < inside:
        for region in _above(backing, base, offset, inside - offset):
            yield region
            offset = region.offset + region.length
    if inside < end:
        yield Region(inside, end - inside, SKIP if backing is base else ZERO)


def own_regions(image: Qcow2Reader, offset: int, length: int) -> Iterator[Region]:
    """What the image itself has of the beginning of the range; SKIP is what it lacks."""
    for kind, _, start, count in image._some_parts(offset, length):
        if kind in c.KINDS_OF_ZEROES:
            yield Region(start, count, ZERO)
        else:
            yield Region(start, count, SKIP if kind in c.KINDS_UNALLOCATED else DATA)

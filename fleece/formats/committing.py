# SPDX-License-Identifier: Apache-2.0
"""What an overlay has, into a layer below it.

The base gets the data, and is stable, before the overlay is emptied: after a crash both have it.
"""

from collections.abc import Callable

from fleece.block.copy import Copy, Plan, Writer
from fleece.block.node import Node
from fleece.errors import ImageError
from fleece.formats.layers import chain_of, regions_above
from fleece.formats.qcow2.image import Qcow2Node
from fleece.formats.qcow2.resize import drop_everything
from fleece.formats.rebasing import overlay_of
from fleece.formats.resizing import resize


def commit(
    node: Node,
    base: Node,
    *,
    rate: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write into ``base`` what the layers from ``node`` down to the one above it have.

    It grows if it is smaller. All of the chain that changes is writable. `ImageError`, OSError.
    """
    if base.read_only:
        raise ImageError(f"{base.name}: it is read-only, so nothing can be committed to it")
    if base.size < node.size:
        resize(base, node.size)
    plan = Plan(rate=rate, piece=1 << 20)
    Copy(node, Writer(base), regions_above(node, base), node.size, plan, progress).run()
    base.flush()


def find_base(node: Node, same: Callable[[Node], bool] | None) -> Node:
    """The layer that ``same`` knows, or the backing file. `ImageError` if there is none."""
    below = chain_of(overlay_of(node))[1:]
    if not below:
        raise ImageError(f"{node.name}: Image does not have a backing file")
    for layer in below:
        if same is None or same(layer):
            return layer
    raise ImageError(f"{node.name}: the base is not in its chain of backing files")


def empty(node: Qcow2Node) -> None:
    """The overlay has nothing any more: all of the disk is its backing file's."""
    drop_everything(node)

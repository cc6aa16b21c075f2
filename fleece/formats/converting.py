# SPDX-License-Identifier: Apache-2.0
"""``fleece image convert``: the target made, filled, and removed again if that failed."""

import os
import stat
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fleece.block.concat import Concat
from fleece.block.copy import Copy, Plan, Regions, Sink, Writer, regions_of
from fleece.block.node import Node
from fleece.errors import ImageError, UnsupportedFeature
from fleece.formats import creating
from fleece.formats.chain import SAME_TREE_POLICY, Policy
from fleece.formats.creating import Recipe
from fleece.formats.filenames import protocol_options
from fleece.formats.opening import open_node
from fleece.units import align_up

if TYPE_CHECKING:
    from fleece.formats.qcow2.image import Qcow2Node


@dataclass(frozen=True)
class Target:
    """Where the copy goes. ``source``: a filename or options. ``recipe``: how to make it.

    ``recipe`` None: it is there, of format ``fmt``. ``is_zero``: it reads as zeroes now. ``sync``:
    wait for stable storage in the end.
    """

    source: Any
    fmt: str | None
    recipe: Recipe | None
    is_zero: bool = False
    sync: bool = False
    policy: Policy = SAME_TREE_POLICY
    keys: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Options:
    """How to convert. ``sparse``: runs of so many zero bytes become holes, 0 for none.

    ``bitmaps``: copy the persistent bitmaps; ``skip_broken``: those that can be. ``dedup``: bytes
    of memory to find identical clusters with, 0 for not. ``salvage`` is told what cannot be read.
    """

    plan: Plan = field(default_factory=Plan)
    sparse: int = 4096
    compress: bool = False
    dedup: int = 0
    bitmaps: bool = False
    skip_broken: bool = False
    progress: Callable[[int, int], None] | None = None
    warn: Callable[[str], None] = lambda text: print(text, file=sys.stderr)


def convert(sources: list[Node], target: Target, options: Options) -> None:
    """Copy the disks, behind each other, into the target. The sources stay open.

    A `FleeceError` or OSError: a target that was made here is removed then.
    """
    source = sources[0] if len(sources) == 1 else Concat(sources)
    if options.bitmaps:
        _check_bitmaps(source, options)
    target, made = _made(source, target)
    try:
        node = _opened(target)
        try:
            _fill(source, node, target, options)
        except BaseException:
            with suppress(OSError, ImageError):
                node.close()
            raise
        node.close()
    except BaseException:
        if made is not None:
            made.unlink(missing_ok=True)
        raise


def _made(source: Node, target: Target) -> tuple[Target, Path | None]:
    """Make it, if it has to be; the path of a regular file that was made."""
    recipe = target.recipe
    if recipe is None:
        return target, None
    if recipe.backing is not None:
        _check_backing(target, recipe)
    size = align_up(source.size, 512) if recipe.size is None else recipe.size
    path = _path_of(target.source)
    if path is None or (recipe.fmt == "raw" and _is_device(path)):
        if recipe.fmt != "raw":
            raise UnsupportedFeature(
                f"{target.source}: an image of format {recipe.fmt} cannot be made there; make it "
                "in a file, or write it raw"
            )
        return replace(target, recipe=None), None
    creating.make(path, size, replace(recipe, sync=target.sync), overwrite=True)
    made = None if _is_device(path) else Path(path)
    return replace(target, is_zero=recipe.backing is None), made


def _path_of(source: Any) -> str | None:
    """The path of a file or a device; None for what is reached by a protocol."""
    options = protocol_options(str(source))
    return str(options["filename"]) if options.get("driver") in ("file", "host_device") else None


def _is_device(path: str) -> bool:
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)
    except OSError:
        return False


def _check_backing(target: Target, recipe: Recipe) -> None:
    """It must be there, and of the format that is said."""
    if recipe.options.get("backing_fmt") is None:
        raise ImageError(f"{target.source}: a backing file needs a format: add -F FORMAT")
    backing = os.path.join(os.path.dirname(str(target.source)), str(recipe.backing))
    open_node(
        backing,
        recipe.options["backing_fmt"],
        read_only=True,
        allow_backing=target.policy,
        keys=target.keys,
    ).close()


def _opened(target: Target) -> Node:
    source = target.source
    if not isinstance(source, Mapping) and not target.sync:
        source = _unsafe(str(source), target)
        return open_node(source, allow_backing=target.policy, keys=target.keys)
    return open_node(source, target.fmt, allow_backing=target.policy, keys=target.keys)


def _unsafe(name: str, target: Target) -> dict[str, Any]:
    """Options that open it without waiting for the storage."""
    file = {**protocol_options(name), "cache": {"no-flush": True}}
    if file["driver"] == "nbd":
        del file["cache"]
    options: dict[str, Any] = {"driver": target.fmt or "raw", "file": file}
    if target.recipe is not None:
        options |= _unlocking(target.recipe)
    return options


def _unlocking(recipe: Recipe) -> dict[str, Any]:
    """How to open again what was made with a passphrase."""
    if recipe.fmt == "luks":
        return {"key-secret": recipe.options["key-secret"]}
    encrypt = recipe.options.get("encrypt")
    return {} if not encrypt else {"encrypt": {"key-secret": encrypt["key-secret"]}}


def _fill(source: Node, node: Node, target: Target, options: Options) -> None:
    if node.size < source.size:
        raise ImageError(
            f"{node.name}: output file is smaller than input file: {node.size} bytes, and "
            f"{source.size} are needed; resize it first"
        )
    backed = target.recipe is not None and target.recipe.backing is not None
    sink = _sink(node, target, options)
    plan = options.plan
    if not (source.blocking or node.blocking):  # more threads than that only wait for each other
        plan = replace(plan, workers=min(plan.workers, (os.cpu_count() or 1) + 1))
    copy = Copy(source, sink, _regions(source, backed), source.size, plan, options.progress)
    copy.run()
    if options.bitmaps:
        _copy_bitmaps(source, node, options)
    if target.sync:
        node.flush()


def _sink(node: Node, target: Target, options: Options) -> Sink:
    if options.compress or options.dedup:
        from fleece.formats.layers import image_of
        from fleece.formats.qcow2.dedup import Dedup
        from fleece.formats.qcow2.image import Qcow2Node
        from fleece.formats.qcow2.packing import Packer

        image = image_of(node)
        if not isinstance(image, Qcow2Node):
            raise UnsupportedFeature(
                f"{node.name}: only images of format qcow2 can be compressed or deduplicated"
            )
        if options.dedup:
            return Dedup(image, options.dedup, is_zero=target.is_zero, compress=options.compress)
        return Packer(image, is_zero=target.is_zero)
    return Writer(node, sparse=options.sparse, is_zero=target.is_zero)


def _regions(source: Node, backed: bool) -> Regions:
    """With a backing file the target needs only what the top layer of the source has."""
    if not backed:
        return regions_of(source)
    from fleece.formats.layers import backing_of, regions_above

    return regions_above(source, backing_of(source))


def _check_bitmaps(source: Node, options: Options) -> None:
    from fleece.formats.layers import image_of
    from fleece.formats.qcow2 import bitmaps

    image = image_of(source)
    found = [] if image is None else bitmaps.load(image)
    for bitmap in found:
        if bitmap.inconsistent and not options.skip_broken:
            raise ImageError(
                f"Cannot copy inconsistent bitmap '{bitmap.name}'; use --skip-broken-bitmaps, or "
                "remove it with: fleece image bitmap --remove"
            )


def _copy_bitmaps(source: Node, node: Node, options: Options) -> None:
    from fleece.formats.layers import image_of
    from fleece.formats.qcow2 import bitmaps

    image, copy = image_of(source), _bitmap_target(node)
    for bitmap in [] if image is None else bitmaps.load(image):
        if bitmap.inconsistent:
            options.warn(f"fleece: warning: Skipping inconsistent bitmap '{bitmap.name}'")
            continue
        bitmaps.add(copy, bitmap.name, granularity=bitmap.granularity, enabled=False)
        bitmaps.merge(copy, bitmap.name, [bitmap])
        bitmaps.enable(copy, bitmap.name, enabled=bitmap.enabled)


def _bitmap_target(node: Node) -> "Qcow2Node":
    from fleece.formats.layers import image_of
    from fleece.formats.qcow2.image import Qcow2Node

    image = image_of(node)
    if not isinstance(image, Qcow2Node):
        raise UnsupportedFeature(f"{node.name}: This image format cannot store bitmaps")
    return image

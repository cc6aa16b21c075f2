# SPDX-License-Identifier: Apache-2.0
"""``fleece image bitmap``: the persistent dirty bitmaps of an image."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from fleece.cli.image import common
from fleece.cli.output import print_json
from fleece.errors import FleeceError, ImageError, UnsupportedFeature, UsageError

if TYPE_CHECKING:
    from fleece.block.node import Node
    from fleece.formats.qcow2.image import Qcow2Node

Step: TypeAlias = tuple[str, str | None]
"""The name of an operation, and the source of a merge."""

_HELP = {
    "add": "make it, clean and enabled",
    "remove": "remove it; also one that is inconsistent",
    "clear": "forget what is dirty",
    "enable": "record changes from now on",
    "disable": "record no more changes",
    "merge": "add what is dirty in bitmap SOURCE",
}


class _AddStep(argparse.Action):
    """Operations are done in the order in which they are given."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        source = values if isinstance(values, str) else None
        verb = (option_string or "").lstrip("-")
        full = next(name for name in _HELP if name.startswith(verb))
        namespace.steps = [*namespace.steps, (full, source)]


def configure(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "bitmap",
        help="add, remove, clear, enable, disable or merge dirty bitmaps",
        description="Change persistent dirty bitmaps of a qcow2 image, in one or more steps that "
        "are done in their order. The image must not be in use.",
        example="fleece image bitmap --add disk.qcow2 nightly\n"
        "fleece image bitmap --merge nightly -b old.qcow2 -F qcow2 disk.qcow2 all",
    )
    common.add_source(parser)
    for verb, text in _HELP.items():
        words: dict[str, Any] = {"metavar": "SOURCE"} if verb == "merge" else {"nargs": 0}
        parser.add_argument(
            f"--{verb}", action=_AddStep, dest="steps", default=[], help=text, **words
        )
    parser.add_argument("-g", "--granularity", metavar="SIZE", help="of --add; 64k, for example")
    parser.add_argument("-b", "--source-file", metavar="FILE", help="the image of --merge's SOURCE")
    parser.add_argument("-F", "--source-format", metavar="FMT", help="the format of that image")
    parser.add_argument("--json", action="store_true", help="say in JSON how the bitmap is then")
    parser.add_argument("filename", metavar="IMAGE", help="the image")
    parser.add_argument("bitmap", metavar="BITMAP", help="the name of the bitmap")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do it; the exit status."""
    return common.run_as_qemu(args, _run)


def _run(args: argparse.Namespace) -> int:
    granularity = _checked(args)
    with common.closing_all(*_open_all(args)) as nodes:
        node = _qcow2(nodes[0])
        source = _qcow2(nodes[-1])
        for step in args.steps:
            try:
                _do(node, source, args.bitmap, step, granularity)
            except FleeceError as error:
                text = f"Operation {step[0]} on bitmap {args.bitmap} failed: {error}"
                raise type(error)(text) from error
            except OSError as error:
                text = f"Operation {step[0]} on bitmap {args.bitmap} failed: {error.strerror}"
                raise ImageError(text) from error
        result = _describe(node, args.bitmap)
    if args.json:
        print_json(result)
    return 0


def _checked(args: argparse.Namespace) -> int | None:
    from fleece.units import parse_size

    verbs = [verb for verb, _ in args.steps]
    if not verbs:
        raise UsageError(
            "Need at least one of --add, --remove, --clear, --enable, --disable, or --merge"
        )
    if args.granularity is not None and "add" not in verbs:
        raise UsageError("granularity only supported with --add")
    if args.source_format is not None and args.source_file is None:
        raise UsageError("-F only supported with -b")
    if args.source_file is not None and "merge" not in verbs:
        raise UsageError("Merge bitmap source file only supported with --merge")
    return None if args.granularity is None else parse_size(args.granularity)


def _open_all(args: argparse.Namespace) -> "list[Node]":
    """The image, and the one of ``-b`` if it is another."""
    if args.source_file is None:
        return [common.open_source(args, args.filename, args.format, writable=True)]
    plain = argparse.Namespace(**{**vars(args), "image_opts": False})
    source = common.open_source(plain, args.source_file, args.source_format)
    try:
        return [common.open_source(args, args.filename, args.format, writable=True), source]
    except BaseException:
        source.close()
        raise


def _do(
    node: "Qcow2Node", source: "Qcow2Node", name: str, step: Step, granularity: int | None
) -> None:
    from fleece.formats.qcow2 import bitmaps

    verb, other = step
    if verb == "add":
        bitmaps.add(node, name, granularity=granularity)
    elif other is not None:
        bitmaps.merge(node, name, [bitmaps.find(source, other)])
    else:
        getattr(bitmaps, verb)(node, name)


def _describe(node: "Qcow2Node", name: str) -> dict[str, Any] | None:
    """The bitmap as ``info`` shows it (Qcow2BitmapInfo); None if it is gone."""
    from fleece.formats.qcow2 import bitmaps

    found = next((bitmap for bitmap in bitmaps.load(node) if bitmap.name == name), None)
    if found is None:
        return None
    flags = ["auto"] if found.enabled else []
    return {"name": found.name, "granularity": found.granularity, "flags": flags}


def _qcow2(node: "Node") -> "Qcow2Node":
    from fleece.formats.qcow2.image import Qcow2Node

    found = common.below_filters(node)
    if not isinstance(found, Qcow2Node):
        raise UnsupportedFeature(f"{node.name}: only qcow2 images have persistent bitmaps")
    return found

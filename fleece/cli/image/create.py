# SPDX-License-Identifier: Apache-2.0
"""``fleece image create``: make a new image."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fleece.cli.image import common
from fleece.cli.output import print_json, printable
from fleece.errors import ImageError, UsageError

if TYPE_CHECKING:
    from fleece.formats.creating import Recipe


def configure(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "create",
        help="make a new image",
        description="Make a new image of SIZE bytes (suffixes k M G T P E). What is at the path is "
        "replaced. With a backing file the size may be left out. -o help lists the options.",
        example="fleece image create -f qcow2 disk.qcow2 20G\n"
        "fleece image create -f qcow2 -b base.qcow2 -F qcow2 overlay.qcow2",
    )
    parser.add_argument("-f", "--format", metavar="FMT", default="raw", help="raw, qcow2 or luks")
    parser.add_argument("-b", "--backing", metavar="FILE", help="the image below the new one")
    parser.add_argument("-F", "--backing-format", metavar="FMT", help="the format of that image")
    parser.add_argument(
        "-u", "--unsafe", action="store_true", help="do not look at the backing file"
    )
    add_options(parser)
    parser.add_argument("-q", "--quiet", action="store_true", help="say nothing but errors")
    parser.add_argument("--json", action="store_true", help="say in JSON what was made")
    common.add_objects(parser)
    common.add_backing_policy(parser)
    parser.add_argument("filename", metavar="IMAGE", help="a file or a block device", nargs="?")
    parser.add_argument("size", metavar="SIZE", help="of the disk", nargs="?")
    parser.set_defaults(run=run)


def add_options(parser: argparse.ArgumentParser) -> None:
    """``-o``."""
    parser.add_argument(
        "-o",
        "--options",
        metavar="OPTIONS",
        action="append",
        default=[],
        help="name=value,... of the format; `-o help` lists them",
    )


def run(args: argparse.Namespace) -> int:
    """Make it; the exit status."""
    return common.run_as_qemu(args, _run)


def asks_for_help(texts: list[str]) -> bool:
    """Whether one of the words of ``-o`` is help."""
    return any(word in ("help", "?") for text in texts for word in text.split(","))


def print_options(fmt: str, *, skip: tuple[str, ...] | None = None) -> int:
    """What ``-o help`` says."""
    from fleece.formats.creating import OF_SLOTS, option_lines

    print("Supported options:")
    for line in option_lines(fmt, skip=OF_SLOTS if skip is None else skip):
        print(line)
    return 0


def _run(args: argparse.Namespace) -> int:
    from fleece.formats import creating

    if asks_for_help(args.options):
        return print_options(args.format)
    if args.filename is None:
        raise UsageError("the name of the new image is missing; see fleece image create --help")
    recipe = creating.recipe(
        args.format,
        args.options,
        common.secrets(args),
        backing_file=args.backing,
        backing_fmt=args.backing_format,
        size=args.size,
    )
    size = _size(args, recipe)
    if not args.quiet and not args.json:
        print(printable(creating.formatting(args.filename, recipe, size)))
    creating.make(args.filename, size, recipe, overwrite=True)
    if args.json:
        print_json({"filename": args.filename, "format": args.format, "virtual-size": size})
    return 0


def _size(args: argparse.Namespace, recipe: "Recipe") -> int:
    """What was asked for, or that of the backing file, which has to be there in any case."""
    if args.size is not None and any("size" in _names(text) for text in args.options):
        raise UsageError("the image size must be given only once")
    found = None
    if recipe.backing is not None and not args.unsafe:
        found = _backing_size(args, recipe)
    size = recipe.size if recipe.size is not None else found
    if size is None:
        raise UsageError("the size is missing; see fleece image create --help")
    return size


def _names(text: str) -> list[str]:
    return [word.partition("=")[0] for word in text.split(",")]


def _backing_size(args: argparse.Namespace, recipe: "Recipe") -> int:
    """Open the backing file as the new image would."""
    name, fmt = str(recipe.backing), recipe.options.get("backing_fmt")
    if fmt is None:
        raise ImageError(f"{args.filename}: a backing file needs a format: add -F FORMAT")
    full = os.path.join(os.path.dirname(args.filename), name)
    if Path(full).exists() and os.path.realpath(full) == os.path.realpath(args.filename):
        raise ImageError(f"{args.filename}: it cannot be its own backing file")
    from fleece.formats.opening import open_node

    node = open_node(
        full if ":" not in name.split("/", 1)[0] else name,
        fmt,
        read_only=True,
        allow_backing=common.policy(args),
        keys=common.secrets(args),
    )
    try:
        return node.size
    finally:
        node.close()

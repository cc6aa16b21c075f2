# SPDX-License-Identifier: Apache-2.0
"""``fleece image measure``: how large an image will be, before it is made."""

import argparse
from typing import TYPE_CHECKING, Any

from fleece.cli.image import common
from fleece.cli.image.create import add_options, asks_for_help, print_options
from fleece.cli.output import print_json
from fleece.errors import UsageError

if TYPE_CHECKING:
    from fleece.formats.creating import Recipe
    from fleece.formats.qcow2.measure import Measure


def configure(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "measure",
        help="how large an image will be",
        description="How many bytes a new image needs, for a disk of a size or as a copy of IMAGE, "
        "and how many it needs when all of the disk is written.",
        example="fleece image measure -O qcow2 --size 20G\n"
        "fleece image measure -O qcow2 -o cluster_size=2M disk.raw",
    )
    common.add_source(parser)
    common.add_output(parser)
    parser.add_argument("-O", "--output-format", metavar="FMT", default="raw", help="of the image")
    add_options(parser)
    parser.add_argument("--size", metavar="SIZE", help="of an empty disk")
    parser.add_argument("-l", "--snapshot", metavar="NAME", help="an internal snapshot of IMAGE")
    parser.add_argument("filename", metavar="IMAGE", nargs="?", help="what would be copied")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the numbers; the exit status."""
    return common.run_as_qemu(args, _run)


def _run(args: argparse.Namespace) -> int:
    from fleece.formats import creating

    if asks_for_help(args.options):
        return print_options(args.output_format)
    if (args.size is None) == (args.filename is None):
        raise UsageError("give either --size or the name of an image")
    recipe = creating.recipe(args.output_format, args.options, common.secrets(args), size=args.size)
    _print(args, _measure(args, recipe))
    return 0


def _measure(args: argparse.Namespace, recipe: "Recipe") -> "Measure":
    from fleece.formats import creating

    if args.filename is None:
        return creating.measure(recipe, int(recipe.size or 0))
    more = {} if args.snapshot is None else {"snapshot": args.snapshot}
    node = common.open_source(args, args.filename, args.format, **more)
    with common.closing_all(node):
        return creating.measure(recipe, node.size, node)


def _print(args: argparse.Namespace, found: "Measure") -> None:
    if common.wants_json(args):
        told = {} if found.bitmaps is None else {"bitmaps": found.bitmaps}
        print_json(told | {"required": found.required, "fully-allocated": found.fully_allocated})
        return
    print(f"required size: {found.required}")
    print(f"fully allocated size: {found.fully_allocated}")
    if found.bitmaps is not None:
        print(f"bitmaps size: {found.bitmaps}")

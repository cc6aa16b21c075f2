# SPDX-License-Identifier: Apache-2.0
"""``fleece image commit``: the data of an overlay into the image below it."""

import argparse
import os
from typing import TYPE_CHECKING, Any

from fleece.cli.arguments import checked
from fleece.cli.image import common
from fleece.cli.output import print_json
from fleece.errors import ImageError
from fleece.units import parse_size

if TYPE_CHECKING:
    from collections.abc import Callable

    from fleece.block.node import Node


def configure(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "commit",
        help="write an overlay into the image below it",
        description="Write what an overlay has into its backing file, or with -b into a layer "
        "further down, which grows if it has to. The overlay is empty then, unless -d or -b is "
        "given.",
        example="fleece image commit overlay.qcow2\n"
        "fleece image commit -b base.qcow2 overlay.qcow2",
    )
    common.add_source(parser)
    parser.add_argument("-b", "--base", metavar="FILE", help="the layer, as the chain names it")
    parser.add_argument("-d", "--keep", action="store_true", help="do not empty the overlay")
    parser.add_argument("-r", "--rate-limit", metavar="RATE", help="bytes a second at most")
    parser.add_argument("-t", "--cache", metavar="MODE", default="writeback", help="no effect")
    parser.add_argument("-q", "--quiet", action="store_true", help="say nothing but errors")
    parser.add_argument("--json", action="store_true", help="say in JSON what was written where")
    common.add_progress(parser)
    parser.add_argument("filename", metavar="IMAGE", help="the overlay")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do it; the exit status."""
    return common.run_as_qemu(args, _run)


def _run(args: argparse.Namespace) -> int:
    rate = checked("-r", parse_size, args.rate_limit) if args.rate_limit else 0
    from fleece.formats import committing
    from fleece.formats.rebasing import overlay_of

    top = common.open_source(args, args.filename, args.format, writable=True, writable_backing=True)
    with common.closing_all(top), common.progress(args) as progress:
        base = _base(args, top)
        committing.commit(top, base, rate=rate, progress=progress)
        if not args.keep and args.base is None:
            committing.empty(overlay_of(top))
        told = base.name
    if args.json:
        print_json({"filename": args.filename, "base": told})
    elif not args.quiet:
        print("Image committed.")
    return 0


def _base(args: argparse.Namespace, top: "Node") -> "Node":
    from fleece.formats import committing

    try:
        return committing.find_base(top, None if args.base is None else _same_as(args))
    except ImageError:
        if args.base is None:
            raise
        raise ImageError(
            f"Did not find '{args.base}' in the backing chain of '{args.filename}'"
        ) from None


def _same_as(args: argparse.Namespace) -> "Callable[[Node], bool]":
    """Whether a layer is the file that -b names, from here or from beside the overlay."""
    beside = os.path.join(os.path.dirname(args.filename), args.base)
    wanted = {os.path.realpath(args.base), os.path.realpath(beside)}
    return lambda layer: os.path.realpath(layer.name) in wanted

# SPDX-License-Identifier: Apache-2.0
"""``fleece image resize``: another size for a disk."""

import argparse
import re
import sys
from typing import Any, Final

from fleece.cli.arguments import checked
from fleece.cli.image import common
from fleece.cli.output import print_json
from fleece.errors import ImageError, UsageError
from fleece.units import parse_size

_MODES: Final = ("off", "metadata", "falloc", "full")
_NEGATIVE: Final = re.compile(r"-\d[\d.]*[bkmgtpe]?", re.IGNORECASE)


def configure(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "resize",
        help="change the size of a disk",
        description="Give a disk another size, or make it larger (+SIZE) or smaller (-SIZE). What "
        "is new reads as zeroes; what is behind the end of a smaller one is lost.",
        example="fleece image resize disk.qcow2 +10G\n"
        "fleece image resize --shrink -f raw disk.raw 512M",
    )
    common.add_source(parser)
    parser.add_argument("--shrink", action="store_true", help="let it get smaller")
    parser.add_argument(
        "--preallocation",
        metavar="MODE",
        default="off",
        help="of what is new: " + ", ".join(_MODES),
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="say nothing but errors")
    parser.add_argument("--json", action="store_true", help="say in JSON what its size is now")
    parser.add_argument("filename", metavar="IMAGE", help="the image")
    parser.add_argument("size", metavar="SIZE", help="SIZE, +SIZE or -SIZE (k, M, G, T, P, E)")
    # "-1G" is no option here.
    parser._negative_number_matcher = re.compile(f"^{_NEGATIVE.pattern}$", re.IGNORECASE)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do it; the exit status."""
    return common.run_as_qemu(args, _run)


def _run(args: argparse.Namespace) -> int:
    if args.preallocation not in _MODES:
        raise UsageError(f"Invalid preallocation mode '{args.preallocation}'")
    sign = args.size[:1] if args.size[:1] in ("+", "-") else ""
    amount = checked("SIZE", parse_size, args.size[len(sign) :])
    from fleece.formats.resizing import resize

    node = common.open_source(args, args.filename, args.format, writable=True)
    with common.closing_all(node):
        size = {"": amount, "+": node.size + amount, "-": node.size - amount}[sign]
        if size <= 0:
            raise ImageError("New image size must be positive")
        _warn_of_loss(args, node.size, size)
        resize(node, size, preallocation=args.preallocation, shrink=args.shrink)
    if args.json:
        print_json({"filename": args.filename, "virtual-size": size})
    elif not args.quiet:
        print("Image resized.")
    return 0


def _warn_of_loss(args: argparse.Namespace, old: int, size: int) -> None:
    if size < old and not args.shrink:
        print(
            "fleece: warning: Shrinking an image will delete all data beyond the shrunken image's "
            "end. Before performing such an operation, make sure there is no important data there.",
            file=sys.stderr,
        )

# SPDX-License-Identifier: Apache-2.0
"""``fleece image compare``: whether two images hold the same disk."""

import argparse
import sys
from typing import TYPE_CHECKING, Any

from fleece.cli.image import common
from fleece.cli.output import print_json, printable

if TYPE_CHECKING:
    from fleece.block.node import Node

_OPENING_FAILED = 2
_STATUS_FAILED = 3


def configure(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "compare",
        help="whether two images hold the same disk",
        description="Compare what two images, of any formats, hold. One may be longer if the rest "
        "of it is zeroes. Exit status: 0 they are the same, 1 they differ, 2 one cannot be opened, "
        "3 its allocation cannot be found out, 4 it cannot be read.",
        example="fleece image compare disk.raw disk.qcow2\n"
        "fleece image compare -f raw -F qcow2 -s one.raw two.qcow2",
    )
    common.add_source(parser)
    parser.add_argument("-F", metavar="FMT", dest="second_format", help="format of IMAGE2")
    parser.add_argument("-T", metavar="CACHE", dest="cache", help="accepted, and changes nothing")
    common.add_progress(parser)
    parser.add_argument("-q", "--quiet", action="store_true", help="print errors only")
    parser.add_argument(
        "-s", "--strict", action="store_true", help="sizes and allocation must be the same as well"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    parser.add_argument("filename", metavar="IMAGE1", help="a file, device, URI, or json:{...}")
    parser.add_argument("second", metavar="IMAGE2", help="another one")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Compare; the exit status."""
    return common.run_as_qemu(args, _open, _OPENING_FAILED)


def _open(args: argparse.Namespace) -> int:
    first = common.open_source(args, args.filename, args.format)
    with common.closing_all(first):
        second = common.open_source(args, args.second, args.second_format)
        with common.closing_all(second):
            return _compare(args, first, second)


def _compare(args: argparse.Namespace, first: "Node", second: "Node") -> int:
    from fleece.formats.comparing import CompareError, Comparer

    with common.progress(args) as progress:
        comparer = Comparer((first, second), progress)
        try:
            if args.strict:
                status = _strict(args, comparer.sizes_differ)
                if status:
                    return status
            elif comparer.sizes_differ:
                _say(args, "Warning: Image size mismatch!")
            found = comparer.run()
        except CompareError as error:
            print(f"fleece: {printable(str(error))}", file=sys.stderr)
            return error.status
    if found is not None:
        _say(args, f"Content mismatch at offset {found}!", identical=False, offset=found)
        return 1
    _say(args, "Images are identical.", identical=True)
    return 0


def _strict(args: argparse.Namespace, sizes_differ: bool) -> int:
    """What ``-s`` demands beside equal contents; 0 if it is so."""
    if sizes_differ:
        _say(args, "Strict mode: Image size mismatch!", identical=False, reason="size")
        return 1
    return common.run_as_qemu(args, _same_allocation, _STATUS_FAILED)


def _same_allocation(args: argparse.Namespace) -> int:
    from fleece.formats.comparing import first_status_difference
    from fleece.formats.mapping import disk_size, walk
    from fleece.formats.opening import Asked, Opener

    asked = Asked(common.policy(args), common.secrets(args), args.force_share)
    source, fmt = common.source_of(args, args.filename, args.format)
    other, other_fmt = common.source_of(args, args.second, args.second_format)
    with Opener(asked) as one, Opener(asked) as two:
        first, second = one.chain(source, fmt), two.chain(other, other_fmt)
        found = first_status_difference(
            walk(first, 0, disk_size(first)), walk(second, 0, disk_size(second))
        )
    if found is None:
        return 0
    text = f"Strict mode: Offset {found} block status mismatch!"
    _say(args, text, identical=False, offset=found, reason="allocation")
    return 1


def _say(args: argparse.Namespace, text: str, **members: Any) -> None:
    if args.json:
        if members:
            print_json({"message": text, **members})
    elif not args.quiet:
        print(text)

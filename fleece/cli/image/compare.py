# SPDX-License-Identifier: Apache-2.0
"""``fleece image compare``: whether two images hold the same disk."""

import argparse
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from fleece.cli.image import common
from fleece.cli.output import print_json, printable
from fleece.errors import FleeceError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fleece.block.node import Node
    from fleece.formats.comparing import Comparer
    from fleece.formats.opening import Layer

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

    try:
        with common.progress(args) as progress, _chains(args) as chains:
            comparer = Comparer((first, second), progress, chains)
            if args.strict and comparer.sizes_differ:
                outcome = _Outcome("Strict mode: Image size mismatch!", reason="size")
            else:
                outcome = _look(args, comparer)
    except CompareError as error:
        print(f"fleece: {printable(str(error))}", file=sys.stderr)
        return error.status
    except _CannotTell as error:
        return common.run_as_qemu(args, error.again, _STATUS_FAILED)
    _print(args, outcome)
    return 0 if outcome.reason is None else 1


@contextmanager
def _chains(args: argparse.Namespace) -> "Iterator[tuple[list[Layer], list[Layer]]]":
    """The layers of both, of those that have a qcow2 image (another needs no numpy)."""
    from fleece.formats.opening import Asked, Opener

    asked = Asked(common.policy(args), common.secrets(args), args.force_share)
    source, fmt = common.source_of(args, args.filename, args.format)
    other, other_fmt = common.source_of(args, args.second, args.second_format)
    with Opener(asked) as one, Opener(asked) as two:
        first, second = one.chain(source, fmt), two.chain(other, other_fmt)
        yield _with_qcow2(first), _with_qcow2(second)


def _with_qcow2(chain: "list[Layer]") -> "list[Layer]":
    return chain if any(layer.header is not None for layer in chain) else []


class _Outcome(NamedTuple):
    """What is printed; ``reason`` is None if the two are the same."""

    text: str
    reason: str | None = None
    offset: int | None = None
    warn: bool = False


class _CannotTell(Exception):
    """The allocation cannot be found out."""

    def __init__(self, error: FleeceError | OSError) -> None:
        super().__init__(str(error))
        self._error = error

    def again(self, _: argparse.Namespace) -> int:
        """Raise what happened."""
        raise self._error


def _look(args: argparse.Namespace, comparer: "Comparer") -> _Outcome:
    """With ``-s`` contents count as far as the allocation is the same."""
    differs = _allocation_differs(args) if args.strict else None
    found = comparer.run(differs)
    if found is not None:
        warn = comparer.sizes_differ and found >= comparer.common
        return _Outcome(f"Content mismatch at offset {found}!", "content", found, warn)
    if differs is not None:
        text = f"Strict mode: Offset {differs} block status mismatch!"
        return _Outcome(text, "allocation", differs)
    return _Outcome("Images are identical.", warn=comparer.sizes_differ)


def _allocation_differs(args: argparse.Namespace) -> int | None:
    from fleece.formats.comparing import first_status_difference
    from fleece.formats.mapping import disk_size, walk
    from fleece.formats.opening import Asked, Opener

    asked = Asked(common.policy(args), common.secrets(args), args.force_share)
    source, fmt = common.source_of(args, args.filename, args.format)
    other, other_fmt = common.source_of(args, args.second, args.second_format)
    try:
        with Opener(asked) as one, Opener(asked) as two:
            first, second = one.chain(source, fmt), two.chain(other, other_fmt)
            return first_status_difference(
                walk(first, 0, disk_size(first)), walk(second, 0, disk_size(second))
            )
    except (FleeceError, OSError) as error:
        raise _CannotTell(error) from error


def _print(args: argparse.Namespace, outcome: _Outcome) -> None:
    if args.json:
        members = {"reason": outcome.reason, "offset": outcome.offset}
        identical = outcome.reason is None
        print_json({"identical": identical, "message": outcome.text, **members})
    elif not args.quiet:
        if outcome.warn:
            print("Warning: Image size mismatch!")
        print(outcome.text)

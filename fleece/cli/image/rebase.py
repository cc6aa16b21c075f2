# SPDX-License-Identifier: Apache-2.0
"""``fleece image rebase``: another backing file for an overlay."""

import argparse
import os
from typing import TYPE_CHECKING, Any

from fleece.cli.image import common
from fleece.cli.output import print_json
from fleece.errors import FleeceError, ImageError, UsageError

if TYPE_CHECKING:
    from fleece.block.node import Node


def configure(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "rebase",
        help="give an overlay another backing file",
        description="Give an overlay another backing file, or with -b '' none. What a guest sees "
        "stays the same: where the two differ, the old data is written into the overlay. With -u "
        "only the name is changed, and nothing is compared.",
        example="fleece image rebase -b new-base.qcow2 -F qcow2 overlay.qcow2\n"
        "fleece image rebase -b '' overlay.qcow2",
    )
    common.add_source(parser)
    parser.add_argument("-b", "--backing", metavar="FILE", help="the new one; '' for none")
    parser.add_argument("-F", "--backing-format", metavar="FMT", help="its format")
    parser.add_argument("-u", "--unsafe", action="store_true", help="change the name only")
    parser.add_argument("-t", "--cache", metavar="MODE", default="writeback", help="no effect")
    parser.add_argument("-T", "--source-cache", metavar="MODE", help="no effect")
    parser.add_argument("-q", "--quiet", action="store_true", help="say nothing but errors")
    parser.add_argument("--json", action="store_true", help="say in JSON what it has now")
    common.add_progress(parser)
    parser.add_argument("filename", metavar="IMAGE", help="the overlay")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do it; the exit status."""
    return common.run_as_qemu(args, _run)


def _run(args: argparse.Namespace) -> int:
    if args.backing is None and not args.unsafe:
        raise UsageError("Must specify backing file (-b) or use unsafe mode (-u)")
    from fleece.formats import rebasing

    name = args.backing or None
    with common.closing_all(_overlay(args)) as (top,):
        node = rebasing.overlay_of(top)
        if name is not None and args.backing_format is None:
            rebasing.change_backing(node, name, None)
        if not args.unsafe:
            with common.closing_all(*_new(args, name)) as new, common.progress(args) as progress:
                rebasing.copy_what_differs(node, new[0] if new else None, progress)
        rebasing.change_backing(node, name, args.backing_format)
    if args.json:
        print_json({"filename": args.filename, "backing-filename": name})
    return 0


def _overlay(args: argparse.Namespace) -> "Node":
    """With -u the old backing file need not be there."""
    if not args.unsafe:
        return common.open_source(args, args.filename, args.format, writable=True)
    from fleece.formats.filenames import normal
    from fleece.formats.opening import open_node

    source, fmt = common.source_of(args, args.filename, args.format)
    options = normal(source, fmt)
    options["backing"] = None
    options.setdefault("driver", "qcow2")
    return open_node(options, allow_backing=common.policy(args), keys=common.secrets(args))


def _new(args: argparse.Namespace, name: str | None) -> "list[Node]":
    if name is None:
        return []
    from fleece.formats.opening import open_node

    # A plain name is one beside the overlay, as the overlay will take it.
    plain = ":" not in name.split("/", 1)[0]
    where = os.path.join(os.path.dirname(args.filename), name) if plain else name
    try:
        return [
            open_node(
                where,
                args.backing_format,
                read_only=True,
                allow_backing=common.policy(args),
                keys=common.secrets(args),
            )
        ]
    except FleeceError as error:
        raise ImageError(f"Could not open new backing file '{name}': {error}") from error

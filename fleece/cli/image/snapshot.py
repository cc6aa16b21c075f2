# SPDX-License-Identifier: Apache-2.0
"""``fleece image snapshot``: the internal snapshots of an image."""

import argparse
from typing import TYPE_CHECKING, Any

from fleece.cli.image import common
from fleece.cli.output import print_json
from fleece.errors import FleeceError, ImageError, UnsupportedFeature

if TYPE_CHECKING:
    from fleece.block.node import Node
    from fleece.formats.qcow2.image import Qcow2Node


def configure(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "snapshot",
        help="list, create, apply or delete internal snapshots",
        description="List the internal snapshots of a qcow2 image, or change them. The image must "
        "not be in use.",
        example="fleece image snapshot -c before-upgrade disk.qcow2\n"
        "fleece image snapshot -l disk.qcow2",
    )
    common.add_source(parser)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("-l", "--list", action="store_true", help="list them (the default)")
    what.add_argument("-c", "--create", metavar="NAME", help="make one of the disk as it is")
    what.add_argument(
        "-a", "--apply", metavar="NAME", help="the disk becomes what it was then; also by id"
    )
    what.add_argument("-d", "--delete", metavar="NAME", help="remove it; also by id")
    common.add_output(parser)
    parser.add_argument("-q", "--quiet", action="store_true", help="say nothing but errors")
    parser.add_argument("filename", metavar="IMAGE", help="the image")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do it; the exit status."""
    return common.run_as_qemu(args, _run)


def _run(args: argparse.Namespace) -> int:
    for verb in ("create", "apply", "delete"):
        if (name := getattr(args, verb)) is not None:
            return _change(args, verb, name)
    node = common.open_source(args, args.filename, args.format)
    with common.closing_all(node):
        _list(args, node)
    return 0


def _list(args: argparse.Namespace, node: "Node") -> None:
    from fleece.cli.image.info import SNAPSHOT_HEADER, snapshot_line
    from fleece.formats.info import snapshot_info
    from fleece.formats.qcow2.image import Qcow2Node
    from fleece.formats.qcow2.snapshots import list_snapshots

    node = common.below_filters(node)
    found = list_snapshots(node) if isinstance(node, Qcow2Node) else []
    infos = [snapshot_info(snapshot) for snapshot in found]
    if common.wants_json(args):
        print_json(infos)
    elif infos:
        print("Snapshot list:", SNAPSHOT_HEADER, *map(snapshot_line, infos), sep="\n")


def _change(args: argparse.Namespace, verb: str, name: str) -> int:
    from fleece.formats.info import snapshot_info
    from fleece.formats.qcow2 import snapshots

    node = common.open_source(args, args.filename, args.format, writable=True)
    with common.closing_all(node):
        try:
            changed = getattr(snapshots, verb)(_qcow2(node), name)
        except FleeceError as error:
            raise type(error)(f"Could not {verb} snapshot '{name}': {error}") from error
        except OSError as error:
            why = error.strerror or str(error)
            raise ImageError(f"Could not {verb} snapshot '{name}': {why}") from error
    if common.wants_json(args):
        print_json(snapshot_info(changed))
    return 0


def _qcow2(node: "Node") -> "Qcow2Node":
    from fleece.formats.qcow2.image import Qcow2Node

    found = common.below_filters(node)
    if not isinstance(found, Qcow2Node):
        raise UnsupportedFeature(f"{node.name}: only qcow2 images have internal snapshots")
    return found

# SPDX-License-Identifier: Apache-2.0
"""``fleece export``: one image over NBD, in the foreground or around a command."""

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fleece.cli.arguments import add_json, checked
from fleece.cli.image.common import add_source, open_source
from fleece.cli.output import print_json
from fleece.errors import UsageError

if TYPE_CHECKING:
    from fleece.block.node import Node
    from nbdwire.uri import NBDURI

_EXAMPLE = """\
fleece export --socket /tmp/nbd.sock -r disk.qcow2
fleece export disk.img -- sh -c 'nbdinfo "$uri"'"""


def configure(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "export",
        help="export one image, without a daemon",
        usage="fleece export [options] IMAGE [-- COMMAND ...]",
        description="Export IMAGE over NBD until Ctrl-C, or while COMMAND runs. COMMAND finds the "
        "export in $uri, $unixsocket and $exportname; its exit status is ours. Without an address "
        "it is a private unix socket with COMMAND, and localhost:10809 without.",
        example=_EXAMPLE,
    )
    address = parser.add_mutually_exclusive_group()
    address.add_argument("--socket", metavar="PATH", help="listen at this unix socket")
    address.add_argument("--listen", metavar="HOST:PORT", help="listen at this address")
    parser.add_argument("--name", default="", help="the export's name (default: empty)")
    parser.add_argument("-r", "--read-only", action="store_true", help="refuse writes")
    parser.add_argument(
        "-l", "--snapshot", metavar="NAME", help="an internal snapshot of IMAGE, or its id"
    )
    parser.add_argument(
        "-B",
        "--bitmap",
        metavar="NAME",
        action="append",
        default=[],
        help="offer this persistent bitmap as qemu:dirty-bitmap:NAME; may be repeated",
    )
    parser.add_argument(
        "-f", "--format", choices=("raw", "qcow2", "luks"), help="of IMAGE (default: look)"
    )
    add_source(parser, fmt=False)
    parser.add_argument("image", metavar="IMAGE", help="a file, a block device or an NBD URI")
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Export until told to stop, or until the command ends; the exit status."""
    if args.command == ():
        raise UsageError("there is no command after --")
    from fleece.config import ExportOptions

    with _address(args) as uri:
        from fleece.appliance import run_export

        options = ExportOptions(
            open=lambda: _open(args),
            uri=uri,
            bitmaps=tuple(args.bitmap),
            command=args.command or (),
            # With a command, standard output is the command's.
            announce=None if args.command else lambda real: _announce(real, args.json),
        )
        return int(run_export(options))


def _open(args: argparse.Namespace) -> "Node":
    writable = not (args.read_only or args.force_share or args.snapshot)
    return open_source(args, args.image, args.format, writable=writable, snapshot=args.snapshot)


@contextmanager
def _address(args: argparse.Namespace) -> Iterator["NBDURI"]:
    from fleece.config import parse_listen
    from nbdwire.uri import NBDURI

    if args.socket is not None:
        yield NBDURI(socket=args.socket, export=args.name)
    elif args.listen is not None or not args.command:
        uri = checked("--listen", parse_listen, args.listen or "localhost")
        yield uri.with_export(args.name)
    else:
        with tempfile.TemporaryDirectory(prefix="fleece-") as directory:
            yield NBDURI(socket=os.path.join(directory, "nbd.sock"), export=args.name)


def _announce(uri: "NBDURI", as_json: bool) -> None:
    if as_json:
        print_json({"uri": str(uri), "export": uri.export, "pid": os.getpid()})
    else:
        print(uri)
    sys.stdout.flush()

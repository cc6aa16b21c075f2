# SPDX-License-Identifier: Apache-2.0
"""``serve``: offer one file, or memory, until a signal comes."""

import argparse
import logging
import os
import signal
import sys
from typing import Final

from nbdwire.server import Server
from nbdwire.tools.files import FileExport
from nbdwire.tools.options import add_json, print_json, size, uri
from nbdwire.uri import NBDURI

_ENDS: Final = (signal.SIGINT, signal.SIGTERM)
_EPILOG = "example: python -m nbdwire serve --memory 1G --socket /tmp/nbd.sock"


def add(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The verb and its options."""
    parser = verbs.add_parser("serve", help="offer a file, or memory", epilog=_EPILOG)
    parser.description = "Offer a file, a block device or memory until SIGINT or SIGTERM comes."
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("file", nargs="?", metavar="FILE", help="a file or a block device, as it is")
    what.add_argument("--memory", type=size, metavar="SIZE", help="an empty disk in memory")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--socket", metavar="PATH", help="listen on this Unix socket")
    where.add_argument(
        "--listen", type=uri, metavar="URI", help="listen there (default: nbd://localhost)"
    )
    parser.add_argument("-r", "--read-only", action="store_true", help="refuse writes")
    parser.add_argument("-n", "--name", default="", help="of the export (default: empty)")
    parser.add_argument("-d", "--description", default="", help="for those who list the exports")
    parser.add_argument("-v", "--verbose", action="store_true", help="log clients on stderr")
    add_json(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Listen, print where, and wait for a signal."""
    if options.verbose:
        logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    # Blocked before there are threads, so that none of them is interrupted and no handler runs.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDS)
    try:
        _serve(options)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return 0


def _serve(options: argparse.Namespace) -> None:
    export = _open(options)
    try:
        with Server() as server:
            server.add(options.name, export, description=options.description)
            where = server.listen(_place(options)).with_export(options.name)
            _announce(where, export, options.json)
            signal.sigwait(_ENDS)
        export.flush()
    finally:
        export.close()


def _open(options: argparse.Namespace) -> FileExport:
    if options.memory is not None:
        return FileExport.memory(options.memory, options.read_only)
    return FileExport.open(options.file, options.read_only)


def _place(options: argparse.Namespace) -> NBDURI:
    if options.socket:
        return NBDURI(socket=os.path.abspath(options.socket))
    place: NBDURI | None = options.listen
    return NBDURI(host="localhost") if place is None else place


def _announce(where: NBDURI, export: FileExport, as_json: bool) -> None:
    if as_json:
        print_json({"uri": str(where), "size": export.size, "read-only": export.read_only})
    else:
        print(where)
    sys.stdout.flush()  # whoever started us waits for it

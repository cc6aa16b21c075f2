# SPDX-License-Identifier: Apache-2.0
"""``copy``: from an export, a file or standard input to an export, a file or standard output."""

import argparse
import json
import os
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict
from typing import Final

from nbdwire import constants as c
from nbdwire.errors import URIError
from nbdwire.pool import connect_pool
from nbdwire.tools.copying import Copy, Plan, Totals
from nbdwire.tools.ends import CopyFailed, FileEnd, Source, StreamSource, StreamTarget, Target
from nbdwire.tools.files import FileExport
from nbdwire.tools.nbdends import NbdEnd
from nbdwire.tools.options import add_json, add_timeout, human, positive, size
from nbdwire.tools.progress import Progress, quiet
from nbdwire.uri import parse

CONNECTIONS: Final = max(2, min(4, os.cpu_count() or 1))
REQUESTS: Final = 8
REQUEST_SIZE: Final = 1 << 20

_EPILOG = """\
SOURCE and TARGET are a URI (nbd://...), a file or block device, or - for standard input or output.
A target file is created or emptied; an export or a device must be as large as the source.
When a read or write fails the copy ends with status 1, and the message says where; the target is
incomplete then.

example: python -m nbdwire copy --connections 4 nbd://host/disk disk.img
"""


def add(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The verb and its options."""
    parser = verbs.add_parser(
        "copy",
        help="copy a disk, its holes too",
        description="Copy a disk. Zeroes and holes are not sent as data.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("target", metavar="TARGET")
    option = parser.add_argument
    option("--connections", type=positive, default=CONNECTIONS, metavar="N",
           help="to each server that allows several, and threads (default: one for each "
           "processor, 2 to 4)")  # fmt: skip
    option("--requests", type=positive, default=REQUESTS, metavar="N",
           help="in flight on each connection (default: %(default)s)")  # fmt: skip
    option("--request-size", type=size, default=REQUEST_SIZE, metavar="SIZE",
           help="bytes of one request, 4k to 32M (default: 1M)")  # fmt: skip
    option("--synchronous", action="store_true", help="one connection and one request at a time")
    option("--allocated", action="store_true", help="make zeroes take up room in the target")
    option("--target-is-zero", action="store_true", help="the target reads as zeroes already")
    option("--sparse", type=size, default=64 << 10, metavar="SIZE",
           help="look for zeroes in blocks of SIZE, 0: never (default: 64k)")  # fmt: skip
    option("--no-flush", action="store_true", help="do not wait for stable storage at the end")
    progress = parser.add_mutually_exclusive_group()
    progress.add_argument("-p", "--progress", action="store_true", default=None, help="show it")
    progress.add_argument("-q", "--no-progress", action="store_false", dest="progress")
    add_timeout(parser)
    add_json(parser)
    parser.set_defaults(run=run, parser=parser)


def run(options: argparse.Namespace) -> int:
    """Open both ends, copy, and close them."""
    if not 4096 <= options.request_size <= c.MAX_PAYLOAD or options.request_size % 512:
        options.parser.error("--request-size: from 4k to 32M, a multiple of 512")
    if options.target_is_zero and options.target == "-":
        options.parser.error("--target-is-zero: a stream has to be told its zeroes")
    _check_uris(options)
    if options.synchronous:
        options.connections = options.requests = 1
    began = time.monotonic()
    with ExitStack() as stack:
        source = _source(options)
        stack.callback(source.close)
        target = _target(options, source.size)
        stack.callback(target.close)
        totals = _copy(options, source, target)
    _report(options, source.size, totals, time.monotonic() - began)
    return 0


def _check_uris(options: argparse.Namespace) -> None:
    """What is no path must be a URI that we know: exit status 2."""
    for place in (options.source, options.target):
        if "://" in place:
            try:
                parse(place)
            except URIError as error:
                options.parser.error(str(error))


def _copy(options: argparse.Namespace, source: Source, target: Target) -> Totals:
    if source.size is not None and target.size is not None and target.size < source.size:
        raise CopyFailed(
            f"the target is too small: {target.name} has {target.size} bytes, "
            f"{source.name} has {source.size}; enlarge it first"
        )
    target.is_zero = target.is_zero or options.target_is_zero
    shown = sys.stderr.isatty() if options.progress is None else options.progress
    progress = Progress(source.size) if shown else None
    plan = Plan(
        request_size=options.request_size,
        allocate=options.allocated,
        sparse=options.sparse,
        flush=not options.no_flush,
    )
    try:
        return Copy(source, target, plan, progress or quiet).run()
    finally:
        if progress is not None:
            progress.end()


def _source(options: argparse.Namespace) -> Source:
    if options.source == "-":
        return StreamSource(sys.stdin.fileno())
    if "://" in options.source:
        return _connect(options, options.source, (c.CONTEXT_BASE_ALLOCATION,))
    return FileEnd(options.source, FileExport.open(options.source, True), lanes=options.connections)


def _target(options: argparse.Namespace, length: int | None) -> Target:
    if options.target == "-":
        return StreamTarget(sys.stdout.fileno())
    if "://" in options.target:
        end = _connect(options, options.target, ())
        if end.read_only:
            end.close()
            raise CopyFailed(
                f"cannot write to {end.name}: the export is read-only; "
                "start its server without that, or give another target"
            )
        return end
    _check_not_itself(options.source, options.target)
    return FileEnd.create(
        options.target, length, keep=options.target_is_zero, lanes=options.connections
    )


def _connect(options: argparse.Namespace, uri: str, contexts: tuple[str, ...]) -> NbdEnd:
    pool = connect_pool(uri, options.connections, contexts=contexts, timeout=options.timeout)
    return NbdEnd(uri, pool, options.requests)


def _check_not_itself(source: str, target: str) -> None:
    """Emptying the target must not empty the source."""
    if os.path.exists(source) and os.path.exists(target) and os.path.samefile(source, target):
        raise URIError(f"{target}: source and target are the same file; give another target")


def _report(
    options: argparse.Namespace, length: int | None, totals: Totals, seconds: float
) -> None:
    """To stdout, unless that is the target."""
    out = sys.stderr if options.target == "-" else sys.stdout
    if options.json:
        facts = {"size": totals.done if length is None else length, **asdict(totals)}
        json.dump({**facts, "seconds": round(seconds, 6)}, out, indent=2)
        out.write("\n")
    elif options.progress:
        print(
            f"copied {human(totals.done)} in {seconds:.1f} s: {human(totals.written)} of data, "
            f"{human(totals.zeroed + totals.skipped)} of zeroes",
            file=sys.stderr,
        )

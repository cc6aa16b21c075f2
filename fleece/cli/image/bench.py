# SPDX-License-Identifier: Apache-2.0
"""``fleece image bench``: how fast requests to an image are."""

import argparse
from typing import TYPE_CHECKING, Any, Final

from fleece.cli.arguments import checked
from fleece.cli.image import common
from fleece.cli.output import print_json
from fleece.errors import ImageError, UsageError
from fleece.units import parse_size

if TYPE_CHECKING:
    from fleece.block.bench import Load

_MOST: Final = (1 << 31) - 1
_MOST_DEPTH: Final = 1024


def configure(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "bench",
        help="how fast requests to an image are",
        description="Send COUNT requests to an image, DEPTH of them at once, and say how long that "
        "takes. With -w they are writes: the image is overwritten.",
        example="fleece image bench -c 100000 -d 32 disk.qcow2\n"
        "fleece image bench -w --pattern 42 --flush-interval 100 scratch.qcow2",
    )
    common.add_source(parser)
    add = parser.add_argument
    add("-c", "--count", metavar="COUNT", default="75000", help="requests (default: 75000)")
    add("-d", "--depth", metavar="DEPTH", default="64", help="at once (default: 64)")
    add("-s", "--buffer-size", metavar="SIZE", default="4096", help="of a request (default: 4k)")
    add("-S", "--step-size", metavar="SIZE", help="from one to the next (default: as -s)")
    add("-o", "--offset", metavar="OFFSET", default="0", help="of the first one")
    add("-w", "--write", action="store_true", help="write")
    add("--pattern", metavar="BYTE", default="0", help="what is written (0 to 255)")
    add("--flush-interval", metavar="N", default="0", help="a flush after every N writes")
    add("--no-drain", action="store_true", help="do not wait for requests before a flush")
    add("-n", "--native", action="store_true", help="accepted, no effect")
    add("-i", "--aio", metavar="AIO", help="accepted, no effect")
    add("-t", "--cache", metavar="MODE", default="writeback", help="accepted, no effect")
    add("-q", "--quiet", action="store_true", help="say nothing but errors")
    add("--json", action="store_true", help="say in JSON how long it took")
    add("filename", metavar="IMAGE", help="the image")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do it; the exit status."""
    return common.run_as_qemu(args, _run)


def _run(args: argparse.Namespace) -> int:
    load = _load(args)
    from fleece.block.bench import Run

    with common.closing_all(
        common.open_source(args, args.filename, args.format, writable=load.write)
    ) as (node,):
        if not args.quiet and not args.json:
            _announce(load)
        try:
            seconds = Run(node, load).seconds()
        except OSError as error:
            raise ImageError(f"Failed request: {error.strerror}") from error
    if args.json:
        print_json({"filename": args.filename, "requests": load.count, "seconds": seconds})
    elif not args.quiet:
        print(f"Run completed in {seconds:.3f} seconds.")
    return 0


def _announce(load: "Load") -> None:
    kind = "write" if load.write else "read"
    print(
        f"Sending {load.count} {kind} requests, {load.size} bytes each, {load.depth} in parallel "
        f"(starting at offset {load.offset}, step size {load.step})"
    )
    if load.flush_every:
        print(f"Sending flush every {load.flush_every} requests", flush=True)


def _load(args: argparse.Namespace) -> "Load":
    from fleece.block.bench import Load

    depth = _number("queue depth", args.depth, _MOST_DEPTH)
    every = _number("flush interval", args.flush_interval, _MOST)
    if depth < 1:
        raise UsageError("Invalid queue depth specified")
    if every and not args.write:
        raise UsageError("--flush-interval is only available in write tests")
    if every and every < depth:
        raise UsageError("Flush interval can't be smaller than depth")
    size = checked("-s", parse_size, args.buffer_size)
    step = checked("-S", parse_size, args.step_size) if args.step_size else size
    if not 0 < size <= _MOST or step > _MOST:
        raise UsageError("Invalid buffer size specified")
    return Load(
        count=_number("request count", args.count, _MOST),
        depth=depth,
        size=size,
        step=step or size,
        offset=checked("-o", parse_size, args.offset),
        write=args.write,
        pattern=_number("pattern byte", args.pattern, 255),
        flush_every=every,
        drain=not args.no_drain,
    )


def _number(what: str, text: str, most: int) -> int:
    try:
        value = int(text, 0)
    except ValueError:
        value = -1
    if not 0 <= value <= most:
        raise UsageError(f"Invalid {what} specified")
    return value

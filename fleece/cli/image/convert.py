# SPDX-License-Identifier: Apache-2.0
"""``fleece image convert``: copy disks into another image, of the same or another format."""

import argparse
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from fleece.cli.arguments import checked
from fleece.cli.image import common
from fleece.cli.image.create import add_options, asks_for_help, print_options
from fleece.cli.output import print_json
from fleece.errors import UsageError
from fleece.units import parse_size

if TYPE_CHECKING:
    from fleece.block.node import Node
    from fleece.formats.converting import Options, Target

CACHE_MODES: Final = ("none", "writeback", "writethrough", "directsync", "unsafe")
_SECTOR: Final = 512
_MOST_SPARSE: Final = 16 << 20
_DEDUP_MEMORY: Final = "256M"


def configure(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "convert",
        help="copy disks into another image",
        description="Copy a disk, or several behind each other, into a new image (or with -n into "
        "one that is there), of the same or another format. What reads as zeroes is not written. "
        "If it fails, or is interrupted, the new image is removed.",
        example="fleece image convert -p -O qcow2 disk.raw disk.qcow2\n"
        "fleece image convert -O qcow2 -c --dedup nbd://backup/vm1 vm1.qcow2",
    )
    common.add_source(parser)
    _add_target(parser)
    _add_copying(parser)
    parser.add_argument("names", metavar="IMAGE", nargs="+", help="the sources, then the target")
    parser.set_defaults(run=run)


def _add_target(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-O", "--output-format", metavar="FMT", help="of the target (default: raw)")
    add_options(parser)
    add("-B", "-b", "--backing", metavar="FILE", help="the image below the target")
    add("-F", "--backing-format", metavar="FMT", help="the format of that image")
    add("-n", "--no-create", action="store_true", help="the target is there: write into it")
    add("--target-image-opts", action="store_true", help="the target is given as options")
    add("--target-is-zero", action="store_true", help="with -n: it reads as zeroes now")
    add("-t", "--cache", metavar="MODE", default="unsafe", help="unsafe does not wait for storage")
    add("-T", "--source-cache", metavar="MODE", default="writeback", help="accepted, no effect")


def _add_copying(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-c", "--compress", action="store_true", help="compress the clusters of a qcow2 target")
    add("--dedup", action="store_true", help="write identical clusters of a qcow2 target once")
    add("--dedup-memory", metavar="SIZE", help=f"for --dedup (default: {_DEDUP_MEMORY})")
    add("-l", "--snapshot", metavar="NAME", help="an internal snapshot of the source, or its id")
    add("-m", "--parallel", metavar="N", default="8", help="pieces in flight, 1 to 16 (default: 8)")
    add(
        "-W", "--out-of-order", action="store_true", help="accepted: only -c and --dedup need order"
    )
    add("-S", "--sparse-size", metavar="SIZE", help="zeroes that make a hole (4k; 0: no holes)")
    add("-r", "--rate-limit", metavar="RATE", help="bytes a second at most (k, M, G)")
    add("-C", "--copy-offloading", action="store_true", help="accepted, no effect")
    add("--bitmaps", action="store_true", help="copy the persistent bitmaps too")
    add("--skip-broken-bitmaps", action="store_true", help="with --bitmaps: leave out broken ones")
    add("--salvage", action="store_true", help="what cannot be read becomes zeroes")
    add("-q", "--quiet", action="store_true", help="say nothing but errors")
    add("--json", action="store_true", help="say in JSON what was made")
    common.add_progress(parser)


def run(args: argparse.Namespace) -> int:
    """Copy; the exit status."""
    return common.run_as_qemu(args, _run)


def _run(args: argparse.Namespace) -> int:
    if asks_for_help(args.options):
        return print_options(args.output_format or "raw")
    _check(args)
    from fleece.formats import converting

    *names, output = args.names
    target = _target(args, output)
    with common.progress(args) as progress:
        options = _options(args, progress)
        with _interruptible(), common.closing_all(*_sources(args, names)) as nodes:
            converting.convert(list(nodes), target, options)
    if args.json:
        print_json({"filename": output, "format": args.output_format or "raw"})
    return 0


def _check(args: argparse.Namespace) -> None:
    """What excludes each other, in QEMU's words."""
    several = len(args.names) > 2
    for wrong, text in (
        (len(args.names) < 2, "Must specify image file name"),
        (args.target_image_opts and not args.no_create, "--target-image-opts requires use of -n"),
        (args.target_is_zero and not args.no_create, "--target-is-zero requires use of -n flag"),
        (args.dedup and args.out_of_order, "--dedup writes in order; leave out -W"),
        (args.dedup_memory and not args.dedup, "--dedup-memory requires --dedup"),
        (args.copy_offloading and args.compress, "Cannot enable copy offloading when -c is used"),
        (
            args.copy_offloading and args.sparse_size,
            "Cannot enable copy offloading when -S is used",
        ),
        (several and args.snapshot, "No support for concatenating multiple snapshot"),
        (several and args.bitmaps, "Copying bitmaps only possible with single source"),
        (
            several and args.backing,
            "Having a backing file for the target makes no sense when concatenating multiple "
            "input images",
        ),
        (
            args.skip_broken_bitmaps and not args.bitmaps,
            "Use of --skip-broken-bitmaps requires --bitmaps",
        ),
    ):
        if wrong:
            raise UsageError(text)
    for mode in (args.cache, args.source_cache):
        if mode not in CACHE_MODES:
            raise UsageError(f"Invalid cache option: {mode}; use {', '.join(CACHE_MODES)}")


def _sources(args: argparse.Namespace, names: list[str]) -> "list[Node]":
    more: dict[str, Any] = {} if args.snapshot is None else {"snapshot": _snapshot(args.snapshot)}
    opened: list[Node] = []
    try:
        for name in names:
            opened.append(common.open_source(args, name, args.format, **more))
    except BaseException:
        for node in opened:
            node.close()
        raise
    return opened


def _snapshot(text: str) -> str:
    """``NAME``, or ``snapshot.id=ID`` and ``snapshot.name=NAME``."""
    if not text.startswith("snapshot."):
        return text
    from fleece.block.options import parse_pairs

    given = parse_pairs(text).get("snapshot", {})
    if not given or not set(given) <= {"id", "name"}:
        raise UsageError(f"-l: {text!r} is neither snapshot.id=ID nor snapshot.name=NAME")
    return str(given.get("id") or given["name"])


def _target(args: argparse.Namespace, output: str) -> "Target":
    from fleece.block.options import parse_pairs
    from fleece.formats import creating
    from fleece.formats.converting import Target

    fmt, recipe = args.output_format, None
    if args.no_create:
        _warn_of_no_effect(args)
    else:
        recipe = creating.recipe(
            fmt or "raw",
            args.options,
            common.secrets(args),
            backing_file=args.backing,
            backing_fmt=args.backing_format,
        )
    return Target(
        parse_pairs(output) if args.target_image_opts else output,
        None if args.target_image_opts else fmt or "raw",
        recipe,
        is_zero=args.target_is_zero,
        sync=args.cache != "unsafe",
        policy=common.policy(args),
        keys=common.secrets(args),
    )


def _warn_of_no_effect(args: argparse.Namespace) -> None:
    for given, flag in ((args.options, "-o"), (args.backing, "-B")):
        if given:
            _warn(f"fleece: warning: {flag} has no effect when skipping image creation")


def _options(args: argparse.Namespace, progress: Callable[[int, int], None]) -> "Options":
    from fleece.block.copy import Plan
    from fleece.formats.converting import Options

    sparse = _sparse(args)
    plan = Plan(
        workers=_parallel(args.parallel),
        # A compressed cluster lies behind the one before it; else two threads that overlap gain
        # more than the order is worth: pieces are large, so what is near stays near.
        ordered=args.compress or args.dedup,
        whole=sparse == 0,
        rate=checked("-r", parse_size, args.rate_limit) if args.rate_limit else 0,
        salvage=_salvage if args.salvage else None,
    )
    return Options(
        plan,
        sparse=sparse,
        compress=args.compress,
        dedup=checked("--dedup-memory", parse_size, args.dedup_memory or _DEDUP_MEMORY)
        if args.dedup
        else 0,
        bitmaps=args.bitmaps,
        skip_broken=args.skip_broken_bitmaps,
        progress=progress,
        warn=_warn,
    )


def _sparse(args: argparse.Namespace) -> int:
    size = checked("-S", parse_size, args.sparse_size or "4k")
    if size % _SECTOR or size > _MOST_SPARSE:
        raise UsageError(
            "Invalid buffer size for sparse output specified. Valid sizes are multiples of "
            f"{_SECTOR} up to {_MOST_SPARSE}. Select 0 to disable sparse detection (fully "
            "allocates output)."
        )
    return size


def _parallel(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 16):
        raise UsageError(
            "Invalid number of coroutines. Allowed number of coroutines is between 1 and 16"
        )
    return int(text)


def _salvage(offset: int, length: int, error: OSError) -> None:
    _warn(f"fleece: warning: error while reading offset {offset}: {error.strerror or error}")


def _warn(text: str) -> None:
    print(text, file=sys.stderr)


@contextmanager
def _interruptible() -> Iterator[None]:
    """A signal to end is an interrupt, after which the half-made target is removed."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = {
        number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

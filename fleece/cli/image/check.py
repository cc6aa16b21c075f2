# SPDX-License-Identifier: Apache-2.0
"""``fleece image check``: find what is wrong with the metadata of an image, and repair it."""

import argparse
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from fleece.cli.image import common
from fleece.cli.output import print_json, printable, report_error
from fleece.errors import UnsupportedFeature

if TYPE_CHECKING:
    from fleece.formats.qcow2.check import CheckResult

CLEAN: Final = 0
FAILED: Final = 1
CORRUPT: Final = 2
LEAKY: Final = 3
UNCHECKABLE: Final = 63

_FIGURES: Final = (
    ("image_end_offset", "image-end-offset"),
    ("total_clusters", "total-clusters"),
    ("allocated_clusters", "allocated-clusters"),
    ("fragmented_clusters", "fragmented-clusters"),
    ("compressed_clusters", "compressed-clusters"),
    ("corruptions", "corruptions"),
    ("leaks", "leaks"),
    ("corruptions_fixed", "corruptions-fixed"),
    ("leaks_fixed", "leaks-fixed"),
)


def configure(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "check",
        help="find what is wrong with an image, and repair it",
        description="Check the metadata of an image. The exit status is 0 if nothing is wrong, 1 "
        "if it could not be checked, 2 if it is corrupt, 3 if clusters leak (space is lost, and "
        "nothing else), 63 if the format has no checks. After a repair it is that of a second "
        "check. Nobody else may use the image meanwhile.",
        example="fleece image check disk.qcow2\nfleece image check -r leaks disk.qcow2\n"
        "fleece image check --output json disk.qcow2",
    )
    common.add_source(parser)
    common.add_output(parser)
    common.add_progress(parser)
    parser.add_argument(
        "-r",
        "--repair",
        choices=("leaks", "all"),
        help="free leaked clusters; or repair all that can be (make a copy first: what is repaired "
        "reads in one of the ways that it could)",
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="print errors only")
    parser.add_argument("-T", "--source-cache", metavar="MODE", help="accepted, changes nothing")
    parser.add_argument("filename", metavar="IMAGE", help="a file, device, URI, or json:{...}")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check it; the exit status."""
    return common.run_as_qemu(args, _run, failed=FAILED)


def _run(args: argparse.Namespace) -> int:
    from fleece.formats.checking import CHECKABLE, NO_CHECKS, check_image, open_for_check

    source, fmt = common.source_of(args, args.filename, args.format)
    node, fmt = open_for_check(
        source, fmt, writable=args.repair is not None, force_share=args.force_share
    )
    if fmt not in CHECKABLE:
        node.close()
        report_error(UnsupportedFeature(NO_CHECKS), UnsupportedFeature.code, args.json)
        return UNCHECKABLE
    quiet = args.quiet or common.wants_json(args)
    with common.closing_all(node), common.progress(args) as progress:
        result = check_image(
            node,
            fmt,
            repair=args.repair,
            report=_report,
            again=None if quiet else lambda first: print(_repaired(first)),
            progress=progress if args.progress else None,
        )
    if common.wants_json(args):
        print_json(as_json(result, args.filename, fmt))
    elif not args.quiet:
        print("\n".join(_lines(result)))
    return _status(result)


def _report(line: str) -> None:
    print(printable(line), file=sys.stderr)


def _status(result: "CheckResult") -> int:
    if result.check_errors:
        print("fleece: the check failed; the lines above say at what", file=sys.stderr)
        return FAILED
    if result.corruptions:
        return CORRUPT
    return LEAKY if result.leaks else CLEAN


def as_json(result: "CheckResult", filename: str, fmt: str) -> dict[str, Any]:
    """QEMU's ``ImageCheck``: figures that are 0 are left out."""
    found = {key: getattr(result, name) for name, key in _FIGURES if getattr(result, name)}
    return {
        **found,
        "check-errors": result.check_errors,
        "filename": filename,
        "format": fmt,
    }


def _repaired(result: "CheckResult") -> str:
    return (
        "The following inconsistencies were found and repaired:\n\n"
        f"    {result.leaks_fixed} leaked clusters\n"
        f"    {result.corruptions_fixed} corruptions\n\n"
        "Double checking the fixed image now..."
    )


def _lines(result: "CheckResult") -> Iterator[str]:
    if not (result.corruptions or result.leaks or result.check_errors):
        yield "No errors were found on the image."
    if result.corruptions:
        yield f"\n{result.corruptions} errors were found on the image."
        yield "Data may be corrupted, or further writes to the image may corrupt it."
    if result.leaks:
        yield f"\n{result.leaks} leaked clusters were found on the image."
        yield "This means waste of disk space, but no harm to data."
    if result.check_errors:
        yield f"\n{result.check_errors} internal errors have occurred during the check."
    if result.total_clusters and result.allocated_clusters:
        yield _allocation(result)
    if result.image_end_offset:
        yield f"Image end offset: {result.image_end_offset}"


def _allocation(result: "CheckResult") -> str:
    total, allocated = result.total_clusters, result.allocated_clusters
    return (
        f"{allocated}/{total} = {allocated * 100 / total:0.2f}% allocated, "
        f"{result.fragmented_clusters * 100 / allocated:0.2f}% fragmented, "
        f"{result.compressed_clusters * 100 / allocated:0.2f}% compressed clusters"
    )

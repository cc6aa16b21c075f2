# SPDX-License-Identifier: Apache-2.0
"""``fleece image info``: what an image is, without opening what it names."""

import argparse
import time
from collections.abc import Iterator
from typing import Any

from fleece.cli.image import common
from fleece.cli.output import print_json, printable


def configure(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "info",
        help="what an image is, and what it names",
        description="Show format, sizes, features, internal snapshots and bitmaps of an image. "
        "What the image names (backing file, data file) is shown and not opened, except for the "
        "backing files with --backing-chain.",
        example="fleece image info disk.qcow2\n"
        "fleece image info --backing-chain --output json overlay.qcow2",
    )
    common.add_source(parser)
    common.add_output(parser)
    parser.add_argument(
        "--backing-chain", action="store_true", help="show all backing files as well"
    )
    parser.add_argument("filename", metavar="IMAGE", help="a file, device, URI, or json:{...}")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print it; the exit status."""
    return common.run_as_qemu(args, _run)


def _run(args: argparse.Namespace) -> int:
    from fleece.formats.info import describe
    from fleece.formats.opening import Asked

    source, fmt = common.source_of(args, args.filename, args.format)
    asked = Asked(common.policy(args), common.secrets(args), args.force_share, data_files=False)
    found = describe(source, fmt, chain=args.backing_chain, asked=asked)
    if common.wants_json(args):
        print_json(found if args.backing_chain else found[0])
    else:
        print("\n\n".join("\n".join(_lines(info)) for info in found))
    return 0


def _lines(info: dict[str, Any]) -> Iterator[str]:
    yield f"image: {printable(info['filename'])}"
    yield f"file format: {info['format']}"
    size = info["virtual-size"]
    yield f"virtual size: {human_size(size)} ({size} bytes)"
    actual = info.get("actual-size")
    yield f"disk size: {'unavailable' if actual is None else human_size(actual)}"
    if info.get("encrypted"):
        yield "encrypted: yes"
    if "cluster-size" in info:
        yield f"cluster_size: {info['cluster-size']}"
    if info.get("dirty-flag"):
        yield "cleanly shut down: no"
    yield from _backing(info)
    if "snapshots" in info:
        yield "Snapshot list:"
        yield SNAPSHOT_HEADER
        yield from map(snapshot_line, info["snapshots"])
    if "format-specific" in info:
        yield "Format specific information:"
        yield from _members(info["format-specific"]["data"], 1)


def _backing(info: dict[str, Any]) -> Iterator[str]:
    if "backing-filename" not in info:
        return
    name, full = info["backing-filename"], info["full-backing-filename"]
    actual = "" if name == full else f" (actual path: {printable(full)})"
    yield f"backing file: {printable(name)}{actual}"
    if "backing-filename-format" in info:
        yield f"backing file format: {printable(info['backing-filename-format'])}"


def _members(members: dict[str, Any], depth: int) -> Iterator[str]:
    for key, value in members.items():
        yield from _value(key.replace("-", " "), value, depth)


def _value(name: str, value: Any, depth: int) -> Iterator[str]:
    indent = "    " * depth
    if isinstance(value, dict):
        yield f"{indent}{name}:"
        yield from _members(value, depth + 1)
    elif isinstance(value, list):
        yield f"{indent}{name}:"
        for number, item in enumerate(value):
            yield from _value(f"[{number}]", item, depth + 1)
    else:
        shown = str(value).lower() if isinstance(value, bool) else printable(str(value))
        yield f"{indent}{name}: {shown}"


SNAPSHOT_HEADER = "ID        TAG               VM SIZE                DATE     VM CLOCK     ICOUNT"


def snapshot_line(snapshot: dict[str, Any]) -> str:
    """One internal snapshot (SnapshotInfo) below `SNAPSHOT_HEADER`, in local time."""
    moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(snapshot["date-sec"]))
    seconds, nanoseconds = snapshot["vm-clock-sec"], snapshot["vm-clock-nsec"]
    minutes, second = divmod(seconds, 60)
    clock = f"{minutes // 60:02}:{minutes % 60:02}:{second:02}.{nanoseconds // 10**6:03}"
    icount = str(snapshot.get("icount", ""))
    name, identity = printable(snapshot["name"]), printable(snapshot["id"])
    size = human_size(snapshot["vm-state-size"])
    left = f"{_padded(identity, 9)} {_padded(name, 16)}"
    return f"{left} {size:>8} {moment:>19} {clock:>12} {icount:>10}"


def _padded(text: str, width: int) -> str:
    """QEMU counts bytes, not characters."""
    return text + " " * (width - len(text.encode("utf-8", "surrogateescape")))


def human_size(count: int) -> str:
    """``1.29 MiB``: three digits, as QEMU has them; a unit is used from 1000 of the next on."""
    power = 0
    while power < 6 and count / 1024**power >= 1000:
        power += 1
    return f"{count / 1024**power:.3g} {' KMGTPE'[power].strip()}{'i' if power else ''}B"

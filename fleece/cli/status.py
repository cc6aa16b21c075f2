# SPDX-License-Identifier: Apache-2.0
"""``fleece status``: the daemon, its disks and its snapshots."""

import argparse
import time
from typing import Any

from fleece.cli import output
from fleece.cli.arguments import add_client_options, connect
from fleece.cli.snapshot_text import snapshot_table
from fleece.units import format_size

_HEADERS = ("DISK", "FORMAT", "SIZE", "CLIENTS", "TRACKING", "IMAGE")


def configure(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "status",
        help="what the daemon serves",
        description="Show the daemon, its disks and its snapshots.",
        example="fleece status\nfleece status --json",
    )
    add_client_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the status."""
    with connect(args) as client:
        status = client.execute("x-fleece-status")
    if args.json:
        output.print_json(status)
    else:
        print("\n\n".join(_sections(status)))
    return 0


def _sections(status: dict[str, Any]) -> list[str]:
    sections = [_daemon(status), _disks(status["disks"])]
    if status["snapshots"]:
        sections.append(snapshot_table(status["snapshots"]))
    return sections


def _daemon(status: dict[str, Any]) -> str:
    try:
        up = f", up {output.duration(time.time() - output.seconds_of(status['started']))}"
    except ValueError:
        up = ""
    lines = [
        f"fleece {status['version']}, process {status['pid']}{up}",
        f"control    {status['control']}",
        f"state      {status['state']}",
        *(f"listening  {uri}" for uri in status["listeners"]),
    ]
    return "\n".join(map(output.printable, lines))


def _disks(disks: list[dict[str, Any]]) -> str:
    rows = [
        (
            disk["name"],
            disk["format"] + (", read-only" if disk["read-only"] else ""),
            format_size(disk["size"]),
            str(disk["clients"]),
            _tracking(disk["tracking"]),
            disk["image"],
        )
        for disk in disks
    ]
    return output.table(_HEADERS, rows, right=("SIZE", "CLIENTS")) if rows else "no disks"


def _tracking(tracking: dict[str, Any] | None) -> str:
    if tracking is None:
        return "off"
    return f"{format_size(tracking['granularity'])}, epoch {tracking['epoch']}"

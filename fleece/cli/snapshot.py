# SPDX-License-Identifier: Apache-2.0
"""``fleece snapshot``: create, list, ack, extend and drop snapshots."""

import argparse
from collections.abc import Callable
from typing import Any

from fleece.cli import output
from fleece.cli.arguments import add_client_options, add_group, connect, value
from fleece.cli.snapshot_text import created_text, snapshot_table
from fleece.control.client import ControlClient
from fleece.errors import FleeceError
from fleece.units import format_size, parse_duration, parse_size


def configure(subparsers: Any) -> None:
    """Add the command's parsers."""
    commands = add_group(
        subparsers,
        "snapshot",
        help="freeze an instant of disks",
        description="Snapshots: the read-only view of one instant of one or more disks.",
        example="fleece snapshot create vm1 --consumer nightly\nfleece snapshot drop s1",
    )
    _configure_create(commands)
    _configure_list(commands)
    _configure_ack(commands)
    _configure_extend(commands)
    _configure_drop(commands)


def _configure_create(commands: Any) -> None:
    parser = commands.add_parser(
        "create",
        help="take an instant of disks and export it",
        description="Take the same instant of all DISKs and export it read-only. With a consumer "
        "who came before, the export also tells what changed since.",
        example="fleece snapshot create vm1 vm2 --consumer nightly --lease 2h",
    )
    parser.add_argument("disks", nargs="+", metavar="DISK", help="a disk that the daemon serves")
    parser.add_argument("--name", help="the snapshot's name (default: the daemon chooses one)")
    parser.add_argument("--consumer", metavar="C", help="whose backup it is: any word you choose")
    parser.add_argument(
        "--lease",
        type=value(parse_duration),
        metavar="TIME",
        help="drop it by itself after TIME, such as 1h, unless it is extended (default: as "
        "configured, else never)",
    )
    parser.add_argument(
        "--cluster-size",
        type=value(parse_size),
        metavar="SIZE",
        help="the unit in which old data is saved, 4k to 2M (default: as configured, else 64k)",
    )
    parser.add_argument(
        "--on-cbw-error",
        choices=("break-snapshot", "break-guest-write"),
        help="what fails when old data cannot be saved: the snapshot or the guest's write "
        "(default: as configured, else break-snapshot)",
    )
    add_client_options(parser)
    parser.set_defaults(run=run_create)


def _configure_list(commands: Any) -> None:
    parser = commands.add_parser(
        "list", help="list snapshots", description="List snapshots.", example="fleece snapshot list"
    )
    add_client_options(parser)
    parser.set_defaults(run=run_list)


def _configure_ack(commands: Any) -> None:
    parser = commands.add_parser(
        "ack",
        help="say that a consumer has all of a snapshot",
        description="Say that the consumer has all of the snapshot and keeps it: what it is told "
        "to read next time counts from here. Without an ack nothing is lost: it reads more.",
        example="fleece snapshot ack s1",
    )
    parser.add_argument("name", metavar="NAME", help="the snapshot's name")
    parser.add_argument(
        "--consumer", metavar="C", help="who has it (default: for whom it was created)"
    )
    add_client_options(parser)
    parser.set_defaults(run=run_ack)


def _configure_extend(commands: Any) -> None:
    parser = commands.add_parser(
        "extend",
        help="let a snapshot live longer",
        description="Let the snapshot live for TIME from now on.",
        example="fleece snapshot extend s1 --lease 1h",
    )
    parser.add_argument("name", metavar="NAME", help="the snapshot's name")
    parser.add_argument(
        "--lease",
        type=value(parse_duration),
        required=True,
        metavar="TIME",
        help="from now on; such as 1h",
    )
    add_client_options(parser)
    parser.set_defaults(run=run_extend)


def _configure_drop(commands: Any) -> None:
    parser = commands.add_parser(
        "drop",
        help="end snapshots",
        description="End snapshots: their exports go, their overlays are deleted.",
        example="fleece snapshot drop s1 s2",
    )
    parser.add_argument("names", nargs="+", metavar="NAME", help="the snapshot's name")
    add_client_options(parser)
    parser.set_defaults(run=run_drop)


def run_create(args: argparse.Namespace) -> int:
    """Create a snapshot and say what to do with it."""
    with connect(args) as client:
        snapshot = client.execute(
            "x-fleece-snapshot-create",
            disks=args.disks,
            name=args.name,
            consumer=args.consumer,
            lease=args.lease,
            cluster_size=args.cluster_size,
            on_cbw_error=args.on_cbw_error,
        )
    _print(args, snapshot, lambda made: created_text(made, args.control))
    return 0


def run_list(args: argparse.Namespace) -> int:
    """Print all snapshots."""
    with connect(args) as client:
        snapshots = client.execute("x-fleece-snapshot-list")
    _print(args, snapshots, snapshot_table)
    return 0


def run_ack(args: argparse.Namespace) -> int:
    """Acknowledge a snapshot."""
    with connect(args) as client:
        result = client.execute("x-fleece-snapshot-ack", name=args.name, consumer=args.consumer)
    _print(args, result, _acknowledged)
    return 0


def run_extend(args: argparse.Namespace) -> int:
    """Extend a snapshot's lease."""
    with connect(args) as client:
        snapshot = client.execute("x-fleece-snapshot-extend", name=args.name, lease=args.lease)
    _print(args, snapshot, _extended)
    return 0


def run_drop(args: argparse.Namespace) -> int:
    """Drop each snapshot that is named, also when one of them cannot be; the first error counts."""
    dropped: list[dict[str, Any]] = []
    with connect(args) as client:
        errors = [error for name in args.names if (error := _drop(client, name, dropped))]
    if not args.json:
        for result in dropped:
            print(_dropped(result))
    for error in errors:
        output.report_error(error, error.code, args.json and error is errors[0], dropped=dropped)
    if args.json and not errors:
        output.print_json(dropped)
    return errors[0].exit_status if errors else 0


def _drop(client: ControlClient, name: str, dropped: list[dict[str, Any]]) -> FleeceError | None:
    try:
        dropped.append(client.execute("x-fleece-snapshot-drop", name=name))
    except FleeceError as error:
        return error
    return None


def _print(args: argparse.Namespace, result: Any, text: Callable[[Any], str]) -> None:
    if args.json:
        output.print_json(result)
    else:
        print(text(result))


def _acknowledged(result: dict[str, Any]) -> str:
    disks = ", ".join(f"{disk['disk']} up to epoch {disk['epoch']}" for disk in result["disks"])
    return output.printable(
        f"consumer {result['consumer']!r} has snapshot {result['name']}: {disks}"
    )


def _extended(snapshot: dict[str, Any]) -> str:
    expires = output.relative(snapshot["lease-expires"])
    return output.printable(f"snapshot {snapshot['name']} is dropped {expires} unless extended")


def _dropped(result: dict[str, Any]) -> str:
    freed = format_size(result["freed-bytes"])
    return output.printable(f"dropped snapshot {result['name']}, {freed} freed")

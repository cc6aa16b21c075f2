# SPDX-License-Identifier: Apache-2.0
"""``fleece cursor``: how far each consumer has come."""

import argparse
from typing import Any

from fleece.cli import output
from fleece.cli.arguments import add_client_options, add_group, connect

_HEADERS = ("DISK", "CONSUMER", "EPOCH", "GENERATION")


def configure(subparsers: Any) -> None:
    """Add the command's parsers."""
    commands = add_group(
        subparsers,
        "cursor",
        help="how far each consumer has come",
        description="Cursors: the last snapshot that each consumer acknowledged, per disk.",
        example="fleece cursor list\nfleece cursor remove nightly",
    )
    listing = commands.add_parser(
        "list", help="list cursors", description="List cursors.", example="fleece cursor list"
    )
    add_client_options(listing)
    listing.set_defaults(run=run_list)
    remove = commands.add_parser(
        "remove",
        help="forget a consumer",
        description="Forget a consumer: its next snapshot is to be read in full.",
        example="fleece cursor remove nightly --disk vm1",
    )
    remove.add_argument("consumer", metavar="CONSUMER", help="whose cursors to remove")
    remove.add_argument("--disk", help="only for this disk (default: for all)")
    add_client_options(remove)
    remove.set_defaults(run=run_remove)


def run_list(args: argparse.Namespace) -> int:
    """Print all cursors."""
    with connect(args) as client:
        cursors = client.execute("x-fleece-cursor-list")
    _print(args, cursors, _table(cursors) if cursors else "no cursors")
    return 0


def run_remove(args: argparse.Namespace) -> int:
    """Remove the cursors of a consumer and say which they were."""
    with connect(args) as client:
        removed = client.execute("x-fleece-cursor-remove", consumer=args.consumer, disk=args.disk)
    disks = ", ".join(cursor["disk"] for cursor in removed)
    text = f"forgot consumer {args.consumer!r} of {disks}: its next snapshot is a full one"
    _print(args, removed, output.printable(text))
    return 0


def _print(args: argparse.Namespace, result: Any, text: str) -> None:
    if args.json:
        output.print_json(result)
    else:
        print(text)


def _table(cursors: list[dict[str, Any]]) -> str:
    rows = [(c["disk"], c["consumer"], str(c["epoch"]), c["generation"]) for c in cursors]
    return output.table(_HEADERS, rows, right=("EPOCH",))

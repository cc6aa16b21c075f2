# SPDX-License-Identifier: Apache-2.0
"""``map``: which parts of an export hold data, or are dirty."""

import argparse
from collections.abc import Iterator
from typing import Final

from nbdwire import constants as c
from nbdwire.client import Client, connect
from nbdwire.errors import NegotiationError
from nbdwire.extents import Extent
from nbdwire.tools.options import add_json, add_server, print_json

_EPILOG = "example: python -m nbdwire map --context qemu:dirty-bitmap:b0 nbd://localhost/disk"
_ALLOCATION: Final = ("data", "hole", "zero", "hole,zero")


def add(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The verb and its options."""
    parser = verbs.add_parser("map", help="which parts hold data", epilog=_EPILOG)
    parser.description = "Print offset, length, status and its meaning for each extent."
    add_server(parser)
    add_json(parser)
    parser.add_argument(
        "--context", default=c.CONTEXT_BASE_ALLOCATION, help="which (default: %(default)s)"
    )
    parser.add_argument("--totals", action="store_true", help="print a sum for each status")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Ask, and print."""
    context: str = options.context
    with connect(options.uri, contexts=(context,), timeout=options.timeout) as client:
        if context not in client.contexts and context != c.CONTEXT_BASE_ALLOCATION:
            raise NegotiationError(f"the export has no metadata context {context!r}")
        found = extents(client, context)
        if options.totals:
            show_totals(found, context, client.size, options.json)
        elif options.json:
            print_json([as_object(extent, context) for extent in found])
        else:
            for x in found:
                print(f"{x.offset:>16} {x.length:>16} {x.status:>4}  {meaning(x.status, context)}")
    return 0


def extents(client: Client, context: str) -> Iterator[Extent]:
    """Every extent of the export, neighbours of one status joined."""
    last: Extent | None = None
    offset = 0
    while offset < client.size:
        for extent in client.extents(offset, client.size - offset, context):
            offset = extent.end
            if last is not None and last.status == extent.status:
                last = Extent(last.offset, last.length + extent.length, last.status)
                continue
            if last is not None:
                yield last
            last = extent
    if last is not None:
        yield last


def meaning(status: int, context: str) -> str:
    """The status in words, where we know the context."""
    if context == c.CONTEXT_BASE_ALLOCATION and status < len(_ALLOCATION):
        return _ALLOCATION[status]
    if context.startswith(c.CONTEXT_DIRTY_BITMAP_PREFIX) and status < 2:
        return "dirty" if status else "clean"
    return ""


def as_object(extent: Extent, context: str) -> dict[str, int | str]:
    """For JSON; keys as nbdinfo has them."""
    return {
        "offset": extent.offset,
        "length": extent.length,
        "type": extent.status,
        "description": meaning(extent.status, context),
    }


def show_totals(found: Iterator[Extent], context: str, size: int, as_json: bool) -> None:
    """Bytes and share of each status."""
    sums: dict[int, int] = {}
    for extent in found:
        sums[extent.status] = sums.get(extent.status, 0) + extent.length
    rows = [
        {
            "size": total,
            "percent": round(100 * total / size, 3),
            "type": status,
            "description": meaning(status, context),
        }
        for status, total in sorted(sums.items())
    ]
    if as_json:
        print_json(rows)
        return
    for row in rows:
        print(f"{row['size']:>16} {row['percent']:>7.3f}% {row['type']:>4}  {row['description']}")

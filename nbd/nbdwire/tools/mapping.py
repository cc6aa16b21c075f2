# SPDX-License-Identifier: Apache-2.0
"""``map``: which parts of an export hold data, or are dirty."""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, Final

from nbdwire import constants as c
from nbdwire.client import Client, connect, list_contexts
from nbdwire.errors import NBDError, NegotiationError
from nbdwire.extents import Extent
from nbdwire.tools.options import add_json, add_server, print_json

_EPILOG: Final = """\
Several contexts are asked for in one pass. A namespace with its colon (qemu:) stands for all that
the server has in it, and "all" for every context.

example: python -m nbdwire map --context qemu:dirty-bitmap:b0 nbd://localhost/disk
another: python -m nbdwire map --context all --json nbd://localhost/disk
"""
_DEPTH: Final = "qemu:allocation-depth"
_ALLOCATION: Final = ("data", "hole", "zero", "hole,zero")


def add(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The verb and its options."""
    parser = verbs.add_parser("map", help="which parts hold data", epilog=_EPILOG,
                             formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.description = "Print offset, length, status and its meaning for each extent."
    add_server(parser)
    add_json(parser)
    parser.add_argument(
        "--context",
        action="append",
        metavar="NAME",
        help="which; may be repeated (default: base:allocation)",
    )
    parser.add_argument("--totals", action="store_true", help="print a sum for each status")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Ask, and print."""
    names = chosen(options)
    with connect(options.uri, contexts=names, timeout=options.timeout) as client:
        missing = [x for x in names if x not in (*client.contexts, c.CONTEXT_BASE_ALLOCATION)]
        if missing:
            raise NegotiationError(
                f"the export has no metadata context {missing[0]!r}; {_what_there_is(options)}"
            )
        if options.json and len(names) > 1:
            maps = extents_of_all(client, names)
            print_json({name: as_json(found, name, options) for name, found in maps.items()})
            return 0
        if len(names) == 1:
            show(extents(client, names[0]), names[0], options)
            return 0
        for name, found in extents_of_all(client, names).items():
            print(f"{name}:")
            show(found, name, options)
    return 0


def chosen(options: argparse.Namespace) -> list[str]:
    """The names of the contexts, each once; patterns are asked of the server."""
    found: dict[str, None] = {}
    for text in options.context or [c.CONTEXT_BASE_ALLOCATION]:
        if text != "all" and not text.endswith(":"):
            found[text] = None
            continue
        queries = () if text == "all" else (text,)
        matches = list_contexts(options.uri, queries, timeout=options.timeout)
        if not matches:
            there = _what_there_is(options)
            raise NegotiationError(f"the export has no metadata context in {text!r}; {there}")
        found.update(dict.fromkeys(matches))
    return list(found)


def _what_there_is(options: argparse.Namespace) -> str:
    names: list[str] = []
    with suppress(OSError, NBDError):
        names = list_contexts(options.uri, timeout=options.timeout)
    return f"it has: {' '.join(map(repr, names)) or 'none'}"


def show(found: Iterator[Extent] | list[Extent], context: str, options: argparse.Namespace) -> None:
    """The map of one context."""
    if options.json:
        print_json(as_json(found, context, options))
    elif options.totals:
        for x in sums(found, context):
            print(f"{x['size']:>16} {x['percent']:>7.3f}% {x['type']:>4}  {x['description']}")
    else:
        for y in found:
            print(f"{y.offset:>16} {y.length:>16} {y.status:>4}  {meaning(y.status, context)}")


def as_json(
    found: Iterator[Extent] | list[Extent], context: str, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Extents, or a sum for each status; keys as nbdinfo has them."""
    if options.totals:
        return sums(found, context)
    return [as_object(extent, context) for extent in found]


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


def extents_of_all(client: Client, contexts: Sequence[str]) -> dict[str, list[Extent]]:
    """As `extents`, of several contexts in one pass: what one answer tells of all of them."""
    asked = [x for x in contexts if x in client.contexts]
    maps: dict[str, list[Extent]] = {name: [] for name in contexts}
    offset = 0
    while offset < client.size:
        answer = client.status(offset, client.size - offset, asked)
        for name in set(contexts) - set(asked):
            answer[name] = [Extent(offset, client.size - offset, 0)]
        end = min(found[-1].end for found in answer.values())
        for name, found in answer.items():
            _join(maps[name], found, end)
        offset = end
    return maps


def _join(known: list[Extent], more: list[Extent], end: int) -> None:
    for extent in more:
        if extent.offset >= end:
            return
        new = Extent(extent.offset, min(extent.end, end) - extent.offset, extent.status)
        if known and known[-1].status == new.status:
            new = Extent(known[-1].offset, known[-1].length + new.length, new.status)
            known.pop()
        known.append(new)


def meaning(status: int, context: str) -> str:
    """The status in words, where we know the context."""
    if context == c.CONTEXT_BASE_ALLOCATION and status < len(_ALLOCATION):
        return _ALLOCATION[status]
    if context.startswith(c.CONTEXT_DIRTY_BITMAP_PREFIX) and status < 2:
        return "dirty" if status else "clean"
    if context == _DEPTH:
        return ("absent", "local")[status] if status < 2 else f"backing depth {status}"
    return ""


def as_object(extent: Extent, context: str) -> dict[str, int | str]:
    """For JSON; keys as nbdinfo has them."""
    return {
        "offset": extent.offset,
        "length": extent.length,
        "type": extent.status,
        "description": meaning(extent.status, context),
    }


def sums(found: Iterator[Extent] | list[Extent], context: str) -> list[dict[str, Any]]:
    """Bytes and share of each status."""
    lengths: dict[int, int] = {}
    for extent in found:
        lengths[extent.status] = lengths.get(extent.status, 0) + extent.length
    whole = sum(lengths.values())
    return [
        {
            "size": length,
            "percent": round(100 * length / whole, 3),
            "type": status,
            "description": meaning(status, context),
        }
        for status, length in sorted(lengths.items())
    ]

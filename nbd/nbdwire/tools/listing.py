# SPDX-License-Identifier: Apache-2.0
"""``list``: the exports of a server."""

import argparse
from typing import Any

from nbdwire.client import connect, describe, list_exports
from nbdwire.errors import NBDError
from nbdwire.tools.info import facts_of, print_export
from nbdwire.tools.options import add_json, add_server, print_json

_EPILOG = "example: python -m nbdwire list --long nbd://localhost"


def add(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The verb and its options."""
    parser = verbs.add_parser("list", help="the exports of a server", epilog=_EPILOG)
    parser.description = "Print the names of a server's exports, a line each."
    add_server(parser)
    add_json(parser)
    parser.add_argument("-l", "--long", action="store_true", help="and all that it tells of each")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Ask, and print."""
    found = list_exports(options.uri, timeout=options.timeout)
    if not (options.long or options.json):
        for name, description in found:
            print(f"{shown(name)}\t{shown(description)}" if description else shown(name))
        return 0
    exports = [facts(options, name, description) for name, description in found]
    if options.json:
        print_json({"exports": exports})
        return 0
    for export in exports:
        if "refused" in export:
            print(f"export={export['export-name']!r}:\n    refused: {export['refused']}")
        else:
            print_export(export)
    return 0


def facts(options: argparse.Namespace, name: str, description: str) -> dict[str, Any]:
    """What the server tells about the export, or why it does not."""
    where = options.uri.with_export(name)
    try:
        session, contexts = describe(where, timeout=options.timeout)
        if not session.size:  # nbd-server tells that of every export until it is opened
            with connect(where, contexts=(), timeout=options.timeout) as client:
                session = client.session
    except NBDError as problem:
        return {"export-name": name, "description": description, "refused": str(problem)}
    return facts_of(where, session, contexts)


def shown(text: str) -> str:
    """A server's text, harmless for a terminal."""
    return "".join(x if x.isprintable() else "\N{REPLACEMENT CHARACTER}" for x in text)

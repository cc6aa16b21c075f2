# SPDX-License-Identifier: Apache-2.0
"""``info``: what a server tells about an export."""

import argparse
from typing import Any, Final

from nbdwire import constants as c
from nbdwire.client import connect, describe
from nbdwire.errors import NBDError
from nbdwire.negotiate_client import ClientSession
from nbdwire.tools.options import add_json, add_server, human, print_json
from nbdwire.uri import NBDURI

_EPILOG: Final = """\
--can and --is answer with the exit status: 0, it can; 3, it cannot (1 and 2: errors, as ever).

example: python -m nbdwire info 'nbd+unix:///disk?socket=/tmp/nbd.sock'
another: python -m nbdwire info --can trim nbd://localhost/disk && echo yes
"""
NO: Final = 3
"""The exit status for "no"."""

_FLAGS: Final = {
    "is_read_only": c.TFLAG_READ_ONLY,
    "is_rotational": c.TFLAG_ROTATIONAL,
    "can_flush": c.TFLAG_SEND_FLUSH,
    "can_fua": c.TFLAG_SEND_FUA,
    "can_trim": c.TFLAG_SEND_TRIM,
    "can_zero": c.TFLAG_SEND_WRITE_ZEROES,
    "can_fast_zero": c.TFLAG_SEND_FAST_ZERO,
    "can_cache": c.TFLAG_SEND_CACHE,
    "can_df": c.TFLAG_SEND_DF,
    "can_multi_conn": c.TFLAG_CAN_MULTI_CONN,
    "can_block_status_payload": c.TFLAG_BLOCK_STATUS_PAYLOAD,
}


_CAN: Final = (
    *sorted(name[4:].replace("_", "-") for name in _FLAGS if name.startswith("can_")),
    "connect",
    "extended",
    "read",
    "structured",
    "write",
)
_IS: Final = ("read-only", "rotational", "tls")


def add(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The verb and its options."""
    parser = verbs.add_parser(
        "info",
        help="what a server tells about an export",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.description = "Print the size of an export, what it can do, and its metadata contexts."
    add_server(parser)
    add_json(parser)
    ask = parser.add_mutually_exclusive_group()
    ask.add_argument("--size", action="store_true", help="print the size in bytes and no more")
    ask.add_argument("--can", choices=_CAN, metavar="WHAT", help=" ".join(_CAN))
    ask.add_argument("--is", dest="is_", choices=_IS, metavar="WHAT", help=" ".join(_IS))
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Connect, and print."""
    with connect(options.uri, contexts=(), timeout=options.timeout) as client:
        session = client.session
    if options.size:
        if options.json:
            print_json({"export-size": session.size, "export-size-str": human(session.size)})
        else:
            print(session.size)
        return 0
    asked = options.can or options.is_
    if asked:
        answer = answers(session)[asked]
        if options.json:
            print_json({asked: answer})
        return 0 if answer else NO
    facts = collect(options.uri, session, options.timeout)
    if options.json:
        print_json(facts)
    else:
        print_facts(facts)
    return 0


def answers(session: ClientSession) -> dict[str, bool]:
    """To --can and --is."""
    read_only = bool(session.flags & c.TFLAG_READ_ONLY)
    return {
        **{name.partition("_")[2].replace("_", "-"): bool(session.flags & flag)
           for name, flag in _FLAGS.items()},
        "connect": True,
        "extended": session.extended,
        "read": True,
        "structured": session.structured,
        "write": not read_only,
        "tls": session.tls,
    }  # fmt: skip


def collect(uri: NBDURI, session: ClientSession, timeout: float) -> dict[str, Any]:
    """Everything about the export that ``session`` was opened with. Keys as nbdinfo has them."""
    return {
        "protocol": "newstyle-fixed",
        "TLS": session.tls,
        "structured": session.structured,
        "extended": session.extended,
        "exports": [facts_of(uri, session, contexts_of(uri, timeout))],
    }


def contexts_of(uri: NBDURI, timeout: float) -> tuple[str, ...]:
    """The metadata contexts of the export; none if the server cannot list them."""
    try:
        return describe(uri, timeout=timeout)[1]
    except NBDError:
        return ()


def facts_of(uri: NBDURI, session: ClientSession, contexts: tuple[str, ...]) -> dict[str, Any]:
    """One export."""
    return {
        "export-name": session.name,
        "description": session.description,
        "export-size": session.size,
        "export-size-str": human(session.size),
        "uri": str(uri.with_export(session.name)),
        "contexts": list(contexts),
        **{name: bool(session.flags & flag) for name, flag in _FLAGS.items()},
        "block_size_minimum": session.minimum_block,
        "block_size_preferred": session.preferred_block,
        "block_size_maximum": session.maximum_payload,
    }


def print_facts(facts: dict[str, Any]) -> None:
    """For people."""
    style = "extended" if facts["extended"] else "structured" if facts["structured"] else "simple"
    tls = "with" if facts["TLS"] else "without"
    print(f"protocol: {facts['protocol']} {tls} TLS, {style} replies")
    for export in facts["exports"]:
        print_export(export)


def print_export(export: dict[str, Any]) -> None:
    """The facts of one export, a line each."""
    print(f"export={export['export-name']!r}:")
    for name, value in export.items():
        if name == "export-size":
            value = f"{value} ({export['export-size-str']})"
        if name == "contexts":
            value = " ".join(value) or "none"
        if name not in ("export-name", "export-size-str") and value != "":
            print(f"    {name}: {str(value).lower() if isinstance(value, bool) else value}")

# SPDX-License-Identifier: Apache-2.0
"""The ``fleece`` command: finds the subcommand, and turns its errors into one line and a status.

Modules of commands import what is heavy in ``run``: ``fleece status`` must not pay for qcow2.
"""

import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Final

from fleece import __version__
from fleece.cli import cursor, export, image, serve, snapshot, status
from fleece.cli.arguments import Parser
from fleece.cli.output import report_error
from fleece.errors import FleeceError

COMMANDS: Final[tuple[ModuleType, ...]] = (serve, export, image, snapshot, status, cursor)

INTERRUPTED: Final = 130
"""Exit status after Ctrl-C: 128 and the number of SIGINT, as shells have it."""
BROKEN_PIPE: Final = 141
"""Exit status when the reader of our output went away: 128 and the number of SIGPIPE."""


def build_parser() -> Parser:
    """The parser with all commands."""
    parser = Parser(
        prog="fleece",
        description="Serve disks over NBD, freeze an instant of them, tell what changed since.",
        example="fleece serve --disk vm1=/images/vm1.img\n"
        "fleece snapshot create vm1 --consumer nightly",
    )
    parser.add_argument("--version", action="version", version=f"fleece {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in COMMANDS:
        module.configure(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's own) and return the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        status = _run(words)
        sys.stdout.flush()
    except BrokenPipeError:
        return _broken_pipe()
    except KeyboardInterrupt:
        return INTERRUPTED
    return status


def _run(words: list[str]) -> int:
    as_json = "--json" in words[: words.index("--")] if "--" in words else "--json" in words
    try:
        return _dispatch(words)
    except (BrokenPipeError, KeyboardInterrupt):
        raise
    except FleeceError as error:
        _show_traceback()
        report_error(error, error.code, as_json)
        return error.exit_status
    except Exception as error:
        return _unexpected(error, as_json)


def _dispatch(words: list[str]) -> int:
    words, command = _split_command(words)
    try:
        args = build_parser().parse_args(words)
    except SystemExit as end:  # --help and --version
        return int(end.code or 0)
    args.command = command
    return int(args.run(args))


def _split_command(words: list[str]) -> tuple[list[str], tuple[str, ...] | None]:
    # argparse would take options of COMMAND for ours; nothing after "--" is its business.
    if words[:1] != ["export"] or "--" not in words:
        return words, None
    end = words.index("--")
    return words[:end], tuple(words[end + 1 :])


def _unexpected(error: Exception, as_json: bool) -> int:
    _show_traceback()
    if isinstance(error, OSError):
        known: Exception = error
    else:
        hint = "" if _debugging() else "; FLEECE_DEBUG=1 shows where"
        known = FleeceError(f"internal error: {type(error).__name__}: {error}{hint}")
    report_error(known, FleeceError.code, as_json)
    return FleeceError.exit_status


def _debugging() -> bool:
    return os.environ.get("FLEECE_DEBUG", "") not in ("", "0")


def _show_traceback() -> None:
    if _debugging():
        import traceback

        traceback.print_exc()


def _broken_pipe() -> int:
    # Python flushes standard output once more at its end; let that go nowhere.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
    return BROKEN_PIPE

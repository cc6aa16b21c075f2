# SPDX-License-Identifier: Apache-2.0
"""What the commands' parsers have in common."""

import argparse
import textwrap
from collections.abc import Callable
from typing import Any, Final, NoReturn, TypeVar

from fleece.control.client import ControlClient
from fleece.control.paths import control_socket
from fleece.errors import UsageError

T = TypeVar("T")

_WIDTH: Final = 78


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as everything else of ours does.

    ``example`` is printed at the end of ``--help``. Options cannot be abbreviated: a script that
    relies on an abbreviation breaks when we add an option.
    """

    def __init__(self, *args: Any, example: str = "", **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        kwargs["allow_abbrev"] = False
        kwargs["description"] = textwrap.fill(kwargs.get("description") or "", _WIDTH)
        if example:
            lines = "\n".join(f"  {line}" for line in example.splitlines())
            kwargs["epilog"] = f"example:\n{lines}"
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Raise UsageError instead of ending the process."""
        raise UsageError(f"{message}; see {self.prog} --help")


def add_json(parser: argparse.ArgumentParser) -> None:
    """``--json``."""
    parser.add_argument(
        "--json", action="store_true", help="print JSON, and nothing else, on standard output"
    )


def add_client_options(parser: argparse.ArgumentParser) -> None:
    """``--control`` and ``--json``, for commands that ask a daemon."""
    default = control_socket().replace("%", "%%")
    parser.add_argument(
        "--control", metavar="PATH", help=f"the daemon's control socket (default: {default})"
    )
    add_json(parser)


def add_group(subparsers: Any, name: str, **kwargs: Any) -> Any:
    """A command that only has subcommands; returns where to add them."""
    parser = subparsers.add_parser(name, **kwargs)
    return parser.add_subparsers(title="commands", metavar="COMMAND", required=True)


def connect(args: argparse.Namespace) -> ControlClient:
    """A connection to the daemon that ``args`` mean. DaemonError when there is none."""
    return ControlClient(args.control or control_socket())


def value(parse: Callable[[str], T]) -> Callable[[str], T]:
    """``parse`` as argparse's ``type=``: the text of its ValueError reaches the user."""

    def convert(text: str) -> T:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def checked(option: str, parse: Callable[[str], T], text: str) -> T:
    """``parse(text)`` for an option whose parser is too heavy for ``type=``; else UsageError."""
    try:
        return parse(text)
    except ValueError as error:
        raise UsageError(f"{option}: {error}") from None

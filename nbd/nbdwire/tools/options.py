# SPDX-License-Identifier: Apache-2.0
"""What the command lines of the tools have in common."""

import argparse
import json
import re
import sys
from typing import Any, Final, NoReturn

from nbdwire.errors import URIError
from nbdwire.opening import CONNECT_TIMEOUT
from nbdwire.uri import NBDURI, parse

_MOST: Final = (1 << 63) - 1
_UNITS: Final = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60}
_SIZE: Final = re.compile(r"([0-9]{1,19})([kmgtpe]?)", re.IGNORECASE)


def size(text: str) -> int:
    """Bytes, as ``65536`` or ``64k``; units are powers of 1024."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 65536, 64k, 1G ...")
    number = int(match[1]) << _UNITS[match[2].lower()]
    if number > _MOST:
        raise argparse.ArgumentTypeError(f"{text!r} is too large; less than 8E can be")
    return number


def positive(text: str) -> int:
    """A number from 1."""
    if not (text.isascii() and text.isdigit() and 0 < int(text) <= 1 << 20):
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 to 1048576")
    return int(text)


def seconds(text: str) -> float:
    """A time above 0, of a million seconds at most."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number <= 1_000_000:  # NaN is not
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0")
    return number


def uri(text: str) -> NBDURI:
    """An NBD URI."""
    try:
        return parse(text)
    except URIError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


class Parser(argparse.ArgumentParser):
    """Tells a wrong command line in one line, and where to read on."""

    def error(self, message: str) -> NoReturn:
        """Exit status 2."""
        name = " ".join(self.prog.split()[2:])  # without "python -m"
        self.exit(2, f"{name}: {' '.join(message.split())}; {self.prog} --help tells more\n")


def add_json(parser: argparse.ArgumentParser) -> None:
    """``--json``."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def add_server(parser: argparse.ArgumentParser) -> None:
    """The URI of a server, and how long to wait for it."""
    parser.add_argument("uri", type=uri, metavar="URI", help="nbd://HOST/EXPORT and the like")
    add_timeout(parser)


def add_timeout(parser: argparse.ArgumentParser) -> None:
    """``--timeout``."""
    parser.add_argument(
        "--timeout",
        type=seconds,
        default=CONNECT_TIMEOUT,
        metavar="SECONDS",
        help="for connecting and the handshake (default: %(default)g)",
    )


def print_json(value: Any) -> None:
    """To stdout, for people too."""
    json.dump(value, sys.stdout, indent=2, ensure_ascii=False)
    print()


def human(number: int) -> str:
    """``65536`` as 64K: exact, or with one decimal."""
    for shift, unit in ((60, "E"), (50, "P"), (40, "T"), (30, "G"), (20, "M"), (10, "K")):
        if number >> shift:
            text = f"{number / (1 << shift):.1f}"
            return text.removesuffix(".0") + unit
    return str(number)

# SPDX-License-Identifier: Apache-2.0
"""``python -m nbdwire``: which tool is wanted, and what becomes of its errors."""

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from typing import Final

from nbdwire.errors import NBDError, NegotiationError, UnknownExport
from nbdwire.tools import copy, info, listing, mapping, serving
from nbdwire.tools.options import Parser

_TOOLS = (info, listing, mapping, copy, serving)
_EPILOG = """\
examples:
  python -m nbdwire info nbd://localhost/disk
  python -m nbdwire copy nbd://localhost/disk disk.img
  python -m nbdwire serve disk.img --socket /tmp/nbd.sock
"""


_HINTS: Final = {
    errno.EACCES: "it needs the right of another user, or chmod",
    errno.EADDRINUSE: "another server listens there: stop it, or choose another place",
    errno.EADDRNOTAVAIL: "choose an address of this host",
    errno.ECONNREFUSED: "nobody listens there: start the server, or check the place",
    errno.EHOSTUNREACH: "check the name of the host and the network",
    errno.EISDIR: "give the path of a file",
    errno.ENOENT: "check the path",
    errno.ENOSPC: "make room there, then try again",
    errno.ETIMEDOUT: "check the host, or give it more time with --timeout",
}
"""What to do next."""


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = Parser(
        prog="python -m nbdwire",
        description="Small tools for network block devices (NBD).",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = top.add_subparsers(dest="verb", metavar="VERB", required=True)
    for tool in _TOOLS:
        tool.add(verbs)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one tool. Returns its exit status (see `nbdwire.tools`)."""
    chosen = parser().parse_args(argv)
    try:
        status: int = chosen.run(chosen)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # no complaint at exit
        return 1
    except (NBDError, OSError) as problem:
        return _complain(chosen.verb, say(problem))
    except KeyboardInterrupt:
        incomplete = "; the target is incomplete" if chosen.verb == "copy" else ""
        _complain(chosen.verb, f"interrupted{incomplete}")
        return 130
    return status


def say(problem: BaseException) -> str:
    """An error in one line, without its number."""
    if not isinstance(problem, OSError) or problem.strerror is None:
        text = str(problem) or type(problem).__name__
        if isinstance(problem, UnknownExport):
            text += "; see: python -m nbdwire list URI"
        elif isinstance(problem, NegotiationError) and "STARTTLS" in text:
            text += "; an nbd:// URI asks for no TLS"
        return " ".join(text.split())
    text = f"{problem.filename}: {problem.strerror}" if problem.filename else problem.strerror
    hint = _HINTS.get(problem.errno or 0)
    if problem.errno == errno.ENOENT and "cannot connect" in text:
        hint = "no server has made that socket: check the path, or start the server"
    return " ".join((f"{text}; {hint}" if hint else text).split())


def _complain(verb: str, text: str) -> int:
    print(f"nbdwire {verb}: {text}", file=sys.stderr)
    return 1

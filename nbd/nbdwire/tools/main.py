# SPDX-License-Identifier: Apache-2.0
"""``python -m nbdwire``: which tool is wanted, and what becomes of its errors."""

import argparse
import errno
import os
import sys
from collections.abc import Sequence

from nbdwire.errors import NBDError
from nbdwire.tools import copy, info, listing, mapping, serving

_TOOLS = (info, listing, mapping, copy, serving)
_EPILOG = """\
examples:
  python -m nbdwire info nbd://localhost/disk
  python -m nbdwire copy nbd://localhost/disk disk.img
  python -m nbdwire serve disk.img --socket /tmp/nbd.sock
"""


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(
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
        _complain(chosen.verb, "interrupted")
        return 130
    return status


def say(problem: BaseException) -> str:
    """An error in one line, without its number."""
    if not isinstance(problem, OSError) or problem.strerror is None:
        return " ".join(str(problem).split()) or type(problem).__name__
    text = f"{problem.filename}: {problem.strerror}" if problem.filename else problem.strerror
    if problem.errno == errno.EADDRINUSE:
        text += "; another server listens there"
    return " ".join(text.split())


def _complain(verb: str, text: str) -> int:
    print(f"nbdwire {verb}: {text}", file=sys.stderr)
    return 1

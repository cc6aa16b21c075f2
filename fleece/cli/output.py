# SPDX-License-Identifier: Apache-2.0
"""What people and scripts read: tables, sentences, JSON, and errors of one line."""

import json
import os
import sys
import time
from calendar import timegm
from collections.abc import Sequence
from typing import Any, Final

_UNITS: Final = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))


def print_json(value: Any) -> None:
    """The value on standard output, indented, for scripts and for people who look."""
    print(json.dumps(value, indent=2))


def printable(text: str) -> str:
    """``text`` on one line and without what could command a terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def bold(text: str) -> str:
    """``text``, emphasised where a person looks at a terminal that can show it."""
    if not sys.stdout.isatty() or "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb":
        return text
    return f"\033[1m{text}\033[0m"


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> str:
    """Aligned columns; those named in ``right`` are flush right. No trailing spaces."""
    cells = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(headers, *cells, strict=True)]

    def line(row: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if header in right else cell.ljust(width)
            for cell, width, header in zip(row, widths, headers, strict=True)
        )
        return "  ".join(padded).rstrip()

    return "\n".join([bold(line(headers)), *map(line, cells)])


def duration(seconds: float) -> str:
    """``2 h 5 min``: the two largest units of a duration, ``45 s``, ``0 s``."""
    left = max(0, round(seconds))
    parts: list[str] = []
    for unit, length in _UNITS:
        count, left = divmod(left, length)
        if count or (unit == "s" and not parts):
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2])


def relative(moment: str | None, now: float | None = None) -> str:
    """``3 min ago`` or ``in 59 min`` for an ISO 8601 moment in UTC; ``-`` for none."""
    if moment is None:
        return "-"
    try:
        distance = seconds_of(moment) - (time.time() if now is None else now)
    except ValueError:
        return moment
    if abs(distance) < 1:
        return "now"
    return f"in {duration(distance)}" if distance > 0 else f"{duration(-distance)} ago"


def seconds_of(moment: str) -> float:
    """Seconds since the epoch of ``2026-11-23T18:44:15.123456Z``. ValueError if it is not one."""
    whole, _, fraction = moment.removesuffix("Z").partition(".")
    seconds = timegm(time.strptime(whole, "%Y-%m-%dT%H:%M:%S"))
    return seconds + (float(f"0.{fraction}") if fraction else 0.0)


def report_error(error: BaseException, code: str, as_json: bool, **more: Any) -> None:
    """One line on standard error; with ``as_json`` also an object on standard output."""
    text = str(error) or type(error).__name__
    print(f"fleece: {printable(text)}", file=sys.stderr)
    if as_json:
        print_json({"error": code, "message": text, **more})

# SPDX-License-Identifier: Apache-2.0
"""What the demo prints: steps, ticks and a table. Plain text unless it is a terminal."""

import os
import time
from collections.abc import Sequence
from typing import TextIO

WIDTH = 78


class Screen:
    """Lines for a person who watches. Times are seconds since it was made."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._begin = time.monotonic()
        self._colour = out.isatty() and "NO_COLOR" not in os.environ
        self._tick, self._cross, self._rule = self._marks()

    def _marks(self) -> tuple[str, str, str]:
        try:
            "✓✗─".encode(self._out.encoding or "ascii")
        except UnicodeEncodeError:
            return "ok", "!!", "-"
        return "✓", "✗", "─"

    def _paint(self, code: int, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._colour else text

    def _line(self, text: str = "") -> None:
        print(text, file=self._out, flush=True)

    @property
    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._begin

    def title(self, text: str) -> None:
        """The first line."""
        self._line(self._paint(1, text))
        self._line(self._rule * WIDTH)

    def step(self, number: int, text: str) -> None:
        """A new step, and what it is to show."""
        gap = " " * max(1, WIDTH - len(text) - 11)
        self._line()
        self._line(self._paint(1, f"{number}  {text}") + gap + f"{self.elapsed:5.1f} s")

    def note(self, text: str) -> None:
        """Something that happens."""
        self._line(f"     {text}")

    def proof(self, text: str) -> None:
        """Something that was checked and holds."""
        self._line(f"   {self._paint(32, self._tick)} {text}")

    def table(self, rows: Sequence[Sequence[str]]) -> None:
        """Rows of equal length, the first one being the head; the last column may be long."""
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        self._line()
        for number, row in enumerate(rows):
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
            line = "   " + "   ".join(cells).rstrip()
            self._line(self._paint(1, line) if number == 0 else line)

    def end(self, text: str) -> None:
        """The last line of a good run."""
        self._line(self._rule * WIDTH)
        self._line(self._paint(32, f"{self._tick} {text}") + f" ({self.elapsed:.1f} s)")

    def failed(self, text: str, log: Sequence[str]) -> None:
        """The last lines of a bad run: what the daemon said, then what was wrong."""
        for line in log:
            self._line(f"     fleece serve said: {line}")
        self._line(self._paint(31, f"{self._cross} demo: {text}"))

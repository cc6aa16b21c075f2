# SPDX-License-Identifier: Apache-2.0
"""How far a copy has come, on stderr: one line that changes; a few lines if that is no terminal."""

import sys
import time
from typing import Final, TextIO

from nbdwire.tools.options import human

_EVERY: Final = 0.2  # seconds between two changes of the line


class Progress:
    """Call it with the bytes that are done; ``size`` None: nobody knows how many there are."""

    def __init__(self, size: int | None, out: TextIO | None = None) -> None:
        self._size = size
        self._out = sys.stderr if out is None else out
        self._changes = self._out.isatty()
        self._began = self._last = time.monotonic()
        self._told = 0  # per cent, in steps of ten

    def __call__(self, done: int) -> None:
        """From one thread at a time."""
        now = time.monotonic()
        if self._changes:
            if now - self._last >= _EVERY:
                self._last = now
                self._out.write(f"\r\x1b[K{self._line(done, now)}")
                self._out.flush()
            return
        reached = 100 * done // self._size // 10 * 10 if self._size else 0
        if reached > self._told:
            self._told = reached
            self._out.write(self._line(done, now) + "\n")

    def _line(self, done: int, now: float) -> str:
        rate = human(int(done / max(now - self._began, 1e-6)))
        share = f"{100 * done // self._size:3d} %  " if self._size else ""
        return f"{share}{human(done)}  {rate}B/s"

    def end(self) -> None:
        """Leave a clean line."""
        if self._changes:
            self._out.write("\r\x1b[K")
            self._out.flush()


def quiet(_: int) -> None:
    """No progress."""

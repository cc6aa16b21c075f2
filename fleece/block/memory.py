# SPDX-License-Identifier: Apache-2.0
"""`MemoryNode`: a sparse disk in memory, for tests, scratch data and measurements."""

import errno
import os
import threading
from collections.abc import Iterator
from typing import Final

from fleece.block.node import Node
from fleece.block.null import clear
from fleece.units import MiB
from nbdwire.constants import CMD_FLAG_NO_HOLE, STATE_HOLE, STATE_ZERO
from nbdwire.export import OPAQUE_RUN, ZERO_RUN, Run
from nbdwire.extents import Extent

PAGE: Final = 64 << 10
_MOST_PAGES: Final = (256 * MiB) // PAGE
"""How many pages one call of `MemoryNode.extents` looks at: the lock is held meanwhile."""


class MemoryNode(Node):
    """``size`` bytes; a page of 64 KiB takes memory from the first write into it on.

    Every verb is atomic with regard to the others. Nothing survives the process.
    """

    def __init__(self, size: int, name: str = "memory") -> None:
        super().__init__(name, size)
        self._pages: dict[int, bytearray] = {}
        self._lock = threading.Lock()

    def pread_into(self, buf: memoryview, offset: int) -> None:
        """Absent pages are zero."""
        with self._lock:
            for index, start, stop, at in _pieces(offset, len(buf)):
                page = self._pages.get(index)
                if page is None:
                    clear(buf[at : at + stop - start])
                else:
                    buf[at : at + stop - start] = memoryview(page)[start:stop]

    def pwrite(self, buf: memoryview, offset: int, fua: bool = False) -> None:
        """ENOMEM if a page cannot be had."""
        with self._lock:
            for index, start, stop, at in _pieces(offset, len(buf)):
                self._page(index)[start:stop] = buf[at : at + stop - start]

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        """Whole pages are given back, unless NO_HOLE."""
        with self._lock:
            if flags & CMD_FLAG_NO_HOLE:
                for index, start, stop, _ in _pieces(offset, length):
                    self._page(index)[start:stop] = bytes(stop - start)
            else:
                self._drop(offset, offset + length)

    def trim(self, offset: int, length: int, flags: int = 0) -> None:
        """As `zero`."""
        self.zero(offset, length)

    def extents(self, offset: int, length: int) -> list[Extent]:
        """Holes and data in whole pages, of the first 256 MiB of the range."""
        return [
            Extent(start, stop - start, 0 if data else STATE_HOLE | STATE_ZERO)
            for start, stop, data in self._stretches(offset, length)
        ]

    def map(self, offset: int, length: int) -> list[Run]:
        """Zero runs and opaque ones."""
        return [
            (OPAQUE_RUN if data else ZERO_RUN, 0, stop - start)
            for start, stop, data in self._stretches(offset, length)
        ]

    def close(self) -> None:
        """Give the memory back."""
        with self._lock:
            self._pages.clear()

    def _page(self, index: int) -> bytearray:
        page = self._pages.get(index)
        if page is None:
            try:
                page = self._pages[index] = bytearray(PAGE)
            except MemoryError:
                raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM), self.name) from None
        return page

    def _drop(self, begin: int, end: int) -> None:
        """Walks the pages that exist or those of the range, whichever are fewer."""
        first, last = begin // PAGE, (end - 1) // PAGE
        sparse = len(self._pages) < last - first
        for index in list(self._pages) if sparse else range(first, last + 1):
            if first <= index <= last and index in self._pages:
                start, stop = max(begin - index * PAGE, 0), min(end - index * PAGE, PAGE)
                if stop - start == PAGE:
                    del self._pages[index]
                else:
                    self._pages[index][start:stop] = bytes(stop - start)

    def _stretches(self, offset: int, length: int) -> list[tuple[int, int, bool]]:
        """``(start, stop, whether there are pages)``, alternating."""
        out: list[tuple[int, int, bool]] = []
        end = min(offset + length, (offset // PAGE + _MOST_PAGES) * PAGE)
        with self._lock:
            for index, start, stop, _ in _pieces(offset, end - offset):
                data, base = index in self._pages, index * PAGE
                if out and out[-1][2] == data:
                    out[-1] = (out[-1][0], base + stop, data)
                else:
                    out.append((base + start, base + stop, data))
        return out


def _pieces(offset: int, length: int) -> Iterator[tuple[int, int, int, int]]:
    """``(page, start in it, stop in it, distance from offset)`` for each page of a range."""
    position, end = offset, offset + length
    while position < end:
        index, start = divmod(position, PAGE)
        stop = min(PAGE, start + end - position)
        yield index, start, stop, position - offset
        position += stop - start

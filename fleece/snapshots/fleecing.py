# SPDX-License-Identifier: Apache-2.0
"""The read-only view of one instant of a live disk, without a lock.

`fleece.snapshots.cbw` explains why what it returns is exact. The rule in one line: *read the
source, then look at ``saved`` again*; it holds for data, for block status and for `map` alike.
"""

import errno
import os
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Final

from fleece.block.node import Node
from fleece.formats.qcow2.overlay import Overlay
from fleece.snapshots.cbw import CopyBeforeWrite, Level
from nbdwire.export import OPAQUE_RUN, ZERO_RUN, Run
from nbdwire.extents import Extent, clip

_END: Final = attrgetter("end")


class Fleecing(Node):
    """A snapshot: saved clusters from the overlays, all others from the live disk.

    Every read of a broken or dropped snapshot is EIO: it never returns what is not the instant.
    """

    def __init__(self, name: str, cbw: CopyBeforeWrite, level: Level) -> None:
        super().__init__(name, cbw.size, read_only=True)
        self.blocking = cbw.blocking
        self.level = level
        self._source = cbw.next
        self._bits = cbw.cluster_size.bit_length() - 1
        self._closed = False

    def pread_into(self, buf: memoryview, offset: int) -> None:
        """Fill ``buf`` with the bytes of the instant."""
        self._read(buf, offset, self._source_into)

    def pread_cached(self, buf: memoryview, offset: int) -> bool:
        """As `pread_into` if the source has it in memory; else False."""
        return self._read(buf, offset, self._source.pread_cached)

    def _source_into(self, buf: memoryview, offset: int) -> bool:
        self._source.pread_into(buf, offset)
        return True

    def _read(
        self, buf: memoryview, offset: int, read_source: Callable[[memoryview, int], bool]
    ) -> bool:
        self._check()
        for overlay, start, end in self._runs(offset, offset + len(buf)):
            part = buf[start - offset : end - offset]
            if overlay is not None:
                overlay.pread_into(part, start)
            elif not read_source(part, start):
                return False
            else:
                self._reread(part, start)
        self._check()
        return True

    def _reread(self, part: memoryview, offset: int) -> None:
        """``part`` came from the source: replace what has been saved since the source was read."""
        end = offset + len(part)
        if self._still_unsaved(offset, end):
            return
        for overlay, start, stop in self._runs(offset, end):
            if overlay is not None:
                overlay.pread_into(part[start - offset : stop - offset], start)

    def extents(self, offset: int, length: int) -> list[Extent]:
        """The allocation of the instant; never that of the live disk."""
        self._check()
        found: list[Extent] = []
        for overlay, start, end in self._runs(offset, offset + length):
            if overlay is not None:
                found += overlay.extents(start, end - start)
            else:
                found += self._source_extents(start, end)
            if found[-1].end < end:
                break
        self._check()
        return found

    def _source_extents(self, start: int, end: int) -> list[Extent]:
        """What the source says, but not of clusters that have been saved since it was asked."""
        said = self._source.extents(start, end - start)
        covered = said[-1].end
        if self._still_unsaved(start, covered):
            return said
        found: list[Extent] = []
        for overlay, first, stop in self._runs(start, covered):
            if overlay is not None:
                found += overlay.extents(first, stop - first)
            else:
                low = bisect_right(said, first, key=_END)
                high = bisect_left(said, stop, key=_END) + 1
                found += clip(said[low:high], first, stop - first)
        return found

    def map(self, offset: int, length: int) -> list[Run]:
        """Saved data lies in the overlay, and stays; of the source only its holes are told."""
        self._check()
        found: list[Run] = []
        for overlay, start, end in self._runs(offset, offset + length):
            runs = (overlay or self._source).map(start, end - start)
            covered = start + sum(run[2] for run in runs)
            if overlay is None:
                runs = [run if run[0] == ZERO_RUN else (OPAQUE_RUN, 0, run[2]) for run in runs]
                if not self._still_unsaved(start, covered):
                    runs = [(OPAQUE_RUN, 0, covered - start)]
            found += runs
            if covered < end:
                break
        self._check()
        return found

    def prefetch(self, offset: int, length: int) -> None:
        """Start to bring the source's range into memory."""
        self._source.prefetch(offset, length)

    def close(self) -> None:
        """From now on every read fails. The level and its overlay are the manager's."""
        self._closed = True

    def _check(self) -> None:
        if self._closed:
            raise OSError(errno.EIO, f"snapshot {self.name!r} was dropped")
        error = self.level.error
        if error is not None:
            raise OSError(
                errno.EIO, f"snapshot {self.name!r} is broken: {os.strerror(error.errno or 0)}"
            )

    def _still_unsaved(self, offset: int, end: int) -> bool:
        """Whether no cluster of the range has been saved, by any level, up to this moment."""
        first, stop = offset >> self._bits, ((end - 1) >> self._bits) + 1
        return all(level.saved.find(1, first, stop) < 0 for level in self.level.chain())

    def _runs(self, offset: int, end: int) -> Iterator[tuple[Overlay | None, int, int]]:
        """``(overlay, start, end)``: pieces that lie in one overlay, or in the source (None)."""
        while offset < end:
            overlay, edge = self._find(offset >> self._bits, ((end - 1) >> self._bits) + 1)
            stop = min(end, edge << self._bits)
            yield overlay, offset, stop
            offset = stop

    def _find(self, first: int, stop: int) -> tuple[Overlay | None, int]:
        """Where cluster ``first`` is, and how far the clusters behind it are in the same place.

        The oldest level that has saved it holds its data: levels are looked at from this one on.
        """
        for level in self.level.chain():
            edge = level.saved.find(1, first, stop)
            if edge == first:
                edge = level.saved.find(0, first, stop)
                return level.overlay, edge if edge >= 0 else stop
            if edge >= 0:
                stop = edge
        return None, stop

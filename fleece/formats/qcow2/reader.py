# SPDX-License-Identifier: Apache-2.0
"""The reading half of the qcow2 driver: data, status and `map` through a backing chain."""

from typing import Final, TypeAlias

from fleece.block.node import Node
from fleece.block.null import clear
from fleece.block.ranges import RangeLock
from fleece.formats.qcow2 import compressed
from fleece.formats.qcow2 import constants as c
from fleece.formats.qcow2.header import Header
from fleece.formats.qcow2.hosting import descriptor
from fleece.formats.qcow2.metadata import Metadata
from fleece.formats.qcow2.refcounts import Refcounts
from nbdwire.constants import STATE_HOLE, STATE_ZERO
from nbdwire.export import OPAQUE_RUN, ZERO_RUN, Run
from nbdwire.extents import Extent, coalesce

Part: TypeAlias = tuple[int, int, int, int]
"""``(kind, where, offset, length)``: ``length`` bytes of the disk from ``offset``; ``where`` is the
host offset of the first byte, or the L2 entry of a compressed cluster."""

_MOST_EXTENTS: Final = 16384
_HOLE: Final = STATE_HOLE | STATE_ZERO


class Qcow2Reader(Node):
    """An image that is read. ``backing`` may be shorter or longer than it, or None.

    Takes over ``file`` and ``backing``: they are closed with it.
    """

    def __init__(
        self,
        file: Node,
        header: Header,
        backing: Node | None,
        *,
        name: str,
        read_only: bool = True,
        counts: Refcounts | None = None,
    ) -> None:
        super().__init__(name, header.size, read_only=read_only)
        self.blocking = file.blocking or (backing is not None and backing.blocking)
        self.file = file
        self.header = header
        self.backing = backing
        self._bits = header.cluster_bits
        self._mask = header.cluster_size - 1
        # Entries with one of these bits need a closer look.
        self._special = c.COMPRESSED | c.ZERO | c.L2_RESERVED | self._mask
        self._meta = Metadata(file, header, counts)
        self._lock = self._meta.lock
        self._map = self._meta.map
        self._ranges = RangeLock()
        self._fd = descriptor(file)
        # What lies behind it in the file reads as zeroes, and sendfile cannot send it.
        self._file_end = file.size
        self._closed = False

    def pread_into(self, buf: memoryview, offset: int) -> None:
        """Fill ``buf``; a request inside one allocated cluster takes one lock and one read."""
        where = self._place(offset, len(buf))
        if where >= 0:
            self.file.pread_into(buf, where)
            return
        for part in self._parts(offset, len(buf)):
            at = part[2] - offset
            self._read_part(part, buf[at : at + part[3]])

    def pread_cached(self, buf: memoryview, offset: int) -> bool:
        """As `pread_into`, or False if data has to be waited for (the tables may have to be)."""
        where = self._place(offset, len(buf))
        if where >= 0:
            return self.file.pread_cached(buf, where)
        for kind, where, start, length in self._parts(offset, len(buf)):
            view = buf[start - offset : start - offset + length]
            if kind in (c.NORMAL, c.SHARED):
                if not self.file.pread_cached(view, where):
                    return False
            elif kind == c.PACKED:
                return False
            elif kind != c.UNALLOCATED:
                clear(view)
            elif not self._backing_cached(view, start):
                return False
        return True

    def prefetch(self, offset: int, length: int) -> None:
        """Start to read the data of the range, here and in the backing file."""
        for kind, where, start, count in self._parts(offset, length):
            if kind in (c.NORMAL, c.SHARED):
                self.file.prefetch(where, count)
            elif kind == c.UNALLOCATED and (n := self._in_backing(start, count)):
                assert self.backing is not None
                self.backing.prefetch(start, n)

    def _place(self, offset: int, length: int) -> int:
        """Where in the file a range lies that is inside one cluster with data; else -1."""
        cluster = offset >> self._bits
        if (offset + length - 1) >> self._bits != cluster:
            return -1
        with self._lock:
            entry = self._map.entry(cluster)
        host = entry & c.OFFSET_MASK
        if not host or entry & self._special:
            return -1
        return host + (offset & self._mask)

    def _parts(self, offset: int, length: int) -> list[Part]:
        """All of the range, in order."""
        parts: list[Part] = []
        end = offset + length
        while offset < end:
            more = self._some_parts(offset, end - offset)
            parts += more
            offset = more[-1][2] + more[-1][3]
        return parts

    def _some_parts(self, offset: int, length: int) -> list[Part]:
        """The beginning of the range: as much as one look at the tables gives."""
        first, last = offset >> self._bits, (offset + length - 1) >> self._bits
        with self._lock:
            runs = self._map.lookup(first, last - first + 1)
        parts: list[Part] = []
        for kind, host, count in runs:
            start, stop = first << self._bits, (first + count) << self._bits
            low, high = max(start, offset), min(stop, offset + length)
            parts.append((kind, host if kind == c.PACKED else host + low - start, low, high - low))
            first += count
        return parts

    def _read_part(self, part: Part, view: memoryview) -> None:
        kind, where, offset, _ = part
        if kind in (c.NORMAL, c.SHARED):
            self.file.pread_into(view, where)
        elif kind == c.UNALLOCATED:
            self._read_backing(view, offset)
        elif kind == c.PACKED:
            at = offset & self._mask
            view[:] = compressed.read(self.file, where, self._bits)[at : at + len(view)]
        else:
            clear(view)

    def _in_backing(self, offset: int, length: int) -> int:
        """How many of the bytes from ``offset`` the backing file has."""
        return 0 if self.backing is None else max(0, min(length, self.backing.size - offset))

    def _read_backing(self, view: memoryview, offset: int) -> None:
        n = self._in_backing(offset, len(view))
        if n:
            assert self.backing is not None
            self.backing.pread_into(view[:n], offset)
        clear(view[n:])

    def _backing_cached(self, view: memoryview, offset: int) -> bool:
        n = self._in_backing(offset, len(view))
        clear(view[n:])
        return n == 0 or (self.backing is not None and self.backing.pread_cached(view[:n], offset))

    def extents(self, offset: int, length: int) -> list[Extent]:
        """Holes are what no file of the chain has; allocated zero clusters are ZERO only."""
        out: list[Extent] = []
        for kind, _, start, count in self._some_parts(offset, length):
            if kind == c.UNALLOCATED:
                if not self._add_backing_extents(out, start, count):
                    break
            elif kind in (c.ZERO_PLAIN, c.ZERO_ALLOC):
                status = _HOLE if kind == c.ZERO_PLAIN else STATE_ZERO
                out.append(Extent(start, count, status))
            else:
                out.append(Extent(start, count, 0))
        return coalesce(out)

    def _add_backing_extents(self, out: list[Extent], offset: int, length: int) -> bool:
        """Add those of the backing file; False if they end before the range does."""
        end, inside = offset + length, offset + self._in_backing(offset, length)
        while offset < inside:
            assert self.backing is not None
            out += self.backing.extents(offset, inside - offset)
            offset = out[-1].end
            if len(out) > _MOST_EXTENTS:
                return False
        if inside < end:
            out.append(Extent(inside, end - inside, _HOLE))
        return True

    def map(self, offset: int, length: int) -> list[Run]:
        """Runs of the image file and of its backing files; compressed clusters are opaque."""
        out: list[Run] = []
        for kind, where, start, count in self._some_parts(offset, length):
            if kind in (c.NORMAL, c.SHARED):
                self._add_file_runs(out, where, count)
            elif kind == c.PACKED:
                out.append((OPAQUE_RUN, 0, count))
            elif kind != c.UNALLOCATED:
                _add_run(out, ZERO_RUN, 0, count)
            elif not self._add_backing_runs(out, start, count):
                break
        return out

    def _add_file_runs(self, out: list[Run], where: int, length: int) -> None:
        if self._fd < 0:
            out.append((OPAQUE_RUN, 0, length))
            return
        there = max(0, min(length, self._file_end - where))
        if there:
            _add_run(out, self._fd, where, there)
        if there < length:
            _add_run(out, ZERO_RUN, 0, length - there)

    def _add_backing_runs(self, out: list[Run], offset: int, length: int) -> bool:
        end, inside = offset + length, offset + self._in_backing(offset, length)
        while offset < inside:
            assert self.backing is not None
            for run in self.backing.map(offset, inside - offset):
                _add_run(out, *run)
                offset += run[2]
            if len(out) > _MOST_EXTENTS:
                return False
        if inside < end:
            _add_run(out, ZERO_RUN, 0, end - inside)
        return True

    def close(self) -> None:
        """Close the file and the backing file. Idempotent."""
        self.file.close()
        if self.backing is not None:
            self.backing.close()


def _add_run(out: list[Run], fd: int, where: int, length: int) -> None:
    if out:
        last_fd, last_where, last_length = out[-1]
        if last_fd == fd and (fd < 0 or last_where + last_length == where):
            out[-1] = (fd, last_where, last_length + length)
            return
    out.append((fd, where, length))

# SPDX-License-Identifier: Apache-2.0
"""The reading half of the qcow2 driver: data, status and `map` through a backing chain."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Final, TypeAlias

from fleece.block.node import Node
from fleece.block.null import clear
from fleece.formats.qcow2 import constants as c
from fleece.formats.qcow2.header import Header
from fleece.formats.qcow2.hosting import descriptor
from fleece.formats.qcow2.metadata import Metadata
from fleece.formats.qcow2.options import Qcow2Options
from fleece.formats.qcow2.pending import PendingClusters
from fleece.formats.qcow2.refcounts import Refcounts
from fleece.formats.qcow2.unpacked import Unpacked
from nbdwire.constants import STATE_HOLE, STATE_ZERO
from nbdwire.export import OPAQUE_RUN, ZERO_RUN, Run
from nbdwire.extents import Extent, coalesce

if TYPE_CHECKING:
    from fleece.formats.qcow2.bitmaps import BitmapSet

Part: TypeAlias = tuple[int, int, int, int]
"""``(kind, where, offset, length)``: ``length`` bytes of the disk from ``offset``; ``where`` is the
host offset of the first byte, or the L2 entry of a compressed cluster."""

PreadAt: TypeAlias = Callable[[memoryview, int, int], None]
"""As `pread_into`, with the offset in the file and the one on the guest's disk."""

_MOST_EXTENTS: Final = 16384
_HOLE: Final = STATE_HOLE | STATE_ZERO
_DEFAULTS: Final = Qcow2Options()


class Qcow2Reader(Node):
    """An image that is read. ``backing`` may be shorter or longer than it, or None.

    ``file`` holds the metadata, and the guest's data too unless it lies in ``data``. Takes over all
    three nodes: they are closed with it. ``l1``: offset and entries of the L1 table of an internal
    snapshot, instead of the active one.
    """

    def __init__(
        self,
        file: Node,
        header: Header,
        backing: Node | None,
        *,
        name: str,
        read_only: bool = True,
        data: Node | None = None,
        counts: Refcounts | None = None,
        options: Qcow2Options = _DEFAULTS,
        l1: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(name, header.size, read_only=read_only)
        self.file = file
        self.data = file if data is None else data
        self.backing = backing
        self.blocking = any(node.blocking for node in (file, self.data, backing) if node)
        self._bits = header.cluster_bits
        self._mask = header.cluster_size - 1
        self._meta = Metadata(file, header, counts, name=name, options=options, l1=l1)
        if header.has_data_file:
            self._meta.data_file = self.data
        self._lock = self._meta.lock
        self._map = self._meta.map
        self._unit_bits = self._map.unit_size.bit_length() - 1
        # Entries with one of these bits need a closer look; with subclusters all do.
        self._special = c.COMPRESSED | c.ZERO | c.L2_RESERVED | self._mask
        # The oldest encryption needs to know where the guest has a sector.
        by_guest = header.crypt_method == c.CRYPT_AES
        self._pread_at: PreadAt | None = getattr(self.data, "pread_at", None) if by_guest else None
        if header.extended_l2 or by_guest:
            self._special = (1 << 64) - 1
        self._pending = PendingClusters()
        self._unpacked = Unpacked(file, header)
        self._fd = descriptor(self.data)
        # What lies behind it in the file reads as zeroes, and sendfile cannot send it.
        self._data_end = self.data.size
        self.bitmaps: BitmapSet | None = None  # of an image that is written
        self._closed = False

    @property
    def header(self) -> Header:
        """The header as it is now."""
        return self._meta.header

    def pread_into(self, buf: memoryview, offset: int) -> None:
        """Fill ``buf``; a request inside one allocated cluster takes one lock and one read."""
        where = self._place(offset, len(buf))
        if where >= 0:
            self.data.pread_into(buf, where)
            return
        for part in self._parts(offset, len(buf)):
            at = part[2] - offset
            self._read_part(part, buf[at : at + part[3]])

    def pread_cached(self, buf: memoryview, offset: int) -> bool:
        """As `pread_into`, or False if data has to be waited for (the tables may have to be)."""
        where = self._place(offset, len(buf))
        if where >= 0:
            return self.data.pread_cached(buf, where)
        for kind, where, start, length in self._parts(offset, len(buf)):
            view = buf[start - offset : start - offset + length]
            if kind in c.KINDS_IN_FILE:
                if self._pread_at is not None or not self.data.pread_cached(view, where):
                    return False
            elif kind == c.PACKED:
                if not self._unpacked.read_cached(where, view, start & self._mask):
                    return False
            elif kind in c.KINDS_OF_ZEROES:
                clear(view)
            elif not self._backing_cached(view, start):
                return False
        return True

    def prefetch(self, offset: int, length: int) -> None:
        """Start to read the data of the range, here and in the backing file."""
        for kind, where, start, count in self._parts(offset, length):
            if kind in c.KINDS_IN_FILE:
                self.data.prefetch(where, count)
            elif kind in c.KINDS_UNALLOCATED and (n := self._in_backing(start, count)):
                assert self.backing is not None
                self.backing.prefetch(start, n)

    def _place(self, offset: int, length: int) -> int:
        """Where in the file a range lies that is inside one cluster with data; else -1."""
        cluster = offset >> self._bits
        if (offset + length - 1) >> self._bits != cluster:
            return -1
        with self._lock:
            entry = self._map.entry(cluster)
            if self._pending and cluster in self._pending:
                return -1
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
        with self._lock:
            parts = self._stored_parts(offset, length)
            return self._with_pending(parts) if self._pending else parts

    def _stored_parts(self, offset: int, length: int) -> list[Part]:
        """As `_some_parts`, of what the tables say; the caller holds the lock."""
        bits = self._unit_bits
        first, last = offset >> bits, (offset + length - 1) >> bits
        parts: list[Part] = []
        for kind, host, count in self._map.lookup(first, last - first + 1):
            start, stop = first << bits, (first + count) << bits
            low, high = max(start, offset), min(stop, offset + length)
            where = host + low - start if kind in c.KINDS_WITH_A_PLACE else host
            parts.append((kind, where, low, high - low))
            first += count
        return parts

    def _with_pending(self, parts: list[Part]) -> list[Part]:
        """With what was written and is in no table yet. The caller holds the lock."""
        found: list[Part] = []
        for part in parts:
            _, _, offset, length = part
            clusters = range(offset >> self._bits, ((offset + length - 1) >> self._bits) + 1)
            few = self._pending if len(self._pending) < len(clusters) else clusters
            waiting = sorted(i for i in few if i in clusters and i in self._pending)
            for cluster in waiting:
                start = cluster << self._bits
                head, inside, part = _split(part, start, start + self._mask + 1)
                found += head
                found += self._delayed_parts(inside, cluster)
                if part[3] == 0:
                    break
            if part[3]:
                found.append(part)
        return found

    def _delayed_parts(self, part: Part, cluster: int) -> list[Part]:
        kind, where, offset, length = part
        start = cluster << self._bits
        found: list[Part] = []
        pending = self._pending[cluster]
        for low, high, written in pending.cut(offset - start, offset + length - start):
            if written:
                found.append((c.DELAYED, pending.host + low, start + low, high - low))
            else:
                there = where + start + low - offset if kind in c.KINDS_WITH_A_PLACE else where
                found.append((kind, there, start + low, high - low))
        return found

    def _read_part(self, part: Part, view: memoryview) -> None:
        kind, where, offset, _ = part
        if kind in c.KINDS_IN_FILE:
            if self._pread_at is not None:
                self._pread_at(view, where, offset)
            else:
                self.data.pread_into(view, where)
        elif kind in c.KINDS_UNALLOCATED:
            self._read_backing(view, offset)
        elif kind == c.PACKED:
            self._unpacked.read(where, view, offset & self._mask)
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
            if kind in c.KINDS_UNALLOCATED:
                if not self._add_backing_extents(out, start, count):
                    break
            elif kind in c.KINDS_OF_ZEROES:
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
            if kind in c.KINDS_IN_FILE:
                self._add_file_runs(out, where, count)
            elif kind == c.PACKED:
                out.append((OPAQUE_RUN, 0, count))
            elif kind in c.KINDS_OF_ZEROES:
                _add_run(out, ZERO_RUN, 0, count)
            elif not self._add_backing_runs(out, start, count):
                break
        return out

    def _add_file_runs(self, out: list[Run], where: int, length: int) -> None:
        if self._fd < 0:
            out.append((OPAQUE_RUN, 0, length))
            return
        there = max(0, min(length, self._data_end - where))
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
        """Close the files. Idempotent."""
        if self.data is not self.file:
            self.data.close()
        self.file.close()
        if self.backing is not None:
            self.backing.close()


def _split(part: Part, start: int, stop: int) -> tuple[list[Part], Part, Part]:
    """What of the part lies before ``start`` (if any), from there to ``stop``, and behind it."""
    kind, where, offset, length = part
    step = kind in c.KINDS_WITH_A_PLACE

    def piece(low: int, high: int) -> Part:
        return kind, where + low - offset if step else where, low, max(0, high - low)

    low, high = max(offset, start), min(offset + length, stop)
    head = [piece(offset, low)] if offset < low else []
    return head, piece(low, high), piece(high, offset + length)


def _add_run(out: list[Run], fd: int, where: int, length: int) -> None:
    if out:
        last_fd, last_where, last_length = out[-1]
        if last_fd == fd and (fd < 0 or last_where + last_length == where):
            out[-1] = (fd, last_where, last_length + length)
            return
    out.append((fd, where, length))

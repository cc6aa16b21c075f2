# SPDX-License-Identifier: Apache-2.0
"""The writing half of the qcow2 driver: data into clusters of the image's own.

A write goes where its clusters are, or into new ones. What belongs around it in a new cluster is
copied later, if at all: see `fleece.formats.qcow2.pending`. With subclusters there is little to
copy, so it is done at once: see `fleece.formats.qcow2.subclusters`.
"""

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Final, TypeAlias

from fleece.block.node import Node
from fleece.block.ranges import RangeLock
from fleece.formats.qcow2 import constants as c
from fleece.formats.qcow2 import subclusters
from fleece.formats.qcow2.entries import CorruptEntry, corrupt
from fleece.formats.qcow2.freespace import OTHER
from fleece.formats.qcow2.header import Header
from fleece.formats.qcow2.options import Qcow2Options
from fleece.formats.qcow2.pending import Pending, Span
from fleece.formats.qcow2.reader import Part, Qcow2Reader
from fleece.formats.qcow2.refcounts import Refcounts
from fleece.units import align_down, align_up

_SETTLED_AT_ONCE: Final = 64

Recorder: TypeAlias = Callable[[int, int], None]
"""Is told of ``(offset, length)`` in bytes before they change."""


class Qcow2Writer(Qcow2Reader):
    """An image that data can be written to."""

    def __init__(
        self,
        file: Node,
        header: Header,
        backing: Node | None,
        *,
        name: str,
        data: Node | None = None,
        read_only: bool = False,
        counts: Refcounts | None = None,
        options: Qcow2Options,
    ) -> None:
        super().__init__(
            file,
            header,
            backing,
            name=name,
            data=data,
            read_only=read_only,
            counts=counts,
            options=options,
        )
        self.options = options
        self._ranges = RangeLock()
        self._per_entry = header.l2_entry_size // 8
        self._per_table = header.l2_entries
        self._unit_shift = self._bits - self._unit_bits
        # Guest data and metadata are in different files, and cannot meet.
        self._data_apart = header.has_data_file
        self._hit = self._meta.overlap.hit
        # Called before every change with (offset, length), to record it in bitmaps.
        self._record: Recorder | None = None

    def _begin(self) -> None:
        raise NotImplementedError

    def flush(self) -> None:
        """All that was written is on stable storage."""
        raise NotImplementedError

    def pwrite(self, buf: memoryview, offset: int, fua: bool = False) -> None:
        """Write in place where the clusters are there, else into new ones."""
        if not self._meta.begun:
            self._begin()
        if self._record is not None:
            self._record(offset, len(buf))
        try:
            where = self._own_place(offset, len(buf))
            if where < 0:
                self._write_allocating(buf, offset)
            elif not fua:
                self._write_data(buf, where)
            else:
                self._write_stable(buf, where)
        except CorruptEntry as error:
            self._meta.mark_corrupt(str(error.strerror))
            raise
        if where < 0:
            if fua or self._meta.crowded:
                self.flush()
            elif self._pending.crowded:
                self._settle_oldest()

    def _own_place(self, offset: int, length: int) -> int:
        """Where in the data file a range lies that is one run of clusters of our own; else -1."""
        cluster = offset >> self._bits
        last = (offset + length - 1) >> self._bits
        with self._lock:
            if cluster == last and self._per_entry == 1:
                entry = self._map.entry(cluster)
                if entry & self._special or not entry & c.COPIED or not entry & c.OFFSET_MASK:
                    return -1
                return (entry & c.OFFSET_MASK) + (offset & self._mask)
            parts = self._stored_parts(offset, length)
        if not parts or parts[0][0] != c.NORMAL or parts[0][3] != length:
            return -1
        return parts[0][1]

    def _write_stable(self, buf: memoryview, where: int) -> None:
        """With FUA, in place: the entries count too, but they never move once they are there."""
        with self._lock:
            stable = self._meta.clean and not self._pending
        self._write_data(buf, where, fua=stable)
        if not stable:
            self.flush()

    def _write_data(self, buf: memoryview, where: int, *, fua: bool = False) -> None:
        end = where + len(buf)
        if not self._data_apart:
            if where <= self._mask or end > self._meta.counts.end:
                raise corrupt(f"data at {where:#x}, where no data can be")
            if self._hit(where, end - where) is not None:
                self._meta.check_place(where, end - where)
        self.data.pwrite(buf, where, fua)
        if end > self._data_end:
            with self._lock:
                self._data_end = max(self._data_end, end)

    # Into clusters that are not there yet

    def _write_allocating(self, buf: memoryview, offset: int) -> None:
        if not buf:
            return
        end = offset + len(buf)
        first, stop = offset >> self._bits, ((end - 1) >> self._bits) + 1
        whole = not (offset | len(buf)) & self._mask
        with self._ranges.exclusive(first, stop):
            if whole and (host := self._allocate_alike(first, stop - first)) >= 0:
                self._write_allocated(buf, first, host)
                return
            self._own_tables(first, stop)
            for part in self._parts(offset, len(buf)):
                kind, where, start, length = part
                view = buf[start - offset : start - offset + length]
                if kind == c.NORMAL:
                    self._write_data(view, where)
                elif self._per_entry == 1:
                    self._write_new(part, view)
                else:
                    self._write_units(part, view)

    def _allocate_alike(self, first: int, count: int) -> int:
        """A place for whole clusters if none of them has one: then nothing else has to be known.

        -1, and nothing is done, if one of them has. This is the short way for the commonest case:
        it takes the lock once, where the long way takes it six times.
        """
        with self._lock:
            if not self._map.is_vacant(first, count):
                runs = self._map.lookup(first << self._unit_shift, count << self._unit_shift)
                if len(runs) > 1 or runs[0].kind not in c.KINDS_WITHOUT_A_PLACE:
                    return -1
            if self._pending and any(first + i in self._pending for i in range(count)):
                return -1
            self._own_tables_locked(first, first + count)
            return first << self._bits if self._data_apart else self._meta.counts.allocate(count)

    def _write_allocated(self, buf: memoryview, first: int, host: int) -> None:
        count = len(buf) >> self._bits
        try:
            self._write_data(buf, host)
        except BaseException:
            self._release(host, count)
            raise
        self._publish_whole(first, host, count)

    def _own_tables(self, first: int, stop: int) -> None:
        with self._lock:
            self._own_tables_locked(first, stop)

    def _own_tables_locked(self, first: int, stop: int) -> None:
        for index in range(first // self._per_table, (stop - 1) // self._per_table + 1):
            self._meta.own_table(index)

    def _write_new(self, part: Part, view: memoryview) -> None:
        """Data for clusters that have none of their own (DELAYED: or a part of it already)."""
        kind, where, offset, _ = part
        if kind != c.DELAYED and self._reads_zero(part) and not self._ends_wait(part):
            self._write_among_zeroes(part, view)
            return
        size = self._mask + 1
        while len(view):
            n = min(size - (offset & self._mask), len(view))
            if n < size or kind == c.DELAYED:
                self._write_delayed(view[:n], offset)
            else:
                n = align_down(len(view), size)
                self._write_whole((kind, where, offset, n), view[:n])
            where += n if kind in c.KINDS_WITH_A_PLACE else 0
            offset, view = offset + n, view[n:]

    def _reads_zero(self, part: Part) -> bool:
        """Whether all of the clusters that the part touches read as zeroes without it."""
        kind, _, offset, length = part
        start, end = align_down(offset, self._mask + 1), align_up(offset + length, self._mask + 1)
        if kind in c.KINDS_UNALLOCATED:
            return not self._in_backing(start, end - start)
        return kind in c.KINDS_OF_ZEROES

    def _ends_wait(self, part: Part) -> bool:
        """Whether the part's first or last cluster has other bytes that are in no table yet."""
        _, _, offset, length = part
        with self._lock:
            first, last = offset >> self._bits, (offset + length - 1) >> self._bits
            return first in self._pending or last in self._pending

    def _write_among_zeroes(self, part: Part, view: memoryview) -> None:
        """One write, and zeroes around it in the first and the last cluster, if need be."""
        kind, where, offset, length = part
        head = offset & self._mask
        count = ((head + length - 1) >> self._bits) + 1
        first = offset >> self._bits
        kept = kind == c.ZERO_ALLOC
        host, fresh = (where - head, False) if kept else self._allocate(first, count)
        try:
            if not fresh:
                tail = (count << self._bits) - head - length
                self._write_data(memoryview(bytes(head)), host)
                self._write_data(memoryview(bytes(tail)), host + head + length)
            self._write_data(view, host + head)
        except BaseException:
            if not kept:
                self._release(host, count)
            raise
        self._publish_whole(first, host, count)

    def _write_whole(self, part: Part, view: memoryview) -> None:
        """Whole clusters, into new ones, or the ones that were kept for them."""
        kind, where, offset, length = part
        first, count = offset >> self._bits, length >> self._bits
        kept = kind in (c.ZERO_ALLOC, c.UNALLOCATED_OWN)
        if not kept:
            self._write_allocated(view, first, self._allocate(first, count)[0])
            return
        self._write_data(view, where)
        self._publish_whole(first, where, count)

    def _allocate(self, first: int, count: int) -> tuple[int, bool]:
        """A place for guest clusters from ``first``, and whether it reads as zeroes."""
        if self._data_apart:
            return first << self._bits, False
        with self._lock:
            counts = self._meta.counts
            host = counts.allocate(count)
            return host, self.data is self.file and counts.is_fresh(host, count)

    def _release(self, host: int, count: int) -> None:
        """Undo `_allocate`."""
        with self._lock:
            self._release_locked(host, count)

    def _release_locked(self, host: int, count: int) -> None:
        if not self._data_apart:
            self._meta.counts.release(host, count)

    def _publish_whole(self, first: int, host: int, count: int) -> None:
        """The tables say that ``count`` clusters from ``first`` lie at ``host``."""
        low, step = host | c.COPIED, self._mask + 1
        words = list(range(low, low + count * step, step))
        if self._per_entry == 2:
            words = [word for entry in words for word in (entry, c.ALL_ALLOCATED)]
        with self._lock:
            self._publish(first, words)

    def _publish(self, first: int, words: list[int], reason: int = OTHER) -> None:
        """Set L2 entries; the caller holds the lock, and their data was written."""
        for entry in self._meta.publish(first, words, reason):
            self._unpacked.forget(entry)

    def _write_if_own(self, view: memoryview, offset: int) -> bool:
        """Write in place, if an earlier part of this request has made the cluster our own.

        Others write in place there too by now, so nothing around ``view`` may be written again.
        """
        where = self._own_place(offset, len(view))
        if where >= 0:
            self._write_data(view, where)
        return where >= 0

    # Copy on write, delayed

    def _write_delayed(self, view: memoryview, offset: int) -> None:
        """A part of one cluster; the caller has the cluster's range."""
        cluster, inside = offset >> self._bits, offset & self._mask
        with self._lock:
            pending = self._pending.get(cluster)
        if pending is None:
            if self._write_if_own(view, offset):
                return
            host, fresh = self._allocate(cluster, 1)
            pending = Pending(host, fresh=fresh)
        try:
            self._write_data(view, pending.host + inside)
        except BaseException:
            pending.fresh = False  # a part of it may be there
            if not pending.spans:
                self._release(pending.host, 1)
            raise
        with self._lock:
            pending.add(inside, inside + len(view))
            if pending.covers(self._mask + 1):
                self._pending.pop(cluster, None)
                self._publish(cluster, [pending.host | c.COPIED])
            else:
                self._pending[cluster] = pending

    def _settle_all(self) -> None:
        """No cluster waits that waited when this was called."""
        with self._lock:
            waiting = sorted(self._pending)
        self._settle_each(waiting)

    def _settle_oldest(self) -> None:
        with self._lock:
            waiting = sorted(islice(self._pending, _SETTLED_AT_ONCE))
        self._settle_each(waiting)

    def _settle_each(self, clusters: Iterable[int]) -> None:
        """All that can be; OSError (the first) if one cannot, which goes on to wait."""
        first: OSError | None = None
        for cluster in clusters:
            try:
                self._settle(cluster)
            except CorruptEntry as error:
                self._meta.mark_corrupt(str(error.strerror))
                raise
            except OSError as error:
                first = first or error
        if first is not None:
            raise first

    def _settle(self, cluster: int) -> None:
        """Copy what belongs around the new data; then the tables may know of it."""
        with self._ranges.exclusive(cluster, cluster + 1):
            with self._lock:
                pending = self._pending.get(cluster)
            if pending is None:
                return
            self._fill_gaps(cluster << self._bits, pending)
            with self._lock:
                self._meta.own_table(cluster // self.header.l2_entries)
                self._publish(cluster, [pending.host | c.COPIED])
                self._pending.pop(cluster, None)

    def _fill_gaps(self, start: int, pending: Pending) -> None:
        """Old data around the new; gaps that are most of what lies between are read at once."""
        gaps = pending.gaps(self._mask + 1)
        if gaps and sum(b - a for a, b in gaps) * 2 > gaps[-1][1] - gaps[0][0]:
            self._copy_old(start, gaps, pending)
            return
        for gap in gaps:
            self._copy_old(start, [gap], pending)

    def _copy_old(self, start: int, gaps: list[Span], pending: Pending) -> None:
        low, high = gaps[0][0], gaps[-1][1]
        if pending.fresh and self._stored_is_zero(start + low, high - low):
            return
        old = self._old_data(start + low, high - low)
        for a, b in gaps:
            self._write_data(old[a - low : b - low], pending.host + a)

    def _stored_is_zero(self, offset: int, length: int) -> bool:
        length = min(length, self.size - offset)
        if length <= 0:
            return True
        with self._lock:
            parts = self._stored_parts(offset, length)
        return all(
            kind in c.KINDS_OF_ZEROES
            or (kind in c.KINDS_UNALLOCATED and not self._in_backing(start, n))
            for kind, _, start, n in parts
        )

    def _old_data(self, offset: int, length: int) -> memoryview:
        """What the tables say is there, with zeroes behind the end of the disk."""
        data = whole = memoryview(bytearray(length))
        end = min(offset + length, self.size)
        while offset < end:
            with self._lock:
                parts = self._stored_parts(offset, end - offset)
            for part in parts:
                at = part[2] - offset
                self._read_part(part, data[at : at + part[3]])
            done = parts[-1][2] + parts[-1][3] - offset
            offset, data = offset + done, data[done:]
        return whole

    # Subclusters

    def _write_units(self, part: Part, view: memoryview) -> None:
        """Whole clusters at once, and parts of clusters one by one, in an image that has them."""
        kind, where, offset, _ = part
        size = self._mask + 1
        while len(view):
            inside = offset & self._mask
            n = min(size - inside, len(view))
            if n == size:
                n = align_down(len(view), size)
                self._write_whole((kind, where, offset, n), view[:n])
            else:
                self._write_in_cluster(view[:n], offset >> self._bits, inside)
            where += n if kind in c.KINDS_WITH_A_PLACE else 0
            offset, view = offset + n, view[n:]

    def _write_in_cluster(self, view: memoryview, cluster: int, inside: int) -> None:
        """A part of one cluster; subclusters that were not touched stay what they are."""
        if self._write_if_own(view, (cluster << self._bits) + inside):
            return
        with self._lock:
            entry, bitmap = self._map.entry(cluster), self._map.bitmap(cluster)
        plan = subclusters.plan_write(
            entry, bitmap, inside, len(view), self._mask + 1, data_file=self.header.has_data_file
        )
        host = plan.host
        if host is None:
            host = self._allocate(cluster, 1)[0]
        start = cluster << self._bits
        try:
            for low, high in plan.copied:
                self._write_data(self._old_data(start + low, high - low), host + low)
            if plan.high - plan.low > len(view):
                merged = self._old_data(start + plan.low, plan.high - plan.low)
                merged[inside - plan.low : inside - plan.low + len(view)] = view
                view = merged
            self._write_data(view, host + plan.low)
        except BaseException:
            if plan.host is None:
                self._release(host, 1)
            raise
        with self._lock:
            self._publish(cluster, [host | c.COPIED, plan.bitmap])

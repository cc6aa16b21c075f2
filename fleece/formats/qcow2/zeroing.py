# SPDX-License-Identifier: Apache-2.0
"""Zeroes and trims in a qcow2 image: entries of the tables instead of data, where they can be."""

import errno
from collections.abc import Iterator
from typing import Final

from fleece.formats.qcow2 import constants as c
from fleece.formats.qcow2 import subclusters
from fleece.formats.qcow2.entries import ClusterRun, CorruptEntry
from fleece.formats.qcow2.freespace import REQUEST
from fleece.formats.qcow2.reader import Part
from fleece.formats.qcow2.writing import Qcow2Writer
from fleece.units import align_down, align_up
from nbdwire.constants import CMD_FLAG_FAST_ZERO, CMD_FLAG_FUA, CMD_FLAG_NO_HOLE

_ZEROES: Final = memoryview(bytes(1 << 20))


class Qcow2Zeroer(Qcow2Writer):
    """An image of which parts can become zeroes, or be given back."""

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        """Zero clusters (or subclusters); what is no whole one is written.

        Without NO_HOLE their space goes back to the file system, unless the image was opened with
        ``discard=ignore``. FAST_ZERO: EOPNOTSUPP where all of it would have to be written.
        """
        if not self._meta.begun:
            self._begin()
        keep = bool(flags & CMD_FLAG_NO_HOLE) or not self.options.discard
        start, stop = self._whole(offset, offset + length)
        by_table = start < stop and self._zeroes_by_table(keep)
        if not by_table and flags & CMD_FLAG_FAST_ZERO:
            raise OSError(errno.EOPNOTSUPP, "zeroes would have to be written", self.name)
        self._change(offset, length)
        try:
            if self.header.raw_data_file:
                self.data.zero(offset, length, flags & ~CMD_FLAG_FUA)
            if by_table:
                self._write_zeroes(offset, start)
                self._zero_units(start, stop, keep=keep)
                self._write_zeroes(stop, offset + length)
            else:
                self._write_zeroes(offset, offset + length)
        except CorruptEntry as error:
            self._meta.mark_corrupt(str(error.strerror))
            raise
        self._end_of_change(flags)

    def trim(self, offset: int, length: int, flags: int = 0) -> None:
        """Whole clusters read as zeroes from now on, and their space goes back.

        Nothing happens with ``discard=ignore``, or in an image of version 2 with a backing file,
        which cannot say that a cluster is zero. With ``discard_no_unref`` a cluster keeps its place
        in the image, which is a hole in the file then.
        """
        start, stop = self._whole(offset, offset + length)
        keep = self.options.discard_no_unref
        if self.options.discard and start < stop and self._zeroes_by_table(keep):
            self._change(offset, length)
            try:
                if self.header.raw_data_file:
                    self.data.trim(start, stop - start)
                self._zero_units(start, stop, keep=keep, punch=keep)
            except CorruptEntry as error:
                self._meta.mark_corrupt(str(error.strerror))
                raise
        elif not self._meta.begun:
            self._begin()
        self._end_of_change(flags)

    def _change(self, offset: int, length: int) -> None:
        if not self._meta.begun:
            self._begin()
        if self._record is not None:
            self._record(offset, length)

    def _end_of_change(self, flags: int) -> None:
        if flags & CMD_FLAG_FUA or self._meta.crowded:
            self.flush()

    def _zeroes_by_table(self, keep: bool) -> bool:
        """Version 2 knows no zero clusters: there, what is in no file of the chain is zero."""
        return self.header.version == 3 or (self.backing is None and not keep)

    def _whole(self, start: int, end: int) -> tuple[int, int]:
        """The whole units within, in bytes; the last one is whole if it goes to the disk's end."""
        size = self._map.unit_size
        start, end = align_up(start, size), end if end == self.size else align_down(end, size)
        if self._per_entry == 2:
            start = self._out_of_packed(start, align_up(start, self._mask + 1))
            end = self._out_of_packed(end, align_down(end, self._mask + 1))
        return start, end

    def _out_of_packed(self, offset: int, edge: int) -> int:
        """``edge``, a cluster's, if ``offset`` lies inside a compressed cluster, which is whole."""
        if offset == edge or offset >= self.size:
            return offset
        with self._lock:
            return edge if self._map.entry(offset >> self._bits) & c.COMPRESSED else offset

    def _write_zeroes(self, offset: int, end: int) -> None:
        """Zeroes as data, where the disk does not read as zeroes already."""
        while offset < end:
            for part in self._some_parts(offset, min(end - offset, len(_ZEROES))):
                if not self._part_is_zero(part):
                    self.pwrite(_ZEROES[: part[3]], part[2])
                offset = part[2] + part[3]

    def _part_is_zero(self, part: Part) -> bool:
        kind, _, offset, length = part
        if kind in c.KINDS_UNALLOCATED:
            return not self._in_backing(offset, length)
        return kind in c.KINDS_OF_ZEROES

    def _zero_units(self, start: int, stop: int, *, keep: bool, punch: bool = False) -> None:
        """The units from byte ``start`` to ``stop`` become zeroes, table by table."""
        bits, shift = self._unit_bits, self._bits - self._unit_bits
        first, last = start >> bits, align_up(stop, 1 << bits) >> bits
        per_table = self.header.l2_entries << shift
        with self._ranges.exclusive(first >> shift, ((last - 1) >> shift) + 1):
            while first < last:
                end = min(last, (first // per_table + 1) * per_table)
                with self._lock:
                    freed = list(self._zero_in_table(first, end, keep=keep))
                    # Only now: if there was no room for a table, they are still what was written.
                    self._drop_pending(first, end)
                if punch and self.options.pass_discard_request:
                    for host, length in freed:
                        self.data.trim(host, length)
                if self._meta.crowded:  # a large disk has more tables than memory should hold
                    self._meta.flush()
                first = end

    def _drop_pending(self, first: int, last: int) -> None:
        """What was written to these clusters, and is in no table yet, is not needed any more.

        The caller holds the lock.
        """
        for cluster in [i for i in self._pending if first <= i < last]:
            self._release_locked(self._pending.pop(cluster).host, 1)

    def _zero_in_table(self, first: int, last: int, *, keep: bool) -> Iterator[tuple[int, int]]:
        """With the lock; the places (offset, length) of data that was there and stays the image's.

        All units are within one L2 table.
        """
        for run in self._map.lookup(first, last - first):
            if not self._run_is_zero(run, first, keep=keep):
                if self._per_entry == 2:
                    self._zero_subclusters(first, first + run.units, keep=keep)
                else:
                    self._zero_clusters(first, run, keep=keep)
                if keep and run.kind == c.NORMAL:
                    yield run.host, run.units << self._unit_bits
            first += run.units

    def _run_is_zero(self, run: ClusterRun, first: int, *, keep: bool) -> bool:
        """Whether nothing has to be done."""
        if run.kind in c.KINDS_UNALLOCATED:
            bits = self._unit_bits
            return not self._in_backing(first << bits, run.units << bits)
        return run.kind == c.ZERO_PLAIN or (run.kind == c.ZERO_ALLOC and keep)

    def _zero_clusters(self, first: int, run: ClusterRun, *, keep: bool) -> None:
        zero = c.ZERO if self.header.version == 3 else 0
        if keep and run.kind == c.NORMAL:
            low = run.host | c.COPIED | zero
            words = list(range(low, low + (run.units << self._bits), 1 << self._bits))
        else:
            words = [zero] * run.units
        self._meta.own_table(first // self.header.l2_entries)
        self._publish(first, words, REQUEST)

    def _zero_subclusters(self, first: int, last: int, *, keep: bool) -> None:
        """Units of clusters that may keep others: the cluster goes when all of it is zero."""
        count = c.SUBCLUSTERS
        self._meta.own_table(first // count // self.header.l2_entries)
        for cluster in range(first // count, (last - 1) // count + 1):
            low, high = max(first, cluster * count), min(last, (cluster + 1) * count)
            entry, bitmap = self._map.entry(cluster), self._map.bitmap(cluster)
            if entry & c.COMPRESSED:
                if high - low < count and high << self._unit_bits < self.size:
                    raise OSError(errno.EBUSY, "it was compressed meanwhile", self.name)
                entry = bitmap = 0
            after = subclusters.zeroed(bitmap, low - cluster * count, high - cluster * count)
            own = entry & c.COPIED
            if after == c.ALL_ZERO and not (keep and own):
                entry = 0
            self._publish(cluster, [entry, after], REQUEST)

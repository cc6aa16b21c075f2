# SPDX-License-Identifier: Apache-2.0
"""`StoredBitmap`: one persistent dirty bitmap, as an image has it and as it changes.

What the image has stays where it is; what is dirty since is in pages of one byte for each granule,
which are there only where something was written. A byte is set, never read and written back, so
writers need no lock. At `write` the pages and what is below them go to new clusters.

Source: QEMU's ``docs/interop/qcow2``, "Bitmaps".
"""

import threading
from collections.abc import Callable, Iterator
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fleece.block.node import Node
from fleece.formats.qcow2 import bitmap_directory as directory
from fleece.formats.qcow2 import constants as c
from fleece.formats.qcow2.bitmap_directory import Bitmap
from fleece.formats.qcow2.entries import corrupt
from fleece.formats.qcow2.header import Header
from nbdwire.constants import STATE_DIRTY
from nbdwire.extents import Extent

Words: TypeAlias = NDArray[np.uint64]
Place: TypeAlias = Callable[[bytes], int]
"""Writes bytes into new clusters of the image; the offset."""
Mark: TypeAlias = Callable[[int, int], None]
"""Takes ``(offset, length)``, bytes of the disk that change."""

_MOST_PAGE_BITS: Final = 16
_RESERVED: Final = 0xFF000000000001FE
_ALL_ONES: Final = 1
_MOST_EXTENTS: Final = 16384
# Stands for every page that is dirty all over; setting bytes of it does no harm.
_FULL: Final = bytearray(b"\1" * (1 << _MOST_PAGE_BITS))


class StoredBitmap:
    """A dirty bitmap of a disk of ``size`` bytes, in the image in ``file``.

    ``entry`` is how the directory has it; ``stored``: the image has its table too, else it is new,
    and clear. Only `mark` and `extents` may be called from several threads.
    """

    def __init__(
        self, file: Node, header: Header, size: int, entry: Bitmap, *, stored: bool = True
    ) -> None:
        self.name = entry.name
        self.granularity = entry.granularity
        self.enabled = bool(entry.flags & directory.AUTO)
        self.size = size
        self.entry = entry
        self.stored = stored
        self._file = file
        self._header = header
        self._bits = entry.granularity_bits
        self._page_bits = min(_MOST_PAGE_BITS, header.cluster_bits + 3)
        self._entry_shift = header.cluster_bits + 3 - self._page_bits
        self._live: dict[int, bytearray] = {}
        self._lock = threading.Lock()
        self._table: Words | None = None if stored else self._blank(size)
        self._next: Words = self._blank(0)
        self.changed = not stored
        self.inconsistent = stored and self._is_inconsistent()

    def _is_inconsistent(self) -> bool:
        entry = self.entry
        unknown = bool(entry.extra) and not entry.flags & directory.EXTRA_COMPATIBLE
        return entry.in_use or unknown or entry.table_size != self._table_size(self.size)

    def _table_size(self, size: int) -> int:
        return directory.table_entries(size, self._bits, self._header.cluster_size)

    def _blank(self, size: int) -> Words:
        return np.zeros(self._table_size(size), np.uint64)

    @property
    def granules(self) -> int:
        """How many bits it has."""
        return (self.size + self.granularity - 1) >> self._bits

    # Recording

    def marker(self) -> Mark:
        """What records a change; it is good until the bitmap is cleared, resized or written."""
        find, bits, page_bits = self._live.get, self._bits, self._page_bits
        mask, slow = (1 << page_bits) - 1, self._mark

        def mark(offset: int, length: int) -> None:
            first = offset >> bits
            page = find(first >> page_bits)
            if page is not None and (offset + length - 1) >> bits == first:
                page[first & mask] = 1
            elif length > 0:
                slow(first, (offset + length - 1) >> bits)

        return mark

    def mark(self, offset: int, length: int) -> None:
        """These bytes of the disk change."""
        self.marker()(offset, length)

    def _mark(self, first: int, last: int) -> None:
        """Granules ``first`` to ``last``."""
        self.changed = True
        size = 1 << self._page_bits
        for number in range(first >> self._page_bits, (last >> self._page_bits) + 1):
            low = max(first - number * size, 0)
            high = min(last + 1 - number * size, size)
            if high - low == size:
                with self._lock:  # not while somebody puts a page there that he has just read
                    self._live[number] = _FULL
            else:
                page = self._live.get(number) or self._make_live(number)
                page[low:high] = _FULL[: high - low]

    def _make_live(self, number: int) -> bytearray:
        with self._lock:
            page = self._live.get(number)
            if page is None:
                try:
                    page = self._page_below(number)
                except OSError:  # too much is dirty then, never too little
                    page = _FULL
                self._live[number] = page
            return page

    # What the image has

    @property
    def table(self) -> Words:
        """Its table; one that cannot be makes it inconsistent, and all dirty."""
        if self._table is None:
            try:
                self._table = self.read_table()
            except OSError:
                self.inconsistent = True
                self._table = self._blank(self.size) | np.uint64(_ALL_ONES)
        return self._table

    def read_table(self) -> Words:
        """The table in the image. OSError, EIO if it cannot be one."""
        entry, size = self.entry, self._header.cluster_size
        data = bytearray(entry.table_size * 8)
        if entry.table_offset + len(data) > self._file.size:
            raise corrupt(f"the table of bitmap {self.name!r} lies outside of the file")
        self._file.pread_into(memoryview(data), entry.table_offset)
        words = np.frombuffer(data, ">u8").astype(np.uint64)
        places = words & np.uint64(c.OFFSET_MASK)
        bad = (words & np.uint64(_RESERVED)) | (places & np.uint64(size - 1))
        used = places[places != 0]
        outside = used > np.uint64(max(0, self._file.size - 1))
        if bad.any() or outside.any() or len(np.unique(used)) < len(used):
            raise corrupt(f"the table of bitmap {self.name!r} is not valid")
        return words

    def _page_below(self, number: int) -> bytearray:
        """A page as it is in the image, one byte for each granule."""
        size, index = 1 << self._page_bits, number >> self._entry_shift
        word = int(self.table[index]) if index < len(self.table) else 0
        host = word & c.OFFSET_MASK
        if not host:
            return bytearray((b"\1" if word & _ALL_ONES else b"\0") * size)
        packed = bytearray(size >> 3)
        inside = number & ((1 << self._entry_shift) - 1)
        self._file.pread_into(memoryview(packed), host + inside * len(packed))
        bits = np.unpackbits(np.frombuffer(packed, np.uint8), bitorder="little")
        return bytearray(bits.tobytes())

    # Reading

    def extents(self, offset: int, length: int) -> list[Extent]:
        """What of these bytes of the disk is dirty (`STATE_DIRTY`) and what is not, in order.

        It ends early after 16384 extents. OSError if the image cannot be read.
        """
        end = min(offset + length, self.size)
        out: list[Extent] = []
        at = offset
        for stop, dirty in self._runs(offset >> self._bits, -(-end >> self._bits)):
            stop = min(stop << self._bits, end)
            if out and out[-1].is_dirty == bool(dirty):
                out[-1] = Extent(out[-1].offset, stop - out[-1].offset, out[-1].status)
            elif len(out) == _MOST_EXTENTS:
                break
            else:
                out.append(Extent(at, stop - at, STATE_DIRTY if dirty else 0))
            at = stop
        return out

    def _runs(self, first: int, stop: int) -> Iterator[tuple[int, int]]:
        """``(where it ends, whether dirty)`` for granules ``[first, stop)``."""
        size, shift = 1 << self._page_bits, self._page_bits + self._entry_shift
        live = {number >> self._entry_shift for number in list(self._live)}
        while first < stop:
            index = first >> shift
            word = int(self.table[index])
            if index not in live and not word & c.OFFSET_MASK:
                first = min(stop, (index + 1) << shift)
                yield first, word & _ALL_ONES
                continue
            number = first >> self._page_bits
            base, end = number * size, min(stop, (number + 1) * size)
            page = self._live.get(number) or self._page_below(number)
            flags = np.frombuffer(bytes(page[first - base : end - base]), np.uint8)
            cuts = np.flatnonzero(np.diff(flags)) + 1
            for at in [*cuts.tolist(), end - first]:
                yield first + at, int(flags[at - 1])
            first = end

    def dirty_extents(self) -> Iterator[tuple[int, int]]:
        """``(offset, length)`` of everything that is dirty, in bytes, in order."""
        at = 0
        while at < self.size:
            found = self.extents(at, self.size - at)
            yield from ((e.offset, e.length) for e in found if e.is_dirty)
            at = found[-1].end

    # Changing, while the disk is at rest

    def clear(self) -> None:
        """Nothing is dirty."""
        self._table, self._live = self._blank(self.size), {}
        self.changed = True

    def resize(self, size: int) -> None:
        """The disk has another size; what is new is clean."""
        before = self.granules
        old, last = self.table, (before - 1) >> self._page_bits
        if before:
            self._trim(last, before)
            # The rest of the last entry's bits were behind the end, and mean nothing.
            for number in range(last + 1, ((last >> self._entry_shift) + 1) << self._entry_shift):
                self._live[number] = bytearray(1 << self._page_bits)
        self.size = size
        self._table = self._blank(size)
        n = min(len(old), len(self._table))
        self._table[:n] = old[:n]
        pages = -(-self.granules >> self._page_bits)
        self._live = {number: page for number, page in self._live.items() if number < pages}
        if pages:
            self._trim(pages - 1, self.granules)
        self.changed = True

    def _trim(self, number: int, granules: int) -> None:
        """Page ``number`` ends at granule ``granules``; the page must be read from the image."""
        page = (self._live.get(number) or self._page_below(number))[: 1 << self._page_bits]
        low = granules - (number << self._page_bits)
        if low < len(page):
            page[low:] = bytes(len(page) - low)
        self._live[number] = page

    # Storing

    def write(self, place: Place) -> Bitmap:
        """Put what changed into new clusters; the entry for the directory, not in use.

        Then call `written` or forget the bitmap. OSError if something cannot be read or written.
        """
        flags = self.entry.flags & ~(directory.IN_USE | directory.AUTO)
        flags |= directory.AUTO if self.enabled else 0
        offset, table = self.entry.table_offset, self.table
        if self.changed:
            table = self.table.copy()
            for index in sorted({number >> self._entry_shift for number in self._live}):
                table[index] = self._write_entry(index, place)
            offset = place(table.astype(">u8").tobytes())
        self._next = table
        return Bitmap(self.name, offset, len(table), self._bits, flags, self.entry.extra)

    def _write_entry(self, index: int, place: Place) -> int:
        first = index << self._entry_shift
        pages = [
            self._live.get(number) or self._page_below(number)
            for number in range(first, first + (1 << self._entry_shift))
        ]
        flags = np.frombuffer(b"".join(page[: 1 << self._page_bits] for page in pages), np.uint8)
        count = min(len(flags), self.granules - (first << self._page_bits))
        flags = flags.copy()
        flags[count:] = 0
        dirty = int(np.count_nonzero(flags))
        if dirty in (0, count):
            return _ALL_ONES if dirty else 0
        return place(np.packbits(flags, bitorder="little").tobytes())

    def written(self, entry: Bitmap) -> list[int]:
        """The directory on disk has ``entry``; host offsets of data that nothing refers to now."""
        old = self.read_table() if self.stored else np.zeros(0, np.uint64)
        kept = self._next & np.uint64(c.OFFSET_MASK)
        places = old & np.uint64(c.OFFSET_MASK)
        gone = places[(places != 0) & ~np.isin(places, kept)]
        self._table, self._live = self._next, {}
        self.entry, self.stored, self.changed = entry, True, False
        return [int(host) for host in gone]

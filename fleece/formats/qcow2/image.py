# SPDX-License-Identifier: Apache-2.0
"""`Qcow2Node`: a qcow2 image as a node, read and written.

Locks. One lock for the metadata (`Metadata.lock`), not held while data is read or written. Whoever
allocates holds the clusters concerned in a `RangeLock`, so that two writers that both see a cluster
as new do not each make one. A write to clusters that are there takes no range lock: such a cluster
never moves.

`map` promises that its runs are stable: a host cluster that was ever named by it is never reused
for other guest data while the image is open. Hence `zero` and `trim` keep the host cluster (the
entry becomes "zero, allocated"), and the allocator takes new clusters from the end only.

The order in which things reach the disk, and what that promises, is told in `metadata`.
"""

import errno
from typing import Final, NoReturn

from fleece.block.node import Node
from fleece.errors import ImageCorrupt, ImageError
from fleece.formats.qcow2 import constants as c
from fleece.formats.qcow2 import header as headers
from fleece.formats.qcow2.header import Header
from fleece.formats.qcow2.reader import Part, Qcow2Reader
from fleece.formats.qcow2.rebuild import rebuild
from fleece.formats.qcow2.refcounts import Refcounts
from fleece.formats.qcow2.tables import corrupt
from fleece.units import align_down, align_up
from nbdwire.constants import CMD_FLAG_FAST_ZERO, CMD_FLAG_FUA

_ZEROES: Final = memoryview(bytes(1 << 20))


class Qcow2Node(Qcow2Reader):
    """A qcow2 image, version 2 or 3. ``name`` is what messages call it, usually its path.

    It takes over ``file`` and ``backing``: both are closed with it. Raises `NotAnImage`,
    `UnsupportedFeature` or `ImageCorrupt` (and closes neither). An image that was not closed is
    repaired before it is written.
    """

    def __init__(
        self,
        file: Node,
        *,
        backing: Node | None = None,
        read_only: bool = False,
        name: str | None = None,
        header: Header | None = None,
    ) -> None:
        name = file.name if name is None else name
        header = read_header(file, name) if header is None else header
        headers.check_supported(header, name, writable=not read_only)
        try:
            if header.dirty and not read_only:
                header = rebuild(file, header, name)
            counts = None if read_only else Refcounts(file, header)
            super().__init__(file, header, backing, name=name, read_only=read_only, counts=counts)
        except OSError as error:
            kind = ImageCorrupt if error.errno in (errno.EIO, errno.EFBIG) else ImageError
            raise kind(f"{name}: {error.strerror or error}") from error

    def _refuse(self) -> NoReturn:
        raise OSError(errno.EPERM, "opened read-only", self.name)

    def _begin(self) -> None:
        if self.read_only:
            self._refuse()
        self._meta.begin()

    def pwrite(self, buf: memoryview, offset: int, fua: bool = False) -> None:
        """Write in place where the clusters are there, else allocate (and copy what is around)."""
        if not self._meta.begun:
            self._begin()
        where = self._own_place(offset, len(buf))
        if where >= 0 and not fua:
            self._write_in_place(buf, where)
        elif where >= 0:
            with self._lock:
                stable = self._meta.clean  # the entries too: they never move once they are there
            self._write_in_place(buf, where, fua=stable)
            if not stable:
                self.flush()
        else:
            self._write_allocating(buf, offset)
            if fua or self._meta.crowded:
                self.flush()

    def _own_place(self, offset: int, length: int) -> int:
        """Where in the file a range lies that is one run of clusters of our own; else -1."""
        cluster = offset >> self._bits
        count = ((offset + length - 1) >> self._bits) - cluster + 1
        with self._lock:
            if count == 1:
                entry = self._map.entry(cluster)
                if entry & self._special or not entry & c.COPIED or not entry & c.OFFSET_MASK:
                    return -1
                return (entry & c.OFFSET_MASK) + (offset & self._mask)
            runs = self._map.lookup(cluster, count)
        if len(runs) > 1 or runs[0].kind != c.NORMAL:
            return -1
        return runs[0].host + (offset & self._mask)

    def _write_in_place(self, buf: memoryview, where: int, *, fua: bool = False) -> None:
        end = where + len(buf)
        if where <= self._mask or end > self._meta.counts.end:
            raise corrupt(f"data at {where:#x}, where no data can be")
        self.file.pwrite(buf, where, fua)
        if end > self._file_end:
            self._grown_to(end)

    def _grown_to(self, end: int) -> None:
        with self._lock:
            self._file_end = max(self._file_end, end)

    def _write_allocating(self, buf: memoryview, offset: int) -> None:
        end = offset + len(buf)
        first, stop = offset >> self._bits, ((end - 1) >> self._bits) + 1
        with self._ranges.exclusive(first, stop):
            self._own_tables(first, stop)
            for part in self._parts(offset, len(buf)):
                kind, where, start, length = part
                view = buf[start - offset : start - offset + length]
                if kind == c.NORMAL:
                    self._write_in_place(view, where)
                else:
                    self._write_new(part, view)

    def _own_tables(self, first: int, stop: int) -> None:
        shift = self._bits - 3
        with self._lock:
            for index in range(first >> shift, ((stop - 1) >> shift) + 1):
                self._meta.own_table(index)

    def _write_new(self, part: Part, view: memoryview) -> None:
        """Data for clusters that have none of their own: new ones, or a kept ZERO_ALLOC one."""
        kind, where, offset, length = part
        first = offset >> self._bits
        count = ((offset + length - 1) >> self._bits) - first + 1
        kept = kind == c.ZERO_ALLOC
        host = align_down(where, self._mask + 1) if kept else self._allocate(count)
        try:
            end = self._fill(part, view, host)
        except BaseException:
            if not kept:
                with self._lock:
                    self._meta.counts.release(host, count)
            raise
        step = self._mask + 1
        entries = list(range(host | c.COPIED, (host | c.COPIED) + count * step, step))
        with self._lock:
            self._file_end = max(self._file_end, end)
            self._meta.publish(first, entries)

    def _allocate(self, count: int) -> int:
        with self._lock:
            return self._meta.counts.allocate(count)

    def _fill(self, part: Part, view: memoryview, host: int) -> int:
        """Write ``view`` to its place in the clusters at ``host``, and what belongs around it.

        Returns the host offset behind what was written.
        """
        kind, _, offset, length = part
        head = offset & self._mask
        tail = -(head + length) & self._mask
        # What is not written of a new cluster at the end of a regular file reads as zeroes.
        fresh = kind != c.ZERO_ALLOC and self._meta.counts.fresh_is_zero
        if (not head and not tail) or (fresh and self._reads_zero(part)):
            self.file.pwrite(view, host + head)
            return host + head + length
        self._fill_around(view, host, offset)
        return host + head + length + tail

    def _reads_zero(self, part: Part) -> bool:
        """Whether all of the clusters that the part touches read as zeroes without it."""
        kind, _, offset, length = part
        start, end = align_down(offset, self._mask + 1), align_up(offset + length, self._mask + 1)
        if kind == c.UNALLOCATED:
            return not self._in_backing(start, end - start)
        return kind in (c.ZERO_PLAIN, c.ZERO_ALLOC)

    def _fill_around(self, view: memoryview, host: int, offset: int) -> None:
        """The first and the last cluster by way of a buffer that has the old data around."""
        size = self._mask + 1
        while len(view):
            inside = offset & self._mask
            n = min(size - inside, len(view))
            if n == size:
                n = align_down(len(view), size)  # whole clusters: one write
                self.file.pwrite(view[:n], host)
            else:
                merged = self._old_cluster(offset >> self._bits)
                merged[inside : inside + n] = view[:n]
                self.file.pwrite(merged, host)
            host, offset, view = host + align_up(n, size), offset + n, view[n:]

    def _old_cluster(self, cluster: int) -> memoryview:
        """What the disk has there now, with zeroes behind its end."""
        data = memoryview(bytearray(self._mask + 1))
        start = cluster << self._bits
        for part in self._parts(start, min(len(data), self.size - start)):
            self._read_part(part, data[part[2] - start : part[2] - start + part[3]])
        return data

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        """Zero clusters, with their host clusters kept; what is no whole cluster is written.

        FAST_ZERO: EOPNOTSUPP where all of it would have to be written.
        """
        self._begin()
        start, stop = self._whole(offset, offset + length)
        if start >= stop or self.header.version == 2:
            if flags & CMD_FLAG_FAST_ZERO:
                raise OSError(errno.EOPNOTSUPP, "zeroes would have to be written", self.name)
            self._write_zeroes(offset, offset + length)
        else:
            self._write_zeroes(offset, start)
            self._zero_clusters(start >> self._bits, align_up(stop, self._mask + 1) >> self._bits)
            self._write_zeroes(stop, offset + length)
        if flags & CMD_FLAG_FUA or self._meta.crowded:
            self.flush()

    def _whole(self, start: int, end: int) -> tuple[int, int]:
        """The whole clusters within; the last one of the disk is whole if it goes to the end."""
        size = self._mask + 1
        return align_up(start, size), end if end == self.size else align_down(end, size)

    def _write_zeroes(self, offset: int, end: int) -> None:
        """Zeroes as data, where the disk does not read as zeroes already."""
        while offset < end:
            for part in self._some_parts(offset, min(end - offset, len(_ZEROES))):
                if not self._part_reads_zero(part):
                    self.pwrite(_ZEROES[: part[3]], part[2])
                offset = part[2] + part[3]

    def _part_reads_zero(self, part: Part) -> bool:
        kind, _, offset, length = part
        if kind == c.UNALLOCATED:
            return not self._in_backing(offset, length)
        return kind in (c.ZERO_PLAIN, c.ZERO_ALLOC)

    def _zero_clusters(self, first: int, stop: int, *, only_own: bool = False) -> None:
        """Set the zero flag, table by table; with ``only_own`` only where there is data."""
        per_table = self.header.l2_entries
        with self._ranges.exclusive(first, stop):
            while first < stop:
                end = min(stop, (first // per_table + 1) * per_table)
                with self._lock:
                    self._zero_in_table(first, end, only_own=only_own)
                first = end

    def _zero_in_table(self, first: int, stop: int, *, only_own: bool) -> None:
        for kind, host, count in self._map.lookup(first, stop - first):
            inside = self._in_backing(first << self._bits, count << self._bits)
            if kind == c.NORMAL:
                low = host | c.COPIED | c.ZERO
                entries = list(range(low, low + (count << self._bits), 1 << self._bits))
            elif only_own or kind in (c.ZERO_PLAIN, c.ZERO_ALLOC):
                entries = []
            else:
                entries = [c.ZERO] * count if kind != c.UNALLOCATED or inside else []
            if entries:
                self._meta.own_table(first // self.header.l2_entries)
                self._meta.publish(first, entries)
            first += count

    def trim(self, offset: int, length: int, flags: int = 0) -> None:
        """Whole clusters of our own read as zeroes from now on; nothing else changes.

        The host cluster is kept (see above), so no space comes back.
        """
        self._begin()
        start, stop = self._whole(offset, offset + length)
        if start < stop and self.header.version == 3:
            last = align_up(stop, self._mask + 1) >> self._bits
            self._zero_clusters(start >> self._bits, last, only_own=True)
        if flags & CMD_FLAG_FUA or self._meta.crowded:
            self.flush()

    def flush(self) -> None:
        """All is on stable storage: one sync, or two or three where clusters are new."""
        if not self.read_only:
            self._meta.flush()

    def close(self) -> None:
        """Write all metadata and close the files. OSError if that failed; they are closed then."""
        try:
            if self._meta.begun and not self._closed:
                self._closed = True
                self._meta.close()
        finally:
            super().close()


def read_header(file: Node, name: str) -> Header:
    """The validated header of ``file``; `NotAnImage`, `UnsupportedFeature` or `ImageCorrupt`."""
    start = _read(file, min(file.size, 512))
    data = _read(file, min(file.size, headers.cluster_size_of(start)))
    return headers.parse(data, file.size, name)


def _read(file: Node, length: int) -> bytes:
    data = bytearray(length)
    if length:
        file.pread_into(memoryview(data), 0)
    return bytes(data)

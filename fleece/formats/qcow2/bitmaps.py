# SPDX-License-Identifier: Apache-2.0
"""The persistent dirty bitmaps of a qcow2 image, as QEMU keeps them.

A bitmap is to be believed only if every program that wrote to the image recorded it. So before the
first write, all of them are marked in use, durably (`BitmapSet.begin`); when the image is closed
they are stored and the mark goes (`BitmapSet.store`). One that is found in use is inconsistent: it
can only be removed. The order of writes is that of formats.md §1.5: a crash at any moment leaves
bitmaps that are right, or inconsistent ones, and leaked clusters.

The functions here change the set of an open image, of which nothing else is done meanwhile; that is
on disk when the node is closed. Source: QEMU's ``docs/interop/qcow2``, "Bitmaps".
"""

import errno
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import numpy as np

from fleece.errors import AlreadyExists, ImageError, NotFound, UnsupportedFeature, UsageError
from fleece.formats.qcow2 import bitmap_directory as directory
from fleece.formats.qcow2 import constants as c
from fleece.formats.qcow2 import header as headers
from fleece.formats.qcow2 import overlap
from fleece.formats.qcow2.bitmap_directory import Bitmap, Place
from fleece.formats.qcow2.dirty_bits import Mark, StoredBitmap
from fleece.formats.qcow2.freespace import OTHER
from fleece.formats.qcow2.header import Header
from fleece.formats.qcow2.hosting import refresh_size
from fleece.units import align_up, is_power_of_two

if TYPE_CHECKING:
    from fleece.formats.qcow2.image import Qcow2Node
    from fleece.formats.qcow2.reader import Qcow2Reader

_LEAST_DEFAULT: Final = 4096
_MOST_DEFAULT: Final = 65536


class BitmapSet:
    """The bitmaps of an image that is open for writing, by their names."""

    def __init__(self, node: "Qcow2Node") -> None:
        """Read the directory. `ImageCorrupt` or OSError."""
        self._node = node
        self._meta = node._meta
        self._lock = threading.Lock()
        self._begun = False
        self.changed = False
        self._disk = directory.read(node.file, node.header, node.name)
        self.bitmaps = {bitmap.name: bitmap for bitmap in _bitmaps(node, self._disk)}
        self._removed: list[StoredBitmap] = []

    @property
    def recorder(self) -> Mark | None:
        """What to tell of every change; None if no bitmap wants to know."""
        active = [b for b in self.bitmaps.values() if b.enabled and not b.inconsistent]
        marks = [bitmap.marker() for bitmap in active]
        if len(marks) < 2:
            return marks[0] if marks else None

        def mark_all(offset: int, length: int) -> None:
            for mark in marks:
                mark(offset, length)

        return mark_all

    def begin(self) -> None:
        """Before the first write: no bitmap on disk is to be believed any more, durably."""
        with self._lock:
            if self._begun:
                return
            header = self._meta.header
            where = directory.place(header, self._node.name) if header.has_bitmaps else None
            if where is None:
                self._drop_extension(header)
            elif any(not entry.in_use for entry in self._disk):
                self._mark_in_use(header, where)
            self._begun = True

    def _drop_extension(self, header: Header) -> None:
        """Somebody wrote to the image who knows no bitmaps: what it has of them is of no use."""
        without = headers.with_extension(header, c.EXT_BITMAPS, None)
        without = replace(without, autoclear=header.autoclear & ~c.AUTOCLEAR_BITMAPS)
        if without != header:
            self._meta.set_header(without)

    def _mark_in_use(self, header: Header, where: Place) -> None:
        invalid = replace(header, autoclear=header.autoclear & ~c.AUTOCLEAR_BITMAPS)
        self._meta.set_header(invalid)
        self._disk = [replace(e, flags=e.flags | directory.IN_USE) for e in self._disk]
        data = directory.pack(self._disk)
        assert len(data) == where.size
        self._meta.check_place(where.offset, len(data), ignore=overlap.BITMAP_DIRECTORY)
        self._node.file.pwrite(memoryview(data), where.offset)
        self._node.file.flush()
        self._meta.set_header(header)

    def store(self) -> None:
        """Put all of them into the image, valid; the node is at rest, and was flushed.

        ImageError or OSError: on disk they are as before then (in use, once something was written).
        """
        if not (self._begun or self.changed):
            return
        self._meta.begin()
        old = self._meta.header
        where = directory.place(old, self._node.name) if old.has_bitmaps else None
        bitmaps = list(self.bitmaps.values())
        entries = [self._stored(bitmap) for bitmap in bitmaps]
        header = self._with_directory(old, entries)
        # What the header will point at is durable, and so are its counts.
        self._meta.write_all()
        refresh_size(self._node.file)
        self._node.set_header(header)
        if where is not None:
            self._free(where.offset, where.size, overlap.BITMAP_DIRECTORY)
        for bitmap, entry in zip(bitmaps, entries, strict=True):
            self._settle(bitmap, entry)
        for bitmap in self._removed:
            self._free_bitmap(bitmap)
        self._disk, self._removed, self._begun, self.changed = entries, [], False, False

    def _stored(self, bitmap: StoredBitmap) -> Bitmap:
        if not bitmap.inconsistent:
            entry = bitmap.write(self._place)
            if not bitmap.inconsistent:  # it may turn out to be only now
                return entry
        return replace(bitmap.entry, flags=bitmap.entry.flags | directory.IN_USE)

    def _place(self, data: bytes, kind: int = overlap.BITMAP_DATA) -> int:
        """Write bytes into new clusters, whole ones; where."""
        size = align_up(len(data), self._meta.header.cluster_size)
        with self._meta.lock:
            offset = self._meta.counts.allocate(size >> self._meta.header.cluster_bits)
            self._meta.overlap.claim(kind, offset, size)
        self._meta.check_place(offset, size, ignore=kind)
        self._node.file.pwrite(memoryview(data.ljust(size, b"\0")), offset)
        return offset

    def _with_directory(self, header: Header, entries: list[Bitmap]) -> Header:
        """The header that names a new directory, which is written; or none."""
        if not entries:
            header = replace(header, autoclear=header.autoclear & ~c.AUTOCLEAR_BITMAPS)
            return headers.with_extension(header, c.EXT_BITMAPS, None)
        data = directory.pack(entries)
        offset = self._place(data, overlap.BITMAP_DIRECTORY)
        place = Place(len(entries), len(data), offset)
        header = replace(header, autoclear=header.autoclear | c.AUTOCLEAR_BITMAPS)
        return headers.with_extension(header, c.EXT_BITMAPS, place.pack())

    def _settle(self, bitmap: StoredBitmap, entry: Bitmap) -> None:
        if bitmap.inconsistent:
            bitmap.entry = entry
            return
        old = bitmap.entry
        was_stored = bitmap.stored
        for host in bitmap.written(entry):
            self._free(host, self._meta.header.cluster_size, overlap.BITMAP_DATA)
        if was_stored and old.table_offset != entry.table_offset:
            self._free(old.table_offset, old.table_size * 8, overlap.BITMAP_DATA)

    def _free_bitmap(self, bitmap: StoredBitmap) -> None:
        """A table that cannot be read is a leak."""
        try:
            places = bitmap.read_table() & np.uint64(c.OFFSET_MASK)
        except OSError:
            return
        for host in places[places != 0].tolist():
            self._free(host, self._meta.header.cluster_size, overlap.BITMAP_DATA)
        self._free(bitmap.entry.table_offset, bitmap.entry.table_size * 8, overlap.BITMAP_DATA)

    def _free(self, offset: int, length: int, kind: int) -> None:
        bits = self._meta.header.cluster_bits
        clusters = align_up(length, 1 << bits) >> bits
        with self._meta.lock:
            self._meta.counts.retire(offset >> bits, clusters, OTHER)
            self._meta.overlap.release(kind, offset, clusters << bits)

    def add(self, bitmap: StoredBitmap) -> None:
        """A new one."""
        self.bitmaps[bitmap.name] = bitmap
        self.changed = True

    def remove(self, name: str) -> None:
        """Forget it, and free it in the image at `store`."""
        bitmap = self.bitmaps.pop(name)
        if bitmap.stored:
            self._removed.append(bitmap)
        self.changed = True


def _bitmaps(node: "Qcow2Reader", entries: list[Bitmap]) -> list[StoredBitmap]:
    return [StoredBitmap(node.file, node.header, node.size, entry) for entry in entries]


def load(node: "Qcow2Reader") -> list[StoredBitmap]:
    """The bitmaps of an open image, in the order that it has them in.

    Of a node that is written they are those that it records. `ImageCorrupt` or OSError.
    """
    if node.bitmaps is not None:
        return list(node.bitmaps.bitmaps.values())
    return _bitmaps(node, directory.read(node.file, node.header, node.name))


def find(node: "Qcow2Reader", name: str) -> StoredBitmap:
    """One that can be used. `NotFound`, or `ImageError` if it is inconsistent."""
    bitmap = next((bitmap for bitmap in load(node) if bitmap.name == name), None)
    if bitmap is None:
        raise NotFound(f"Dirty bitmap '{name}' not found")
    if bitmap.inconsistent:
        raise ImageError(
            f"Bitmap '{name}' is inconsistent and cannot be used; "
            "remove it with: fleece image bitmap --remove"
        )
    return bitmap


def default_granularity(node: "Qcow2Reader") -> int:
    """Bytes: the image's cluster size, within 4 KiB to 64 KiB."""
    return min(max(node.header.cluster_size, _LEAST_DEFAULT), _MOST_DEFAULT)


def add(
    node: "Qcow2Node", name: str, *, granularity: int | None = None, enabled: bool = True
) -> StoredBitmap:
    """A new bitmap, which is clean. ``granularity`` in bytes, a power of two from 512 to 2^31.

    `AlreadyExists`, `UsageError` (name, granularity), `UnsupportedFeature` (version 2) or
    `ImageError` (no room for it).
    """
    granularity = default_granularity(node) if granularity is None else granularity
    _check_new(node, name, granularity)
    bits = granularity.bit_length() - 1
    length = directory.table_entries(node.size, bits, node.header.cluster_size)
    if length << node.header.cluster_bits > directory.MAX_BITMAP_BYTES:
        raise ImageError(
            f"{node.name}: bitmap '{name}' would be over 512 MiB; "
            f"take a granularity above {granularity}"
        )
    bitmaps = _attached(node)
    placed = Place(len(bitmaps.bitmaps) + 1, 1, 0).pack()
    try:
        headers.build(headers.with_extension(node.header, c.EXT_BITMAPS, placed))
    except ValueError as error:
        raise ImageError(
            f"{node.name}: there is no room in the header for bitmaps: {error}"
        ) from None
    entry = Bitmap(name, 0, length, bits, directory.AUTO if enabled else 0)
    bitmap = StoredBitmap(node.file, node.header, node.size, entry, stored=False)
    bitmaps.add(bitmap)
    node.refresh_recorder()
    return bitmap


def _check_new(node: "Qcow2Node", name: str, granularity: int) -> None:
    known = load(node)
    if any(bitmap.name == name for bitmap in known):
        raise AlreadyExists(f"Bitmap already exists: {name}")
    if not name:
        raise UsageError("Bitmap name cannot be empty")
    if len(name.encode("utf-8", "surrogateescape")) > directory.MAX_NAME:
        raise UsageError(f"Bitmap name too long (maximum length is {directory.MAX_NAME} bytes)")
    if not is_power_of_two(granularity) or not 9 <= granularity.bit_length() - 1 <= 31:
        raise UsageError("Granularity must be power of 2 and at least 512, and at most 2 GiB")
    if node.header.version == 2:
        raise UnsupportedFeature(
            "Cannot store dirty bitmaps in qcow2 v2 files; use: fleece image amend -o compat=1.1"
        )
    if not node.size:
        raise ImageError("a disk of no bytes cannot have bitmaps")
    if len(known) >= directory.MAX_BITMAPS:
        raise ImageError(f"the image has {directory.MAX_BITMAPS} bitmaps already")


def remove(node: "Qcow2Node", name: str) -> None:
    """Also one that is inconsistent. `NotFound`."""
    if all(bitmap.name != name for bitmap in load(node)):
        raise NotFound(f"Dirty bitmap '{name}' not found")
    _attached(node).remove(name)
    node.refresh_recorder()


def clear(node: "Qcow2Node", name: str) -> None:
    """Nothing is dirty. `NotFound`, `ImageError`."""
    _used(node, name).clear()
    node.refresh_recorder()


def enable(node: "Qcow2Node", name: str, *, enabled: bool = True) -> None:
    """It records changes from now on, or does not. `NotFound`, `ImageError`."""
    _used(node, name).enabled = enabled
    node.refresh_recorder()


def disable(node: "Qcow2Node", name: str) -> None:
    """It does not record changes any more. `NotFound`, `ImageError`."""
    enable(node, name, enabled=False)


def merge(node: "Qcow2Node", name: str, sources: Sequence[StoredBitmap]) -> None:
    """What is dirty in ``sources`` (see `find`; other images' as well) becomes dirty in ``name``.

    `NotFound`, or `ImageError` if one is inconsistent or of a disk of another size: nothing is
    changed then. OSError if a source cannot be read.
    """
    target = find(node, name)
    for source in sources:
        if source.size != target.size:
            raise ImageError(
                f"Bitmaps are of different sizes (destination size is {target.size}, source size "
                f"is {source.size}) and can't be merged"
            )
    _used(node, name)
    for source in sources:
        for offset, length in source.dirty_extents() if source is not target else ():
            target.mark(offset, length)


def check_resize(node: "Qcow2Node", size: int) -> None:
    """`ImageError` if the disk cannot have ``size`` bytes because of a bitmap."""
    for bitmap in load(node):
        if bitmap.inconsistent:
            raise ImageError(
                f"{node.name}: Bitmap '{bitmap.name}' is inconsistent and cannot be resized; "
                "remove it with: fleece image bitmap --remove"
            )
        bits, cluster = bitmap.entry.granularity_bits, node.header.cluster_size
        if directory.table_entries(size, bits, cluster) * cluster > directory.MAX_BITMAP_BYTES:
            raise ImageError(f"{node.name}: Bitmap '{bitmap.name}' would be over 512 MiB")


def resize(node: "Qcow2Node", size: int) -> None:
    """The disk gets ``size`` bytes: call it before the header says so, or right after.

    What is new is clean. `ImageError` as `check_resize`: nothing is changed then. All of them are
    marked in use on disk first.
    """
    check_resize(node, size)
    if node.bitmaps is None:
        return
    node.bitmaps.changed = True
    node.bitmaps.begin()
    for bitmap in node.bitmaps.bitmaps.values():
        try:
            bitmap.resize(size)
        except OSError:  # what it has cannot be read
            bitmap.inconsistent = True
    node.refresh_recorder()


def mark_all(node: "Qcow2Node") -> None:
    """All of the disk changes: what records that is all dirty."""
    if node.bitmaps is not None and node.size and (record := node.bitmaps.recorder):
        node.bitmaps.changed = True
        record(0, node.size)


def _attached(node: "Qcow2Node") -> BitmapSet:
    if node.read_only:
        raise OSError(errno.EPERM, "opened read-only", node.name)
    if node.bitmaps is None:
        node.bitmaps = BitmapSet(node)
    return node.bitmaps


def _used(node: "Qcow2Node", name: str) -> StoredBitmap:
    """One that is going to be changed."""
    bitmap = find(node, name)
    _attached(node).changed = True
    return bitmap

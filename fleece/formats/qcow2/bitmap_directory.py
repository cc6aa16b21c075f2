# SPDX-License-Identifier: Apache-2.0
"""The directory of persistent bitmaps: parsed with every field checked, and packed.

Source: QEMU's ``docs/interop/qcow2``, section "Bitmaps"; limits as QEMU has them (formats.md §1.5).
Nothing here imports numpy; what the bitmaps hold is not read.
"""

import struct
from dataclasses import dataclass
from typing import Final

from fleece.block.node import Node
from fleece.errors import ImageCorrupt
from fleece.formats.qcow2 import constants as c
from fleece.formats.qcow2.header import Header, extension
from fleece.units import align_up

_EXTENSION: Final = struct.Struct(">IIQQ")
_ENTRY: Final = struct.Struct(">QIIBBHI")
ENTRY_BYTES: Final = _ENTRY.size  # 24

IN_USE: Final = 1 << 0
AUTO: Final = 1 << 1
EXTRA_COMPATIBLE: Final = 1 << 2
_KNOWN_FLAGS: Final = IN_USE | AUTO | EXTRA_COMPATIBLE
_TYPE_DIRTY: Final = 1

MAX_BITMAPS: Final = 65535
MAX_DIRECTORY_BYTES: Final = 64 << 20
MAX_TABLE_ENTRIES: Final = 1 << 27
MAX_NAME: Final = 1023
MAX_BITMAP_BYTES: Final = 512 << 20
MIN_GRANULARITY_BITS: Final = 9
MAX_GRANULARITY_BITS: Final = 31


@dataclass(frozen=True)
class Bitmap:
    """One entry: ``table_size`` is in entries of 8 bytes; ``flags``: `IN_USE`, `AUTO`, ...

    ``extra`` is extra data, which QEMU refuses to open unless there is none.
    """

    name: str
    table_offset: int
    table_size: int
    granularity_bits: int
    flags: int = 0
    extra: bytes = b""

    @property
    def in_use(self) -> bool:
        """Whether it was not stored by the last program that had it: it is not to be believed."""
        return bool(self.flags & IN_USE)

    @property
    def granularity(self) -> int:
        """Bytes of the disk that one bit stands for."""
        return 1 << self.granularity_bits

    @property
    def packed_name(self) -> bytes:
        """The name as the image has it."""
        return self.name.encode("utf-8", "surrogateescape")


@dataclass(frozen=True)
class Place:
    """The header extension: how many bitmaps there are, and where their directory is (bytes)."""

    count: int
    size: int
    offset: int

    def pack(self) -> bytes:
        """The 24 bytes of the extension."""
        return _EXTENSION.pack(self.count, 0, self.size, self.offset)


def place(header: Header, name: str) -> Place | None:
    """Where the directory is; None if there is none. `ImageCorrupt` for what cannot be.

    Whether it is to be believed (the autoclear bit) is `Header.has_bitmaps`.
    """
    data = extension(header, c.EXT_BITMAPS)
    if data is None:
        return None
    if len(data) != _EXTENSION.size:
        raise ImageCorrupt(f"{name}: the bitmap extension has {len(data)} bytes, not 24")
    count, reserved, size, offset = _EXTENSION.unpack(data)
    if reserved or not 0 < count <= MAX_BITMAPS:
        raise ImageCorrupt(f"{name}: the bitmap extension is not valid ({count} bitmaps)")
    if not count * (ENTRY_BYTES + 1) <= size <= MAX_DIRECTORY_BYTES:
        raise ImageCorrupt(f"{name}: a bitmap directory of {size} bytes cannot be")
    if not offset or offset % header.cluster_size or offset > c.MAX_SIZE - size:
        raise ImageCorrupt(f"{name}: the bitmap directory at {offset:#x} is not where one can be")
    return Place(count, size, offset)


def read(file: Node, header: Header, name: str) -> list[Bitmap]:
    """The bitmaps of the image in ``file``; none if they are not to be believed.

    `ImageCorrupt` naming ``name``, or OSError.
    """
    where = place(header, name) if header.has_bitmaps else None
    if where is None:
        return []
    if where.offset + where.size > file.size:
        raise ImageCorrupt(f"{name}: the bitmap directory lies outside of the file")
    data = bytearray(where.size)
    file.pread_into(memoryview(data), where.offset)
    return parse(bytes(data), where.count, header, name)


def parse(data: bytes, count: int, header: Header, name: str) -> list[Bitmap]:
    """The entries of a whole directory, of which there must be ``count``. `ImageCorrupt`."""
    found: list[Bitmap] = []
    at = 0
    while at < len(data):
        bitmap, length = _entry(data, at, header, len(found), name)
        found.append(bitmap)
        at += length
    if at != len(data) or len(found) != count:
        raise ImageCorrupt(f"{name}: the bitmap directory does not have {count} entries")
    if len({bitmap.name for bitmap in found}) < count:
        raise ImageCorrupt(f"{name}: two of its bitmaps have one name")
    return found


def _entry(data: bytes, at: int, header: Header, number: int, name: str) -> tuple[Bitmap, int]:
    if at + ENTRY_BYTES > len(data):
        raise ImageCorrupt(f"{name}: the bitmap directory ends inside of entry {number}")
    table, table_size, flags, kind, bits, name_size, extra_size = _ENTRY.unpack_from(data, at)
    length = align_up(ENTRY_BYTES + extra_size + name_size, 8)
    if not 0 < name_size <= MAX_NAME or at + length > len(data):
        raise ImageCorrupt(f"{name}: entry {number} of the bitmap directory does not fit")
    if kind != _TYPE_DIRTY or flags & ~_KNOWN_FLAGS:
        raise ImageCorrupt(f"{name}: bitmap {number} has an unknown type or flag")
    if not MIN_GRANULARITY_BITS <= bits <= MAX_GRANULARITY_BITS:
        raise ImageCorrupt(f"{name}: bitmap {number} has a granularity of 2^{bits}")
    if not table or table % header.cluster_size or table > c.MAX_SIZE:
        raise ImageCorrupt(f"{name}: the table of bitmap {number} is not where one can be")
    if not 0 < table_size <= min(MAX_TABLE_ENTRIES, MAX_BITMAP_BYTES >> header.cluster_bits or 1):
        raise ImageCorrupt(f"{name}: the table of bitmap {number} has {table_size} entries")
    start = at + ENTRY_BYTES
    text = data[start + extra_size : start + extra_size + name_size]
    bitmap = Bitmap(
        text.decode("utf-8", "surrogateescape"),
        table,
        table_size,
        bits,
        flags,
        data[start : start + extra_size],
    )
    return bitmap, length


def table_entries(disk_size: int, granularity_bits: int, cluster_size: int) -> int:
    """How many entries the table of a bitmap of a disk of ``disk_size`` bytes must have."""
    bits = (disk_size + (1 << granularity_bits) - 1) >> granularity_bits
    length = (bits + 7) // 8
    return (length + cluster_size - 1) // cluster_size


def pack(bitmaps: list[Bitmap]) -> bytes:
    """The directory, each entry padded to 8 bytes. ValueError if it would be above a limit."""
    if len(bitmaps) > MAX_BITMAPS:
        raise ValueError(f"{len(bitmaps)} bitmaps are above {MAX_BITMAPS}")
    data = b"".join(map(_pack_entry, bitmaps))
    if len(data) > MAX_DIRECTORY_BYTES:
        raise ValueError("the bitmap directory would be longer than 64 MiB")
    return data


def _pack_entry(bitmap: Bitmap) -> bytes:
    text = bitmap.packed_name
    if not 0 < len(text) <= MAX_NAME:
        raise ValueError(f"the name of a bitmap has 1 to {MAX_NAME} bytes, not {len(text)}")
    entry = _ENTRY.pack(
        bitmap.table_offset,
        bitmap.table_size,
        bitmap.flags,
        _TYPE_DIRTY,
        bitmap.granularity_bits,
        len(text),
        len(bitmap.extra),
    )
    data = entry + bitmap.extra + text
    return data + bytes(-len(data) % 8)

# SPDX-License-Identifier: Apache-2.0
"""Where snapshots, bitmaps and the LUKS header of an image lie, without trust in any of it.

For the counting of references and for the overlap checks: only places and lengths are looked at.
Sources: QEMU's ``docs/interop/qcow2``, "Snapshots", "Bitmaps extension", "Full disk encryption
header pointer".
"""

import struct
from collections.abc import Callable, Iterator
from typing import Final, TypeAlias

import numpy as np

from fleece.block.node import Node
from fleece.formats.qcow2 import constants as c
from fleece.formats.qcow2.header import Header
from fleece.formats.qcow2.tally import Numbers, Problem, ProblemKind

Span: TypeAlias = tuple[int, int]
Found: TypeAlias = Callable[[int, int], bool]
"""Takes ``(offset, length)``, bytes of the file that hold a table; False if they are not there."""

_SNAPSHOT: Final = struct.Struct(">QIHHIIQII")
_MOST_SNAPSHOT_BYTES: Final = 64 << 20
_LONGEST_SNAPSHOT: Final = 40 + 1024 + 2 * 65535 + 7
_MOST_EXTRA: Final = 1024
_BITMAPS: Final = struct.Struct(">IIQQ")
_BITMAP: Final = struct.Struct(">QIIBBHI")
_MOST_DIRECTORY_BYTES: Final = 64 << 20
_MOST_BITMAP_ENTRIES: Final = 1 << 27
_BITMAP_RESERVED: Final = 0xFF000000000001FE
_MOST_CRYPTO_BYTES: Final = 64 << 20
_BATCH: Final = 1 << 20


def _extension(header: Header, number: int) -> bytes | None:
    return next((data for kind, data in header.extensions if kind == number), None)


def _read(file: Node, offset: int, length: int) -> bytearray:
    data = bytearray(length)
    if length:
        file.pread_into(memoryview(data), offset)
    return data


def snapshot_l1_tables(
    file: Node, header: Header, found: Found, problem: Callable[[Problem], None]
) -> list[Span]:
    """``(offset, entries)`` of the L1 table of each snapshot. ``found`` gets the snapshot table."""
    start, end = header.snapshots_offset, file.size
    if not header.snapshots:
        return []
    bad = Problem(ProblemKind.SNAPSHOT_TABLE, at=start, offset=start)
    if start % header.cluster_size or not header.cluster_size <= start < end:
        problem(bad)
        return []
    longest = min(_MOST_SNAPSHOT_BYTES, header.snapshots * _LONGEST_SNAPSHOT)
    data = _read(file, start, min(longest, end - start))
    tables: list[Span] = []
    at = 0
    for index in range(header.snapshots):
        if at + 40 > len(data):
            problem(bad)
            break
        offset, entries, id_length, name_length, *_, extra = _SNAPSHOT.unpack_from(data, at)
        if extra > _MOST_EXTRA:
            problem(bad)
            break
        kind = _snapshot_problem(header, offset, entries)
        if kind is None:
            tables.append((offset, entries))
        else:
            problem(Problem(kind, at=start + at, offset=offset, length=entries, index=index))
        at = -(-(at + 40 + extra + id_length + name_length) // 8) * 8
    found(start, at)
    return tables


def _snapshot_problem(header: Header, offset: int, entries: int) -> ProblemKind | None:
    if offset % header.cluster_size or offset > c.MAX_SIZE:
        return ProblemKind.SNAPSHOT_L1_UNALIGNED
    if entries * 8 > c.MAX_L1_BYTES:
        return ProblemKind.SNAPSHOT_L1_SIZE
    return None


def crypto_header(header: Header, problem: Callable[[Problem], None]) -> Span | None:
    """``(offset, length)`` of the LUKS header, if the image has one."""
    data = _extension(header, c.EXT_CRYPTO)
    if data is None or len(data) < 16 or header.crypt_method != 2:
        return None
    offset, length = struct.unpack_from(">QQ", data)
    if offset % header.cluster_size or offset > c.MAX_SIZE or length > _MOST_CRYPTO_BYTES:
        problem(Problem(ProblemKind.CRYPTO_HEADER, offset=offset, length=length))
        return None
    return offset, length


def bitmap_directory(header: Header) -> tuple[int, int, int] | None:
    """``(bitmaps, offset, length)`` of the directory, if the image has bitmaps that are valid."""
    data = _extension(header, c.EXT_BITMAPS)
    if data is None or len(data) < 24 or not header.autoclear & c.AUTOCLEAR_BITMAPS:
        return None
    count, _, length, offset = _BITMAPS.unpack_from(data)
    return count, offset, length


def bitmap_tables(
    file: Node, header: Header, found: Found, problem: Callable[[Problem], None]
) -> Iterator[Numbers]:
    """Host offsets of the data of bitmaps. ``found`` gets the directory and the bitmap tables."""
    place = bitmap_directory(header)
    if place is None:
        return
    count, start, length = place
    bad = Problem(ProblemKind.BITMAP_DIRECTORY, at=start, offset=start, length=length)
    if start % header.cluster_size or length > _MOST_DIRECTORY_BYTES or start > c.MAX_SIZE:
        problem(bad)
        return
    if not found(start, length):
        return
    entries, whole = _directory(_read(file, start, min(length, max(0, file.size - start))), count)
    room = file.size  # tables that lie on each other must not cost more than the file is long
    for index, (offset, size) in enumerate(entries):
        room -= size * 8
        unaligned = offset % header.cluster_size or offset > c.MAX_SIZE
        if unaligned or size > _MOST_BITMAP_ENTRIES or room < 0:
            problem(Problem(ProblemKind.BITMAP_DIRECTORY, at=start, offset=offset, index=index))
        elif found(offset, size * 8):
            yield from _bitmap_data(file, header, (offset, size), index, problem)
    if not whole:
        problem(bad)


def _directory(data: bytearray, count: int) -> tuple[list[Span], bool]:
    """``(table offset, entries)`` of each bitmap, and whether there were ``count`` of them."""
    entries: list[Span] = []
    at = 0
    while len(entries) < count and at + 24 <= len(data):
        offset, size, _, _, _, name, extra = _BITMAP.unpack_from(data, at)
        entries.append((offset, size))
        at = -(-(at + 24 + name + extra) // 8) * 8
    return entries, len(entries) == count


def _bitmap_data(
    file: Node, header: Header, table: Span, index: int, problem: Callable[[Problem], None]
) -> Iterator[Numbers]:
    """Where the data of one bitmap lies."""
    offset, size = table
    end = min(offset + size * 8, file.size & ~7)
    for start in range(offset, end, _BATCH):
        words = np.frombuffer(_read(file, start, min(_BATCH, end - start)), ">u8")
        words = words.astype(np.uint64)
        places = words & np.uint64(c.OFFSET_MASK)
        bad = words & np.uint64(_BITMAP_RESERVED) != 0
        bad |= (places & np.uint64(header.cluster_size - 1)) != 0
        bad |= (places != 0) & (words & np.uint64(1) != 0)
        for i in np.flatnonzero(bad)[:100].tolist():
            entry = int(words[i])
            problem(Problem(ProblemKind.BITMAP_ENTRY, at=start + i * 8, entry=entry, index=index))
        yield places[(places != 0) & ~bad].astype(np.int64)

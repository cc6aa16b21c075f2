# SPDX-License-Identifier: Apache-2.0
"""The table of internal snapshots: parsed with every field checked, and packed.

Source: QEMU's ``docs/interop/qcow2``, section "Snapshots"; limits as QEMU has them (formats.md
§1.4). Nothing here imports numpy, and nothing reads a table that these functions do not describe.
"""

import struct
from dataclasses import dataclass
from typing import Final

from fleece.block.node import Node
from fleece.errors import ImageCorrupt
from fleece.formats.qcow2 import constants as c
from fleece.formats.qcow2.header import Header
from fleece.units import align_up

_ENTRY: Final = struct.Struct(">QIHHIIQII")
_LARGE_SIZE: Final = struct.Struct(">Q")
ENTRY_BYTES: Final = _ENTRY.size  # 40
MAX_TABLE_BYTES: Final = 64 << 20
MAX_EXTRA: Final = 1024
MIN_V3_EXTRA: Final = 16
_NO_ICOUNT: Final = (1 << 64) - 1
_PIECE: Final = 64 << 10


@dataclass(frozen=True)
class Snapshot:
    """One entry. ``identity`` and ``name`` are bytes that the image chose: show them printable.

    ``seconds`` since 1970 and ``nanoseconds``: when it was made; ``clock``: the guest's own clock,
    in nanoseconds. ``disk_size`` is None where the entry does not say (QEMU before 1.1): the
    current size then. ``icount`` is None without a recorded execution. ``unknown`` is what the
    extra data has behind the fields that are known here; it is kept.
    """

    l1_offset: int
    l1_size: int
    identity: bytes
    name: bytes
    seconds: int = 0
    nanoseconds: int = 0
    clock: int = 0
    vm_state_size: int = 0
    disk_size: int | None = None
    icount: int | None = None
    extra_length: int = 24
    unknown: bytes = b""


def read(file: Node, header: Header, name: str) -> list[Snapshot]:
    """All snapshots of the image in ``file``. `ImageCorrupt` naming ``name``, or OSError.

    Takes memory for the entries only, whatever the file's length.
    """
    found: list[Snapshot] = []
    window = _Window(file, header.snapshots_offset)
    at = 0
    for number in range(header.snapshots):
        snapshot, length = _read_entry(window, at, header, number, name)
        found.append(snapshot)
        at += length
        if at > MAX_TABLE_BYTES:
            raise ImageCorrupt(f"{name}: the snapshot table is longer than 64 MiB")
    return found


class _Window:
    """The table in pieces, without the end of the file being passed."""

    def __init__(self, file: Node, start: int) -> None:
        self._file = file
        self._start = start
        self._at = 0
        self._data = b""

    def bytes(self, at: int, length: int) -> bytes:
        """``length`` bytes of the table from ``at``, or fewer at the end of the file."""
        end = at + length
        if not (self._at <= at and end <= self._at + len(self._data)):
            there = max(0, self._file.size - self._start - at)
            piece = bytearray(min(max(length, _PIECE), there))
            if piece:
                self._file.pread_into(memoryview(piece), self._start + at)
            self._at, self._data = at, bytes(piece)
        return self._data[at - self._at : end - self._at]


def _read_entry(
    window: _Window, at: int, header: Header, number: int, name: str
) -> tuple[Snapshot, int]:
    head = window.bytes(at, ENTRY_BYTES)
    if len(head) < ENTRY_BYTES:
        raise ImageCorrupt(f"{name}: the file ends inside of its snapshot table")
    *_, id_length, name_length, _s, _ns, _clock, _vm, extra_length = _ENTRY.unpack(head)
    if extra_length > MAX_EXTRA:
        raise ImageCorrupt(f"{name}: snapshot {number} has {extra_length} bytes of extra data")
    length = ENTRY_BYTES + extra_length + id_length + name_length
    data = window.bytes(at, length)
    if len(data) < length:
        raise ImageCorrupt(f"{name}: the file ends inside of its snapshot table")
    snapshot = parse_entry(data)
    _check(snapshot, header, number, name)
    return snapshot, align_up(length, 8)


def parse_entry(data: bytes) -> Snapshot:
    """One whole entry, without the padding behind it. Its fields are not checked."""
    l1_offset, l1_size, id_length, name_length, seconds, nanoseconds, clock, vm_small, extra = (
        _ENTRY.unpack_from(data)
    )
    more = data[ENTRY_BYTES : ENTRY_BYTES + extra]
    at = ENTRY_BYTES + extra
    large, disk_size, icount = (
        _LARGE_SIZE.unpack_from(more, start)[0] if extra >= start + 8 else None
        for start in (0, 8, 16)
    )
    return Snapshot(
        l1_offset=l1_offset,
        l1_size=l1_size,
        identity=data[at : at + id_length],
        name=data[at + id_length : at + id_length + name_length],
        seconds=seconds,
        nanoseconds=nanoseconds,
        clock=clock,
        vm_state_size=vm_small if large is None else large,
        disk_size=disk_size,
        icount=None if icount == _NO_ICOUNT else icount,
        extra_length=min(extra, 24),
        unknown=more[24:],
    )


def _check(snapshot: Snapshot, header: Header, number: int, name: str) -> None:
    if header.version == 3 and snapshot.extra_length < MIN_V3_EXTRA:
        raise ImageCorrupt(f"{name}: snapshot {number} does not say how large its disk is")
    if snapshot.l1_size * 8 > c.MAX_L1_BYTES:
        raise ImageCorrupt(f"{name}: the L1 table of snapshot {number} is above the limit")
    if snapshot.l1_offset % header.cluster_size or snapshot.l1_offset > c.MAX_SIZE:
        raise ImageCorrupt(f"{name}: the L1 table of snapshot {number} is not aligned to a cluster")
    if snapshot.l1_size and not snapshot.l1_offset:
        raise ImageCorrupt(f"{name}: the L1 table of snapshot {number} lies in the header")
    if (snapshot.disk_size or 0) > c.MAX_SIZE:
        raise ImageCorrupt(f"{name}: the disk of snapshot {number} is larger than 2^63 - 1 bytes")


def pack(snapshots: list[Snapshot]) -> bytes:
    """The table, each entry padded to 8 bytes. ValueError if it would be above a limit."""
    if len(snapshots) > c.MAX_SNAPSHOTS:
        raise ValueError(f"{len(snapshots)} internal snapshots are above {c.MAX_SNAPSHOTS}")
    data = b"".join(map(_pack_entry, snapshots))
    if len(data) > MAX_TABLE_BYTES:
        raise ValueError("the snapshot table would be longer than 64 MiB")
    return data


def _pack_entry(snapshot: Snapshot) -> bytes:
    if len(snapshot.identity) > 0xFFFF or len(snapshot.name) > 0xFFFF:
        raise ValueError("the name of a snapshot cannot be longer than 65535 bytes")
    extra = b"".join(
        _LARGE_SIZE.pack(_NO_ICOUNT if value is None else value)
        for value in (snapshot.vm_state_size, snapshot.disk_size or 0, snapshot.icount)
    )
    extra = extra[: snapshot.extra_length] + snapshot.unknown
    small = snapshot.vm_state_size if snapshot.vm_state_size < 1 << 32 else 0
    entry = _ENTRY.pack(
        snapshot.l1_offset,
        snapshot.l1_size,
        len(snapshot.identity),
        len(snapshot.name),
        snapshot.seconds,
        snapshot.nanoseconds,
        snapshot.clock,
        small,
        len(extra),
    )
    data = entry + extra + snapshot.identity + snapshot.name
    return data + bytes(-len(data) % 8)

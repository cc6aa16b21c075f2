"""The snapshot table and the bitmap directory: what is packed is read, and every limit is held."""

import struct
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleece.block.memory import MemoryNode
from fleece.errors import ImageCorrupt
from fleece.formats.qcow2 import bitmap_directory, snapshot_table
from fleece.formats.qcow2 import constants as c
from fleece.formats.qcow2.bitmap_directory import Bitmap, Place
from fleece.formats.qcow2.header import Header
from fleece.formats.qcow2.snapshot_table import Snapshot

CLUSTER = 65536
HEADER = Header(
    version=3,
    cluster_bits=16,
    size=1 << 30,
    l1_size=2,
    l1_offset=CLUSTER,
    refcount_table_offset=2 * CLUSTER,
    refcount_table_clusters=1,
)


def snapshot(**changes: Any) -> Snapshot:
    return replace(
        Snapshot(4 * CLUSTER, 2, b"1", b"one", 1, 2, 3, 1 << 33, 1 << 30, None, 24), **changes
    )


def stored(data: bytes, offset: int = CLUSTER) -> MemoryNode:
    node = MemoryNode(offset + max(len(data), 1))
    if data:
        node.pwrite(memoryview(data), offset)
    return node


def read_snapshots(data: bytes, count: int, **changes: Any) -> list[Snapshot]:
    header = replace(HEADER, snapshots=count, snapshots_offset=CLUSTER, **changes)
    with closing(stored(data)) as node:
        return snapshot_table.read(node, header, "x.qcow2")


_SNAPSHOTS = st.builds(
    Snapshot,
    l1_offset=st.integers(1, 1 << 40).map(lambda n: n << 16),
    l1_size=st.integers(0, c.MAX_L1_BYTES // 8),
    identity=st.binary(max_size=10),
    name=st.binary(max_size=30),
    seconds=st.integers(0, 0xFFFFFFFF),
    nanoseconds=st.integers(0, 10**9),
    clock=st.integers(0, 1 << 63),
    vm_state_size=st.integers(0, 1 << 62),
    disk_size=st.integers(0, c.MAX_SIZE),
    icount=st.none() | st.integers(0, 1 << 62),
    unknown=st.binary(max_size=20),
)


@settings(derandomize=True, deadline=None, max_examples=80)
@given(st.lists(_SNAPSHOTS, max_size=8))
def test_packed_snapshots_are_read_again(snapshots: list[Snapshot]) -> None:
    """formats.md §1.4: unknown extra data is kept."""
    data = snapshot_table.pack(snapshots)
    assert len(data) % 8 == 0
    assert read_snapshots(data, len(snapshots)) == snapshots


def test_an_entry_of_old_qemus_has_no_extra_data() -> None:
    old = snapshot(extra_length=0, disk_size=None, vm_state_size=77)
    assert read_snapshots(snapshot_table.pack([old]), 1, version=2) == [old]
    with pytest.raises(ImageCorrupt, match="how large"):
        read_snapshots(snapshot_table.pack([old]), 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"l1_size": c.MAX_L1_BYTES // 8 + 1}, "above the limit"),
        ({"l1_offset": 4 * CLUSTER + 512}, "not aligned"),
        ({"l1_offset": 1 << 63}, "not aligned"),
        ({"l1_offset": 0}, "in the header"),
        ({"disk_size": 1 << 63}, "larger than"),
        ({"unknown": bytes(1024)}, "bytes of extra data"),
    ],
)
def test_a_snapshot_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    good = snapshot_table.pack([snapshot()])
    with pytest.raises(ImageCorrupt, match=message) as caught:
        read_snapshots(good + snapshot_table.pack([snapshot(**changes)]), 2)
    assert str(caught.value).startswith("x.qcow2: ")


def test_a_snapshot_table_ends_with_the_file() -> None:
    data = snapshot_table.pack([snapshot(), snapshot(name=b"n" * 60_000)])
    for length in (0, 20, 60, 90, 100, 60_000):
        with pytest.raises(ImageCorrupt, match="ends inside"):
            read_snapshots(data[:length], 2)
    long = snapshot_table.pack([snapshot(name=b"n" * 65_535)] * 1000)
    with pytest.raises(ImageCorrupt, match="64 MiB"):
        read_snapshots(long + long, 2000)


def test_what_is_above_a_limit_is_not_packed() -> None:
    for snapshots in ([snapshot(name=bytes(65_536))], [snapshot(name=bytes(65_000))] * 1100):
        with pytest.raises(ValueError, match="longer"):
            snapshot_table.pack(snapshots)
    with pytest.raises(ValueError, match="above 65536"):
        snapshot_table.pack([snapshot()] * 65_537)


def bitmap(**changes: Any) -> Bitmap:
    return replace(Bitmap("b0", 5 * CLUSTER, 1, 16, bitmap_directory.AUTO), **changes)


def with_place(place: Place, *, autoclear: int = c.AUTOCLEAR_BITMAPS) -> Header:
    return replace(HEADER, extensions=((c.EXT_BITMAPS, place.pack()),), autoclear=autoclear)


def read_bitmaps(data: bytes, count: int, **changes: Any) -> list[Bitmap]:
    header = with_place(replace(Place(count, len(data), CLUSTER), **changes))
    with closing(stored(data)) as node:
        return bitmap_directory.read(node, header, "x.qcow2")


_BITMAPS = st.builds(
    Bitmap,
    name=st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=30),
    table_offset=st.integers(1, 1 << 40).map(lambda n: n << 16),
    table_size=st.integers(1, 8192),
    granularity_bits=st.integers(9, 31),
    flags=st.integers(0, 7),
    extra=st.binary(max_size=20),
)


@settings(derandomize=True, deadline=None, max_examples=80)
@given(st.lists(_BITMAPS, min_size=1, max_size=8, unique_by=lambda b: b.name))
def test_packed_bitmaps_are_read_again(bitmaps: list[Bitmap]) -> None:
    data = bitmap_directory.pack(bitmaps)
    assert len(data) % 8 == 0
    assert read_bitmaps(data, len(bitmaps)) == bitmaps


def test_bitmaps_are_not_believed_without_the_autoclear_bit() -> None:
    """formats.md §1.5: valid only while autoclear bit 0 is set."""
    data = bitmap_directory.pack([bitmap()])
    header = with_place(Place(1, len(data), CLUSTER), autoclear=0)
    with closing(stored(data)) as node:
        assert bitmap_directory.read(node, header, "x") == []
        assert bitmap_directory.place(header, "x") == Place(1, len(data), CLUSTER)
        assert bitmap_directory.read(node, HEADER, "x") == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"table_offset": 0}, "not where one can be"),
        ({"table_offset": 512}, "not where one can be"),
        ({"table_offset": 1 << 63}, "not where one can be"),
        ({"table_size": 0}, "0 entries"),
        ({"table_size": 8193}, "8193 entries"),
        ({"granularity_bits": 8}, "granularity"),
        ({"granularity_bits": 32}, "granularity"),
        ({"flags": 8}, "unknown type or flag"),
        ({"name": "same"}, "one name"),
    ],
)
def test_a_bitmap_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    data = bitmap_directory.pack([bitmap(name="same"), bitmap(**changes)])
    with pytest.raises(ImageCorrupt, match=message):
        read_bitmaps(data, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 0}, "not valid"),
        ({"count": 65_536}, "not valid"),
        ({"count": 2}, "does not have 2"),
        ({"size": 0}, "of 0 bytes"),
        ({"size": (64 << 20) + 8}, "cannot be"),
        ({"size": 64 << 20}, "outside of the file"),
        ({"offset": 0}, "not where one can be"),
        ({"offset": CLUSTER + 512}, "not where one can be"),
        ({"offset": (1 << 63) - CLUSTER}, "not where one can be|outside"),
        ({"offset": (1 << 64) - CLUSTER}, "not where one can be"),
    ],
)
def test_a_directory_that_cannot_be_is_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ImageCorrupt, match=message):
        read_bitmaps(bitmap_directory.pack([bitmap(name="n" * 40)]), **{"count": 1, **changes})


def test_an_entry_must_fit_into_the_directory() -> None:
    good = bitmap_directory.pack([bitmap()])
    for at, value in ((18, b"\0\0"), (18, b"\4\0"), (20, b"\xff\xff\xff\xff"), (16, b"\2")):
        bad = bytearray(good)
        bad[at : at + len(value)] = value
        with pytest.raises(ImageCorrupt, match=r"does not fit|unknown type"):
            read_bitmaps(bytes(bad), 1)
    with pytest.raises(ImageCorrupt, match="ends inside"):
        read_bitmaps(good + bytes(8), 1)
    bad_extension = replace(HEADER, extensions=((c.EXT_BITMAPS, bytes(8)),), autoclear=1)
    with pytest.raises(ImageCorrupt, match="8 bytes"):
        bitmap_directory.place(bad_extension, "x")
    reserved = struct.pack(">IIQQ", 1, 1, len(good), CLUSTER)
    with pytest.raises(ImageCorrupt, match="not valid"):
        bitmap_directory.place(replace(HEADER, extensions=((c.EXT_BITMAPS, reserved),)), "x")


def test_a_directory_above_a_limit_is_not_packed() -> None:
    for bitmaps in ([bitmap(name="")], [bitmap(name="x" * 1024)], [bitmap()] * 65_536):
        with pytest.raises(ValueError, match=r"bytes, not|above"):
            bitmap_directory.pack(bitmaps)


@pytest.mark.parametrize(
    ("size", "bits", "expected"),
    [(0, 16, 0), (1, 16, 1), (1 << 40, 16, 32), ((1 << 40) + 1, 16, 33), (1 << 30, 9, 4)],
)
def test_a_table_has_an_entry_for_each_cluster_of_bits(size: int, bits: int, expected: int) -> None:
    assert bitmap_directory.table_entries(size, bits, CLUSTER) == expected

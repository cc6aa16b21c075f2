"""Which cluster holds which metadata: formats.md §1.9."""

import struct
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fleece.block.file import FileNode
from fleece.formats.qcow2 import header as headers
from fleece.formats.qcow2 import options, overlap
from fleece.formats.qcow2.header import Header
from fleece.formats.qcow2.image import read_header
from fleece.formats.qcow2.overlap import MetadataMap
from tests.support.qcow2 import qemu_img, qemu_io

SIZE = 65536


@contextmanager
def loaded(path: Path, checks: int = overlap.ALL) -> Iterator[tuple[MetadataMap, Header]]:
    with closing(FileNode(path, read_only=True, locking=False)) as file:
        header = read_header(file, "test")
        known = MetadataMap(header, checks)
        known.load(file)
        yield known, header


def image(
    tmp_path: Path, *, snapshot: bool = False, bitmap: bool = False, luks: bool = False
) -> Path:
    path = tmp_path / "disk.qcow2"
    if luks:
        return encrypted(path)
    qemu_img("create", "-q", "-f", "qcow2", path, "1G")
    qemu_io(path, "write 0 1M", "write 600M 1M")
    if snapshot:
        qemu_img("snapshot", "-c", "one", path)
        qemu_io(path, "write 600M 64k")
    if bitmap:
        qemu_img("bitmap", "--add", "--enable", path, "b0")
        qemu_io(path, "write 3M 64k")
    return path


def encrypted(path: Path) -> Path:
    """An image whose header says that three clusters from the eighth on are a LUKS header."""
    qemu_img("create", "-q", "-f", "qcow2", path, "1G")
    with closing(FileNode(path, locking=False)) as file:
        header = read_header(file, "test")
        place = struct.pack(">QQ", 8 * SIZE, 3 * SIZE - 100)
        changed = replace(headers.with_extension(header, 0x0537BE77, place), crypt_method=2)
        headers.rewrite(file, header, changed, "test")
        file.pwrite(memoryview(bytes(1)), 11 * SIZE - 1)
    return path


def entries(path: Path, offset: int, count: int) -> list[int]:
    with path.open("rb") as file:
        file.seek(offset)
        return [e & 0x00FFFFFFFFFFFE00 for e in struct.unpack(f">{count}Q", file.read(count * 8))]


def test_the_levels_and_switches_are_those_of_qemu() -> None:
    """formats.md §1.9: the table."""
    names = list(overlap.SWITCHES)
    table = {
        "none": [],
        "constant": [
            "main-header",
            "active-l1",
            "refcount-table",
            "snapshot-table",
            "bitmap-directory",
            "luks-header",
        ],
        "cached": [name for name in names if name != "inactive-l2"],
        "all": names,
    }
    for level, kinds in table.items():
        assert overlap.LEVELS[level] == sum(overlap.SWITCHES[kind] for kind in kinds)
    assert [overlap.SWITCHES[n] for n in names] == [1 << bit for bit in range(11)]
    assert options.Qcow2Options().overlap_check == overlap.ALL
    assert set(overlap.NAMES) == set(overlap.SWITCHES.values())


def test_each_table_of_an_image_is_known(tmp_path: Path) -> None:
    path = image(tmp_path, snapshot=True, bitmap=True)
    with loaded(path) as (known, header):
        l2 = [e for e in entries(path, header.l1_offset, header.l1_size) if e]
        block = entries(path, header.refcount_table_offset, 1)[0]
        snapshot_l1 = entries(path, header.snapshots_offset, 1)[0]
        data = dict(header.extensions)[0x23852875]
        directory = struct.unpack(">IIQQ", data)[3]
        bitmap_table = struct.unpack(">Q", path.read_bytes()[directory : directory + 8])[0]
        bitmap_data = entries(path, bitmap_table, 1)[0]
        old = [e for e in entries(path, snapshot_l1, header.l1_size) if e and e not in l2]
        wanted = {
            "qcow2_header": [0],
            "active L1 table": [header.l1_offset],
            "active L2 table": l2,
            "refcount table": [header.refcount_table_offset],
            "refcount block": [block],
            "snapshot table": [header.snapshots_offset],
            "inactive L1 table": [snapshot_l1],
            "inactive L2 table": old,
            "bitmap directory": [directory],
            "bitmap": [bitmap_table, bitmap_data],
        }
        for name, places in wanted.items():
            assert places, name
            for place in places:
                assert known.hit(place, 1) == name
                assert known.hit(place + SIZE - 1, 1) == name
                assert known.hit(place - 1, 2) is not None or place == 0
        of_data = entries(path, l2[0], 16)
        assert len(of_data) == 16
        assert all(known.hit(place, SIZE) is None for place in of_data)
        assert known.hit(of_data[0], 16 * SIZE) is None
        assert known.hit(header.size * 2, SIZE) is None


def test_the_luks_header_is_known(tmp_path: Path) -> None:
    path = image(tmp_path, luks=True)
    with loaded(path) as (known, header):
        offset, length = struct.unpack(">QQ", dict(header.extensions)[0x0537BE77])
        assert known.hit(offset, 512) == "LUKS header"
        assert known.hit(offset + length - 1, 1) == "LUKS header"


def test_a_writer_of_metadata_may_write_its_own_kind(tmp_path: Path) -> None:
    with loaded(image(tmp_path)) as (known, header):
        assert known.hit(header.l1_offset, 8, ignore=overlap.ACTIVE_L1) is None
        assert known.hit(header.l1_offset, 8, ignore=overlap.ACTIVE_L2) == "active L1 table"


@pytest.mark.parametrize("level", list(overlap.LEVELS))
def test_a_level_tells_of_its_kinds_only(level: str, tmp_path: Path) -> None:
    path = image(tmp_path, snapshot=True)
    with loaded(path, overlap.LEVELS[level]) as (known, header):
        l2 = entries(path, header.l1_offset, 1)[0]
        assert (known.hit(0, 1) is not None) == (level != "none")
        assert (known.hit(l2, 1) is not None) == (level in ("cached", "all"))
        old_l1 = entries(path, header.snapshots_offset, 1)[0]
        old = [e for e in entries(path, old_l1, header.l1_size) if e]
        # The table of the first half of the disk has both users.
        assert known.hit(old[0], 1, ignore=overlap.ACTIVE_L2) == (
            "inactive L2 table" if level == "all" else None
        )


def test_claims_and_releases_are_told_of_at_once(tmp_path: Path) -> None:
    with loaded(image(tmp_path)) as (known, header):
        far = 1 << 50
        for place in (100 * SIZE, far):
            known.claim(overlap.BITMAP_DATA, place, 2 * SIZE)
            assert known.hit(place + SIZE, 1) == "bitmap"
            known.claim(overlap.ACTIVE_L2, place + SIZE, SIZE)
            known.release(overlap.BITMAP_DATA, place, 2 * SIZE)
            assert known.hit(place, SIZE) is None
            assert known.hit(place, SIZE + 1) == "active L2 table"
        known.release(overlap.ACTIVE_L1, header.l1_offset, 8)
        assert known.hit(header.l1_offset, 8) is None
        known.forget(overlap.ACTIVE_L2 | overlap.REFCOUNT_BLOCK)
        assert known.hit(100 * SIZE, 2 * SIZE) is None
        assert known.hit(entries(Path(header_path(tmp_path)), header.l1_offset, 1)[0], 1) is None


def header_path(tmp_path: Path) -> Path:
    return tmp_path / "disk.qcow2"


def test_what_is_known_of_a_range_agrees_with_single_looks(tmp_path: Path) -> None:
    with loaded(image(tmp_path, snapshot=True, bitmap=True)) as (known, _):
        known.claim(overlap.LUKS_HEADER, 30 * SIZE, SIZE)
        known.hit(0, 1)  # from here on the snapshots' tables are known
        single = [known.hit(n * SIZE, 1) is not None for n in range(80)]
        assert known.known(0, 80).tolist() == single
        assert known.known(7, 40).tolist() == single[7:47]
        assert any(single)


def test_a_second_load_finds_what_changed(tmp_path: Path) -> None:
    path = image(tmp_path)
    with closing(FileNode(path, read_only=True, locking=False)) as file:
        known = MetadataMap(read_header(file, "test"))
        known.load(file)
        known.claim(overlap.BITMAP_DATA, 100 * SIZE, SIZE)
    qemu_img("snapshot", "-c", "one", path)
    with closing(FileNode(path, read_only=True, locking=False)) as file:
        header = read_header(file, "test")
        assert known.hit(header.snapshots_offset, 1) is None
        known.load(file, header)
        assert known.hit(header.snapshots_offset, 1) == "snapshot table"
        assert known.hit(100 * SIZE, 1) is None


def test_tables_that_cannot_be_are_left_out(tmp_path: Path) -> None:
    path = image(tmp_path)
    with closing(FileNode(path, read_only=True, locking=False)) as file:
        header = read_header(file, "test")
    with path.open("r+b") as out:
        out.seek(header.l1_offset)
        out.write(struct.pack(">Q", (1 << 63) | (1 << 55)))
    with loaded(path) as (known, _):
        assert known.hit(1 << 55, 1) is None
        assert len(known._filter) < 1000


def test_a_look_at_plain_data_is_cheap(tmp_path: Path) -> None:
    with loaded(image(tmp_path)) as (known, _):
        best = min(_time(known) for _ in range(20))
        assert best < 20e-6  # a few hundred ns; the bound is for a machine under load


def _time(known: MetadataMap) -> float:
    begun = time.perf_counter()
    for _ in range(100):
        known.hit(500 * SIZE, SIZE)
    return (time.perf_counter() - begun) / 100


def test_many_tables_take_little_memory() -> None:
    header = Header(
        version=3,
        cluster_bits=16,
        size=1 << 40,
        l1_size=2048,
        l1_offset=SIZE,
        refcount_table_offset=2 * SIZE,
        refcount_table_clusters=1,
    )
    known = MetadataMap(header)
    clusters = np.arange(0, 1 << 24, 8192)
    known._clusters, known._kinds = clusters, np.full(len(clusters), overlap.ACTIVE_L2, np.uint16)
    known._set_filter(clusters)
    assert len(known._filter) <= 1 << 20
    assert known.hit(8192 * SIZE, 1) == "active L2 table"
    assert known.hit(8191 * SIZE, SIZE) is None

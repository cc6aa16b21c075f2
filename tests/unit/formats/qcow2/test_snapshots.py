"""Internal snapshots: what each holds, and that ``qemu-img check`` finds nothing at any time."""

import os
import random
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fleece.block.file import FileNode
from fleece.block.memory import MemoryNode
from fleece.errors import FleeceError, ImageCorrupt, ImageError, NotFound, UnsupportedFeature
from fleece.formats.opening import open_node
from fleece.formats.qcow2 import bitmaps, snapshots
from fleece.formats.qcow2 import constants as c
from fleece.formats.qcow2.image import Qcow2Node
from tests.support.fulldisk import FullDisk
from tests.support.qcow2 import assert_clean, assert_same, make, opened, pread, qemu_img, qemu_io

SIZE = 1_000_448


@contextmanager
def snapshot_of(path: Path, which: str | bytes) -> Iterator[Any]:
    node = Qcow2Node(FileNode(path, read_only=True, locking=False), read_only=True)
    with_snapshot = snapshots.open_snapshot(node, which)
    try:
        yield with_snapshot
    finally:
        with_snapshot.close()


def contents(path: Path, which: str | bytes) -> bytes:
    with snapshot_of(path, which) as node:
        return pread(node, node.size, 0)


def names(path: Path) -> list[bytes]:
    with opened(path, read_only=True) as node:
        return [snapshot.name for snapshot in snapshots.list_snapshots(node)]


class Machine:
    """An image under random operations, and what it and its snapshots should hold."""

    def __init__(self, path: Path, rnd: random.Random, **options: Any) -> None:
        self.path = make(path, SIZE, **options)
        self.rnd = rnd
        self.disk = bytearray(SIZE)
        self.saved: dict[bytes, bytes] = {}
        self.node = self._open()

    def _open(self) -> Qcow2Node:
        return Qcow2Node(FileNode(self.path, locking=False))

    def step(self) -> None:
        verbs = ["write"] * 6 + ["zero", "trim", "create", "create", "apply", "delete", "reopen"]
        getattr(self, self.rnd.choice(verbs))()

    def _range(self) -> tuple[int, int]:
        offset = self.rnd.randrange(SIZE)
        return offset, min(self.rnd.choice([1, 513, 4096, 70_000, 300_000]), SIZE - offset)

    def write(self) -> None:
        offset, length = self._range()
        data = self.rnd.randbytes(length)
        self.node.pwrite(memoryview(data), offset)
        self.disk[offset : offset + length] = data

    def zero(self) -> None:
        offset, length = self._range()
        self.node.zero(offset, length)
        self.disk[offset : offset + length] = bytes(length)

    def trim(self) -> None:
        unit = self.node.header.cluster_size
        offset, length = self._range()
        offset, length = offset // unit * unit, length // unit * unit
        if offset + length <= SIZE:
            self.node.trim(offset, length)
            self.disk[offset : offset + length] = bytes(length)

    def create(self) -> None:
        if len(self.saved) < 4:
            snapshot = snapshots.create(self.node, "a name")
            self.saved[snapshot.identity] = bytes(self.disk)

    def apply(self) -> None:
        if self.saved:
            which = self.rnd.choice(list(self.saved))
            snapshots.apply(self.node, which)
            self.disk[:] = self.saved[which]

    def delete(self) -> None:
        if self.saved:
            which = self.rnd.choice(list(self.saved))
            assert snapshots.delete(self.node, which).identity == which
            del self.saved[which]

    def reopen(self) -> None:
        self.node.close()
        assert_clean(self.path)
        self.node = self._open()

    def compare(self) -> None:
        assert pread(self.node, SIZE, 0) == self.disk
        self.node.flush()
        if not self.node.header.lazy_refcounts:  # there counts are right once it is closed
            assert_clean(self.path)
        for which, data in self.saved.items():
            assert contents(self.path, which) == data


@pytest.mark.parametrize(
    "options",
    [
        {"cluster_size": 512},
        {"cluster_size": 4096, "refcount_bits": 4},
        {"cluster_size": 65536, "refcount_bits": 8, "lazy_refcounts": True},
        {"cluster_size": 16384, "extended_l2": True},
        {"cluster_size": 4096, "version": 2},
        {"cluster_size": 65536, "refcount_bits": 64, "extended_l2": True},
    ],
    ids=str,
)
def test_random_writes_and_snapshots_agree_with_a_model(
    options: dict[str, Any], tmp_path: Path
) -> None:
    rnd = random.Random(str(options))
    machine = Machine(tmp_path / "disk.qcow2", rnd, **options)
    for _ in range(60):
        machine.step()
        if rnd.random() < 0.12:
            machine.compare()
    machine.compare()
    machine.reopen()
    assert_same(machine.path, machine.disk)
    for which, data in machine.saved.items():
        clone = tmp_path / "clone.raw"
        qemu_img("convert", "-l", f"snapshot.id={which.decode()}", "-O", "raw", machine.path, clone)
        assert clone.read_bytes() == data
    machine.node.close()


def test_a_snapshot_keeps_its_data_when_the_disk_is_written(tmp_path: Path) -> None:
    path = make(tmp_path / "disk.qcow2", SIZE, cluster_size=4096)
    with opened(path) as node:
        node.pwrite(memoryview(b"a" * SIZE), 0)
        snapshots.create(node, "before")
        node.pwrite(memoryview(b"b" * SIZE), 0)
    assert contents(path, "before") == b"a" * SIZE
    assert_same(path, b"b" * SIZE)
    assert_clean(path)


def test_ids_count_up_from_the_highest_that_there_is(tmp_path: Path) -> None:
    path = make(tmp_path / "disk.qcow2", SIZE)
    with opened(path) as node:
        made = [snapshots.create(node, name) for name in ("x", "y", "x")]
        assert [snapshot.identity for snapshot in made] == [b"1", b"2", b"3"]
        snapshots.delete(node, "y")
        assert snapshots.create(node, "z").identity == b"4"


def test_delete_prefers_a_name_and_apply_an_id_as_qemu_does(tmp_path: Path) -> None:
    path = make(tmp_path / "disk.qcow2", SIZE)
    with opened(path) as node:
        snapshots.create(node, "first")
        snapshots.create(node, "1")
        assert snapshots.apply(node, "1").name == b"first"
        assert snapshots.delete(node, "1").name == b"1"


def test_a_snapshot_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    path = make(tmp_path / "disk.qcow2", SIZE)
    with opened(path) as node:
        snapshots.create(node, "there")
        for verb in (snapshots.apply, snapshots.delete):
            with pytest.raises(NotFound, match=r"no snapshot 'gone'; it has 'there'"):
                verb(node, "gone")


def test_what_only_a_deleted_snapshot_needed_is_free_again(tmp_path: Path) -> None:
    path = make(tmp_path / "disk.qcow2", SIZE, cluster_size=4096)
    with opened(path) as node:
        node.pwrite(memoryview(b"a" * SIZE), 0)
        snapshots.create(node, "before")
        node.pwrite(memoryview(b"b" * SIZE), 0)
        node.flush()
        full = os.stat(path).st_blocks
        snapshots.delete(node, "before")
    assert os.stat(path).st_blocks * 512 < full * 512 - SIZE * 9 // 10
    assert_clean(path)


def test_after_the_last_snapshot_is_gone_writes_go_in_place_again(tmp_path: Path) -> None:
    path = make(tmp_path / "disk.qcow2", SIZE, cluster_size=4096)
    with opened(path) as node:
        node.pwrite(memoryview(b"a" * SIZE), 0)
        snapshots.create(node, "before")
        snapshots.delete(node, "before")
        end = node._meta.counts.end
        node.pwrite(memoryview(b"b" * SIZE), 0)
        assert node._meta.counts.end == end


def test_refcounts_that_are_too_narrow_are_one_error_and_nothing_changes(tmp_path: Path) -> None:
    """formats.md §1.3: images with counts of 1 bit can never have a snapshot."""
    path = make(tmp_path / "disk.qcow2", SIZE, cluster_size=4096, refcount_bits=1)
    with opened(path) as node:
        node.pwrite(memoryview(b"a" * 50_000), 0)
        node.flush()
        with pytest.raises(ImageError, match=r"1 bit refcounts can hold; see: .*refcount_bits"):
            snapshots.create(node, "no")
        assert snapshots.list_snapshots(node) == []
        assert_clean(path)
        node.pwrite(memoryview(b"b" * 50_000), 0)
        node.flush()
        assert_clean(path)
    assert_same(path, b"b" * 50_000 + bytes(SIZE - 50_000))


def test_counts_that_fit_for_some_snapshots_refuse_the_next_one(tmp_path: Path) -> None:
    path = make(tmp_path / "disk.qcow2", SIZE, cluster_size=512, refcount_bits=2)
    with opened(path) as node:
        node.pwrite(memoryview(b"a" * SIZE), 0)
        snapshots.create(node, "1")
        snapshots.create(node, "2")
        with pytest.raises(ImageError, match="over 3 references"):
            snapshots.create(node, "3")
        with pytest.raises(ImageError, match="over 3 references"):
            snapshots.apply(node, "1")
        node.flush()
        assert_clean(path)
        snapshots.delete(node, "1")
        assert pread(node, SIZE, 0) == b"a" * SIZE
    assert_clean(path)


def test_an_image_with_a_data_file_cannot_have_snapshots(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file={tmp_path}/data.raw", path, "1M")
    data = FileNode(tmp_path / "data.raw", locking=False)
    node = Qcow2Node(FileNode(path, locking=False), data_file=data)
    for verb in (snapshots.create, snapshots.apply, snapshots.delete, snapshots.open_snapshot):
        with pytest.raises(UnsupportedFeature, match="lies in another file"):
            verb(node, "x")
    node.close()


def test_a_snapshot_of_another_size_brings_its_size_back(tmp_path: Path) -> None:
    path = make(tmp_path / "disk.qcow2", SIZE, cluster_size=4096)
    with opened(path) as node:
        node.pwrite(memoryview(b"a" * SIZE), 0)
        snapshots.create(node, "small")
    qemu_img("resize", "-f", "qcow2", path, "8M")
    qemu_io(path, "write -P 0x62 0 8M")
    with opened(path) as node:
        snapshots.create(node, "large")
        with snapshot_of(path, "small") as old:
            assert old.size == SIZE  # QEMU's tools would show 8 MiB
            assert pread(old, SIZE, 0) == b"a" * SIZE
        snapshots.apply(node, "small")
        assert (node.size, pread(node, SIZE, 0)) == (SIZE, b"a" * SIZE)
        node.flush()
        assert_clean(path)
        snapshots.apply(node, "large")
        assert (node.size, pread(node, 8 << 20, 0)) == (8 << 20, b"b" * (8 << 20))
    assert_clean(path)


def test_an_image_of_version_2_keeps_its_size(tmp_path: Path) -> None:
    """formats.md §1.4: v2 images with snapshots may not be resized."""
    path = make(tmp_path / "disk.qcow2", SIZE, version=2)
    with opened(path) as node:
        snapshots.create(node, "one")
        node.set_header(type(node.header)(**{**vars(node.header), "size": 512}))
        with pytest.raises(UnsupportedFeature, match="another size"):
            snapshots.apply(node, "one")


def test_compressed_clusters_are_shared_and_freed(tmp_path: Path) -> None:
    source = tmp_path / "source.raw"
    rnd = random.Random(5)
    data = b"".join(bytes([rnd.randrange(256)]) * 3000 + rnd.randbytes(300) for _ in range(300))
    source.write_bytes(data[: len(data) // 512 * 512])
    path = tmp_path / "disk.qcow2"
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4k", source, path)
    expected = source.read_bytes()
    with opened(path) as node:
        snapshots.create(node, "packed")
        node.pwrite(memoryview(b"x" * len(expected)), 0)
        node.flush()
        assert_clean(path)
        assert contents(path, "packed") == expected
        snapshots.apply(node, "packed")
        snapshots.delete(node, "packed")
        assert pread(node, len(expected), 0) == expected
    assert_clean(path)
    assert_same(path, expected)


def test_vm_state_behind_the_disk_is_kept_by_create_apply_and_delete(tmp_path: Path) -> None:
    """formats.md §1.4: VM state lies behind the disk, in the same tables."""
    path = make(tmp_path / "disk.qcow2", 64 << 20, cluster_size=65536)
    qemu_io(path, "write -P 0x61 0 1M")
    save_vm_state(path, b"s" * 300_000)
    before = qemu_img("snapshot", "-l", path)
    with opened(path) as node:
        state = snapshots.list_snapshots(node)[0]
        assert state.vm_state_size == 300_000
        snapshots.create(node, "other")
        snapshots.apply(node, "state")
        snapshots.delete(node, "other")
        assert snapshots.list_snapshots(node) == [state]
        assert vm_state(node, 300_000) == b"s" * 300_000
    assert_clean(path)
    assert qemu_img("snapshot", "-l", path) == before


def vm_state(node: Qcow2Node, length: int) -> bytes:
    """What lies behind the last L2 table of the disk."""
    per_table = node.header.l2_entries << node.header.cluster_bits
    start = -(-node.size // per_table) * per_table
    size, node.size = node.size, start + length
    data = pread(node, length, start)
    node.size = size
    return data


def save_vm_state(path: Path, data: bytes) -> None:
    """A snapshot named ``state`` with VM state, as QEMU's savevm leaves it: in its tables only."""
    node = Qcow2Node(FileNode(path, locking=False))
    per_table = node.header.l2_entries << node.header.cluster_bits
    start = -(-node.size // per_table) * per_table
    node._meta.map.l1.extend(bytes(8))
    node.set_header(type(node.header)(**{**vars(node.header), "l1_size": start // per_table + 1}))
    node._begin()
    size, node.size = node.size, start + len(data)
    node.pwrite(memoryview(data), start)
    node.size = size
    snapshots.create(node, "state")
    table = node.header.snapshots_offset
    node.file.pwrite(memoryview(struct.pack(">I", len(data))), table + 32)
    node.file.pwrite(memoryview(struct.pack(">Q", len(data))), table + 40)
    node.close()


def test_qemu_made_snapshots_are_applied_and_deleted(tmp_path: Path) -> None:
    path = make(tmp_path / "disk.qcow2", SIZE, cluster_size=4096)
    qemu_io(path, "write -P 1 0 400k")
    qemu_img("snapshot", "-c", "one", path)
    qemu_io(path, "write -P 2 100k 400k")
    qemu_img("snapshot", "-c", "two", path)
    qemu_img("snapshot", "-d", "one", path)
    qemu_img("snapshot", "-c", "three", path)
    qemu_io(path, "write -P 3 200k 400k")
    two = b"\1" * 102400 + b"\2" * 409600
    two += bytes(SIZE - len(two))
    assert contents(path, "two") == contents(path, "three") == two
    with opened(path) as node:
        snapshots.apply(node, "two")
        node.pwrite(memoryview(b"\4" * SIZE), 0)
        node.flush()
        assert_clean(path)
        assert contents(path, "three") == two
        snapshots.delete(node, "two")
    assert_clean(path)
    assert contents(path, "three") == two
    qemu_img("snapshot", "-a", "three", path)
    assert_same(path, two)


def test_a_snapshot_with_a_backing_file_reads_through_to_it(tmp_path: Path) -> None:
    path = make(tmp_path / "disk.qcow2", SIZE, cluster_size=4096)
    base = MemoryNode(SIZE)
    base.pwrite(memoryview(b"B" * SIZE), 0)
    with opened(path, base) as node:
        node.pwrite(memoryview(b"w" * 5000), 4096 * 3)
        snapshots.create(node, "one")
        node.pwrite(memoryview(b"x" * SIZE), 0)
        old = snapshots.open_snapshot(node, "one")
        assert pread(old, 4096 * 6, 0) == b"B" * 12288 + b"w" * 5000 + b"B" * (12288 - 5000)


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, struct.pack(">Q", 0x200), "not aligned"),
        (0, struct.pack(">Q", 1 << 40), "outside"),
        (8, struct.pack(">I", 1 << 30), "above the limit"),
        (36, struct.pack(">I", 8), "how large its disk is"),
        (48, struct.pack(">Q", 1 << 50), "too small for its disk"),
    ],
)
def test_a_snapshot_entry_that_cannot_be_is_one_clear_error(
    at: int, value: bytes, message: str, tmp_path: Path
) -> None:
    path = make(tmp_path / "disk.qcow2", SIZE, cluster_size=4096)
    with opened(path) as node:
        node.pwrite(memoryview(b"a" * 9000), 0)
        snapshots.create(node, "one")
        table = node.header.snapshots_offset
    damaged = bytearray(path.read_bytes())
    damaged[table + at : table + at + len(value)] = value
    path.write_bytes(damaged)
    with opened(path) as node:
        with pytest.raises(ImageCorrupt, match=message):
            snapshots.open_snapshot(node, "one")
        with pytest.raises(ImageCorrupt, match=message):
            snapshots.apply(node, "one")
    assert path.read_bytes()[: len(damaged)] == damaged


def test_one_l2_table_at_two_places_is_refused_before_anything_is_changed(tmp_path: Path) -> None:
    path = make(tmp_path / "disk.qcow2", 8 << 20, cluster_size=4096)
    with opened(path) as node:
        node.pwrite(memoryview(b"a" * 9000), 0)
    data = bytearray(path.read_bytes())
    l1 = int.from_bytes(data[40:48], "big")
    data[l1 + 8 : l1 + 16] = data[l1 : l1 + 8]
    path.write_bytes(data)
    with opened(path) as node, pytest.raises(ImageCorrupt, match="two entries"):
        snapshots.create(node, "one")
    assert path.read_bytes()[: len(data)] == data


def test_overlap_checks_know_the_tables_of_snapshots(tmp_path: Path) -> None:
    """formats.md §1.9."""
    path = make(tmp_path / "disk.qcow2", SIZE, cluster_size=4096)
    with opened(path) as node:
        node.pwrite(memoryview(b"a" * 9000), 0)
        one = snapshots.create(node, "one")
        table, hit = node.header.snapshots_offset, node._meta.overlap.hit
        assert hit(table, 1) == "snapshot table"
        assert hit(one.l1_offset, 1) == "inactive L1 table"
        node.pwrite(memoryview(b"b" * 9000), 0)
        node.flush()
        l2 = int.from_bytes(path.read_bytes()[one.l1_offset :][:8], "big") & c.OFFSET_MASK
        assert hit(l2, 1) == "inactive L2 table"
        snapshots.delete(node, "one")
        assert [hit(at, 1) for at in (table, one.l1_offset, l2)] == [None] * 3


def test_a_snapshot_opens_by_the_way_that_every_image_is_opened(tmp_path: Path) -> None:
    path = make(tmp_path / "disk.qcow2", SIZE)
    with opened(path) as node:
        node.pwrite(memoryview(b"a" * SIZE), 0)
        snapshots.create(node, "one")
        node.pwrite(memoryview(b"b" * SIZE), 0)
    with_snapshot = open_node(str(path), read_only=True, snapshot="one")
    assert pread(with_snapshot, SIZE, 0) == b"a" * SIZE
    with_snapshot.close()


@pytest.mark.parametrize("verb", ["create", "apply", "delete"])
def test_a_write_that_fails_anywhere_harms_neither_disk_nor_snapshots(
    verb: str, tmp_path: Path
) -> None:
    for left in range(40):
        path = make(tmp_path / f"{verb}{left}.qcow2", SIZE, cluster_size=4096)
        file = FullDisk(path, locking=False)
        node = Qcow2Node(file)
        node.pwrite(memoryview(b"a" * 500_000), 0)
        snapshots.create(node, "old")
        node.pwrite(memoryview(b"b" * 500_000), 100_000)
        node.flush()
        file.left = left
        failed = False
        try:
            getattr(snapshots, verb)(node, "new" if verb == "create" else "old")
        except (OSError, ImageError):
            failed = True
        file.left = 1 << 30
        now = pread(node, SIZE, 0)
        node.pwrite(memoryview(b"c" * 200_000), 50_000)
        node.close()
        listed = names(path)
        old = b"a" * 500_000 + bytes(SIZE - 500_000)
        if b"old" in listed:
            assert contents(path, "old") == old
        if b"new" in listed:
            assert contents(path, "new") == now
        qemu_img("check", "-r", "all", path, ok=(0, 3))
        assert_same(path, now[:50_000] + b"c" * 200_000 + now[250_000:])
        path.unlink()
        if not failed:
            return
    pytest.fail("it never succeeded")


def test_mutated_images_are_errors_of_one_line(tmp_path: Path) -> None:
    rnd = random.Random(11)
    seed = make(tmp_path / "seed.qcow2", SIZE, cluster_size=4096)
    with opened(seed) as node:
        bitmaps.add(node, "b0", granularity=512)
        for name in ("one", "two"):
            node.pwrite(memoryview(bytes(100_000)), 0)
            snapshots.create(node, name)
    good = seed.read_bytes()
    places = [i for i in range(0, len(good), 8) if good[i : i + 8] != bytes(8)]
    refused = 0
    for _ in range(150):
        data = bytearray(good)
        for _ in range(rnd.choice([1, 2, 4])):
            data[rnd.choice(places) + rnd.randrange(8)] = rnd.choice([0, 1, 0x7F, 0x80, 0xFF])
        refused += use(tmp_path / "mutant.qcow2", data)
    assert refused > 10


def use(path: Path, data: bytes | bytearray) -> bool:
    """Everything that can be done with snapshots and bitmaps; whether something was refused."""
    path.write_bytes(data)
    verbs: list[Callable[[Any], object]] = [
        lambda node: snapshots.create(node, "new"),
        lambda node: snapshots.apply(node, "one"),
        lambda node: snapshots.delete(node, "two"),
        lambda node: list(bitmaps.find(node, "b0").dirty_extents()),
        lambda node: node.pwrite(memoryview(b"x" * 3000), 10_000),
        lambda node: bitmaps.remove(node, "b0"),
    ]
    problems: list[Exception] = []
    try:
        with opened(path) as node:
            for verb in verbs:
                try:
                    verb(node)
                except (FleeceError, OSError) as problem:
                    problems.append(problem)
    except (FleeceError, OSError) as problem:
        problems.append(problem)
    assert all("\n" not in str(problem) for problem in problems)
    return bool(problems)

"""Persistent dirty bitmaps: recorded, stored and read as QEMU does, and marked in use meanwhile."""

import contextlib
import random
import struct
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fleece.block.file import FileNode
from fleece.errors import (
    AlreadyExists,
    FleeceError,
    ImageCorrupt,
    ImageError,
    NotFound,
    UnsupportedFeature,
    UsageError,
)
from fleece.formats.qcow2 import bitmap_directory as directory
from fleece.formats.qcow2 import bitmaps, dirty_bits, snapshots
from fleece.formats.qcow2 import constants as c
from fleece.formats.qcow2 import header as headers
from fleece.formats.qcow2.bitmap_directory import Bitmap
from fleece.formats.qcow2.dirty_bits import StoredBitmap
from fleece.formats.qcow2.image import Qcow2Node, read_header
from tests.support.fulldisk import FullDisk
from tests.support.qcow2 import (
    RecordingFile,
    assert_clean,
    in_two_threads,
    make,
    opened,
    qemu_img,
    qemu_io,
)

MiB = 1 << 20
SIZE = 8 * MiB


def dirty(path: Path, name: str) -> list[tuple[int, int]]:
    with opened(path, read_only=True) as node:
        return list(bitmaps.find(node, name).dirty_extents())


def flags(path: Path) -> dict[str, tuple[bool, bool]]:
    """Name -> (in use, enabled), as the directory has them."""
    file = FileNode(path, read_only=True, locking=False)
    try:
        found = directory.read(file, read_header(file, "x"), "x")
    finally:
        file.close()
    return {b.name: (b.in_use, bool(b.flags & directory.AUTO)) for b in found}


def write(node: Any, offset: int, length: int) -> None:
    node.pwrite(memoryview(b"x" * length), offset)


def test_writes_zeroes_and_trims_are_recorded_and_survive_close(tmp_path: Path) -> None:
    path = make(tmp_path / "disk.qcow2", SIZE)
    with opened(path) as node:
        bitmaps.add(node, "b0", granularity=65536)
        write(node, 65536 * 3 + 7, 10)
        node.zero(65536 * 10 - 1, 2)
        node.trim(65536 * 20, 65536 * 2)
        write(node, 65536 * 40 - 1, 65536 * 2)
    assert_clean(path)
    expected = [(3, 1), (9, 2), (20, 2), (39, 3)]
    assert dirty(path, "b0") == [(first * 65536, n * 65536) for first, n in expected]


def test_a_compressed_write_is_recorded(tmp_path: Path) -> None:
    path = make(tmp_path / "disk.qcow2", SIZE)
    with opened(path) as node:
        bitmaps.add(node, "b0")
        node.write_compressed(memoryview(bytes(65536)), 65536)
    assert dirty(path, "b0") == [(65536, 65536)]


def test_a_disabled_bitmap_records_nothing_until_it_is_enabled(tmp_path: Path) -> None:
    path = make(tmp_path / "disk.qcow2", SIZE)
    with opened(path) as node:
        bitmaps.add(node, "off", enabled=False)
        bitmaps.add(node, "on")
        write(node, 0, 10)
        bitmaps.enable(node, "off")
        bitmaps.disable(node, "on")
        write(node, MiB, 10)
    assert dirty(path, "on") == [(0, 65536)]
    assert dirty(path, "off") == [(MiB, 65536)]
    assert flags(path) == {"off": (False, True), "on": (False, False)}


def test_bitmaps_are_in_use_on_disk_from_the_first_write_to_the_close(tmp_path: Path) -> None:
    """formats.md §1.5: in_use is set before the first guest write, and goes with the store."""
    path = make(tmp_path / "disk.qcow2", SIZE)
    with opened(path) as node:
        bitmaps.add(node, "b0")
        bitmaps.add(node, "b1", enabled=False)
    assert flags(path) == {"b0": (False, True), "b1": (False, False)}
    with opened(path) as node:
        assert flags(path) == {"b0": (False, True), "b1": (False, False)}
        write(node, 0, 1)
        assert flags(path) == {"b0": (True, True), "b1": (True, False)}
    assert flags(path) == {"b0": (False, True), "b1": (False, False)}


def test_one_that_is_found_in_use_can_only_be_removed(tmp_path: Path) -> None:
    path = make(tmp_path / "disk.qcow2", SIZE)
    with opened(path) as node:
        bitmaps.add(node, "b0")
        bitmaps.add(node, "good")
    with opened(path) as node:
        write(node, 0, 1)
        crashed = path.read_bytes()
    path.write_bytes(crashed)
    with opened(path) as node:
        assert [b.inconsistent for b in bitmaps.load(node)] == [True, True]
        for verb in (bitmaps.clear, bitmaps.enable, bitmaps.disable):
            with pytest.raises(ImageError, match="'b0' is inconsistent and cannot be used"):
                verb(node, "b0")
        with pytest.raises(ImageError, match="inconsistent"):
            bitmaps.resize(node, SIZE * 2)
        with pytest.raises(AlreadyExists, match="Bitmap already exists: b0"):
            bitmaps.add(node, "b0")
        write(node, 0, 1)
        bitmaps.remove(node, "b0")
        bitmaps.add(node, "b0")
    assert flags(path) == {"good": (True, True), "b0": (False, True)}
    assert_clean(path)


def test_reading_an_image_changes_nothing(tmp_path: Path) -> None:
    path = make(tmp_path / "disk.qcow2", SIZE)
    with opened(path) as node:
        bitmaps.add(node, "b0")
        write(node, 0, 1)
    before = path.read_bytes()
    assert dirty(path, "b0") == [(0, 65536)]
    with opened(path):
        pass  # nor does opening it for writing
    assert path.read_bytes() == before


def test_bitmaps_that_another_program_ignored_are_dropped_at_the_first_write(
    tmp_path: Path,
) -> None:
    """formats.md §1.5: without the autoclear bit nothing of them is to be believed."""
    path = make(tmp_path / "disk.qcow2", SIZE)
    with opened(path) as node:
        bitmaps.add(node, "b0")
    data = bytearray(path.read_bytes())
    data[c.AT_AUTOCLEAR : c.AT_AUTOCLEAR + 8] = bytes(8)
    path.write_bytes(data)
    with opened(path) as node:
        assert bitmaps.load(node) == []
        assert headers.extension(node.header, c.EXT_BITMAPS) is not None
        write(node, 0, 1)
        assert headers.extension(node.header, c.EXT_BITMAPS) is None
    qemu_img("check", path, ok=(3,))  # what they took is leaked
    qemu_img("check", "-r", "leaks", path)
    assert_clean(path)


@pytest.mark.parametrize("cluster", [512, 4096, 65536])
@pytest.mark.parametrize("granularity", [512, 4096, 1 << 20])
def test_random_operations_agree_with_a_model(
    cluster: int, granularity: int, tmp_path: Path
) -> None:
    rnd = random.Random(cluster * granularity)
    size = rnd.choice([3 * MiB + 512, 40 * MiB])
    path = make(tmp_path / "disk.qcow2", 48 * MiB, cluster_size=cluster)
    reheader(path, size)
    model: set[int] = set()
    node = Qcow2Node(FileNode(path, locking=False))
    bitmaps.add(node, "b", granularity=granularity)
    for _ in range(60):
        verb = rnd.choice(["mark"] * 6 + ["reopen", "clear", "resize", "all"])
        if verb == "mark":
            offset = rnd.randrange(size)
            length = min(rnd.choice([1, 512, 70_000, 5 * MiB]), size - offset)
            node.zero(offset, length)
            model |= set(range(offset // granularity, (offset + length - 1) // granularity + 1))
        elif verb == "all" and rnd.random() < 0.3:
            bitmaps.mark_all(node)
            model = set(range(-(-size // granularity)))
        elif verb == "clear" and rnd.random() < 0.3:
            bitmaps.clear(node, "b")
            model.clear()
        elif verb == "resize":
            size = rnd.choice([2 * MiB, 3 * MiB + 512, 40 * MiB, 41 * MiB])
            bitmaps.resize(node, size)
            node.close()
            model = {g for g in model if g * granularity < size}
            reheader(path, size)
            node = Qcow2Node(FileNode(path, locking=False))
        elif verb == "reopen":
            node.close()
            node = Qcow2Node(FileNode(path, locking=False))
        got = set()
        for offset, length in bitmaps.find(node, "b").dirty_extents():
            assert offset % granularity == 0
            got |= set(range(offset // granularity, -(-(offset + length) // granularity)))
        assert got == model
    node.close()
    qemu_img("check", path)


def reheader(path: Path, size: int) -> None:
    """The size of a disk whose L1 table is large enough for 48 MiB."""
    with open(path, "r+b") as file:
        file.seek(c.AT_SIZE)
        file.write(struct.pack(">Q", size))


def test_clusters_of_equal_bits_take_no_space(tmp_path: Path) -> None:
    path = make(tmp_path / "disk.qcow2", 64 * MiB, cluster_size=512)
    with opened(path) as node:
        bitmaps.add(node, "b0", granularity=512)
        node.zero(0, 32 * MiB)
        node.zero(40 * MiB, 512)
        end = node._meta.counts.end
    with opened(path) as node:
        assert node._meta.counts.end - end < 16 * 512
    assert dirty(path, "b0") == [(0, 32 * MiB), (40 * MiB, 512)]
    assert_clean(path)


def test_what_did_not_change_is_not_written_again(tmp_path: Path) -> None:
    path = make(tmp_path / "disk.qcow2", 64 * MiB, cluster_size=512)
    with opened(path) as node:
        bitmaps.add(node, "b0", granularity=512)
        for offset in range(0, 64 * MiB, 4 * MiB):
            node.zero(offset, 512)
    before = tables(path)
    with opened(path) as node:
        node.zero(MiB, 512)
    after = tables(path)
    assert sum(a != b for a, b in zip(before, after, strict=True)) == 1
    with opened(path) as node:
        bitmaps.disable(node, "b0")
    assert tables(path) == after
    assert_clean(path)


def tables(path: Path) -> list[int]:
    with opened(path, read_only=True) as node:
        return [int(word) for word in bitmaps.find(node, "b0").table]


def test_merge_takes_other_granularities_and_other_images(tmp_path: Path) -> None:
    path, other = make(tmp_path / "a.qcow2", SIZE), make(tmp_path / "b.qcow2", SIZE)
    with opened(other) as node:
        bitmaps.add(node, "fine", granularity=512)
        write(node, 1000, 10)
        write(node, 3 * MiB, 65537)
    with opened(path) as node, opened(other, read_only=True) as source:
        bitmaps.add(node, "b0", granularity=1 << 16)
        write(node, 7 * MiB, 1)
        bitmaps.add(node, "small", granularity=512, enabled=False)
        bitmaps.merge(node, "small", [bitmaps.find(node, "b0")])
        bitmaps.merge(node, "b0", [bitmaps.find(source, "fine")])
        bitmaps.merge(node, "b0", [bitmaps.find(node, "b0")])
    assert dirty(path, "small") == [(7 * MiB, 65536)]
    assert dirty(path, "b0") == [(0, 65536), (3 * MiB, 131072), (7 * MiB, 65536)]


def test_merge_refuses_disks_of_another_size(tmp_path: Path) -> None:
    path, other = make(tmp_path / "a.qcow2", SIZE), make(tmp_path / "b.qcow2", SIZE * 2)
    with opened(path) as node, opened(other) as source:
        bitmaps.add(node, "b0")
        bitmaps.add(source, "b1")
        with pytest.raises(
            ImageError,
            match=r"different sizes \(destination size is 8388608, source size is 16777216\) and",
        ):
            bitmaps.merge(node, "b0", [bitmaps.find(source, "b1")])


@pytest.mark.parametrize(
    ("name", "granularity", "kind", "message"),
    [
        ("", None, UsageError, "Bitmap name cannot be empty"),
        ("n" * 1024, None, UsageError, "Bitmap name too long"),
        ("b", 3000, UsageError, "power of 2 and at least 512"),
        ("b", 256, UsageError, "power of 2 and at least 512"),
        ("b", 1 << 32, UsageError, "at most 2 GiB"),
    ],
)
def test_what_cannot_be_added_is_refused(
    name: str, granularity: int | None, kind: type[FleeceError], message: str, tmp_path: Path
) -> None:
    path = make(tmp_path / "disk.qcow2", SIZE)
    before = path.read_bytes()
    with opened(path) as node, pytest.raises(kind, match=message):
        bitmaps.add(node, name, granularity=granularity)
    assert path.read_bytes() == before


def test_a_bitmap_over_512_mib_is_refused(tmp_path: Path) -> None:
    path = make(tmp_path / "disk.qcow2", 4 << 40, cluster_size=2 * MiB)
    with opened(path) as node:
        with pytest.raises(ImageError, match="over 512 MiB; take a granularity above 512"):
            bitmaps.add(node, "b", granularity=512)
        bitmaps.add(node, "b", granularity=1024)


def test_version_2_cannot_store_bitmaps(tmp_path: Path) -> None:
    path = make(tmp_path / "disk.qcow2", SIZE, version=2)
    with opened(path) as node, pytest.raises(UnsupportedFeature, match="qcow2 v2 files"):
        bitmaps.add(node, "b")


def test_an_image_that_is_open_for_reading_keeps_its_bitmaps(tmp_path: Path) -> None:
    path = make(tmp_path / "disk.qcow2", SIZE)
    with opened(path, read_only=True) as node, pytest.raises(OSError, match="read-only"):
        bitmaps.add(node, "b")


def test_unknown_names_are_not_found(tmp_path: Path) -> None:
    path = make(tmp_path / "disk.qcow2", SIZE)
    with opened(path) as node:
        for verb in (bitmaps.remove, bitmaps.clear, bitmaps.enable, bitmaps.find):
            with pytest.raises(NotFound, match="Dirty bitmap 'zz' not found"):
                verb(node, "zz")


def test_removing_the_last_one_removes_the_extension_and_frees_all(tmp_path: Path) -> None:
    path = make(tmp_path / "disk.qcow2", SIZE)
    with opened(path) as node:
        bitmaps.add(node, "b0")
        write(node, 0, 1)
    with opened(path) as node:
        bitmaps.remove(node, "b0")
    with opened(path, read_only=True) as node:
        assert headers.extension(node.header, c.EXT_BITMAPS) is None
        assert not node.header.autoclear
    assert_clean(path)


def test_a_header_without_room_refuses_a_bitmap(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    name = "b" * 360
    qemu_img("create", "-q", "-f", "qcow2", "-u", "-b", name, "-F", "raw",
             "-o", "cluster_size=512", path, "1M")  # fmt: skip
    with opened(path) as node, pytest.raises(ImageError, match="no room in the header"):
        bitmaps.add(node, "b0")


def test_going_back_to_a_snapshot_makes_all_that_records_dirty(tmp_path: Path) -> None:
    path = make(tmp_path / "disk.qcow2", SIZE)
    with opened(path) as node:
        bitmaps.add(node, "on")
        bitmaps.add(node, "off", enabled=False)
        snapshots.create(node, "one")
        write(node, 0, 1)
        snapshots.apply(node, "one")
    assert dirty(path, "on") == [(0, SIZE)]
    assert dirty(path, "off") == []
    assert_clean(path)


def entry_of(path: Path) -> tuple[int, Bitmap]:
    """Where the directory lies, and its only entry."""
    file = FileNode(path, read_only=True, locking=False)
    header = read_header(file, "x")
    found, place = directory.read(file, header, "x"), directory.place(header, "x")
    file.close()
    assert place is not None
    return place.offset, found[0]


def patch(path: Path, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


@pytest.mark.parametrize(
    "word", [1 << 63, 0x2, 0x200, 1 << 50, 0x10001], ids=["high", "low", "crooked", "far", "both"]
)
def test_a_table_that_cannot_be_makes_its_bitmap_inconsistent_and_never_clean(
    word: int, tmp_path: Path
) -> None:
    path = make(tmp_path / "disk.qcow2", SIZE)
    with opened(path) as node:
        bitmaps.add(node, "b0")
    patch(path, entry_of(path)[1].table_offset, struct.pack(">Q", word))
    with opened(path, read_only=True) as node:
        bitmap = bitmaps.find(node, "b0")
        if word == 0x10001:
            return  # a place has no other bits: nothing more to say of it
        assert list(bitmap.dirty_extents()) == [(0, SIZE)]
        assert bitmap.inconsistent
    with opened(path) as node:
        write(node, 0, 1)
    assert flags(path) == {"b0": (True, True)}


def test_extra_data_is_kept_if_it_may_be_ignored_and_else_the_bitmap_is_not_used(
    tmp_path: Path,
) -> None:
    """qcow2: extra_data_compatible."""
    for known in (True, False):
        path = make(tmp_path / f"{known}.qcow2", SIZE)
        with opened(path) as node:
            bitmap = bitmaps.add(node, "b0")
            more = directory.EXTRA_COMPATIBLE if known else 0
            flag = bitmap.entry.flags | more
            bitmap.entry = replace(bitmap.entry, flags=flag, extra=b"12345678")
        with opened(path) as node:
            assert bitmaps.load(node)[0].inconsistent is not known
            write(node, 0, 1)
        entry = entry_of(path)[1]
        assert (entry.extra, entry.in_use) == (b"12345678", not known)


def test_a_table_of_the_wrong_size_makes_a_bitmap_inconsistent(tmp_path: Path) -> None:
    path = make(tmp_path / "disk.qcow2", SIZE)
    with opened(path) as node:
        bitmaps.add(node, "b0")
    patch(path, entry_of(path)[0] + 8, struct.pack(">I", 2))
    with opened(path) as node:
        assert bitmaps.load(node)[0].inconsistent


def test_a_directory_that_cannot_be_is_one_clear_error(tmp_path: Path) -> None:
    path = make(tmp_path / "disk.qcow2", SIZE)
    with opened(path) as node:
        bitmaps.add(node, "b0")
    patch(path, entry_of(path)[0] + 17, b"\x05")
    file = FileNode(path, locking=False)
    with pytest.raises(ImageCorrupt, match=r"granularity of 2\^5"):
        Qcow2Node(file)
    file.close()


def test_data_that_cannot_be_read_counts_as_dirty(tmp_path: Path) -> None:
    """A gap in a backup is worse than too much in it."""
    path = make(tmp_path / "disk.qcow2", SIZE, cluster_size=512)
    with opened(path) as node:
        bitmaps.add(node, "b0", granularity=512)
        write(node, 0, 1)
    with opened(path) as node:
        bitmap = bitmaps.find(node, "b0")

        def broken(number: int) -> bytearray:
            raise OSError(5, "Input/output error")

        bitmap._page_below = broken  # type: ignore[method-assign]
        bitmap.mark(4096, 1)
        assert bitmap.extents(0, 1 * MiB)[0].length == MiB


def test_extents_are_cut_to_the_range_and_end_early_when_there_are_many(tmp_path: Path) -> None:
    path = make(tmp_path / "disk.qcow2", 64 * MiB)
    with opened(path) as node:
        bitmap = bitmaps.add(node, "b0", granularity=512)
        for offset in range(0, 64 * MiB, 1024):
            bitmap.mark(offset, 1)
        assert bitmap.extents(100, 500) == [(100, 412, 1), (512, 88, 0)]
        found = bitmap.extents(0, 64 * MiB)
        assert len(found) == 16384
        assert found[-1] == (16383 * 512, 512, 0)


class Slow(StoredBitmap):
    """Waits in the middle of making a page, for another thread to do the same."""

    barrier: threading.Barrier

    def _page_below(self, number: int) -> bytearray:
        page = super()._page_below(number)
        with contextlib.suppress(threading.BrokenBarrierError):
            self.barrier.wait(0.2)  # in vain if the other one waits for the lock, as it should
        return page


class NoLock:
    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


def marked_by_two(path: Path, *, locked: bool) -> int:
    file = FileNode(path, locking=False)
    header = read_header(file, "x")
    entry = Bitmap("b", 0, 1, 16, directory.AUTO)
    bitmap = Slow(file, header, SIZE, entry, stored=False)
    bitmap.barrier = threading.Barrier(2)
    if not locked:
        bitmap._lock = NoLock()  # type: ignore[assignment]
    mark = bitmap.marker()
    threads = [threading.Thread(target=mark, args=(at, 1)) for at in (0, MiB)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    file.close()
    return len([e for e in bitmap.extents(0, SIZE) if e.is_dirty])


def test_two_first_writes_at_once_are_both_recorded(tmp_path: Path) -> None:
    assert marked_by_two(make(tmp_path / "disk.qcow2", SIZE), locked=True) == 2


def test_control_without_the_lock_one_of_them_may_be_lost(tmp_path: Path) -> None:
    path = make(tmp_path / "disk.qcow2", SIZE)
    assert min(marked_by_two(path, locked=False) for _ in range(20)) == 1


def data_before_mark(path: Path, *, wrong: bool) -> bool:
    """Two first writes at once: whether data of one is in the file before the mark is."""
    with opened(path) as node:
        bitmaps.add(node, "b0")
    recorder = RecordingFile(FileNode(path, locking=False))
    node = Qcow2Node(recorder)
    assert node.bitmaps is not None
    begun, mark, header = node.bitmaps, node.bitmaps._mark_in_use, node.header
    entered, written = threading.Event(), threading.Event()

    def slow(*arguments: Any) -> None:
        entered.set()
        written.wait(0.3)
        mark(*arguments)

    def second() -> None:
        entered.wait(10)
        write(node, MiB, 65536)
        written.set()

    begun._mark_in_use = slow  # type: ignore[method-assign]
    if wrong:
        node._begin = lambda: (node._meta.begin(), begun.begin())  # type: ignore[method-assign,assignment]
    in_two_threads(lambda: write(node, 0, 65536), second)
    place = directory.place(header, "x")
    assert place is not None
    log = [(at, data[:1]) for kind, at, data in recorder.log if kind == "write"]
    marked = next(i for i, (at, _) in enumerate(log) if at == place.offset)
    first = next(i for i, (_, data) in enumerate(log) if data == b"x")
    node.close()
    return first < marked


def test_no_data_is_written_before_the_bitmaps_are_marked_in_use(tmp_path: Path) -> None:
    assert not data_before_mark(make(tmp_path / "disk.qcow2", SIZE), wrong=False)


def test_control_if_the_image_is_begun_before_its_bitmaps_data_is(tmp_path: Path) -> None:
    assert data_before_mark(make(tmp_path / "disk.qcow2", SIZE), wrong=True)


def test_the_page_that_is_full_stays_full() -> None:
    assert dirty_bits._FULL == b"\1" * 65536


def test_a_store_that_fails_anywhere_leaves_no_stale_bitmap(tmp_path: Path) -> None:
    for left in range(40):
        path = make(tmp_path / f"{left}.qcow2", SIZE, cluster_size=4096)
        with opened(path) as node:
            bitmaps.add(node, "b0", granularity=4096)
            write(node, 0, 10_000)
        file = FullDisk(path, locking=False)
        node = Qcow2Node(file)
        write(node, MiB, 10_000)
        node.flush()
        file.left = left
        failed = False
        try:
            node.close()
        except OSError:
            failed = True
        qemu_img("check", path, ok=(0, 3))
        assert flags(path)["b0"][0] or dirty(path, "b0") == [(0, 12288), (MiB, 12288)]
        assert flags(path)["b0"][0] or left > 1
        if not failed:
            return
    pytest.fail("it never succeeded")


def test_bitmaps_that_qemu_made_and_wrote_are_read(tmp_path: Path) -> None:
    path = make(tmp_path / "disk.qcow2", SIZE, cluster_size=4096)
    qemu_img("bitmap", "--add", "-g", "4k", path, "q0")
    qemu_img("bitmap", "--add", "-g", "512", "--disable", path, "q1")
    qemu_io(path, "write 100k 9k", "discard 1M 64k", "write -z 7M 1M")
    assert dirty(path, "q0") == [(102400, 12288), (MiB, 65536), (7 * MiB, MiB)]
    assert dirty(path, "q1") == []

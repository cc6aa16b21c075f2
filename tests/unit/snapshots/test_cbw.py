"""Copy-before-write: what writers do to each other, and what happens when old data is lost."""

import errno
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fleece.block.file import FileNode
from fleece.formats.qcow2.overlay import Overlay
from fleece.snapshots.cbw import BREAK_GUEST_WRITE, CopyBeforeWrite, unsaved_runs
from nbdwire.constants import CMD_FLAG_FAST_ZERO
from tests.support.snapshots import CLUSTER, ArrayNode, Rig, read

SIZE = 8 * CLUSTER


@pytest.fixture
def data() -> bytes:
    return random.Random(2).randbytes(SIZE)


class NoLock:
    """The control's range lock: it locks nothing."""

    @contextmanager
    def exclusive(self, start: int, stop: int) -> Iterator[None]:
        yield


def two_writers(tmp_path: Path, data: bytes, lock: Any = None) -> bytes:
    """The second writer arrives while the first one copies; what the snapshot then reads.

    The first writer is held between its read of the old data and its store. The second writer
    wants the same cluster. With the lock it waits; without, it copies, writes, and is done, and a
    third copy reads what it wrote.
    """
    source = ArrayNode(data)
    rig = Rig(tmp_path, source)
    if lock is not None:
        rig.cbw._ranges = lock
    view = rig.snapshot()
    first_is_in, second_is_done = threading.Event(), threading.Event()

    def hold_the_first(offset: int, length: int) -> None:
        if not first_is_in.is_set():
            first_is_in.set()
            second_is_done.wait(0.3)

    def second() -> None:
        first_is_in.wait()
        rig.disk.root.pwrite(memoryview(b"2" * 1000), 3 * CLUSTER)
        second_is_done.set()

    source.before_read = hold_the_first
    thread = threading.Thread(target=second)
    thread.start()
    rig.disk.root.pwrite(memoryview(b"1" * 1000), 3 * CLUSTER + 2000)
    thread.join()
    try:
        return read(view, 0, SIZE)
    finally:
        rig.close()


def test_two_writers_of_one_cluster_do_not_save_each_others_data(
    tmp_path: Path, data: bytes
) -> None:
    assert two_writers(tmp_path, data) == data


def test_control_without_the_range_lock_the_second_writers_data_is_saved(
    tmp_path: Path, data: bytes
) -> None:
    assert two_writers(tmp_path, data, NoLock()) != data


def test_a_large_write_is_copied_in_pieces_of_one_mebibyte(tmp_path: Path) -> None:
    source = ArrayNode(random.Random(3).randbytes(64 * CLUSTER))
    rig = Rig(tmp_path, source)
    reads: list[int] = []
    rig.snapshot()
    source.before_read = lambda offset, length: reads.append(length)
    rig.write(bytes(40 * CLUSTER), 10)
    rig.close()
    assert reads == [1 << 20, 1 << 20, 9 * CLUSTER]


def test_holes_of_the_source_are_saved_without_data(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    with open(path, "wb") as file:
        file.write(b"d" * CLUSTER)
        file.truncate(SIZE)
    rig = Rig(tmp_path, FileNode(path))
    view = rig.snapshot()
    rig.write(b"n" * (SIZE - 100), 50)
    try:
        assert rig.cbw.copied_bytes == CLUSTER
        assert view.level.overlay is not None
        assert view.level.overlay.data_bytes == CLUSTER
        assert read(view, 0, SIZE) == b"d" * CLUSTER + bytes(SIZE - CLUSTER)
    finally:
        rig.close()
        rig.source.close()


def test_a_hole_that_covers_only_part_of_a_cluster_does_not_hide_its_data(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    with open(path, "wb") as file:
        file.truncate(SIZE)
        file.seek(2 * CLUSTER + 32768)
        file.write(b"half" * 1024)
    rig = Rig(tmp_path, FileNode(path))
    before = read(rig.source, 0, SIZE)
    view = rig.snapshot()
    rig.write(b"n" * SIZE, 0)
    try:
        assert read(view, 0, SIZE) == before
    finally:
        rig.close()
        rig.source.close()


def test_a_fast_zero_that_had_to_copy_first_is_refused_and_changes_nothing(
    tmp_path: Path, data: bytes
) -> None:
    source = ArrayNode(data)
    rig = Rig(tmp_path, source)
    rig.snapshot()
    with pytest.raises(OSError, match="not supported") as caught:
        rig.disk.root.zero(0, CLUSTER, CMD_FLAG_FAST_ZERO)
    assert caught.value.errno == errno.EOPNOTSUPP
    assert source.data == data
    rig.write(b"x", 0)
    rig.disk.root.zero(0, CLUSTER, CMD_FLAG_FAST_ZERO)  # saved now: nothing to copy
    rig.close()


class FullOverlay(Overlay):
    """An overlay on a full file system, while ``full`` is set."""

    full = True

    def store(self, first: int, count: int, view: memoryview) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        super().store(first, count, view)


def full_overlay(rig: Rig) -> FullOverlay:
    return FullOverlay.create(
        rig.directory / "full.qcow2",
        rig.source.size,
        backing="disk.img",
        backing_format="raw",
        cluster_size=rig.cluster_size,
    )


def test_break_snapshot_lets_the_guest_write_and_every_later_read_fail(
    tmp_path: Path, data: bytes
) -> None:
    source = ArrayNode(data)
    rig = Rig(tmp_path, source)
    view = rig.snapshot(full_overlay(rig))
    rig.write(b"guest", 5 * CLUSTER)
    assert source.data[5 * CLUSTER : 5 * CLUSTER + 5] == b"guest"
    for offset in (0, 5 * CLUSTER):  # also where nothing was lost
        with pytest.raises(OSError, match="broken"):
            read(view, offset, 100)
        with pytest.raises(OSError, match="broken"):
            view.extents(offset, 100)
        with pytest.raises(OSError, match="broken"):
            view.map(offset, 100)
    assert [level.name for level in rig.broken] == ["s1"]
    rig.close()


def test_a_broken_snapshot_says_so_in_its_file_before_the_guest_writes(
    tmp_path: Path, data: bytes
) -> None:
    source = ArrayNode(data)
    rig = Rig(tmp_path, source)
    overlay = full_overlay(rig)
    rig.snapshot(overlay)
    seen: list[bool] = []

    def look(offset: int, length: int) -> None:
        seen.append(Overlay.open(overlay.path).broken)

    source.before_write = look
    rig.write(b"guest", 0)
    assert seen == [True]
    rig.close()


def test_older_snapshots_that_needed_the_lost_data_are_broken_too(
    tmp_path: Path, data: bytes
) -> None:
    rig = Rig(tmp_path, ArrayNode(data))
    older = rig.snapshot()
    rig.snapshot(full_overlay(rig))
    rig.write(b"guest", 0)
    with pytest.raises(OSError, match="broken"):
        read(older, 0, 1)
    fresh = rig.snapshot()
    now = read(rig.disk.root, 0, SIZE)
    rig.write(b"again", CLUSTER)
    assert read(fresh, 0, SIZE) == now
    rig.close()


def test_break_guest_write_fails_the_write_and_keeps_the_snapshot(
    tmp_path: Path, data: bytes
) -> None:
    source = ArrayNode(data)
    rig = Rig(tmp_path, source, policy=BREAK_GUEST_WRITE)
    overlay = full_overlay(rig)
    view = rig.snapshot(overlay)
    with pytest.raises(OSError, match="No space") as caught:
        rig.write(b"guest", 0)
    assert caught.value.errno == errno.ENOSPC
    assert source.data == data
    assert read(view, 0, SIZE) == data
    overlay.full = False  # space was freed: it recovers by itself
    rig.write(b"guest", 0)
    assert read(view, 0, SIZE) == data
    rig.close()


def test_a_source_that_cannot_be_read_breaks_the_snapshot_not_the_guest(
    tmp_path: Path, data: bytes
) -> None:
    source = ArrayNode(data)
    rig = Rig(tmp_path, source)
    view = rig.snapshot()

    def fail(offset: int, length: int) -> None:
        raise OSError(errno.EIO, "medium error")

    source.before_read = fail
    rig.write(b"guest", 0)
    source.before_read = lambda offset, length: None
    assert source.data[:5] == b"guest"
    with pytest.raises(OSError, match="broken"):
        read(view, 0, 1)
    rig.close()


def test_a_fault_of_ours_while_copying_fails_the_guest_write_rather_than_the_truth(
    tmp_path: Path, data: bytes
) -> None:
    source = ArrayNode(data)
    rig = Rig(tmp_path, source)
    view = rig.snapshot()

    def fail(offset: int, length: int) -> None:
        raise MemoryError

    source.before_read = fail
    with pytest.raises(MemoryError):
        rig.write(b"guest", 0)
    source.before_read = lambda offset, length: None
    assert source.data == data
    assert read(view, 0, SIZE) == data
    rig.close()


def test_unsaved_runs_are_found_between_saved_ones() -> None:
    saved = bytearray(b"\1\0\0\1\0\1\1\0")
    assert list(unsaved_runs(saved, 0, 8)) == [(1, 3), (4, 5), (7, 8)]
    assert list(unsaved_runs(saved, 2, 5)) == [(2, 3), (4, 5)]
    assert list(unsaved_runs(saved, 5, 7)) == []


def test_a_filter_without_a_fresh_cluster_passes_writes_on_without_a_lock(
    tmp_path: Path, data: bytes
) -> None:
    rig = Rig(tmp_path, ArrayNode(data))
    rig.snapshot()
    rig.write(b"x", 0)
    assert isinstance(rig.disk.root, CopyBeforeWrite)
    rig.disk.root._ranges = None  # type: ignore[assignment]
    rig.write(b"y", 5)
    rig.close()

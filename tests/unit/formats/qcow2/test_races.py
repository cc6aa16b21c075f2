"""What two writers, or one and a flush, or a small cache, could do to each other: one by one."""

import errno
import random
import threading
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fleece.block.file import FileNode
from fleece.block.node import Filter, Node
from fleece.formats.qcow2 import bitmaps, compressed, overlap, pending
from fleece.formats.qcow2.image import Qcow2Node
from fleece.formats.qcow2.options import Qcow2Options
from fleece.formats.qcow2.unpacked import Unpacked
from nbdwire.extents import Extent
from tests.support.qcow2 import assert_clean, assert_same, make, opened, pread, qemu_img
from tests.support.threads import in_thread, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable

CLUSTER = 65536
SIZE = 16 * CLUSTER
OLD = random.Random(3).randbytes(SIZE)


class Hooked(Filter):
    """Calls ``before_write(offset, length)`` and ``before_flush()``."""

    def __init__(self, child: Node) -> None:
        super().__init__(child.name, child)
        self.before_read: Callable[[int, int], None] = lambda offset, length: None
        self.before_write: Callable[[int, int], None] = lambda offset, length: None
        self.before_flush: Callable[[], None] = lambda: None

    def pread_into(self, buf: memoryview, offset: int) -> None:
        self.before_read(offset, len(buf))
        self.next.pread_into(buf, offset)

    def pwrite(self, buf: memoryview, offset: int, fua: bool = False) -> None:
        self.before_write(offset, len(buf))
        self.next.pwrite(buf, offset, fua)

    def flush(self) -> None:
        self.before_flush()
        self.next.flush()

    def close(self) -> None:
        self.next.close()


def overlay(directory: Path, **options: Any) -> tuple[Path, Path]:
    base = directory / "base.raw"
    base.write_bytes(OLD)
    path = make(directory / "d.qcow2", SIZE, backing=str(base), backing_format="raw", **options)
    return path, base


def read_only(path: Path) -> FileNode:
    return FileNode(path, read_only=True, locking=False)


def test_a_write_that_fills_a_cluster_and_goes_on_in_what_was_written_stays_in_it(
    tmp_path: Path,
) -> None:
    path, base = overlay(tmp_path)
    model = bytearray(OLD)
    rnd = random.Random(1)
    with opened(path, read_only(base)) as node:
        for low, high in [(0, 4096), (8192, CLUSTER), (4096, 16384), (9000, 10000)]:
            data = rnd.randbytes(high - low)
            node.pwrite(memoryview(data), low)
            model[low:high] = data
            assert pread(node, SIZE, 0) == model
        assert not node._pending
    assert_clean(path)
    assert_same(path, model)


@pytest.mark.parametrize("extended", [False, True])
def test_a_write_of_some_parts_reads_and_writes_nothing_that_another_may_write_by_then(
    extended: bool, tmp_path: Path
) -> None:
    """Once the first part has published the cluster, others write it in place, with no lock."""
    unit = 2048
    path, base = overlay(tmp_path, extended_l2=extended)
    model = bytearray(OLD)
    with opened(path, read_only(base)) as node:
        if extended:  # subcluster 0 is the backing file's, 1 is data
            data = b"a" * unit
            node.pwrite(memoryview(data), unit)
            model[unit : 2 * unit] = data
        else:
            for low, high in [(0, 100), (unit, CLUSTER)]:
                node.pwrite(memoryview(b"a" * (high - low)), low)
                model[low:high] = b"a" * (high - low)
    qemu_img("snapshot", "-c", "one", path)
    file = Hooked(FileNode(path, locking=False))
    node = Qcow2Node(file, backing=read_only(base))

    def meddle(offset: int, length: int) -> None:
        """While the second part is written, another thread writes beside it."""
        if length in (unit, 100, unit // 2) and node._own_place(unit, 1) >= 0:
            file.before_write = lambda offset, length: None
            with in_thread(lambda: node.pwrite(memoryview(b"c" * 100), 2 * unit - 100)):
                pass

    try:
        file.before_write = meddle
        length = unit + unit // 2 - 10
        node.pwrite(memoryview(b"b" * length), 10)
        model[10 : 10 + length] = b"b" * length
        if file.before_write is meddle:
            node.pwrite(memoryview(b"c" * 100), 2 * unit - 100)
        model[2 * unit - 100 : 2 * unit] = b"c" * 100
        assert pread(node, SIZE, 0) == model
    finally:
        node.close()
    assert_clean(path)
    assert_same(path, model)


@pytest.mark.parametrize("which", ["l2_cache_bytes", "refcount_cache_bytes"])
def test_tables_that_do_not_fit_into_the_cache_lose_no_change(which: str, tmp_path: Path) -> None:
    size = 4 << 20
    path = make(tmp_path / "d.qcow2", size, cluster_size=512)
    options: dict[str, Any] = {which: 1024}
    node = Qcow2Node(FileNode(path, locking=False), options=Qcow2Options(**options))
    model = bytearray(size)
    for shift in (0, 512):
        for at in range(shift, size, 8192):
            node.pwrite(memoryview(b"%16d" % at * 32), at)
            model[at : at + 512] = b"%16d" % at * 32
    node.zero(size // 2, size // 2)
    model[size // 2 :] = bytes(size // 2)
    assert pread(node, size, 0) == model
    node.close()
    assert_clean(path)
    assert_same(path, model)


def test_what_a_flush_publishes_is_stable_in_the_data_file_first(tmp_path: Path) -> None:
    """Also what another thread writes while the flush is under way."""
    data = tmp_path / "d.data"
    path, base = overlay(tmp_path, data_file=str(data))
    file = Hooked(FileNode(data, locking=False))
    node = Qcow2Node(FileNode(path, locking=False), backing=read_only(base), data_file=file)
    written: list[int] = []
    stable: list[int] = []

    def flushing() -> None:
        before = list(written)
        if len(written) == 1:
            node.pwrite(memoryview(b"x" * CLUSTER), 2 * CLUSTER)
        stable[:] = before

    try:
        file.before_write = lambda offset, length: written.append(offset)
        file.before_flush = flushing
        node.pwrite(memoryview(b"x" * CLUSTER), CLUSTER)
        node.flush()
        with opened_with(path, base, data) as later:
            found = {e.offset for e in later_runs(later)}
        assert found <= set(stable)
        assert CLUSTER in found
    finally:
        node.close()


def opened_with(path: Path, base: Path, data: Path) -> Any:
    return closing(
        Qcow2Node(
            read_only(path), backing=read_only(base), data_file=read_only(data), read_only=True
        )
    )


def later_runs(node: Qcow2Node) -> list[Any]:
    """Clusters that the tables on disk say are there."""
    entries = [node._map.entry(cluster) for cluster in range(SIZE // CLUSTER)]
    return [Extent(i * CLUSTER, CLUSTER, 0) for i, entry in enumerate(entries) if entry]


def test_bitmaps_that_are_stored_while_the_refcount_table_moves_do_not_move_it_back(
    tmp_path: Path,
) -> None:
    path = make(tmp_path / "d.qcow2", 64 << 20, cluster_size=512, refcount_bits=64)
    with opened(path) as node:
        bitmap = bitmaps.add(node, "b", granularity=512)
        capacity = (
            64 * 64 * 512
        )  # entries of the table's cluster, counts of a block, their clusters
        at = 0
        while node._meta.counts.end < capacity - 8192:
            node.pwrite(memoryview(b"x" * 512), at)
            at += 512
        for marked in range(0, 64 << 20, 40_000):
            bitmap.mark(marked, 1)
        node.flush()
        before = node.header.refcount_table_offset
    with opened(path, read_only=True) as node:
        assert node.header.refcount_table_offset != before
        assert len(list(bitmaps.find(node, "b").dirty_extents())) > 1000
    assert_clean(path)


class Backing(FileNode):
    """Cannot be read at ``bad``."""

    bad = -1

    def pread_into(self, buf: memoryview, offset: int) -> None:
        if offset <= self.bad < offset + len(buf):
            raise OSError(errno.EIO, "bad sector")
        super().pread_into(buf, offset)


@pytest.mark.parametrize("closing", [False, True])
def test_what_can_be_flushed_is_although_a_copy_cannot_be_made(
    closing: bool, tmp_path: Path
) -> None:
    path, base = overlay(tmp_path)
    backing = Backing(base, read_only=True, locking=False)
    backing.bad = 3 * CLUSTER
    node = Qcow2Node(FileNode(path, locking=False), backing=backing)
    for at in range(SIZE // CLUSTER):
        node.pwrite(memoryview(b"new"), at * CLUSTER + 100)
    try:
        with pytest.raises(OSError, match="bad sector"):
            node.close() if closing else node.flush()
        with opened(path, read_only(base), read_only=True) as later:
            for at in range(SIZE // CLUSTER):
                expected = OLD[at * CLUSTER + 100 :][:3] if at == 3 else b"new"
                assert pread(later, 3, at * CLUSTER + 100) == expected
        qemu_img("check", "-U", path, ok=(0, 3))
        backing.bad = -1
        if not closing:
            node.flush()
            with opened(path, read_only(base), read_only=True) as later:
                assert pread(later, 3, 3 * CLUSTER + 100) == b"new"
    finally:
        node.close()


def test_a_write_of_nothing_does_nothing(tmp_path: Path) -> None:
    path, base = overlay(tmp_path)
    with opened(path, read_only(base)) as node:
        for at in (0, 5, CLUSTER):
            node.pwrite(memoryview(b""), at)
        assert pread(node, SIZE, 0) == OLD


def test_a_cluster_that_is_replaced_while_it_is_unpacked_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its place may get other compressed data, of the same length: the same L2 entry."""
    path = make(tmp_path / "d.qcow2", SIZE)
    reading, replaced = threading.Event(), threading.Event()
    texts = [b"old" * 100, b"new" * 100]

    def read(*_: object) -> bytes:
        text = texts.pop(0)
        if not reading.is_set():
            reading.set()
            wait_for(replaced)
        return text

    monkeypatch.setattr(compressed, "read", read)
    with opened(path) as node:
        cache = Unpacked(node.file, node.header)
        view = memoryview(bytearray(3))
        with in_thread(lambda: cache.read(77, memoryview(bytearray(3)), 0)):
            wait_for(reading)
            cache.forget(77)
            replaced.set()
        cache.read(77, view, 0)
        assert view == b"new"


@pytest.mark.parametrize("how", ["flush", "close", "many"])
def test_a_late_copy_that_would_hit_metadata_closes_the_image_to_writes(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, base = overlay(tmp_path)
    node = Qcow2Node(FileNode(path, locking=False), backing=read_only(base))
    try:
        node.pwrite(memoryview(b"new"), 100)
        with node._lock:
            node._meta.overlap.claim(overlap.ACTIVE_L2, node._pending[0].host, CLUSTER)
        monkeypatch.setattr(pending, "MOST", 0)
        late = {
            "flush": node.flush,
            "close": node.close,
            "many": lambda: node.pwrite(memoryview(b"new"), CLUSTER + 100),
        }
        with pytest.raises(OSError, match="overlaps with active L2 table"):
            late[how]()
        assert "overlaps" in node._meta.broken
    finally:
        node.close()
    with opened(path, read_only(base), read_only=True) as later:
        assert later.header.corrupt
        assert pread(later, SIZE, 0) == OLD


@pytest.mark.parametrize("how", ["trim", "zero"])
def test_a_trim_that_fails_brings_no_older_data_back(how: str, tmp_path: Path) -> None:
    path, base = overlay(tmp_path)
    file = Hooked(FileNode(path, locking=False))
    node = Qcow2Node(file, backing=read_only(base))

    def full(index: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    try:
        node._meta.own_table = full  # type: ignore[assignment, method-assign]
        node._own_tables_locked = lambda first, stop: None  # type: ignore[method-assign]
        node.pwrite(memoryview(b"new"), 100)
        with pytest.raises(OSError, match="full"):
            getattr(node, how)(0, CLUSTER)
        assert pread(node, 3, 100) == b"new"
        del node._meta.own_table, node._own_tables_locked
        getattr(node, how)(0, CLUSTER)
        assert pread(node, CLUSTER, 0) == bytes(CLUSTER)
    finally:
        node.close()
    assert_clean(path)

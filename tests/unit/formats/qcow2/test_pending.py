"""Copy on write happens late, and not at all if later writes cover the cluster."""

import random
from pathlib import Path

import pytest

from fleece.block.file import FileNode
from fleece.block.node import Filter
from fleece.formats.qcow2 import pending
from fleece.formats.qcow2.image import Qcow2Node
from fleece.formats.qcow2.pending import Pending
from tests.support.qcow2 import RecordingFile, assert_clean, assert_same, make, pread

CLUSTER = 65536
SIZE = 64 * CLUSTER
OLD = random.Random(1).randbytes(SIZE)


class Counted(Filter):
    """Counts the bytes that are read of it."""

    def __init__(self, child: FileNode) -> None:
        super().__init__("counted", child)
        self.bytes_read = 0

    def pread_into(self, buf: memoryview, offset: int) -> None:
        self.bytes_read += len(buf)
        self.next.pread_into(buf, offset)

    def close(self) -> None:
        self.next.close()


class Disk:
    def __init__(self, directory: Path) -> None:
        base = directory / "base.raw"
        base.write_bytes(OLD)
        self.path = make(directory / "d.qcow2", SIZE, backing=str(base), backing_format="raw")
        self.base = Counted(FileNode(base, read_only=True, locking=False))
        self.file = RecordingFile(FileNode(self.path, locking=False))
        self.node = Qcow2Node(self.file, backing=self.base)
        self.model = bytearray(OLD)

    def write(self, offset: int, data: bytes) -> None:
        self.node.pwrite(memoryview(data), offset)
        self.model[offset : offset + len(data)] = data

    def check(self) -> None:
        assert pread(self.node, SIZE, 0) == self.model

    def syncs(self) -> int:
        return sum(kind == "sync" for kind, _, _ in self.file.log)


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk(tmp_path)


@pytest.mark.parametrize("order", ["forwards", "backwards", "shuffled"])
def test_writes_that_cover_a_cluster_never_copy_it(disk: Disk, order: str) -> None:
    starts = list(range(0, 4 * CLUSTER, 4096))
    if order == "backwards":
        starts.reverse()
    elif order == "shuffled":
        random.Random(2).shuffle(starts)
    for at in starts:
        disk.write(at, bytes([at >> 12 & 255]) * 4096)
    disk.node.flush()
    assert disk.base.bytes_read == 0
    disk.check()
    disk.node.close()
    assert_clean(disk.path)
    assert_same(disk.path, disk.model)


def test_what_is_missing_is_copied_at_the_flush_after_one_read(disk: Disk) -> None:
    disk.write(CLUSTER + 4096, b"x" * 4096)
    disk.write(CLUSTER + 12288, b"y" * 100)
    assert disk.base.bytes_read == 0
    disk.check()
    before = disk.base.bytes_read
    disk.node.flush()
    assert disk.base.bytes_read - before == CLUSTER
    disk.check()
    assert_clean(disk.path)
    assert_same(disk.path, disk.model)


def test_where_little_is_missing_only_that_is_read_at_the_flush(disk: Disk) -> None:
    disk.write(CLUSTER + 4096, b"x" * (CLUSTER - 5000))
    assert disk.base.bytes_read == 0
    disk.node.flush()
    assert disk.base.bytes_read == 5000
    disk.check()
    assert_clean(disk.path)
    assert_same(disk.path, disk.model)


def test_a_flush_of_many_new_clusters_syncs_as_often_as_one_of_one(disk: Disk) -> None:
    disk.write(5, b"a")
    disk.node.flush()
    first = disk.syncs()
    for cluster in range(1, 40):
        disk.write(cluster * CLUSTER + 5, b"a")
    disk.node.flush()
    assert disk.syncs() - first <= first
    disk.check()


def test_without_a_flush_the_tables_know_nothing_of_it(disk: Disk) -> None:
    disk.write(0, b"new")
    assert_same(disk.path, OLD)
    disk.node.close()
    assert_same(disk.path, disk.model)
    assert_clean(disk.path)


def test_no_more_clusters_wait_than_may(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pending, "MOST", 8)
    for cluster in range(60):
        disk.write(cluster * CLUSTER + 7, b"late")
        assert len(disk.node._pending) <= 9
    disk.check()
    disk.node.close()
    assert_clean(disk.path)
    assert_same(disk.path, disk.model)


def test_a_zeroed_cluster_waits_no_longer(disk: Disk) -> None:
    disk.write(10, b"gone")
    disk.node.zero(0, CLUSTER)
    disk.model[:CLUSTER] = bytes(CLUSTER)
    disk.check()
    disk.node.flush()
    assert disk.base.bytes_read <= SIZE
    disk.check()
    assert_clean(disk.path)


def test_spans_join_and_leave_their_gaps() -> None:
    waiting = Pending(0, fresh=True)
    for start, stop in [(10, 20), (40, 50), (20, 30), (5, 12)]:
        waiting.add(start, stop)
    assert waiting.spans == [(5, 30), (40, 50)]
    assert waiting.gaps(60) == [(0, 5), (30, 40), (50, 60)]
    assert waiting.cut(0, 45) == [(0, 5, False), (5, 30, True), (30, 40, False), (40, 45, True)]
    waiting.add(0, 60)
    assert waiting.covers(60)
    assert waiting.gaps(60) == []

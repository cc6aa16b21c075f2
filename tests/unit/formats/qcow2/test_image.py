"""Single behaviours of the qcow2 node."""

import errno
import os
import struct
from pathlib import Path
from typing import Any

import pytest

from fleece.block.file import FileNode
from fleece.block.memory import MemoryNode
from fleece.block.node import Filter
from fleece.errors import ImageCorrupt
from fleece.formats.qcow2.image import Qcow2Node
from nbdwire.constants import CMD_FLAG_FAST_ZERO, CMD_FLAG_NO_HOLE, STATE_HOLE, STATE_ZERO
from nbdwire.export import OPAQUE_RUN, ZERO_RUN
from nbdwire.extents import Extent
from tests.support.qcow2 import RecordingFile, assert_clean, make, opened, pread, qemu_img

CLUSTER = 65536
MiB = 1 << 20


class Full(Filter):
    """A file whose disk is full behind ``limit``."""

    def __init__(self, child: FileNode, limit: int = 1 << 62) -> None:
        super().__init__("full", child)
        self.limit = limit

    def pwrite(self, buf: memoryview, offset: int, fua: bool = False) -> None:
        if offset + len(buf) > self.limit:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.next.pwrite(buf, offset, fua)

    def close(self) -> None:
        self.next.close()


def disk(tmp_path: Path, size: int = 8 * MiB, **options: Any) -> Path:
    return make(tmp_path / "disk.qcow2", size, **options)


def test_a_write_crossing_two_clusters_allocates_both(tmp_path: Path) -> None:
    path = disk(tmp_path)
    with opened(path) as node:
        node.pwrite(memoryview(b"ab" * 1000), CLUSTER - 1000)
        assert node.extents(0, 3 * CLUSTER) == [
            Extent(0, 2 * CLUSTER, 0),
            Extent(2 * CLUSTER, CLUSTER, STATE_HOLE | STATE_ZERO),
        ]
        assert pread(node, 2002, CLUSTER - 1001) == b"\0" + b"ab" * 1000 + b"\0"
    assert_clean(path)


def test_a_sequential_disk_is_one_run(tmp_path: Path) -> None:
    with opened(disk(tmp_path)) as node:
        for offset in range(0, 4 * MiB, MiB):
            node.pwrite(memoryview(b"x" * MiB), offset)
        runs = node.map(0, 4 * MiB)
        assert len(runs) == 1
        assert runs[0][2] == 4 * MiB


@pytest.mark.parametrize("verb", ["zero", "trim"])
def test_zero_and_trim_give_the_host_cluster_back(verb: str, tmp_path: Path) -> None:
    path = disk(tmp_path)
    with opened(path) as node:
        node.pwrite(memoryview(b"x" * CLUSTER), 0)
        getattr(node, verb)(0, CLUSTER)
        assert node.map(0, CLUSTER) == [(ZERO_RUN, 0, CLUSTER)]
        assert node.extents(0, CLUSTER) == [Extent(0, CLUSTER, STATE_ZERO | STATE_HOLE)]
        assert pread(node, CLUSTER, 0) == bytes(CLUSTER)
    assert_clean(path)


def test_zeroes_without_a_hole_keep_the_host_cluster_and_the_next_write_uses_it(
    tmp_path: Path,
) -> None:
    path = disk(tmp_path)
    with opened(path) as node:
        node.pwrite(memoryview(b"x" * CLUSTER), 0)
        [(fd, host, _)] = node.map(0, CLUSTER)
        for _ in range(2):
            node.zero(0, CLUSTER, CMD_FLAG_NO_HOLE)
            assert node.map(0, CLUSTER) == [(ZERO_RUN, 0, CLUSTER)]
            assert node.extents(0, CLUSTER) == [Extent(0, CLUSTER, STATE_ZERO)]
            assert pread(node, CLUSTER, 0) == bytes(CLUSTER)
            node.pwrite(memoryview(b"new"), 100)
            assert node.map(0, CLUSTER)[0] == (fd, host, CLUSTER)
            assert pread(node, CLUSTER, 0) == bytes(100) + b"new" + bytes(CLUSTER - 103)
    assert_clean(path)


def test_a_host_cluster_that_map_named_never_holds_other_data(tmp_path: Path) -> None:
    with opened(disk(tmp_path, cluster_size=4096)) as node:
        node.pwrite(memoryview(b"\1" * 40960), 0)
        named = {
            host // 4096
            for _, host, length in node.map(0, 40960)
            for host in range(host, host + length, 4096)
        }
        node.zero(0, 40960)
        node.trim(0, 40960)
        node.flush()
        node.pwrite(memoryview(b"\2" * 40960), MiB)
        node.flush()
        later = {
            h // 4096
            for _, host, length in node.map(MiB, 40960)
            for h in range(host, host + length, 4096)
        }
        assert not named & later


def test_what_lies_behind_a_short_backing_file_is_zero_within_one_request(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(b"\3" * 70_000)
    base = FileNode(tmp_path / "base", read_only=True, locking=False)
    path = disk(tmp_path, backing=str(tmp_path / "base"), backing_format="raw")
    with opened(path, base) as node:
        assert pread(node, 20_000, 60_000) == b"\3" * 10_000 + bytes(10_000)
        assert node.map(60_000, 100_000)[-1] == (ZERO_RUN, 0, 90_000)
        node.pwrite(memoryview(b"x"), 69_000)  # copies the part of the cluster that is there
        assert pread(node, 20_000, 60_000) == b"\3" * 9000 + b"x" + b"\3" * 999 + bytes(10_000)


def test_a_fast_zero_of_less_than_a_cluster_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    with opened(disk(tmp_path)) as node:
        node.pwrite(memoryview(b"x" * CLUSTER), 0)
        with pytest.raises(OSError, match="zeroes") as caught:
            node.zero(10, 100, CMD_FLAG_FAST_ZERO)
        assert caught.value.errno == errno.EOPNOTSUPP
        assert pread(node, CLUSTER, 0) == b"x" * CLUSTER


def test_zeroing_what_is_zero_already_allocates_nothing(tmp_path: Path) -> None:
    path = disk(tmp_path)
    with opened(path) as node:
        size = path.stat().st_size
        node.zero(100, 3 * MiB)
        node.flush()
        assert path.stat().st_size == size
        assert node.extents(0, 8 * MiB) == [Extent(0, 8 * MiB, STATE_HOLE | STATE_ZERO)]


def test_a_read_only_image_refuses_to_change(tmp_path: Path) -> None:
    path = disk(tmp_path)
    before = path.read_bytes()
    with opened(path, read_only=True) as node:
        changes = [
            lambda: node.pwrite(memoryview(b"x"), 0),
            lambda: node.zero(0, 512),
            lambda: node.trim(0, 512),
        ]
        for change in changes:
            with pytest.raises(PermissionError):
                change()
        node.flush()
    assert path.read_bytes() == before


def test_opening_for_writing_and_closing_changes_no_byte(tmp_path: Path) -> None:
    path = disk(tmp_path, lazy_refcounts=True)
    before = path.read_bytes()
    with opened(path) as node:
        assert pread(node, 100, 0) == bytes(100)
        node.flush()
    assert path.read_bytes() == before


def test_a_full_disk_fails_the_write_and_leaves_the_image_right(tmp_path: Path) -> None:
    path = disk(tmp_path, cluster_size=4096)
    file = Full(FileNode(path, locking=False))
    node = Qcow2Node(file)
    node.pwrite(memoryview(b"\1" * 8192), 0)
    model = bytearray(node.size)
    model[:8192] = b"\1" * 8192
    for limit in range(path.stat().st_size, path.stat().st_size + 40_000, 1500):
        file.limit = limit
        with pytest.raises(OSError, match="No space"):
            node.pwrite(memoryview(b"\2" * 60_000), MiB + 5)
        assert pread(node, node.size, 0) == model
    file.limit = 1 << 62
    node.pwrite(memoryview(b"\2" * 60_000), MiB + 5)
    model[MiB + 5 : MiB + 60_005] = b"\2" * 60_000
    assert pread(node, node.size, 0) == model
    node.close()
    assert_clean(path)


def test_a_flush_that_fails_is_made_up_for_by_the_next_one(tmp_path: Path) -> None:
    path = disk(tmp_path, cluster_size=512)
    file = Full(FileNode(path, locking=False))
    node = Qcow2Node(file)
    node.pwrite(memoryview(b"\1" * MiB), 0)
    file.limit = 0
    with pytest.raises(OSError, match="No space"):
        node.flush()
    file.limit = 1 << 62
    node.pwrite(memoryview(b"\2" * MiB), 2 * MiB)
    node.flush()
    qemu_img("check", "-U", "-f", "qcow2", path)
    node.close()
    assert_clean(path)
    with opened(path, read_only=True) as again:
        assert pread(again, 3 * MiB, 0) == b"\1" * MiB + bytes(MiB) + b"\2" * MiB


def test_a_flush_without_new_clusters_is_one_sync(tmp_path: Path) -> None:
    recorder = RecordingFile(FileNode(disk(tmp_path), locking=False))
    node = Qcow2Node(recorder)
    node.pwrite(memoryview(b"x" * 512), 0)
    node.flush()
    del recorder.log[:]
    node.pwrite(memoryview(b"y" * 512), 0)
    node.flush()
    assert [kind for kind, _, _ in recorder.log] == ["write", "sync"]
    node.close()


def test_a_fua_write_makes_the_tables_stable_too(tmp_path: Path) -> None:
    path = disk(tmp_path)
    with opened(path) as node:
        for data, fua in [(b"x", False), (b"y", True)]:  # the second one is in place
            node.pwrite(memoryview(data * 512), 0, fua)
        with opened(path, read_only=True) as as_it_is_on_disk:
            assert pread(as_it_is_on_disk, 512, 0) == b"y" * 512


def test_a_fua_write_with_stable_tables_is_one_write_with_fua(tmp_path: Path) -> None:
    class Fua(RecordingFile):
        def pwrite(self, buf: memoryview, offset: int, fua: bool = False) -> None:
            super().pwrite(buf, offset)
            self.log += [("fua", 0, b"")] if fua else []

    recorder = Fua(FileNode(disk(tmp_path), locking=False))
    node = Qcow2Node(recorder)
    node.pwrite(memoryview(b"x" * 512), 0)
    node.flush()
    del recorder.log[:]
    node.pwrite(memoryview(b"y" * 512), 0, True)
    assert [kind for kind, _, _ in recorder.log] == ["write", "fua"]
    node.close()


def test_lazy_refcounts_set_the_dirty_bit_first_and_clear_it_last(tmp_path: Path) -> None:
    path = disk(tmp_path, lazy_refcounts=True)
    recorder = RecordingFile(FileNode(path, locking=False))
    node = Qcow2Node(recorder)
    node.pwrite(memoryview(b"x" * 512), 0)
    assert recorder.log[0] == ("write", 72, (1).to_bytes(8, "big"))
    assert recorder.log[1][0] == "sync"
    node.flush()
    assert path.read_bytes()[79] == 1
    node.close()
    assert path.read_bytes()[79] == 0
    assert_clean(path)


def test_unknown_autoclear_bits_are_cleared_before_the_first_write(tmp_path: Path) -> None:
    path = disk(tmp_path)
    with path.open("r+b") as file:
        file.seek(88)
        file.write((1 << 40).to_bytes(8, "big"))
    with opened(path) as node:
        assert path.read_bytes()[88:96] == (1 << 40).to_bytes(8, "big")
        node.pwrite(memoryview(b"x"), 0)
        assert path.read_bytes()[88:96] == bytes(8)


def test_closing_twice_is_harmless(tmp_path: Path) -> None:
    with opened(disk(tmp_path)) as node:
        node.pwrite(memoryview(b"x"), 0)
        node.close()


def test_an_image_on_something_that_is_no_file_is_opaque(tmp_path: Path) -> None:
    path = disk(tmp_path, MiB)
    with opened(path) as node:
        node.pwrite(memoryview(b"x" * CLUSTER), 0)
    data = path.read_bytes()
    memory = MemoryNode(len(data))
    memory.pwrite(memoryview(data), 0)
    node = Qcow2Node(memory, read_only=True)
    assert node.map(0, 2 * CLUSTER) == [(OPAQUE_RUN, 0, CLUSTER), (ZERO_RUN, 0, CLUSTER)]
    assert pread(node, CLUSTER, 0) == b"x" * CLUSTER
    node.close()


def patch_l2(path: Path, entry: int) -> None:
    """Make ``entry`` the first one of the first L2 table."""
    with path.open("r+b") as file:
        file.seek(40)
        (l1,) = struct.unpack(">Q", file.read(8))
        file.seek(l1)
        (l2,) = struct.unpack(">Q", file.read(8))
        file.seek(l2 & 0x00FFFFFFFFFFFE00)
        file.write(struct.pack(">Q", entry))


@pytest.mark.parametrize(
    ("entry", "what"),
    [
        (1 << 63 | 0x50200, "inside a cluster"),
        (1 << 63 | 0x0, "the header"),
        (1 << 63 | 1 << 50, "behind everything"),
        (1 << 60 | 1 << 63 | 0x50000, "reserved bits"),
    ],
)
def test_a_write_where_no_data_can_be_fails_and_the_image_stays(
    entry: int, what: str, tmp_path: Path
) -> None:
    path = disk(tmp_path)
    with opened(path) as node:
        node.pwrite(memoryview(b"x" * CLUSTER), 0)
    patch_l2(path, entry)
    before = bytearray(path.read_bytes()[:65536])
    with opened(path) as node:
        if not entry & 0x00FFFFFFFFFFFE00:  # not allocated then, whatever the flag says
            node.pwrite(memoryview(b"y" * CLUSTER), 0)
            return
        for match in ("corrupt", "closed to writes"):
            with pytest.raises(OSError, match=match) as caught:
                node.pwrite(memoryview(b"y" * CLUSTER), 0)
            assert caught.value.errno == errno.EIO, what
    before[79] |= 2  # and nothing else than the corrupt bit
    assert path.read_bytes()[:65536] == before
    with pytest.raises(ImageCorrupt, match="check -r all"), opened(path):
        pass


def test_an_l2_table_inside_a_cluster_is_an_error_of_the_request(tmp_path: Path) -> None:
    path = disk(tmp_path)
    with path.open("r+b") as file:
        file.seek(40)
        (l1,) = struct.unpack(">Q", file.read(8))
        file.seek(l1)
        file.write(struct.pack(">Q", 1 << 63 | 0x10200))
    with opened(path, read_only=True) as node, pytest.raises(OSError, match="inside a cluster"):
        pread(node, 512, 0)


def test_a_dirty_image_with_two_users_of_a_cluster_is_not_repaired(tmp_path: Path) -> None:
    path = disk(tmp_path, lazy_refcounts=True)
    with opened(path) as node:
        node.pwrite(memoryview(b"x" * CLUSTER * 2), 0)
        [(_, host, _)] = node.map(CLUSTER, CLUSTER)
    patch_l2(path, 1 << 63 | host)
    with path.open("r+b") as file:
        file.seek(79)
        file.write(b"\1")
    before = path.read_bytes()
    with pytest.raises(ImageCorrupt, match=r"two tables refer to one cluster.*qemu-img check"):
        opened(path).__enter__()
    assert path.read_bytes() == before

"""Counts of every width, and an allocator that reuses what is free, but not too early."""

import errno
import os
import random
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest

from fleece.block.file import FileNode
from fleece.formats.qcow2 import freespace
from fleece.formats.qcow2.image import read_header
from fleece.formats.qcow2.metadata import Metadata
from fleece.formats.qcow2.options import Qcow2Options
from fleece.formats.qcow2.overlap import BITMAP_DATA, MetadataMap
from fleece.formats.qcow2.refcounts import Refcounts
from fleece.formats.qcow2.widths import Width
from tests.support.qcow2 import CLEAN, LEAKS, qemu_img

WIDTHS = [1, 2, 4, 8, 16, 32, 64]


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Disk:
    """Counts of an image without a guest: what is allocated is referred to by nobody."""

    def __init__(self, path: Path, file: FileNode) -> None:
        self.path = path
        self.clock = Clock()
        header = read_header(file, "test")
        self.header = header
        self.size = header.cluster_size
        self.counts = Refcounts(file, header, clock=self.clock)
        self._meta = Metadata(file, header, self.counts, name="test", options=Qcow2Options())

    def write_back(self) -> None:
        """The file is as long as if all of it had been written."""
        os.truncate(self.path, max(self.counts.end, self.path.stat().st_size))
        self._meta.flush()

    def wait(self) -> None:
        """Twice the grace period, with a look in between."""
        for _ in range(2):
            self.clock.now += freespace.GRACE + 1
            self.counts._free._turn()

    def free(self, offset: int, count: int) -> None:
        """Let go of clusters, all the way through the quarantine."""
        self.counts.retire(offset // self.size, count)
        self.write_back()
        self.wait()

    def numbers(self, *offsets: int) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
        return np.array(offsets, np.int64) // self.size


@contextmanager
def disk(
    tmp_path: Path, bits: int = 16, cluster: int = 4096, size: str = "64M", version: str = "1.1"
) -> Iterator[Disk]:
    path = tmp_path / "disk.qcow2"
    options = f"refcount_bits={bits},cluster_size={cluster},compat={version}"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, size)
    file = FileNode(path, locking=False)
    try:
        yield Disk(path, file)
    finally:
        file.close()


@pytest.mark.parametrize("bits", WIDTHS)
def test_counts_of_every_width_are_read_as_they_were_written(bits: int) -> None:
    """formats.md §1.3: LSB first below 8 bits, else big-endian."""
    width = Width(bits.bit_length() - 1)
    rnd = random.Random(bits)
    data, model = bytearray(512), [0] * (4096 // bits)
    for _ in range(300):
        low = rnd.randrange(len(model))
        high = min(len(model), low + rnd.choice([1, 2, 7, 100]))
        values = [rnd.randrange(width.most + 1) for _ in range(high - low)]
        kind = rnd.randrange(3)
        if kind == 0:
            width.write(data, low, np.array(values, np.uint64))
        elif kind == 1:
            values = values[:1] * (high - low)
            width.fill(data, low, high, values[0])
        else:
            high, values = low + 1, values[:1]
            width.put(data, low, values[0])
        model[low:high] = values
        assert width.read(data, 0, len(model)).tolist() == model
        assert width.get(data, low) == model[low]
        assert width.read(data, low, high).tolist() == values
    raw = int.from_bytes(data, "little" if bits < 8 else "big")
    for at, value in enumerate(model):
        shift = at * bits if bits < 8 else 4096 - (at + 1) * bits
        assert raw >> shift & width.most == value


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(("cluster", "clusters"), [(512, 9000), (4096, 3000), (2 << 20, 40)])
def test_qemu_agrees_with_counts_that_grew_with_the_file(
    bits: int, cluster: int, clusters: int, tmp_path: Path
) -> None:
    rnd = random.Random(bits)
    with disk(tmp_path, bits, cluster) as it:
        table = it.counts.table_offset
        used: set[int] = set()
        while len(used) < clusters:
            count = rnd.choice([1, 1, 3, 200])
            first = it.counts.allocate(count) // cluster
            assert used.isdisjoint(range(first, first + count))
            used.update(range(first, first + count))
            if rnd.random() < 0.05:
                it.write_back()
        it.write_back()
        it.write_back()
        assert all(it.counts.get(n) == 1 for n in used)
        if (cluster, bits) == (512, 64):
            assert it.counts.table_offset != table
    qemu_img("check", "-f", "qcow2", it.path, ok=(LEAKS,))
    qemu_img("check", "-q", "-r", "leaks", "-f", "qcow2", it.path, ok=(CLEAN,))
    with closing(FileNode(it.path, locking=False)) as file:
        again = Refcounts(file, read_header(file, "test"))
        free = again._free.find(1, again._next)
        assert free < 0 or again.get(free) == 0


def test_version_2_images_have_16_bit_counts(tmp_path: Path) -> None:
    with disk(tmp_path, version="0.10") as it:
        it.counts.allocate(5000)
        it.write_back()
        assert it.counts.most == 0xFFFF
    qemu_img("check", "-f", "qcow2", it.path, ok=(LEAKS,))


@pytest.mark.parametrize(("bits", "cluster"), [(1, 4096), (16, 512), (64, 512), (16, 65536)])
def test_a_file_does_not_grow_when_as_much_is_freed_as_is_allocated(
    bits: int, cluster: int, tmp_path: Path
) -> None:
    rnd = random.Random(1)
    with disk(tmp_path, bits, cluster) as it:
        live: list[tuple[int, int]] = []
        ends = []
        for _ in range(90):
            live += [(it.counts.allocate(n), n) for n in rnd.choices([1, 2, 5], k=20)]
            rnd.shuffle(live)
            for offset, n in live[60:]:
                it.counts.retire(offset // cluster, n)
            del live[60:]
            it.write_back()
            it.wait()
            ends.append(it.counts.end)
        assert ends[-1] == ends[60]
        taken = [n for offset, count in live for n in range(offset, offset + count * cluster, 512)]
        assert len(set(taken)) == len(taken)


def test_control_without_reuse_the_file_grows(tmp_path: Path) -> None:
    with disk(tmp_path) as it:
        for _ in range(50):
            it.counts.retire(it.counts.allocate(10) // it.size, 10)
            it.write_back()  # and no time goes by
        assert it.counts.end > 500 * it.size


def test_a_freed_cluster_is_reused_when_durable_and_punched_and_after_the_grace(
    tmp_path: Path,
) -> None:
    """metadata.py: data of a reader that began before must not change under it."""
    with disk(tmp_path) as it:
        counts = it.counts
        old = counts.allocate(1)
        counts.retire(old // it.size, 1, freespace.REQUEST)
        it.wait()
        assert counts.get(old // it.size) == 1
        changes = counts.take()
        counts.settle(changes, written=False)
        it.wait()
        assert counts.allocate(1) != old
        counts.settle(counts.take(), written=True)  # durable
        freed = counts.take_freed()
        assert freed == [(old // it.size, 1, freespace.REQUEST)]
        it.wait()
        assert counts.allocate(1) != old
        counts.punched(freed)
        assert counts.allocate(1) != old
        it.clock.now += freespace.GRACE - 1
        assert counts.allocate(1) != old
        it.wait()
        assert counts.allocate(1) == old
        assert counts.take_freed() == []


def test_what_was_not_taken_for_a_hole_is_never_offered_once_it_is_reused(tmp_path: Path) -> None:
    with disk(tmp_path) as it:
        old = it.counts.allocate(3)
        it.counts.retire(old // it.size, 3)
        it.counts.settle(it.counts.take(), written=True)
        it.wait()
        assert it.counts.allocate(3) == old
        assert it.counts.take_freed() == []


def test_a_cluster_that_held_data_is_not_fresh(tmp_path: Path) -> None:
    with disk(tmp_path) as it:
        new = it.counts.allocate(4)
        assert it.counts.is_fresh(new, 4)
        assert it.counts.fresh_is_zero
        it.free(new + it.size, 2)
        again = it.counts.allocate(2)
        assert again == new + it.size
        assert not it.counts.is_fresh(again, 2)
        assert not it.counts.fresh_is_zero
        assert it.counts.is_fresh(it.counts.allocate(1))


def test_free_space_of_an_earlier_session_is_used_and_is_not_fresh(tmp_path: Path) -> None:
    with disk(tmp_path) as it:
        it.counts.allocate(100)
        it.write_back()
    qemu_img("check", "-q", "-r", "leaks", "-f", "qcow2", it.path)
    with closing(FileNode(it.path, locking=False)) as file:
        file.pwrite(memoryview(b"x" * it.size), 200 * it.size)
    with closing(FileNode(it.path, locking=False)) as file:
        counts = Refcounts(file, read_header(file, "test"))
        end = counts.end
        offset = counts.allocate(50)
        assert offset + 50 * it.size <= end
        assert not counts.is_fresh(offset, 50)


def test_released_clusters_come_back_after_the_quarantine(tmp_path: Path) -> None:
    with disk(tmp_path) as it:
        first = it.counts.allocate(2)
        it.counts.release(first, 2)
        assert it.counts.allocate(2) != first
        it.wait()
        assert it.counts.allocate(2) == first


def test_offset_0_is_never_given_out(tmp_path: Path) -> None:
    """formats.md §15: a guest's first 64 KiB were overwritten in another driver."""
    with disk(tmp_path) as it:
        it.counts.guard = None
        it.counts._blocks.fill(0, 8, 0)
        assert it.counts.get(0) == 0
        offsets = [it.counts.allocate(1) for _ in range(20)]
        assert 0 not in offsets
        assert it.size in offsets


def test_what_the_metadata_map_knows_is_never_given_out(tmp_path: Path) -> None:
    with disk(tmp_path) as it:
        first = it.counts.allocate(10)
        it.free(first, 10)
        it.counts.guard = MetadataMap(it.header)
        it.counts.guard.claim(BITMAP_DATA, first + 3 * it.size, 2 * it.size)
        offsets = [it.counts.allocate(1) for _ in range(12)]
        assert not {first + 3 * it.size, first + 4 * it.size} & set(offsets)
        assert first in offsets
        assert first + 9 * it.size in offsets


def test_new_blocks_and_tables_are_told_to_the_guard(tmp_path: Path) -> None:
    with disk(tmp_path, 64, 512) as it:
        guard = it.counts.guard = MetadataMap(it.header)
        it.counts.allocate(5000)
        assert guard.hit(it.counts.table_offset, 512) == "refcount table"
        places = [int(place) for place in it.counts._blocks.table if place][1:]
        assert places
        assert all(guard.hit(place, 1) == "refcount block" for place in places)


def test_one_search_looks_at_a_few_segments_only(tmp_path: Path) -> None:
    with disk(tmp_path, 16, 512, size="200M") as it:
        it.counts.allocate(20 * freespace.SEGMENT)
        it.write_back()
        with closing(FileNode(it.path, locking=False)) as file:
            counts = Refcounts(file, it._meta.header)
            looks: list[int] = []
            inner = counts._free._is_free
            counts._free._is_free = lambda first, n: looks.append(n) or inner(first, n)  # type: ignore[func-returns-value]
            counts.allocate(1)
            assert 0 < len(looks) <= 5
            for _ in range(30):
                counts.allocate(1)
            seen = len(looks)
            for _ in range(100):
                counts.allocate(1)
            assert len(looks) == seen


def test_compressed_data_is_packed_and_shares_clusters(tmp_path: Path) -> None:
    with disk(tmp_path) as it:
        counts, size = it.counts, it.size
        a, b = counts.allocate_bytes(1000), counts.allocate_bytes(2000)
        assert b == a + 1000
        assert counts.get(a // size) == 2
        across = counts.allocate_bytes(3000)
        assert across == b + 2000
        assert (counts.get(a // size), counts.get(a // size + 1)) == (3, 1)
        counts.allocate(1)
        apart = counts.allocate_bytes(4000)
        assert apart % size == 0
        counts.release_bytes(across, 3000)
        assert (counts.get(a // size), counts.get(a // size + 1)) == (2, 0)
        counts.retire(a // size, 1)
        counts.retire(a // size, 1)
        it.write_back()
        assert counts.get(a // size) == 0
        assert counts.allocate_bytes(10) // size != a // size


def test_a_cluster_of_compressed_data_that_was_freed_takes_no_more(tmp_path: Path) -> None:
    with disk(tmp_path) as it:
        first = it.counts.allocate_bytes(100)
        it.counts.retire(first // it.size, 1)
        it.write_back()
        assert it.counts.allocate_bytes(100) // it.size != first // it.size


def test_nothing_is_packed_into_a_cluster_that_was_freed_and_got_other_data(tmp_path: Path) -> None:
    with disk(tmp_path) as it:
        first = it.counts.allocate_bytes(100)
        it.free(first, 1)
        assert it.counts.allocate(1) == first
        assert it.counts.allocate_bytes(100) // it.size != first // it.size
        assert it.counts.get(first // it.size) == 1


def test_one_bit_counts_share_nothing(tmp_path: Path) -> None:
    with disk(tmp_path, 1) as it:
        places = [it.counts.allocate_bytes(100) // it.size for _ in range(5)]
        assert len(set(places)) == 5
        assert all(it.counts.get(n) == 1 for n in places)


@pytest.mark.parametrize("bits", WIDTHS[:5])
def test_references_are_added_all_or_none(bits: int, tmp_path: Path) -> None:
    with disk(tmp_path, bits) as it:
        counts = it.counts
        first = counts.allocate(6) // it.size
        clusters = np.arange(first, first + 6)
        most = (1 << bits) - 1
        counts.add_references(np.repeat(clusters[:3], most - 1))
        assert [counts.get(n) for n in clusters] == [most] * 3 + [1] * 3
        with pytest.raises(OSError, match="refcounts can hold") as caught:
            counts.add_references(clusters[::-1])
        assert caught.value.errno == errno.EINVAL
        assert [counts.get(n) for n in clusters] == [most] * 3 + [1] * 3
        counts.drop_references(np.repeat(clusters, most - 1 or 1))
        left = 1 if bits > 1 else 0
        assert [counts.get(n) for n in clusters] == [left] * 3 + [0] * 3


def test_references_are_added_across_blocks_and_dropped_to_the_quarantine(tmp_path: Path) -> None:
    with disk(tmp_path, 64, 512) as it:
        clusters = np.arange(it.counts.allocate(500) // 512, it.counts.end // 512)
        before = [it.counts.get(n) for n in clusters.tolist()]
        it.counts.add_references(clusters)
        assert [it.counts.get(n) for n in clusters.tolist()] == [n + 1 for n in before]
        it.counts.drop_references(clusters)
        it.counts.drop_references(clusters, freespace.SNAPSHOT)
        assert not any(it.counts.get(n) for n in clusters.tolist())
        freed = it.counts.take_freed()
        assert sum(run.clusters for run in freed) == sum(map(bool, before))
        assert {run.reason for run in freed} == {freespace.SNAPSHOT}


def test_a_reference_to_a_cluster_without_a_count_cannot_be_added(tmp_path: Path) -> None:
    with disk(tmp_path) as it, pytest.raises(OSError, match="corrupt") as caught:
        it.counts.add_references(np.array([1 << 40]))
    assert caught.value.errno == errno.EIO


def test_a_count_never_falls_below_0(tmp_path: Path) -> None:
    with disk(tmp_path) as it:
        first = it.counts.allocate(3)
        it.counts.retire(first // it.size, 3)
        it.counts.retire(first // it.size + 1, 1)
        it.write_back()
        it.counts.drop_references(it.numbers(first, first, 1 << 50))
        assert [it.counts.get(first // it.size + n) for n in range(3)] == [0, 0, 0]


class Full(FileNode):
    """A file system without room behind ``limit``."""

    limit = 1 << 62

    def pwrite(self, buf: memoryview, offset: int, fua: bool = False) -> None:
        if offset + len(buf) > self.limit:
            raise OSError(errno.ENOSPC, "full")
        super().pwrite(buf, offset, fua)


def test_growing_that_fails_can_be_tried_again(tmp_path: Path) -> None:
    with disk(tmp_path, 64, 512) as it:
        pass
    file = Full(it.path, locking=False)
    with closing(file):
        header = read_header(file, "test")
        counts = Refcounts(file, header)
        meta = Metadata(file, header, counts, name="test", options=Qcow2Options())
        failures = 0
        for limit in range(0, 3 << 20, 20_000):
            file.limit = limit
            try:
                counts.allocate(50)
            except OSError:
                failures += 1
        assert failures
        file.limit = 1 << 62
        counts.allocate(5000)
        meta.flush()
        meta.flush()
    qemu_img("check", "-f", "qcow2", it.path, ok=(LEAKS,))

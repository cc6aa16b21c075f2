"""Writers of one cluster at once. Each test has a control that fails without the lock."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import pytest

from fleece.block.file import FileNode
from fleece.block.node import Filter
from fleece.formats.qcow2.image import Qcow2Node
from fleece.formats.qcow2.refcounts import Refcounts
from tests.support.qcow2 import (
    CountedLock,
    Rendezvous,
    assert_clean,
    in_two_threads,
    make,
    opened,
    pread,
)
from tests.support.threads import frequent_switches, wait_until

CLUSTER = 65536
SIZE = 4 << 20


class NoLock:
    """What stands for the range lock in a control."""

    def exclusive(self, _start: int, _stop: int) -> AbstractContextManager[None]:
        return nullcontext()

    def __len__(self) -> int:
        return 0


class Meeting(Filter):
    """Holds the first write of data until a second user is there as well, or waits for the lock."""

    def __init__(self, child: FileNode) -> None:
        super().__init__("meeting", child)
        self.arrived = 0
        self.armed = False
        self.others: Callable[[], int] = lambda: 0
        self._lock = threading.Lock()

    def pwrite(self, buf: memoryview, offset: int, fua: bool = False) -> None:
        # Data of this test is marked; tables are not, and are written under the metadata lock.
        if self.armed and b"\xaa" in bytes(buf[:1]) + bytes(buf[-1:]):
            with self._lock:
                self.arrived += 1
            wait_until(lambda: self.arrived >= 2 or self.others() >= 2)
        self.next.pwrite(buf, offset, fua)

    def close(self) -> None:
        self.next.close()


@contextmanager
def meeting(tmp_path: Path, locked: bool, base: bytes) -> Iterator[tuple[Qcow2Node, Meeting]]:
    backing = tmp_path / "base.raw"
    backing.write_bytes(base)
    path = make(tmp_path / "disk.qcow2", SIZE, backing=str(backing), backing_format="raw")
    file = Meeting(FileNode(path, locking=False))
    node = Qcow2Node(file, backing=FileNode(backing, read_only=True, locking=False))
    if not locked:
        node._ranges = NoLock()  # type: ignore[assignment]
    node.pwrite(memoryview(b"\1" * 512), 0)  # the L2 table is there from now on
    file.others = lambda: len(node._ranges)
    file.armed = True
    try:
        yield node, file
    finally:
        node.close()


def two_halves(node: Qcow2Node) -> bool:
    """Two writers, one new cluster; whether both halves are there."""
    half = memoryview(b"\xaa" * (CLUSTER // 2))
    at = 5 * CLUSTER
    in_two_threads(lambda: node.pwrite(half, at), lambda: node.pwrite(half, at + CLUSTER // 2))
    return pread(node, CLUSTER, at) == bytes(half) * 2


def test_two_writers_of_the_halves_of_a_new_cluster_both_keep_their_data(tmp_path: Path) -> None:
    with meeting(tmp_path, True, b"\7" * SIZE) as (node, file):
        assert two_halves(node)
        assert file.arrived >= 1
    assert_clean(tmp_path / "disk.qcow2")


def test_control_without_the_range_lock_one_half_is_lost(tmp_path: Path) -> None:
    with meeting(tmp_path, False, b"\7" * SIZE) as (node, _):
        assert not two_halves(node)


class Late(Filter):
    """Holds the read of old data (for copy on write) until somebody has tried to zero it."""

    def __init__(self, child: FileNode, go_on: Callable[[], bool]) -> None:
        super().__init__("late", child)
        self._go_on = go_on
        self.reading = threading.Event()

    def pread_into(self, buf: memoryview, offset: int) -> None:
        self.next.pread_into(buf, offset)
        self.reading.set()
        wait_until(self._go_on)

    def close(self) -> None:
        self.next.close()


def old_data_after_zero(tmp_path: Path, *, locked: bool) -> bool:
    """A writer of some bytes has read the old data of its cluster, then the cluster is zeroed."""
    backing = tmp_path / "base.raw"
    backing.write_bytes(b"\7" * SIZE)
    path = make(tmp_path / "disk.qcow2", SIZE, backing=str(backing), backing_format="raw")
    zeroed = threading.Event()
    late = Late(
        FileNode(backing, read_only=True, locking=False),
        lambda: zeroed.is_set() or len(node._ranges) >= 2,
    )
    node = Qcow2Node(FileNode(path, locking=False), backing=late)
    if not locked:
        node._ranges = NoLock()  # type: ignore[assignment]

    def zero() -> None:
        late.reading.wait(20)
        node.zero(0, CLUSTER)
        zeroed.set()

    def write() -> None:
        node.pwrite(memoryview(b"\xaa" * 512), 1024)
        node.flush()  # which copies what is around it

    in_two_threads(write, zero)
    content = pread(node, CLUSTER, 0)
    node.close()
    return b"\7" in content


def test_a_zero_beside_a_copying_write_does_not_bring_old_data_back(tmp_path: Path) -> None:
    assert not old_data_after_zero(tmp_path, locked=True)


def test_control_without_the_range_lock_old_data_comes_back(tmp_path: Path) -> None:
    assert old_data_after_zero(tmp_path, locked=False)


class SlowCounts(Refcounts):
    """Meets another thread once it has looked where the next free cluster is."""

    together: Rendezvous
    _value: int
    _looking = threading.local()

    def _missing_block(self, count: int) -> int | None:
        result = super()._missing_block(count)
        self._looking.now = result is None
        return result

    @property  # type: ignore[override]
    def _next(self) -> int:
        value = self._value
        if getattr(self._looking, "now", False):
            self._looking.now = False
            self.together.meet()
        return value

    @_next.setter
    def _next(self, value: int) -> None:
        self._value = value


def two_allocations(tmp_path: Path, *, real: bool) -> bool:
    """Two writers allocate different clusters at once; whether both find their data again."""
    lock = CountedLock(real=real)
    with opened(make(tmp_path / "disk.qcow2", SIZE)) as node:
        node.pwrite(memoryview(b"\1" * 512), 0)  # the L2 table is there from now on
        node._lock = lock
        counts = node._meta.counts
        counts._value = counts.__dict__.pop("_next")
        counts.together = Rendezvous(lock, real=real)
        counts.__class__ = SlowCounts
        counts.together.armed = True
        data = [memoryview(bytes([n]) * CLUSTER) for n in (2, 3)]
        in_two_threads(
            lambda: node.pwrite(data[0], CLUSTER), lambda: node.pwrite(data[1], 2 * CLUSTER)
        )
        return pread(node, 2 * CLUSTER, CLUSTER) == bytes(data[0]) + bytes(data[1])


def test_two_writers_never_get_the_same_new_cluster(tmp_path: Path) -> None:
    assert two_allocations(tmp_path, real=True)
    assert_clean(tmp_path / "disk.qcow2")


def test_control_without_the_metadata_lock_they_get_the_same_cluster(tmp_path: Path) -> None:
    assert not two_allocations(tmp_path, real=False)


def test_many_writers_and_flushes_lose_nothing(tmp_path: Path) -> None:
    """Threads write every n-th sector each, so every cluster is allocated by a race."""
    path = make(tmp_path / "disk.qcow2", SIZE, cluster_size=4096)
    node = Qcow2Node(FileNode(path, locking=False))
    threads = 6

    def write(me: int) -> None:
        for sector in range(me, SIZE // 512, threads * 3):
            node.pwrite(memoryview(bytes([me + 1]) * 512), sector * 512)
            if sector % 601 == 0:
                node.flush()
            assert pread(node, 512, sector * 512) == bytes([me + 1]) * 512

    with frequent_switches(), ThreadPoolExecutor(threads) as pool:
        list(pool.map(write, range(threads)))
    expected = bytearray(SIZE)
    for sector in range(SIZE // 512):
        if sector % (threads * 3) < threads:
            expected[sector * 512 : sector * 512 + 512] = bytes([sector % (3 * threads) + 1]) * 512
    assert pread(node, SIZE, 0) == expected
    node.close()
    assert_clean(path)


@pytest.mark.parametrize("cluster", [512, 4096])
def test_readers_beside_writers_see_old_or_new_sectors_only(cluster: int, tmp_path: Path) -> None:
    path = make(tmp_path / "disk.qcow2", 1 << 20, cluster_size=cluster)
    node = Qcow2Node(FileNode(path, locking=False))
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            got = pread(node, 64 << 10, 128 << 10)
            for at in range(0, len(got), 512):
                assert got[at : at + 512] in (bytes(512), b"\5" * 512)

    with frequent_switches(), ThreadPoolExecutor(2) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        for sector in range(200 * 2, 300 * 2):
            node.pwrite(memoryview(b"\5" * 512), sector * 512)
        stop.set()
        for reader in readers:
            reader.result(30)
    node.close()

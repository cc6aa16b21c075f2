"""A snapshot is the instant, byte for byte, whatever the guest does meanwhile."""

import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fleece.block.file import FileNode
from fleece.snapshots.fleecing import Fleecing
from nbdwire.constants import STATE_ZERO
from nbdwire.export import OPAQUE_RUN, ZERO_RUN
from tests.support.snapshots import CLUSTER, ArrayNode, Rig, read

SIZE = 40 * CLUSTER + 1234  # the last cluster is a partial one


class Unvalidated(Fleecing):
    """The control: what a view would be that did not look at ``saved`` again."""

    def _reread(self, part: memoryview, offset: int) -> None:
        pass

    def _still_unsaved(self, offset: int, end: int) -> bool:
        return True


@pytest.fixture
def data() -> bytes:
    return random.Random(1).randbytes(SIZE)


@pytest.fixture
def rig(tmp_path: Path, data: bytes) -> Iterator[Rig]:
    rig = Rig(tmp_path, ArrayNode(data))
    yield rig
    rig.close()


def test_a_guest_write_after_the_instant_does_not_change_it(rig: Rig, data: bytes) -> None:
    view = rig.snapshot()
    rig.write(b"new" * 40000, 12345)
    assert read(view, 0, SIZE) == data
    assert read(rig.disk.root, 12345, 3) == b"new"


def test_a_write_to_the_last_partial_cluster_is_saved_up_to_the_end(rig: Rig, data: bytes) -> None:
    view = rig.snapshot()
    rig.write(b"x", SIZE - 1)
    assert read(view, SIZE - 5000, 5000) == data[-5000:]


def test_zero_and_trim_save_what_they_destroy(rig: Rig, data: bytes) -> None:
    view = rig.snapshot()
    rig.disk.root.zero(CLUSTER + 5, 3 * CLUSTER)
    rig.disk.root.trim(20 * CLUSTER, CLUSTER)
    assert read(view, 0, SIZE) == data


def test_a_read_over_saved_and_unsaved_clusters_is_exact(rig: Rig, data: bytes) -> None:
    view = rig.snapshot()
    for cluster in range(0, 40, 3):
        rig.write(b"n" * 10, cluster * CLUSTER + 7)
    for offset, length in ((0, SIZE), (5, SIZE - 9), (3 * CLUSTER - 1, 2), (CLUSTER, 7 * CLUSTER)):
        assert read(view, offset, length) == data[offset : offset + length]


class Racing:
    """A guest that writes to the very range that a reader is about to read from the source."""

    def __init__(self, rig: Rig, source: ArrayNode) -> None:
        self.rig = rig
        self.reader = threading.get_ident()
        self.writes = 0
        source.before_read = self._before_read

    def _before_read(self, offset: int, length: int) -> None:
        if self.writes == 0 and self.rig.views:
            self.writes += 1
            self.rig.disk.root.pwrite(memoryview(b"RACE" * (length // 4)), offset)


def race(tmp_path: Path, data: bytes, view: type[Fleecing]) -> bytes:
    source = ArrayNode(data)
    rig = Rig(tmp_path, source, view=view)
    try:
        snapshot = rig.snapshot()
        racing = Racing(rig, source)
        seen = read(snapshot, 2 * CLUSTER, 4 * CLUSTER)
        assert racing.writes == 1
        return seen
    finally:
        rig.close()


def test_a_write_that_overtakes_a_read_of_the_source_is_noticed(
    tmp_path: Path, data: bytes
) -> None:
    assert race(tmp_path, data, Fleecing) == data[2 * CLUSTER : 6 * CLUSTER]


def test_control_without_the_second_look_such_a_read_is_wrong(tmp_path: Path, data: bytes) -> None:
    assert race(tmp_path, data, Unvalidated) != data[2 * CLUSTER : 6 * CLUSTER]


def zero_race(directory: Path, view: type[Fleecing]) -> int:
    """The status of a cluster whose data the guest zeroes while the source is asked about it."""
    path = directory / "disk.img"
    path.write_bytes(b"d" * (8 * CLUSTER))
    rig = Rig(directory, _ZeroedWhileAsked(path), view=view)
    try:
        snapshot = rig.snapshot()
        source = rig.source
        assert isinstance(source, _ZeroedWhileAsked)
        source.rig = rig
        [first, *_] = snapshot.extents(0, CLUSTER)
        return first.status
    finally:
        rig.close()
        rig.source.close()


class _ZeroedWhileAsked(FileNode):
    rig: Rig | None = None

    def extents(self, offset: int, length: int) -> list:  # type: ignore[type-arg]
        if self.rig is not None:
            rig, self.rig = self.rig, None
            rig.disk.root.zero(0, 4 * CLUSTER)
        return super().extents(offset, length)


def test_block_status_never_calls_old_data_zero(tmp_path: Path) -> None:
    assert not zero_race(tmp_path, Fleecing) & STATE_ZERO


def test_control_without_the_second_look_old_data_is_called_zero(tmp_path: Path) -> None:
    assert zero_race(tmp_path, Unvalidated) & STATE_ZERO


def test_map_names_the_overlay_for_saved_clusters_and_nothing_of_the_live_disk(
    tmp_path: Path,
) -> None:
    path = tmp_path / "disk.img"
    with open(path, "wb") as file:
        file.write(b"d" * (4 * CLUSTER))
        file.truncate(8 * CLUSTER)
    rig = Rig(tmp_path, FileNode(path))
    try:
        view = rig.snapshot()
        rig.write(b"n", CLUSTER)
        runs = [run for start in range(8) for run in view.map(start * CLUSTER, CLUSTER)]
        assert [run[0] for run in runs[:4]][0::2] == [OPAQUE_RUN, OPAQUE_RUN]
        assert runs[1][0] >= 0
        assert {run[0] for run in runs[4:]} == {ZERO_RUN}
    finally:
        rig.close()
        rig.source.close()


def test_a_dropped_snapshot_reads_errors_and_never_live_data(rig: Rig) -> None:
    view = rig.snapshot()
    rig.drop(view)
    with pytest.raises(OSError, match="dropped"):
        read(view, 0, 1)


# Several snapshots of one disk

OPERATION = st.one_of(
    st.tuples(st.just("write"), st.integers(0, SIZE - 1), st.integers(1, 3 * CLUSTER)),
    st.tuples(st.just("zero"), st.integers(0, SIZE - 1), st.integers(1, 3 * CLUSTER)),
    st.tuples(st.just("snapshot"), st.just(0), st.just(0)),
    st.tuples(st.just("drop"), st.integers(0, 9), st.just(0)),
    st.tuples(st.just("read"), st.integers(0, SIZE - 1), st.integers(1, 9 * CLUSTER)),
)


@settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(operations=st.lists(OPERATION, max_size=40), seed=st.integers(0, 99))
def test_any_number_of_snapshots_taken_and_dropped_in_any_order_stay_exact(
    tmp_path: Path, operations: list[tuple[str, int, int]], seed: int
) -> None:
    generator = random.Random(seed)
    data = generator.randbytes(SIZE)
    rig = Rig(tmp_path, ArrayNode(data))
    live = bytearray(data)
    instants: dict[Fleecing, bytes] = {}
    try:
        for kind, offset, length in operations:
            length = min(length, SIZE - offset)
            if kind == "write":
                new = generator.randbytes(length)
                live[offset : offset + length] = new
                rig.write(new, offset)
            elif kind == "zero":
                live[offset : offset + length] = bytes(length)
                rig.disk.root.zero(offset, length)
            elif kind == "snapshot" and len(instants) < 4:
                instants[rig.snapshot()] = bytes(live)
            elif kind == "drop" and instants:
                view = list(instants)[offset % len(instants)]
                del instants[view]
                rig.drop(view)
            elif kind == "read":
                for view, instant in instants.items():
                    assert read(view, offset, length) == instant[offset : offset + length]
        for view, instant in instants.items():
            assert read(view, 0, SIZE) == instant
        assert read(rig.disk.root, 0, SIZE) == live
        if not instants:
            assert rig.disk.root is rig.source
            assert not list(tmp_path.glob("*.qcow2"))
    finally:
        rig.close()


def test_each_guest_write_copies_a_cluster_once_however_many_snapshots_there_are(rig: Rig) -> None:
    for _ in range(5):
        rig.snapshot()
    rig.write(b"x", 3 * CLUSTER)
    assert rig.cbw.copied_bytes == CLUSTER


# Under load

LOAD_SIZE = 64 << 20


class Writer(threading.Thread):
    """Unaligned writes, zeroes and trims, many of them across clusters, on its own session."""

    def __init__(self, rig: Rig, seed: int, stop: threading.Event) -> None:
        super().__init__()
        self.rig, self.random, self.stop = rig, random.Random(seed), stop
        self.operations = 0

    def run(self) -> None:
        session = self.rig.disk.open_session()
        noise = self.random.randbytes(1 << 20)
        while not self.stop.is_set():
            offset = self.random.randrange(LOAD_SIZE - (1 << 20))
            length = self.random.choice((1, 512, 4096, 4097, 65536, 100_001, 1 << 20))
            with session.gate:
                kind = self.random.random()
                if kind < 0.8:
                    session.node.pwrite(memoryview(noise)[:length], offset)
                elif kind < 0.9:
                    session.node.zero(offset, length)
                else:
                    session.node.trim(offset, length)
            self.operations += 1
        session.close()


@pytest.mark.parametrize("cluster_size", [4096, 65536])
def test_reads_of_any_size_under_concurrent_writers_are_exact(
    tmp_path: Path, cluster_size: int
) -> None:
    path = tmp_path / "disk.img"
    with open(path, "wb") as file:
        for part in range(8):  # half of it data, half of it holes
            file.seek(part * LOAD_SIZE // 8)
            file.write(random.Random(part).randbytes(LOAD_SIZE // 16))
        file.truncate(LOAD_SIZE)
    rig = Rig(tmp_path, FileNode(path), cluster_size)
    stop = threading.Event()
    writers = [Writer(rig, seed, stop) for seed in range(3)]
    for writer in writers:
        writer.start()
    try:
        for round_ in range(3):
            _compare_under_load(rig, random.Random(round_))
    finally:
        stop.set()
        for writer in writers:
            writer.join()
        rig.close()
        rig.source.close()
    assert all(writer.operations for writer in writers)


def _compare_under_load(rig: Rig, generator: random.Random) -> None:
    """Freeze an instant, note it independently while drained, then read it under the writers."""
    from fleece.block.graph import drained
    from fleece.snapshots.cbw import Level

    name = f"load{len(rig.cbw.levels)}"
    overlay = rig.overlay(name)
    level = Level(name, overlay, saved=bytearray(-(-LOAD_SIZE // rig.cluster_size)))
    with drained([rig.disk]):
        instant = read(rig.source, 0, LOAD_SIZE)
        if not rig.cbw.levels:
            rig.disk.attach(rig.cbw)
        rig.cbw.push(level)
    view = Fleecing(name, rig.cbw, level)
    for length in (4096, 65536, 1 << 20, 4097, 32 << 20) * 4:
        offset = generator.randrange(LOAD_SIZE - length + 1)
        assert read(view, offset, length) == instant[offset : offset + length]
        for extent in view.extents(offset, length):
            if extent.is_zero:
                assert not any(instant[extent.offset : extent.end])

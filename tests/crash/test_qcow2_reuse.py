"""Free clusters that are used again, and a crash at any moment: a cluster must not get new data
before the removal of its last reference is durable."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fleece.block.file import FileNode
from fleece.formats.qcow2 import freespace
from fleece.formats.qcow2.image import Qcow2Node
from fleece.formats.qcow2.refcounts import Refcounts
from tests.crash.test_qcow2_order import (
    SIZE,
    History,
    examine,
    killed_at,
    power_lost_at,
)
from tests.support.qcow2 import CLEAN, LEAKS, RecordingFile, assert_clean, make, pread


class PunchedFile(RecordingFile):
    """A hole is recorded as the zeroes that it reads as."""

    def trim(self, offset: int, length: int, flags: int = 0) -> None:
        self.log.append(("write", offset, bytes(length)))
        self.next.trim(offset, length, flags)


@contextmanager
def disk(directory: Path, seed: int, cluster: int) -> Iterator[tuple[Qcow2Node, History]]:
    rnd = random.Random(seed)
    backing = directory / "base.raw"
    backing.write_bytes(rnd.randbytes(SIZE // 2 + 300))
    options = {"cluster_size": cluster, "backing": str(backing), "backing_format": "raw"}
    path = make(directory / "disk.qcow2", SIZE, **options)
    initial = path.read_bytes()
    recorder = PunchedFile(FileNode(path, locking=False))
    node = Qcow2Node(recorder, backing=FileNode(backing, read_only=True, locking=False))
    model = backing.read_bytes().ljust(SIZE, b"\0")
    try:
        yield node, History(initial, backing.read_bytes(), recorder.log, [model], [0], [True])
    finally:
        node.close()


def play(directory: Path, seed: int, cluster: int) -> History:
    """Random operations that give up clusters all the time, on an image that reuses them."""
    rnd = random.Random(seed)
    with disk(directory, seed, cluster) as (node, history):
        for _ in range(40):
            kind = rnd.choice(["write", "write", "pack", "pack", "trim", "zero", "flush"])
            operate(node, kind, rnd, cluster)
            note(history, pread(node, SIZE, 0), flushed=kind == "flush")
        assert node._meta.counts._free.reused
    note(history, history.versions[-1], flushed=True)
    return history


def note(history: History, content: bytes, *, flushed: bool) -> None:
    history.versions.append(content)
    history.ends.append(len(history.log))
    history.flushed.append(flushed)


def operate(node: Qcow2Node, kind: str, rnd: random.Random, cluster: int) -> None:
    # In a small part of the disk, so that operations meet each other.
    offset = rnd.randrange(min(SIZE, 24 * cluster))
    length = min(rnd.choice([1, cluster, 5 * cluster]), SIZE - offset)
    if kind == "write":
        node.pwrite(memoryview(rnd.randbytes(length)), offset)
    elif kind == "pack":
        pack(node, offset // cluster * cluster, rnd, cluster)
    elif kind == "trim":
        node.trim(offset, length)
    elif kind == "zero":
        node.zero(offset, length)
    else:
        node.flush()


def pack(node: Qcow2Node, offset: int, rnd: random.Random, cluster: int) -> None:
    data = (rnd.randbytes(9) * cluster)[: min(cluster, SIZE - offset)]
    try:
        node.write_compressed(memoryview(data), offset)
    except OSError:  # the cluster is there: a write gives up what was there
        node.pwrite(memoryview(data), offset)


@pytest.fixture
def without_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads are over when a cluster is freed, so that a short run reuses something."""
    monkeypatch.setattr(freespace, "GRACE", 0.0)


CASES = [(512, 1), (512, 2), (4096, 3), (16384, 4)]


@pytest.mark.usefixtures("without_grace")
@pytest.mark.parametrize(("cluster", "seed"), CASES)
def test_a_kill_after_any_write_loses_no_flushed_data_to_a_reused_cluster(
    cluster: int, seed: int, tmp_path: Path
) -> None:
    history = play(tmp_path, seed, cluster)
    for position in range(len(history.log) + 1):
        image = killed_at(history, position)
        examine(tmp_path, image, history.allowed(position), (CLEAN, LEAKS))
    assert_clean(tmp_path / "disk.qcow2")


@pytest.mark.usefixtures("without_grace")
@pytest.mark.parametrize(("cluster", "seed"), CASES)
def test_a_power_cut_loses_no_flushed_data_to_a_reused_cluster(
    cluster: int, seed: int, tmp_path: Path
) -> None:
    history = play(tmp_path, seed, cluster)
    rnd = random.Random(seed)
    syncs = [i for i, (kind, _, _) in enumerate(history.log) if kind == "sync"]
    positions = [rnd.randrange(1, len(history.log) + 1) for _ in range(30)]
    for position in syncs + positions:
        image = power_lost_at(history, position, rnd)
        examine(tmp_path, image, history.allowed(position), (CLEAN, LEAKS))


@pytest.mark.usefixtures("without_grace")
def test_control_without_the_quarantine_a_kill_loses_flushed_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def retire(self: Refcounts, first: int, count: int, reason: int = freespace.OTHER) -> None:
        self._drop(first, count, reason)  # although nothing of it is on disk yet
        for _ in range(2):
            self._free._turn()

    monkeypatch.setattr(Refcounts, "retire", retire)
    harm = 0
    for seed in range(10, 14):
        directory = tmp_path / str(seed)
        directory.mkdir()
        history = play(directory, seed, 512)
        for position in range(0, len(history.log) + 1, 3):
            image = killed_at(history, position)
            try:
                examine(directory, image, history.allowed(position), (CLEAN, LEAKS))
            except (AssertionError, OSError):
                harm += 1
        if harm:
            break
    assert harm

"""As test_qcow2_order, of images with subclusters, a data file, compressed clusters, snapshots,
bitmaps and encryption, with space used again at once and copies that are delayed.

FLEECE_SOAK=N: N times as many.
"""

import os
import random
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from fleece.block.node import Filter, Node
from fleece.formats.qcow2 import freespace, metadata, pending
from fleece.formats.qcow2.image import Qcow2Node
from nbdwire.constants import CMD_FLAG_NO_HOLE
from tests.crash.test_qcow2_faults import explain
from tests.crash.test_qcow2_order import sectors
from tests.support import stress
from tests.support.qcow2 import CLEAN, LEAKS, pread, qemu_img
from tests.support.stress import SIZE, Image, assert_equal

ROUNDS = int(os.environ.get("FLEECE_SOAK", "1"))
Entry = tuple[str, Path, int, bytes]


class Recorded(Filter):
    """Writes and syncs of one file, in a log that the files of an image share."""

    def __init__(self, child: Node, log: list[Entry]) -> None:
        super().__init__(child.name, child)
        self._path = Path(child.name)
        self._log = log

    def pwrite(self, buf: memoryview, offset: int, fua: bool = False) -> None:
        self._log.append(("write", self._path, offset, bytes(buf)))
        self.next.pwrite(buf, offset, fua)
        if fua:
            self._log.append(("sync", self._path, 0, b""))

    def trim(self, offset: int, length: int, flags: int = 0) -> None:
        self._log.append(("write", self._path, offset, bytes(length)))
        self.next.trim(offset, length, flags)

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        self._log.append(("write", self._path, offset, bytes(length)))
        self.next.zero(offset, length, flags)

    def flush(self) -> None:
        self.next.flush()
        self._log.append(("sync", self._path, 0, b""))

    def close(self) -> None:
        self.next.close()


@dataclass
class Recording:
    """``versions[i]``: the disk after operation i, which ended at ``ends[i]`` of the log."""

    image: Image
    initial: dict[Path, bytes]
    log: list[Entry] = field(default_factory=list)
    versions: list[bytes] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    flushed: list[bool] = field(default_factory=list)

    def note(self, version: bytes | bytearray, *, flushed: bool) -> None:
        self.versions.append(bytes(version))
        self.ends.append(len(self.log))
        self.flushed.append(flushed)

    def allowed(self, position: int) -> list[bytes]:
        ends = self.ends
        running = next((i for i, end in enumerate(ends) if end >= position), len(ends) - 1)
        durable = max(i for i, end in enumerate(ends) if self.flushed[i] and end <= position)
        return self.versions[durable : running + 1]


def record(image: Image, seed: int) -> Recording:
    files = [image.path, *([image.data_file] if image.data_file else [])]
    recording = Recording(image, {path: path.read_bytes() for path in files})
    image.wrap = lambda node: Recorded(node, recording.log)
    rnd = random.Random(seed)
    recording.note(image.model, flushed=True)
    node = image.open()
    try:
        for _ in range(50):
            kind = rnd.choice(["write"] * 5 + ["zero", "trim", "trim", "flush"])
            operate(node, image.model, kind, rnd)
            got = pread(node, SIZE, 0)
            assert_equal(got, image.model, kind)
            recording.note(got, flushed=kind == "flush")
    finally:
        node.close()
    recording.note(image.model, flushed=True)
    return recording


def operate(node: Qcow2Node, model: bytearray, kind: str, rnd: random.Random) -> None:
    cluster = node.header.cluster_size
    # In a part of the disk, so that operations meet each other.
    low = rnd.randrange(min(SIZE, 16 * cluster))
    if rnd.random() < 0.4:
        low = low // cluster * cluster
    high = min(SIZE, low + rnd.choice([1, 700, cluster // 3, cluster, 4 * cluster]))
    if kind == "write":
        data = rnd.randbytes(high - low)
        node.pwrite(memoryview(data), low, rnd.random() < 0.1)
        model[low:high] = data
    elif kind == "zero":
        node.zero(low, high - low, rnd.choice([0, CMD_FLAG_NO_HOLE]))
        model[low:high] = bytes(high - low)
    elif kind == "trim":
        node.trim(low, high - low)
        model[low:high] = pread(node, high - low, low)
    else:
        node.flush()


def crash(recording: Recording, position: int, chance: float | None, rnd: random.Random) -> None:
    """The files as they could be: of what was not synced each sector by ``chance``; None: all."""
    log = recording.log[:position]
    contents = {path: bytearray(data) for path, data in recording.initial.items()}
    synced = dict.fromkeys(contents, 0)
    for i, (kind, path, _, _) in enumerate(log):
        if kind == "sync":
            synced[path] = i
    for i, (kind, path, offset, data) in enumerate(log):
        if kind != "write":
            continue
        whole = chance is None or i < synced[path]
        for at, new in [(offset, data)] if whole else sectors(offset, data):
            if whole or (chance is not None and rnd.random() < chance):
                content = contents[path]
                content.extend(bytes(max(0, at + len(new) - len(content))))
                content[at : at + len(new)] = new
    for path, content in contents.items():
        path.write_bytes(content)


def examine(recording: Recording, position: int) -> None:
    image = recording.image
    node = image.open(read_only=True)
    try:
        got, dirty = pread(node, SIZE, 0), node.header.dirty
    finally:
        node.close()
    explain(got, recording.allowed(position))
    if not dirty:
        qemu_img("check", "-U", *image.source(), ok=(CLEAN, LEAKS))
    else:
        repair(image, got)
    if image.snapshot is not None and position % 5 == 0:
        raw = image.path.with_suffix(".snapshot")
        qemu_img("convert", "-U", "-l", "snapshot.name=one", "-O", "raw", image.path, raw)
        assert_equal(raw.read_bytes(), image.snapshot, "the snapshot")


def repair(image: Image, content: bytes) -> None:
    """With lazy refcounts, opening it for writing makes it clean."""
    image.wrap = lambda node: node
    node = image.open()
    try:
        assert_equal(pread(node, SIZE, 0), content, "repaired")
    finally:
        node.close()
    qemu_img("check", "-U", *image.source())


NAMES = [
    "lazy refcounts",
    "version 2, backing",
    "subclusters, backing",
    "subclusters, snapshot",
    "subclusters, compressed",
    "compressed, small",
    "snapshot, backing, small",
    "data file",
    "data file, backing",
    "LUKS, backing",
    "clusters of 512, small caches",
    "64-bit refcounts",
    "bitmap",
    "no unref, subclusters",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_crash_leaves_leaks_at_most_and_all_flushed_data(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(freespace, "GRACE", 0.0)
    for number in range(ROUNDS):
        seed = stress.seed_of(name) + number
        rnd = random.Random(seed)
        monkeypatch.setattr(pending, "MOST", rnd.choice([3, 1024]))
        monkeypatch.setattr(metadata, "DIRTY_LIMIT", rnd.choice([2048, 8 << 20]))
        directory = tmp_path / str(number)
        directory.mkdir()
        recording = record(stress.IMAGES[name](directory, rnd), seed)
        last = len(recording.log)
        syncs = [i for i, entry in enumerate(recording.log) if entry[0] == "sync"]
        states: list[tuple[int, float]] = [(rnd.randrange(last + 1), 2.0) for _ in range(8)]
        states += [(i, rnd.choice([0.1, 0.5, 0.9])) for i in rnd.sample(syncs, min(14, len(syncs)))]
        states += [(rnd.randrange(last + 1), rnd.choice([0.0, 0.5])) for _ in range(8)]
        for position, chance in states:
            crash(recording, position, None if chance > 1 else chance, rnd)
            try:
                examine(recording, position)
            except (AssertionError, OSError) as error:
                raise AssertionError(
                    f"{name}, seed {seed}, {position} of {last}, {chance}: {error}"
                ) from error

"""Who was told by `map` where bytes lie may read them there a moment later, whatever is written,
zeroed and trimmed meanwhile: it is what they were at some moment since, or zeroes; never others'.
"""

import os
import random
import struct
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fleece.block.file import FileNode
from fleece.formats.qcow2 import freespace
from fleece.formats.qcow2.image import Qcow2Node
from nbdwire.constants import CMD_FLAG_NO_HOLE
from tests.support.qcow2 import assert_clean, make, qemu_img
from tests.support.threads import frequent_switches

CLUSTER = 16384
SLOT = 3 * CLUSTER
SLOTS = 40
SIZE = SLOTS * SLOT
WORD = 8
WRITERS = 3


def tagged(offset: int, length: int, version: int) -> bytes:
    """Each word says where on the disk it belongs, and which write it is of."""
    words = [x for at in range(offset, offset + length, WORD) for x in (at // WORD, version)]
    return struct.pack(f">{len(words)}I", *words)


class ForeignDataError(AssertionError):
    """A word that belongs elsewhere, or one that was replaced before `map` was asked."""


class Disk:
    def __init__(self, node: Qcow2Node) -> None:
        self.node = node
        self.versions = [1] * SLOTS  # the last one that is complete
        self.done = threading.Event()

    def write(self, seed: int, number: int, steps: int) -> None:
        rnd = random.Random(seed + number)
        for _ in range(steps):
            slot = rnd.randrange(number, SLOTS, WRITERS)
            low, high = sorted(rnd.sample(range(0, SLOT + 1, 512), 2))
            if rnd.random() < 0.5:
                low, high = 0, SLOT
            self.change(rnd, slot, slot * SLOT + low, high - low)
            if rnd.random() < 0.2:
                self.node.flush()

    def change(self, rnd: random.Random, slot: int, offset: int, length: int) -> None:
        kind = rnd.choice(["write", "write", "write", "trim", "zero"])
        version = self.versions[slot] + 1
        if kind == "write":
            data = tagged(offset, length, version)
            self.node.pwrite(memoryview(data), offset)
            if length == SLOT:
                self.versions[slot] = version
        elif kind == "trim":
            self.node.trim(offset, length)
        else:
            self.node.zero(offset, length, rnd.choice([0, CMD_FLAG_NO_HOLE]))

    def follow(self, seed: int) -> None:
        rnd = random.Random(seed)
        while not self.done.is_set():
            least = list(self.versions)
            offset = rnd.randrange(0, SIZE, 512)
            length = min(SIZE - offset, rnd.choice([4096, SLOT, 20 * SLOT]))
            runs = self.node.map(offset, length)
            for _ in range(rnd.choice([0, 20, 2000])):
                pass  # some time goes by
            for fd, where, count in runs:
                if fd >= 0:
                    self.verify(os.pread(fd, count, where), offset, least)
                offset += count

    def verify(self, data: bytes, offset: int, least: list[int]) -> None:
        length = len(data) // WORD * WORD
        for index, version in struct.iter_unpack(">II", data[:length]):
            if version:
                right = index * WORD == offset and version >= least[offset // SLOT]
                if not right:
                    raise ForeignDataError(f"at {offset}: {index * WORD}, version {version}")
            elif index:
                raise ForeignDataError(f"at {offset}: {index * WORD}, and no version")
            offset += WORD


def start(directory: Path, kind: str) -> Qcow2Node:
    base = directory / "base.raw"
    base.write_bytes(tagged(0, SIZE, 1))
    options: dict[str, Any] = {"cluster_size": CLUSTER, "extended_l2": kind == "subclusters"}
    backing = kind != "snapshot"
    if backing:
        options |= {"backing": str(base), "backing_format": "raw"}
    path = make(directory / "d.qcow2", SIZE, **options)
    if not backing:
        node = Qcow2Node(FileNode(path, locking=False))
        node.pwrite(memoryview(base.read_bytes()), 0)
        node.close()
        qemu_img("snapshot", "-c", "one", path)
    below = FileNode(base, read_only=True, locking=False) if backing else None
    return Qcow2Node(FileNode(path, locking=False), backing=below)


def play(directory: Path, kind: str, seed: int, steps: int) -> None:
    node = start(directory, kind)
    disk = Disk(node)

    def stopping(work: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            try:
                work()
            finally:
                disk.done.set()

        return run

    try:
        with frequent_switches(), ThreadPoolExecutor(WRITERS + 2) as pool:
            readers = [pool.submit(stopping(lambda n=n: disk.follow(seed + n))) for n in (50, 51)]
            writers = [pool.submit(disk.write, seed, n, steps) for n in range(WRITERS)]
            for future in writers:
                future.result(120)
            disk.done.set()
            for reader in readers:
                reader.result(30)
    finally:
        disk.done.set()
        node.close()
    assert_clean(directory / "d.qcow2")


@pytest.mark.parametrize("kind", ["backing", "subclusters", "snapshot"])
def test_the_runs_of_map_never_have_foreign_data(kind: str, tmp_path: Path) -> None:
    rounds = int(os.environ.get("FLEECE_SOAK", "1"))
    for number in range(rounds):
        directory = tmp_path / str(number)
        directory.mkdir()
        play(directory, kind, int(os.environ.get("FLEECE_SEED", "1")) * 1000 + number, 80)


@pytest.mark.parametrize(("grace", "foreign"), [(30.0, False), (0.0, True)])
def test_control_without_the_grace_period_they_would(
    grace: float, foreign: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(freespace, "GRACE", grace)
    node = start(tmp_path, "backing")
    disk = Disk(node)
    try:
        node.pwrite(memoryview(tagged(0, SLOT, 2)), 0)
        ((fd, where, length),) = node.map(0, SLOT)
        node.trim(0, SLOT)
        for slot in range(1, SLOTS):
            node.flush()
            node.pwrite(memoryview(tagged(slot * SLOT, SLOT, 2)), slot * SLOT)
        data = os.pread(fd, length, where)
        if foreign:
            with pytest.raises(ForeignDataError):
                disk.verify(data, 0, disk.versions)
        else:
            disk.verify(data, 0, disk.versions)
    finally:
        node.close()

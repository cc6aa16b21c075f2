"""Snapshots of a live qcow2 disk whose own copies on write are delayed, while it is written,
zeroed and trimmed: each view is the instant, byte by byte."""

import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fleece.formats.qcow2 import freespace, pending
from fleece.snapshots.cbw import Level
from fleece.snapshots.fleecing import Fleecing
from nbdwire.constants import CMD_FLAG_NO_HOLE, STATE_ZERO
from nbdwire.export import ZERO_RUN
from tests.support import stress
from tests.support.qcow2 import pread
from tests.support.snapshots import Rig
from tests.support.stress import SIZE, assert_equal
from tests.support.threads import frequent_switches

WRITERS = 3
NAMES = [
    "shorter backing",
    "subclusters, snapshot",
    "subclusters, compressed",
    "compressed",
    "snapshot, backing, small",
    "data file, backing",
    "LUKS, backing",
    "clusters of 512",
    "preallocated",
]


class Instants(Rig):
    """A rig that remembers what the disk was, under the drain of each snapshot."""

    model: bytearray

    def follow(self, model: bytearray) -> None:
        self.model = model
        self.expected: list[bytes] = []
        push = self.cbw.push

        def pushing(level: Level) -> None:
            self.expected.append(bytes(model))
            push(level)

        self.cbw.push = pushing  # type: ignore[method-assign]


def write(rig: Instants, slots: list[tuple[int, int]], seed: int, steps: int) -> None:
    rnd = random.Random(seed)
    session = rig.disk.open_session()
    for _ in range(steps):
        low, high = rnd.choice(slots)
        kind = rnd.choice(["write"] * 4 + ["zero", "trim", "flush"])
        with session.gate:
            node = session.node
            if kind == "write":
                data = rnd.randbytes(high - low)
                node.pwrite(memoryview(data), low)
                rig.model[low:high] = data
            elif kind == "zero":
                node.zero(low, high - low, rnd.choice([0, CMD_FLAG_NO_HOLE]))
                rig.model[low:high] = bytes(high - low)
            elif kind == "trim":
                node.trim(low, high - low)
                rig.model[low:high] = pread(node, high - low, low)
            else:
                node.flush()


def look(view: Fleecing, expected: bytes, rnd: random.Random) -> None:
    low = rnd.randrange(SIZE)
    length = min(SIZE - low, rnd.choice([100, 4096, 70_000, 300_000]))
    buf = memoryview(bytearray(length))
    if rnd.random() < 0.5 and view.pread_cached(buf, low):
        got = bytes(buf)
    else:
        got = pread(view, length, low)
    assert_equal(got, expected[low : low + length], "view", low)
    for extent in view.extents(low, length):
        if extent.status & STATE_ZERO:
            assert not any(expected[extent.offset : extent.end]), "an extent is not zero"
    for fd, where, count in view.map(low, length):
        if fd == ZERO_RUN:
            assert not any(expected[low : low + count]), "a run is not zero"
        elif fd >= 0:
            got = os.pread(fd, count, where).ljust(count, b"\0")
            assert_equal(got, expected[low : low + count], "a run", low)
        low += count


@pytest.mark.parametrize("cluster", [4096, 65536])
@pytest.mark.parametrize("name", NAMES)
def test_a_snapshot_of_a_qcow2_disk_is_its_instant(
    name: str, cluster: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(freespace, "GRACE", 0.0)
    seed = stress.seed_of(name) + cluster
    rnd = random.Random(seed)
    monkeypatch.setattr(pending, "MOST", rnd.choice([4, 1024]))
    image = stress.IMAGES[name](tmp_path, rnd)
    node = image.open()
    rig = Instants(tmp_path, node, cluster_size=cluster)
    rig.follow(image.model)
    pieces = stress.slots(rnd, node.header.cluster_size)
    stop = threading.Event()

    def reading(number: int) -> None:
        mine = random.Random(seed + 100 + number)
        while not stop.is_set():
            known = list(zip(list(rig.views), rig.expected, strict=False))
            if known:
                look(*mine.choice(known), mine)

    try:
        with frequent_switches(), ThreadPoolExecutor(WRITERS + 2) as pool:
            for _ in range(3):
                stop.clear()
                readers = [pool.submit(reading, n) for n in range(2)]
                steps = [
                    pool.submit(write, rig, pieces[n::WRITERS], rnd.getrandbits(30), 20)
                    for n in range(WRITERS)
                ]
                try:
                    rig.snapshot()  # in the middle of it
                    for future in steps:
                        future.result(60)
                finally:
                    stop.set()
                for future in readers:
                    future.result(60)
        for view, expected in zip(rig.views, rig.expected, strict=True):
            assert_equal(pread(view, SIZE, 0), expected, view.name)
    finally:
        stop.set()
        rig.close()
        node.close()
    image.check()

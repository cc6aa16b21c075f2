# SPDX-License-Identifier: Apache-2.0
"""A process that tracks changes is killed at any point; the next one misses nothing."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import pytest

from fleece.tracking.frozen import FrozenMap
from fleece.tracking.store import DiskTracking

ROOT = Path(__file__).parents[2]
GRANULE = 4096
GRANULES = 1 << 18
SIZE = GRANULES * GRANULE

# Lower case announces what comes, upper case says that it is done. One write(2) for each line.
COMMON = """
import os, sys, random
from pathlib import Path
from fleece.tracking.store import DiskTracking
seed, directory, image = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
GRANULE, SIZE = int(sys.argv[4]), int(sys.argv[5])
random = random.Random(seed)
def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())
def opened():
    return DiskTracking.open(directory, "vm1", SIZE, image, granularity=GRANULE)
"""

PRIVATE = """
import mmap
from fleece.tracking import sidecar
class Private(mmap.mmap):
    def __new__(cls, fd, length):
        return super().__new__(cls, fd, length, access=mmap.ACCESS_COPY)
sidecar.mmap.mmap = Private
"""

MARKING = """
tracking = opened()
say("G", tracking.generation)
while True:
    what = random.randrange(1000)
    if what < 700:
        first = random.randrange(SIZE // GRANULE - 600)
        count = random.choice((1, 1, 2, 16, 512))
        say("m", tracking.epoch, first, count)
        tracking.map.mark(first * GRANULE, count * GRANULE)
        say("M", tracking.epoch, first, count)
    elif what < 996:
        say("C", tracking.checkpoint().epoch)
    elif tracking.epoch > 1:
        consumer = random.choice(("nightly", "weekly"))
        epoch = tracking.epoch - 1
        say("a", consumer, epoch)
        say("A", consumer, tracking.acknowledge(consumer, tracking.generation, epoch))
"""

REOPENING = """
while True:
    tracking = opened()
    say("G", tracking.generation)
    tracking.close()
"""


@dataclass
class Told:
    """What the killed processes said. Each mark is (epoch, first granule, count)."""

    generations: set[str] = field(default_factory=set)
    announced: list[tuple[int, int, int]] = field(default_factory=list)
    done: list[tuple[int, int, int]] = field(default_factory=list)
    acknowledged: dict[str, int] = field(default_factory=dict)
    maybe: dict[str, int] = field(default_factory=dict)
    checkpoint: int = 0

    def hear(self, line: str) -> None:
        kind, *words = line.split()
        if kind == "G":
            self.generations.add(words[0])
        elif kind in "mM":
            epoch, first, count = map(int, words)
            (self.announced if kind == "m" else self.done).append((epoch, first, count))
        elif kind == "C":
            self.checkpoint = max(self.checkpoint, int(words[0]))
        elif kind in "aA":
            told = self.maybe if kind == "a" else self.acknowledged
            told[words[0]] = int(words[1])


@contextmanager
def child(seed: int, tmp_path: Path, program: str) -> Iterator[subprocess.Popen[bytes]]:
    image = tmp_path / "vm1.raw"
    command = [sys.executable, "-c", COMMON + program, str(seed), str(tmp_path), str(image)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'nbd'}"}
    with subprocess.Popen(
        [*command, str(GRANULE), str(SIZE)], stdout=subprocess.PIPE, env=environment
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def run_and_kill(random: Random, tmp_path: Path, program: str, told: Told, lines: int) -> None:
    """Listen to ``lines`` lines, kill, then hear what was said up to the kill."""
    with child(random.randrange(1 << 30), tmp_path, program) as process:
        assert process.stdout is not None
        for _ in range(lines):
            told.hear(process.stdout.readline().decode())
        process.send_signal(signal.SIGKILL)
        for line in process.stdout:
            if line.endswith(b"\n"):
                told.hear(line.decode())
        assert process.wait() == -signal.SIGKILL


def bits(marks: list[tuple[int, int, int]], since: int) -> bytearray:
    out = bytearray(GRANULES)
    for epoch, first, count in marks:
        if epoch > since:
            out[first : first + count] = b"\1" * count
    return out


def missed(frozen: FrozenMap, told: Told, since: int) -> int:
    """How many granules that were reported as marked after ``since`` are not in the answer."""
    answer = frozen.changed(since)._bits
    return sum(want > have for want, have in zip(bits(told.done, since), answer, strict=True))


def too_many(frozen: FrozenMap, told: Told, since: int) -> int:
    """How many granules are in the answer although nobody was about to mark them."""
    answer = frozen.changed(since)._bits
    return sum(have > may for may, have in zip(bits(told.announced, since), answer, strict=True))


def opened(tmp_path: Path) -> DiskTracking:
    return DiskTracking.open(tmp_path, "vm1", SIZE, tmp_path / "vm1.raw", granularity=GRANULE)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "vm1.raw"
    with path.open("wb") as file:
        file.truncate(SIZE)
    return path


@pytest.mark.usefixtures("image")
def test_every_mark_that_was_made_before_a_kill_is_in_the_answer_after_it(tmp_path: Path) -> None:
    random, told = Random(20261123), Told()
    for _ in range(30):
        run_and_kill(random, tmp_path, MARKING, told, random.randrange(1, 6000))
        tracking = opened(tmp_path)
        assert tracking.reason_new is None
        assert told.generations == {tracking.generation}
        assert told.checkpoint + 1 <= tracking.epoch <= told.checkpoint + 2
        told.checkpoint = tracking.checkpoint().epoch
        for cursor in tracking.cursors():
            held = (told.acknowledged.get(cursor.consumer), told.maybe[cursor.consumer])
            assert cursor.epoch in held
            told.acknowledged[cursor.consumer] = cursor.epoch
        tracking.close(clean=False)
    check_answers(tmp_path, told)


def check_answers(tmp_path: Path, told: Told) -> None:
    tracking = opened(tmp_path)
    frozen = tracking.checkpoint()
    assert frozen.epoch > 3 * 256  # slots ran out several times
    assert set(told.acknowledged) == {"nightly", "weekly"}
    for consumer in told.acknowledged:
        since, _ = tracking.since(consumer)
        assert since is not None
        assert missed(frozen, told, since) == 0
        assert too_many(frozen, told, since) == 0
    assert missed(frozen, told, 1) == 0
    tracking.close()


@pytest.mark.usefixtures("image")
def test_a_kill_while_the_record_is_opened_or_closed_does_not_end_it(tmp_path: Path) -> None:
    random, told = Random(7), Told()
    tracking = opened(tmp_path)
    told.generations.add(tracking.generation)
    tracking.checkpoint()
    tracking.map.mark(77 * GRANULE, 1)
    tracking.close()
    for _ in range(12):
        run_and_kill(random, tmp_path, REOPENING, told, random.randrange(1, 30))
    tracking = opened(tmp_path)
    assert told.generations == {tracking.generation}
    assert tracking.checkpoint().dirty_bytes(1) == GRANULE
    tracking.close()


@pytest.mark.usefixtures("image")
def test_a_kill_while_the_first_record_is_made_leaves_one_that_works_or_none(
    tmp_path: Path,
) -> None:
    program = """
while True:
    tracking = opened()
    say("G", tracking.generation)
    tracking.close()
    (directory / "vm1.epochs").unlink()
"""
    random = Random(11)
    for _ in range(8):
        run_and_kill(random, tmp_path, program, Told(), random.randrange(1, 30))
        tracking = opened(tmp_path)
        assert tracking.reason_new in (None, "disk 'vm1' was not tracked before")
        tracking.close()
        assert sorted(os.listdir(tmp_path)) == ["vm1.epochs", "vm1.raw"]


@pytest.mark.usefixtures("image")
def test_a_map_in_private_memory_would_lose_marks_and_this_would_be_seen(tmp_path: Path) -> None:
    """The control of the first test."""
    opened(tmp_path).close(clean=False)
    told = Told()
    run_and_kill(Random(1), tmp_path, PRIVATE + MARKING, told, 500)
    tracking = opened(tmp_path)
    assert missed(tracking.checkpoint(), told, 0) > 0
    tracking.close()

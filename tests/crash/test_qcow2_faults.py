"""A write or sync of the file under an image fails, any one of them: what was acknowledged stays
right, nobody's neighbour is destroyed, and once the fault is gone a flush makes all of it durable.

FLEECE_SOAK=N: at N times as many calls of each run; 23: at every one.
"""

import errno
import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from fleece.block.node import Filter, Node
from fleece.formats.qcow2 import freespace, metadata, pending
from fleece.formats.qcow2.image import Qcow2Node
from fleece.units import align_down
from nbdwire.constants import CMD_FLAG_NO_HOLE
from tests.support import stress
from tests.support.qcow2 import CLEAN, LEAKS, pread, qemu_img
from tests.support.stress import SIZE, Image, assert_equal

STEP = 23 // min(23, int(os.environ.get("FLEECE_SOAK", "1")))


@dataclass
class Fault:
    """Calls ``first`` to ``last`` of all files that share it fail, after half of a write."""

    first: int
    last: int
    code: int
    calls: int = 0

    def fails(self) -> bool:
        self.calls += 1
        return self.first <= self.calls <= self.last


class FaultyFile(Filter):
    def __init__(self, child: Node, fault: Fault) -> None:
        super().__init__(child.name, child)
        self._fault = fault

    def pwrite(self, buf: memoryview, offset: int, fua: bool = False) -> None:
        if self._fault.fails():
            half = align_down(offset + len(buf) // 2, 512) - offset  # no sector is torn
            if half > 0:
                self.next.pwrite(buf[:half], offset)
            raise OSError(self._fault.code, os.strerror(self._fault.code))
        self.next.pwrite(buf, offset, fua)

    def flush(self) -> None:
        if self._fault.fails():
            raise OSError(self._fault.code, os.strerror(self._fault.code))
        self.next.flush()

    def close(self) -> None:
        self.next.close()


class Run:
    """The same operations each time; ``possible``: what each byte may be after a crash."""

    def __init__(self, node: Qcow2Node, model: bytearray, seed: int) -> None:
        self.node = node
        self.model = model
        self.rnd = random.Random(seed)
        self.possible = [bytes(model)]
        self.errors = 0

    def all(self) -> None:
        for _ in range(36):
            kind = self.rnd.choice(["write"] * 5 + ["zero", "trim", "flush"])
            low = self.rnd.randrange(SIZE)
            high = min(SIZE, low + self.rnd.choice([1, 700, 5000, 66_000, 200_000]))
            data = self.rnd.randbytes(high - low) if kind == "write" else bytes(high - low)
            flags = self.rnd.choice([0, CMD_FLAG_NO_HOLE])
            fua = self.rnd.random() < 0.1
            try:
                self.one(kind, low, data, flags, fua)
            except OSError:
                self.errors += 1
                self.failed(low, data)
            if kind != "flush":
                self.possible.append(bytes(self.model))

    def one(self, kind: str, low: int, data: bytes, flags: int, fua: bool) -> None:
        high = low + len(data)
        if kind == "flush":
            self.node.flush()
            self.possible = [bytes(self.model)]
        elif kind == "write":
            self.possible.append(bytes(self.model))
            self.node.pwrite(memoryview(data), low, fua)
            self.model[low:high] = data
        elif kind == "zero":
            self.node.zero(low, len(data), flags)
            self.model[low:high] = data
        else:
            self.node.trim(low, len(data))
            self.model[low:high] = self.old_or_new(low, data)

    def failed(self, low: int, data: bytes) -> None:
        """Each byte of its range may have been changed or not, and no other.

        Where it reads as it did, the disk may have the new data still, in the place of data that
        was zeroed since the last flush.
        """
        written = bytearray(self.model)
        written[low : low + len(data)] = data
        self.possible.append(bytes(written))
        self.model[low : low + len(data)] = self.old_or_new(low, data)

    def old_or_new(self, low: int, data: bytes) -> bytes:
        got = pread(self.node, len(data), low)
        old = self.model[low : low + len(data)]
        if got not in (old, data):
            assert all(a in (b, c) for a, b, c in zip(got, old, data, strict=True)), "foreign data"
        return got


def start(directory: Path, name: str, seed: int) -> Image:
    directory.mkdir()
    return stress.IMAGES[name](directory, random.Random(seed))


def attempt(image: Image, fault: Fault, seed: int, *, heals: bool) -> bool:
    """One run with this fault; whether it was met."""
    image.wrap = lambda node: FaultyFile(node, fault)
    model = bytearray(image.model)
    node = image.open()
    run = Run(node, model, seed)
    try:
        run.all()
        assert_equal(pread(node, SIZE, 0), model, "live")
        if heals:
            fault.first = fault.last = 0
            node.flush()
            run.possible = [bytes(model)]
            check(image, run.possible)
    finally:
        try:
            node.close()
        except OSError:
            assert fault.last
        else:
            run.possible = [bytes(model)]
    check(image, run.possible)
    return bool(run.errors) or not heals


def check(image: Image, possible: list[bytes]) -> None:
    node = image.open(read_only=True)
    try:
        got = pread(node, SIZE, 0)
        lazy = node.header.dirty
    finally:
        node.close()
    if got != possible[-1]:
        explain(got, possible)
    if not lazy:
        qemu_img("check", "-U", *image.source(), ok=(CLEAN, LEAKS))


def explain(got: bytes, possible: list[bytes]) -> None:
    import numpy as np

    array = np.frombuffer(got, np.uint8)
    fits = np.zeros(len(array), np.bool_)
    for version in possible:
        fits |= array == np.frombuffer(version, np.uint8)
    wrong = np.flatnonzero(~fits)
    assert not len(wrong), f"{len(wrong)} bytes are wrong, from {wrong[0]}"


NAMES = [
    "shorter backing",
    "subclusters, snapshot",
    "snapshot, backing, small",
    "compressed",
    "data file, backing",
    "64-bit refcounts",
    "lazy refcounts",
    "bitmap",
    "LUKS, backing",
    "clusters of 512, small caches",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("heals", [True, False], ids=["heals", "stays"])
def test_a_call_that_fails_destroys_nothing(
    name: str, heals: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(freespace, "GRACE", 0.0)
    monkeypatch.setattr(pending, "MOST", 4)
    monkeypatch.setattr(metadata, "DIRTY_LIMIT", 8192)
    seed = stress.seed_of(name)
    image = start(tmp_path / "first", name, seed)
    shutil.copytree(tmp_path / "first", tmp_path / "kept")
    count = Fault(0, 0, 0)
    attempt(image, count, seed, heals=False)
    met = 0
    for number in range(1 + seed % STEP, count.calls + 1, STEP):
        for kept in (tmp_path / "kept").iterdir():
            shutil.copy(kept, tmp_path / "first" / kept.name)
        rnd = random.Random(number)
        last = number if heals and rnd.random() < 0.5 else 10**9
        last = number + rnd.randrange(6) if heals and last != number else last
        fault = Fault(number, last, rnd.choice([errno.EIO, errno.ENOSPC]))
        try:
            met += attempt(image, fault, seed, heals=heals)
        except (AssertionError, OSError) as error:
            raise AssertionError(f"{name}, seed {seed}, call {number}: {error}") from error
    assert met

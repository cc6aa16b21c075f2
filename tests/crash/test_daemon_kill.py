"""`fleece serve` is killed at any moment, over and over, and never tells a wrong byte.

Two guests write without a pause, unaligned and across clusters; each knows what it had
acknowledged. FLEECE_SOAK multiplies the rounds.
"""

import os
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fleece.formats.qcow2.create import CreateOptions, create
from nbdwire.client import Client
from nbdwire.errors import NBDError
from nbdwire.extents import Extent
from tests.support.daemon import Daemon

SIZE = (24 << 20) + 512
STRIPE = (1 << 20) + 70_001  # no multiple of anything: the guests share clusters
SOAK = int(os.environ.get("FLEECE_SOAK", "1"))
CONSUMER = "nightly"
CONTEXT = f"qemu:dirty-bitmap:{CONSUMER}"


class Guest(threading.Thread):
    """Writes into every other stripe until it is told to stop, or the daemon is gone.

    ``doubtful`` is the request that was not answered: offset, and what it would have written.
    """

    def __init__(
        self, number: int, daemon: Daemon, model: bytearray, seed: int, trims: bool
    ) -> None:
        super().__init__(name=f"guest-{number}", daemon=True)
        self.number = number
        self.model = model
        self.doubtful: tuple[int, bytes] | None = None
        self.done = 0
        self.problem: BaseException | None = None
        self._dice = random.Random(seed * 2 + number)
        self._noise = random.Random(number).randbytes(4 << 20)
        self._trims = trims  # where what was trimmed reads as zeroes, to the byte
        self._halt = threading.Event()
        self._client = daemon.client("a")

    def run(self) -> None:
        try:
            while not self._halt.is_set():
                self._operation(self._client)
        except NBDError:
            pass  # it was killed
        except BaseException as problem:
            self.problem = problem
        finally:
            self._client.close()

    def stop(self) -> None:
        self._halt.set()

    def _operation(self, client: Client) -> None:
        dice = self._dice
        stripe = dice.randrange(SIZE // STRIPE // 2) * 2 + self.number
        length = min(dice.choice((1, 511, 4096, 65536, 100_003, 300_000, 1 << 20)), STRIPE)
        offset = stripe * STRIPE + dice.randrange(STRIPE - length + 1)
        kind = dice.random()
        start = dice.randrange(len(self._noise) - length)
        data = self._noise[start : start + length] if kind < 0.8 else bytes(length)
        self.doubtful = (offset, data)
        if kind < 0.8:
            client.pwrite(data, offset)
        elif kind < 0.9 or not self._trims:
            client.zero(offset, length)
        else:
            client.trim(offset, length)
        self.model[offset : offset + length] = data
        self.doubtful = None
        self.done += 1


class Trial:
    """A daemon, its guests, and what every instant was."""

    def __init__(self, directory: Path, fmt: str, seed: int) -> None:
        self.image = directory / "a.img"
        self.fmt = fmt
        self.dice = random.Random(seed)
        self.model = self._make_image()
        self.daemon = Daemon(directory, {"a": f"{self.image},format={fmt}"})
        self.instants: dict[str, bytes] = {}
        self.pulled = bytes(SIZE)  # what the consumer has
        self.interrupted = self.taken = 0
        self.daemon.start()

    def _make_image(self) -> bytearray:
        if self.fmt == "qcow2":
            create(self.image, SIZE, CreateOptions())
            return bytearray(SIZE)
        data = bytearray(SIZE)
        data[: SIZE // 2] = random.Random(7).randbytes(SIZE // 2)
        with self.image.open("wb") as file:
            file.write(data[: SIZE // 2])
            file.truncate(SIZE)
        return data

    def guests(self) -> list[Guest]:
        seed = self.dice.getrandbits(32)
        trims = self.fmt == "raw"
        both = [Guest(number, self.daemon, self.model, seed, trims) for number in (0, 1)]
        for guest in both:
            guest.start()
        return both

    def pause(self, seconds: float) -> None:
        """Up to that long, at random: whatever happens meanwhile is what is to be tried."""
        threading.Event().wait(self.dice.random() * seconds)

    def snapshot(self, *, after_writes: bool = False) -> str:
        """Taken while the guests rest, so the model is the instant. Nobody has flushed."""
        if after_writes:
            guests = self.guests()
            self.pause(0.05)
            for guest in guests:
                guest.stop()
                guest.join(30)
                assert guest.problem is None
                assert guest.doubtful is None
        self.taken += 1
        name = f"s{self.taken}"
        self.daemon.ask("snapshot-create", disks=["a"], name=name, consumer=CONSUMER)
        self.instants[name] = bytes(self.model)
        return name

    def drop(self, name: str) -> None:
        self.daemon.ask("snapshot-drop", name=name)
        del self.instants[name]

    def kill_and_restart(self, guests: list[Guest]) -> None:
        self.daemon.kill()
        for guest in guests:
            guest.join(30)
            assert guest.problem is None
        self.daemon.start()
        live = self.daemon.read("a")
        for guest in guests:
            self._settle(guest, live)
        if self.fmt == "qcow2":  # what was acknowledged and not flushed may be lost
            self.model[:] = live
        assert live == self.model

    def _settle(self, guest: Guest, live: bytes) -> None:
        """Each byte of the request in flight is the old one or the new one."""
        if guest.doubtful is None:
            return
        self.interrupted += 1
        offset, data = guest.doubtful
        part = slice(offset, offset + len(data))
        now, old, new = (np.frombuffer(b, np.uint8) for b in (live[part], self.model[part], data))
        if self.fmt == "raw":
            assert ((now == old) | (now == new)).all()
        self.model[part] = live[part]

    def check(self) -> None:
        """Every snapshot that lives is its instant, byte for byte."""
        listed = {snapshot["name"]: snapshot for snapshot in self.daemon.ask("snapshot-list")}
        assert set(listed) == set(self.instants)
        for name, instant in self.instants.items():
            assert listed[name]["state"] == "active"
            assert self.daemon.read(f"a@{name}") == instant, f"{name} is not its instant"

    def pull(self, name: str) -> int:
        """Apply the increment to what the consumer has, and acknowledge it; bytes read."""
        extents = self._dirty(name)
        data = bytearray(self.pulled)
        with self.daemon.client(f"a@{name}") as client:
            for extent in extents:
                data[extent.offset : extent.end] = client.pread(extent.length, extent.offset)
        assert data == self.instants[name], "the increment misses something"
        self.pulled = bytes(data)
        self.daemon.ask("snapshot-ack", name=name)
        return sum(extent.length for extent in extents)

    def _dirty(self, name: str) -> list[Extent]:
        found: list[Extent] = []
        with self.daemon.client(f"a@{name}", [CONTEXT]) as client:
            while not found or found[-1].end < SIZE:
                offset = found[-1].end if found else 0
                found += client.extents(offset, SIZE - offset, CONTEXT)
        return [extent for extent in found if extent.is_dirty]

    def finish(self, order: Callable[[list[str]], list[str]]) -> None:
        for name in order(list(self.instants)):
            self.drop(name)
            self.check()
        assert self.daemon.left() == set()
        assert self.daemon.end() == 0
        assert "Traceback" not in self.daemon.log.read_text()


def rounds(count: int) -> int:
    return count * SOAK


@pytest.mark.timeout(120 * SOAK)
@pytest.mark.parametrize(("fmt", "count"), [("raw", 8), ("qcow2", 4)])
def test_kills_in_the_middle_of_writes_and_copies_cost_no_byte(
    tmp_path: Path, fmt: str, count: int
) -> None:
    trial = Trial(tmp_path, fmt, seed=1)
    read = []
    try:
        for round_ in range(rounds(count)):
            name = trial.snapshot(after_writes=True)
            if len(trial.instants) > 2:  # always two alive; the middle, the oldest, in turn
                trial.drop(list(trial.instants)[round_ % 2])
            guests = trial.guests()
            trial.pause(0.15)
            trial.kill_and_restart(guests)
            trial.check()
            read.append(trial.pull(name))
        assert trial.interrupted > count // 2
        assert all(count < SIZE for count in read[1:]), "each of them was a full backup"
        trial.finish(lambda names: names if fmt == "raw" else names[::-1])
    finally:
        trial.daemon.close()


class Asking(threading.Thread):
    """A control command in a thread of its own, whose daemon may die over it."""

    def __init__(self, daemon: Daemon, command: str, **arguments: Any) -> None:
        super().__init__(daemon=True)
        self._ask = lambda: daemon.ask(command, **arguments)
        self.answer: Any = None

    def run(self) -> None:
        try:
            self.answer = self._ask()
        except Exception as problem:  # of any kind: it was killed
            self.answer = None
            self.problem = problem


@pytest.mark.timeout(120 * SOAK)
def test_kills_in_the_middle_of_a_create_leave_it_whole_or_not_at_all(tmp_path: Path) -> None:
    trial = Trial(tmp_path, "raw", seed=2)
    try:
        trial.snapshot()
        for round_ in range(rounds(6)):
            busy = round_ % 2 == 0
            guests = trial.guests() if busy else []
            asking = Asking(trial.daemon, "snapshot-create", disks=["a"], name="new")
            asking.start()
            trial.pause(0.04)
            before = bytes(trial.model)
            trial.kill_and_restart(guests)
            asking.join(30)
            names = [snapshot["name"] for snapshot in trial.daemon.ask("snapshot-list")]
            assert names in (["s1"], ["s1", "new"])
            assert asking.answer is None or "new" in names, "it was announced, and is gone"
            if "new" in names:
                if not busy:
                    assert trial.daemon.read("a@new") == before
                trial.daemon.ask("snapshot-drop", name="new")
            trial.check()
            trial.drop("s1")
            assert trial.daemon.left() == set()
            trial.taken = 0
            trial.snapshot()
        trial.finish(lambda names: names)
    finally:
        trial.daemon.close()


@pytest.mark.timeout(120 * SOAK)
def test_kills_in_the_middle_of_a_drop_leave_the_others_exact(tmp_path: Path) -> None:
    trial = Trial(tmp_path, "raw", seed=3)
    try:
        trial.snapshot()
        for round_ in range(rounds(6)):
            trial.snapshot()
            guests = trial.guests()
            trial.pause(0.05)
            victim = list(trial.instants)[round_ // 2 % 2]
            asking = Asking(trial.daemon, "snapshot-drop", name=victim)
            asking.start()
            trial.pause(0.02)
            trial.kill_and_restart(guests)
            asking.join(30)
            names = [snapshot["name"] for snapshot in trial.daemon.ask("snapshot-list")]
            if asking.answer is not None:
                assert victim not in names
            if victim not in names:
                del trial.instants[victim]
            trial.check()
            if victim in names:
                trial.drop(victim)
        trial.finish(lambda names: names)
    finally:
        trial.daemon.close()

"""Internal snapshots and a crash at any moment: the old set of snapshots or the new one, each with
its data, leaks at most, and no write to the disk that harms a snapshot later.

``qemu-img check`` also counts COPIED flags that do not fit their count as errors. In the middle of
these operations some do not (QEMU's order of steps has the same window): a flag may be missing, or
belong to a cluster whose other reference is a leak. Neither does harm, which is tested by writing
to all of the disk afterwards."""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fleece.block.file import FileNode
from fleece.formats.qcow2 import snapshots
from fleece.formats.qcow2.image import Qcow2Node
from tests.crash.test_qcow2_order import rebuilt, sectors
from tests.support.qcow2 import RecordingFile, make, opened, pread, qemu_img

SIZE = 300_032

Log = list[tuple[str, int, bytes]]


@dataclass
class Run:
    """``initial``: the image before the operation; ``log``: what it wrote.

    ``before``, ``after``: the disk, and the snapshots' contents by id, on both sides of it.
    """

    initial: bytes
    log: Log
    before: tuple[bytes, dict[bytes, bytes]]
    after: tuple[bytes, dict[bytes, bytes]]

    def killed(self) -> Iterator[bytes]:
        """After SIGKILL: any prefix of the writes."""
        for position in range(len(self.log) + 1):
            yield rebuilt(self.initial, writes(self.log[:position]))

    def power_lost(self, rnd: random.Random) -> Iterator[bytes]:
        """What was synced, and any sectors of the rest; most is open just before a sync."""
        syncs = [i for i, (kind, _, _) in enumerate(self.log) if kind == "sync"]
        for position in [*syncs * 2, *(rnd.randrange(len(self.log) + 1) for _ in range(4))]:
            done = self.log[:position]
            synced = max((i for i, (kind, _, _) in enumerate(done) if kind == "sync"), default=0)
            chance = rnd.choice([0.1, 0.5, 0.9])
            rest = [s for at, data in writes(done[synced:]) for s in sectors(at, data)]
            kept = [sector for sector in rest if rnd.random() < chance]
            yield rebuilt(self.initial, writes(done[:synced]) + kept)


def writes(log: Log) -> list[tuple[int, bytes]]:
    return [(at, data) for kind, at, data in log if kind == "write"]


def state(path: Path) -> tuple[bytes, dict[bytes, bytes]]:
    """The disk, and what each snapshot holds."""
    with opened(path, read_only=True) as node:
        disk = pread(node, node.size, 0)
        known = [snapshot.identity for snapshot in snapshots.list_snapshots(node)]
    saved = {}
    for which in known:
        node = Qcow2Node(FileNode(path, read_only=True, locking=False), read_only=True)
        old = snapshots.open_snapshot(node, which)
        saved[which] = pread(old, old.size, 0)
        old.close()
    return disk, saved


def play(directory: Path, verb: str, seed: int, options: dict[str, Any]) -> Run:
    """An image with two snapshots, and then one operation, recorded."""
    rnd = random.Random(seed)
    path = make(directory / "disk.qcow2", SIZE, **options)
    node = Qcow2Node(FileNode(path, locking=False))
    for _ in range(2):
        for _ in range(4):
            length = rnd.choice([700, 5000, 70_000])
            offset = rnd.randrange(SIZE - length)
            node.pwrite(memoryview(rnd.randbytes(length)), offset)
        snapshots.create(node, "snap")
    node.pwrite(memoryview(rnd.randbytes(100_000)), 30_000)
    node.close()
    initial, before = path.read_bytes(), state(path)
    recorder = RecordingFile(FileNode(path, locking=False))
    node = Qcow2Node(recorder)
    getattr(snapshots, verb)(node, "new" if verb == "create" else "1")
    node.close()
    return Run(initial, recorder.log, before, state(path))


def check(right: bool) -> None:
    """An assertion that does not compare a megabyte line by line to explain itself."""
    assert right


def examine(path: Path, image: bytes, run: Run) -> bool:
    """Whether the operation had been done; AssertionError if anything is not as it must be."""
    path.write_bytes(image)
    found = state(path)
    check(found in (run.before, run.after))
    report = json.loads(qemu_img("check", "--output=json", path, ok=(0, 2, 3)))
    if report.get("corruptions"):
        lines = [line for line in qemu_img("check", path, ok=(2,)).splitlines() if "ERROR" in line]
        assert all(line.startswith("ERROR OFLAG_COPIED") for line in lines), lines
    with opened(path) as node:
        node.pwrite(memoryview(b"\xaa" * SIZE), 0)
    check(state(path) == (b"\xaa" * SIZE, found[1]))
    if report.get("corruptions") or report.get("leaks"):
        path.write_bytes(image)
        qemu_img("check", "-r", "all", path, ok=(0, 2, 3))
        qemu_img("check", path)
        check(state(path) == found)
    return found == run.after


LAYOUTS = [
    {"cluster_size": 512},
    {"cluster_size": 4096, "version": 2, "refcount_bits": 16},
    {"cluster_size": 16384, "extended_l2": True, "refcount_bits": 4},
]


@pytest.mark.parametrize("options", LAYOUTS, ids=str)
@pytest.mark.parametrize("verb", ["create", "apply", "delete"])
def test_a_kill_after_any_write_leaves_the_old_or_the_new_set(
    verb: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """formats.md §1.4: the order of the steps of each operation."""
    run = play(tmp_path, verb, 1, options)
    assert run.before != run.after
    done = [examine(tmp_path / "crashed.qcow2", image, run) for image in run.killed()]
    assert not done[0]
    assert done[-1]
    assert done == sorted(done)  # one write decides


@pytest.mark.parametrize("options", LAYOUTS, ids=str)
@pytest.mark.parametrize("verb", ["create", "apply", "delete"])
def test_a_power_cut_that_keeps_any_of_the_unsynced_sectors_does_no_more_harm(
    verb: str, options: dict[str, Any], tmp_path: Path
) -> None:
    run = play(tmp_path, verb, 2, options)
    for image in run.power_lost(random.Random(3)):
        examine(tmp_path / "crashed.qcow2", image, run)


@pytest.mark.parametrize("verb", ["create", "apply", "delete"])
def test_control_in_another_order_the_writes_do_harm(verb: str, tmp_path: Path) -> None:
    run = play(tmp_path, verb, 1, LAYOUTS[0])
    run.log.reverse()
    harm = 0
    for image in run.killed():
        try:
            examine(tmp_path / "crashed.qcow2", image, run)
        except Exception:
            harm += 1
    assert harm


def test_control_without_the_syncs_a_power_cut_does_harm(tmp_path: Path) -> None:
    harm = 0
    for verb in ("create", "apply", "delete"):
        run = play(tmp_path, verb, 4, LAYOUTS[0])
        rnd = random.Random(5)
        for _ in range(6):
            kept = [s for at, data in writes(run.log) for s in sectors(at, data)]
            image = rebuilt(run.initial, [s for s in kept if rnd.random() < 0.5])
            try:
                examine(tmp_path / "crashed.qcow2", image, run)
            except Exception:
                harm += 1
        (tmp_path / "disk.qcow2").unlink()
    assert harm

"""Persistent bitmaps and a crash at any moment: one that claims to be valid knows of every change,
and ``qemu-img check`` finds leaks at most."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fleece.block.file import FileNode
from fleece.formats.qcow2 import bitmaps
from fleece.formats.qcow2.image import Qcow2Node
from tests.crash.test_qcow2_order import rebuilt, sectors
from tests.crash.test_qcow2_snapshots import Log, Run, writes
from tests.support.qcow2 import CLEAN, LEAKS, RecordingFile, make, opened, pread, qemu_img

SIZE = 300_032
GRANULE = 4096


@dataclass
class Session:
    """``run``: what was written from open to close. ``disk``: the disk before.

    ``marked``: the granules that each bitmap had dirty before; ``recording``: who records.
    """

    run: Run
    disk: bytes
    marked: dict[str, set[int]]
    recording: set[str]


def granules(extents: Any) -> set[int]:
    return {g for at, n in extents for g in range(at // GRANULE, -(-(at + n) // GRANULE))}


def play(directory: Path, seed: int, options: dict[str, Any]) -> Session:
    rnd = random.Random(seed)
    path = make(directory / "disk.qcow2", SIZE, **options)
    node = Qcow2Node(FileNode(path, locking=False))
    for name in ("on", "off", "gone", "merged"):
        bitmaps.add(node, name, granularity=GRANULE)
    operate(node, rnd)
    bitmaps.disable(node, "off")
    node.close()
    initial = path.read_bytes()
    with opened(path, read_only=True) as node:
        disk = pread(node, SIZE, 0)
        marked = {b.name: granules(b.dirty_extents()) for b in bitmaps.load(node)}
    recorder = RecordingFile(FileNode(path, locking=False))
    node = Qcow2Node(recorder)
    operate(node, rnd)
    node.flush()
    bitmaps.remove(node, "gone")
    bitmaps.merge(node, "merged", [bitmaps.find(node, "off")])
    operate(node, rnd)
    node.close()
    run = Run(initial, recorder.log, (b"", {}), (b"", {}))
    return Session(run, disk, marked, {"on", "gone", "merged"})


def operate(node: Qcow2Node, rnd: random.Random) -> None:
    for _ in range(4):
        length = rnd.choice([700, 5000, 30_000])
        offset = rnd.randrange(SIZE - length)
        if rnd.random() < 0.7:
            node.pwrite(memoryview(rnd.randbytes(length)), offset)
        else:
            node.zero(offset, length)


def examine(path: Path, image: bytes, session: Session) -> dict[str, bool]:
    """Name -> whether it claims to be valid; AssertionError if one does and is not."""
    path.write_bytes(image)
    qemu_img("check", path, ok=(CLEAN, LEAKS))
    with opened(path, read_only=True) as node:
        disk = pread(node, SIZE, 0)
        pieces = range(0, SIZE, GRANULE)
        changed = {a // GRANULE for a in pieces if disk[a:][:GRANULE] != session.disk[a:][:GRANULE]}
        for bitmap in (found := bitmaps.load(node)):
            if not bitmap.inconsistent:
                needed = set(session.marked[bitmap.name])
                needed |= changed if bitmap.name in session.recording else set()
                assert needed <= granules(bitmap.dirty_extents()), bitmap.name
    with opened(path) as node:  # and whoever writes now does not make them worse
        node.pwrite(memoryview(b"\xaa" * 10), 0)
    qemu_img("check", path, ok=(CLEAN, LEAKS))
    return {bitmap.name: not bitmap.inconsistent for bitmap in found}


LAYOUTS = [
    {"cluster_size": 512},
    {"cluster_size": 4096, "refcount_bits": 1},
    {"cluster_size": 65536, "extended_l2": True},
]


@pytest.mark.parametrize("options", LAYOUTS, ids=str)
def test_a_kill_after_any_write_leaves_no_stale_bitmap(
    options: dict[str, Any], tmp_path: Path
) -> None:
    """formats.md §1.5: in use from before the first guest write until everything is stored."""
    session = play(tmp_path, 1, options)
    seen = [examine(tmp_path / "crashed.qcow2", i, session) for i in session.run.killed()]
    assert seen[0] == dict.fromkeys(("on", "off", "gone", "merged"), True)
    assert seen[-1] == dict.fromkeys(("on", "off", "merged"), True)
    valid = [any(found.values()) for found in seen]
    assert valid.count(True) < 8  # the rest of the time they are in use, or there are none


@pytest.mark.parametrize("options", LAYOUTS, ids=str)
def test_a_power_cut_that_keeps_any_of_the_unsynced_sectors_leaves_none_either(
    options: dict[str, Any], tmp_path: Path
) -> None:
    session = play(tmp_path, 2, options)
    for image in session.run.power_lost(random.Random(3)):
        examine(tmp_path / "crashed.qcow2", image, session)


def harmed(path: Path, session: Session, images: list[bytes]) -> int:
    harm = 0
    for image in images:
        try:
            examine(path, image, session)
        except Exception:
            harm += 1
    return harm


def test_control_without_the_mark_a_kill_leaves_a_stale_bitmap(tmp_path: Path) -> None:
    session = play(tmp_path, 4, LAYOUTS[1])
    log = session.run.log
    third = [i for i, (kind, _, _) in enumerate(log) if kind == "sync"][2]
    unmarked: Log = log[third + 1 :]
    images = [rebuilt(session.run.initial, writes(unmarked[:n])) for n in range(len(unmarked))]
    assert harmed(tmp_path / "crashed.qcow2", session, images) > 0


def test_control_without_the_syncs_a_power_cut_leaves_a_stale_bitmap(tmp_path: Path) -> None:
    session = play(tmp_path, 5, LAYOUTS[0])
    rnd = random.Random(6)
    kept = [s for at, data in writes(session.run.log) for s in sectors(at, data)]
    images = [
        rebuilt(session.run.initial, [s for s in kept if rnd.random() < 0.7]) for _ in range(20)
    ]
    assert harmed(tmp_path / "crashed.qcow2", session, images) > 0

"""A qcow2 image after the process or the host dies at any moment: leaks at most, and no flushed
data is lost. What was written is recorded, and the file is put together again as it could be."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fleece.block.file import FileNode
from fleece.formats.qcow2.image import Qcow2Node
from tests.support.qcow2 import (
    CLEAN,
    CORRUPT,
    LEAKS,
    RecordingFile,
    assert_clean,
    make,
    opened,
    pread,
    qemu_img,
)

SIZE = 600_064


@dataclass
class History:
    """``initial``: the file before; ``log``: what was written to it since.

    ``versions[i]``: the disk after operation i (0: before the first), which ended at
    ``ends[i]`` of the log; ``flushed[i]``: operation i was a flush.
    """

    initial: bytes
    backing: bytes
    log: list[tuple[str, int, bytes]]
    versions: list[bytes] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    flushed: list[bool] = field(default_factory=list)

    def allowed(self, position: int) -> list[bytes]:
        """What each byte may be when ``position`` writes of the log were begun."""
        running = next(
            (i for i, end in enumerate(self.ends) if end >= position), len(self.ends) - 1
        )
        durable = max(
            i for i in range(len(self.ends)) if self.flushed[i] and self.ends[i] <= position
        )
        return self.versions[durable : running + 1]


def play(directory: Path, seed: int, cluster: int, version: int, *, lazy: bool = False) -> History:
    """Random operations on a new image with a backing file, recorded."""
    rnd = random.Random(seed)
    backing = directory / "base.raw"
    backing.write_bytes(rnd.randbytes(SIZE // 2 + 300))
    path = make(
        directory / "disk.qcow2",
        SIZE,
        cluster_size=cluster,
        version=version,
        lazy_refcounts=lazy,
        backing=str(backing),
        backing_format="raw",
    )
    initial = path.read_bytes()
    recorder = RecordingFile(FileNode(path, locking=False))
    node = Qcow2Node(recorder, backing=FileNode(backing, read_only=True, locking=False))
    model = bytearray(backing.read_bytes().ljust(SIZE, b"\0"))
    history = History(initial, backing.read_bytes(), recorder.log, [bytes(model)], [0], [True])
    for _ in range(26):
        kind = rnd.choice(["write", "write", "write", "zero", "flush"])
        operate(node, model, kind, rnd)
        history.versions.append(bytes(model))
        history.ends.append(len(recorder.log))
        history.flushed.append(kind == "flush")
    node.close()
    history.versions.append(bytes(model))
    history.ends.append(len(recorder.log))
    history.flushed.append(True)
    return history


def operate(node: Qcow2Node, model: bytearray, kind: str, rnd: random.Random) -> None:
    offset = rnd.randrange(SIZE)
    length = min(rnd.choice([1, 700, 5000, 70_000]), SIZE - offset)
    if kind == "write":
        data = rnd.randbytes(length)
        node.pwrite(memoryview(data), offset)
        model[offset : offset + length] = data
    elif kind == "zero":
        node.zero(offset, length)
        model[offset : offset + length] = bytes(length)
    else:
        node.flush()


def rebuilt(initial: bytes, writes: list[tuple[int, bytes]]) -> bytes:
    data = bytearray(initial)
    for offset, new in writes:
        if len(data) < offset + len(new):
            data.extend(bytes(offset + len(new) - len(data)))
        data[offset : offset + len(new)] = new
    return bytes(data)


def killed_at(history: History, position: int) -> bytes:
    """The file after SIGKILL: the first ``position`` entries of the log happened."""
    return rebuilt(
        history.initial,
        [(at, data) for kind, at, data in history.log[:position] if kind == "write"],
    )


def power_lost_at(history: History, position: int, rnd: random.Random) -> bytes:
    """What was synced, and of the rest any sectors."""
    log = history.log[:position]
    synced = max((i for i, entry in enumerate(log) if entry[0] == "sync"), default=0)
    writes = [(at, data) for kind, at, data in log[:synced] if kind == "write"]
    chance = rnd.choice([0.1, 0.5, 0.9])
    for kind, at, data in log[synced:]:
        writes += [s for s in sectors(at, data) if kind == "write" and rnd.random() < chance]
    return rebuilt(history.initial, writes)


def sectors(offset: int, data: bytes) -> Iterator[tuple[int, bytes]]:
    position = 0
    while position < len(data):
        n = min(len(data) - position, 512 - (offset + position) % 512)
        yield offset + position, data[position : position + n]
        position += n


def explained(content: bytes, allowed: list[bytes]) -> bool:
    """Whether each byte of ``content`` is that of some allowed version."""
    got = np.frombuffer(content, np.uint8)
    fits = np.zeros(len(got), np.bool_)
    for version in allowed:
        fits |= got == np.frombuffer(version, np.uint8)
    return bool(fits.all())


def content_of(path: Path, backing: Path) -> bytes:
    base = FileNode(backing, read_only=True, locking=False)
    with opened(path, base, read_only=True) as node:
        return pread(node, SIZE, 0)


def examine(directory: Path, image: bytes, allowed: list[bytes], ok: tuple[int, ...]) -> None:
    path = directory / "crashed.qcow2"
    path.write_bytes(image)
    qemu_img("check", "-f", "qcow2", path, ok=ok)
    assert explained(content_of(path, directory / "base.raw"), allowed)


@pytest.mark.parametrize(("cluster", "version", "seed"), [(512, 3, 1), (4096, 2, 2), (65536, 3, 3)])
def test_a_kill_after_any_write_leaves_leaks_at_most_and_all_flushed_data(
    cluster: int, version: int, seed: int, tmp_path: Path
) -> None:
    history = play(tmp_path, seed, cluster, version)
    for position in range(len(history.log) + 1):
        image = killed_at(history, position)
        examine(tmp_path, image, history.allowed(position), (CLEAN, LEAKS))
    assert_clean(tmp_path / "disk.qcow2")
    assert content_of(tmp_path / "disk.qcow2", tmp_path / "base.raw") == history.versions[-1]


@pytest.mark.parametrize(("cluster", "version", "seed"), [(512, 3, 4), (4096, 2, 5), (65536, 3, 6)])
def test_a_power_cut_that_keeps_any_of_the_unsynced_sectors_does_no_more_harm(
    cluster: int, version: int, seed: int, tmp_path: Path
) -> None:
    history = play(tmp_path, seed, cluster, version)
    rnd = random.Random(seed)
    syncs = [i for i, (kind, _, _) in enumerate(history.log) if kind == "sync"]
    positions = [rnd.randrange(1, len(history.log) + 1) for _ in range(20)]
    for position in syncs * 3 + positions:  # just before a sync the most is open
        image = power_lost_at(history, position, rnd)
        examine(tmp_path, image, history.allowed(position), (CLEAN, LEAKS))


@pytest.mark.parametrize("lost", [killed_at, power_lost_at])
def test_with_lazy_refcounts_the_image_is_right_again_once_it_is_opened(
    lost: Callable[..., bytes], tmp_path: Path
) -> None:
    history = play(tmp_path, 7, 4096, 3, lazy=True)
    rnd = random.Random(7)
    path = tmp_path / "crashed.qcow2"
    for _ in range(25):
        position = rnd.randrange(1, len(history.log) + 1)
        arguments: tuple[Any, ...] = (rnd,) if lost is power_lost_at else ()
        path.write_bytes(lost(history, position, *arguments))
        base = FileNode(tmp_path / "base.raw", read_only=True, locking=False)
        with opened(path, base) as node:
            assert explained(pread(node, SIZE, 0), history.allowed(position))
        qemu_img("check", "-f", "qcow2", path)


def test_control_entries_that_are_written_before_their_counts_are_found(tmp_path: Path) -> None:
    history = play(tmp_path, 8, 4096, 3)
    block = range(2 * 4096, 3 * 4096)  # where `create` puts the first refcount block
    late = [w for w in history.log if w[0] == "write" and w[1] not in block]
    assert len(late) < len([w for w in history.log if w[0] == "write"])
    path = tmp_path / "crashed.qcow2"
    path.write_bytes(rebuilt(history.initial, [(at, data) for _, at, data in late]))
    qemu_img("check", "-f", "qcow2", path, ok=(CORRUPT,))


def test_control_without_the_syncs_a_power_cut_does_harm(tmp_path: Path) -> None:
    history = play(tmp_path, 4, 512, 3)
    rnd = random.Random(4)
    harm = 0
    for _ in range(30):
        position = rnd.randrange(len(history.log) // 2, len(history.log) + 1)
        allowed = history.allowed(position)
        unsynced = History(
            history.initial, history.backing, [e for e in history.log[:position] if e[0] != "sync"]
        )
        image = power_lost_at(unsynced, position, rnd)
        try:
            examine(tmp_path, image, allowed, (CLEAN, LEAKS))
        except (AssertionError, OSError):
            harm += 1
    assert harm > 0

"""As test_qcow2_order, while several threads write, zero and flush: what was acknowledged before
a flush began is there after a crash once the flush was acknowledged.

FLEECE_SEED=N: other requests; FLEECE_SOAK=N: N times as many.
"""

import os
import random
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fleece.block.file import FileNode
from fleece.block.node import Filter, Node
from fleece.formats.qcow2 import freespace, metadata, pending
from fleece.formats.qcow2.image import Qcow2Node
from tests.crash.test_qcow2_map_runs import tagged
from tests.crash.test_qcow2_order import sectors
from tests.support.qcow2 import CLEAN, LEAKS, make, pread, qemu_img
from tests.support.threads import frequent_switches

CLUSTER = 16384
SLOT = 5 * CLUSTER // 4  # so that each shares clusters with the next
SLOTS = 24
SIZE = SLOTS * SLOT
WRITERS = 3
Entry = tuple[str, Path, int, bytes]


class Log:
    """What reached the files, in the order in which it was complete."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        # For each slot what it was: (zero?, where in the log that began), by version.
        self.history: list[list[tuple[bool, int]]] = [[(False, 0)] for _ in range(SLOTS)]
        self.complete = [0] * SLOTS
        # (end in the log, the versions that were complete when it began)
        self.flushes: list[tuple[int, list[int]]] = [(0, [0] * SLOTS)]


class Recorded(Filter):
    def __init__(self, child: Node, entries: list[Entry]) -> None:
        super().__init__(child.name, child)
        self._path = Path(child.name)
        self._entries = entries

    def pwrite(self, buf: memoryview, offset: int, fua: bool = False) -> None:
        assert not fua
        data = bytes(buf)
        self.next.pwrite(buf, offset)
        self._entries.append(("write", self._path, offset, data))

    def flush(self) -> None:
        begun = len(self._entries)
        self.next.flush()
        self._entries.append(("sync", self._path, begun, b""))

    def close(self) -> None:
        self.next.close()


def write(node: Qcow2Node, log: Log, number: int, rnd: random.Random, steps: int) -> None:
    for _ in range(steps):
        slot = rnd.randrange(number, SLOTS, WRITERS)
        kind = rnd.choice(["write", "write", "write", "zero", "flush"])
        if kind == "flush":
            before = list(log.complete)
            node.flush()
            log.flushes.append((len(log.entries), before))
            continue
        history = log.history[slot]
        history.append((kind == "zero", len(log.entries)))
        version = len(history) - 1
        if kind == "zero":
            node.zero(slot * SLOT, SLOT)
        else:
            data = memoryview(tagged(slot * SLOT, SLOT, version))
            cut = rnd.choice([SLOT // 2, 512, SLOT - 8])
            for low, high in [(cut, SLOT), (0, cut)]:
                node.pwrite(data[low:high], slot * SLOT + low)
        log.complete[slot] = version


def explained(log: Log, content: bytes, position: int) -> None:
    least = max((f for f in log.flushes if f[0] <= position), key=lambda f: f[0])[1]
    for flush in log.flushes:
        if flush[0] <= position:
            least = [max(a, b) for a, b in zip(least, flush[1], strict=True)]
    for slot in range(SLOTS):
        history = log.history[slot]
        possible = {
            version
            for version, (_, begun) in enumerate(history)
            if version >= least[slot] and (begun <= position or version == least[slot])
        }
        zero = any(history[version][0] for version in possible)
        at = slot * SLOT
        for index, version in struct.iter_unpack(">II", content[at : at + SLOT]):
            if (index, version) == (0, 0):
                # The first word of the backing file is zero too.
                assert zero or at == 0, f"zeroes at {at} of slot {slot}"
            else:
                assert index * 8 == at, f"foreign data at {at}"
                assert version in possible, f"version {version} at {at}, of {sorted(possible)}"
                assert not history[version][0], f"version {version} at {at} was of zeroes"
            at += 8


class Image:
    def __init__(self, directory: Path, kind: str) -> None:
        self.base = directory / "base.raw"
        self.base.write_bytes(tagged(0, SIZE, 0))
        self.data = directory / "d.data" if kind == "data file" else None
        options: dict[str, Any] = {"extended_l2": kind == "subclusters"}
        self.path = make(
            directory / "d.qcow2",
            SIZE,
            cluster_size=CLUSTER,
            backing=str(self.base),
            backing_format="raw",
            data_file=self.data and str(self.data),
            **options,
        )
        files = [self.path, *([self.data] if self.data else [])]
        self.initial = {path: path.read_bytes() for path in files}

    def open(self, log: Log | None = None) -> Qcow2Node:
        def file(path: Path) -> Node:
            node = FileNode(path, read_only=log is None, locking=False)
            return node if log is None else Recorded(node, log.entries)

        return Qcow2Node(
            file(self.path),
            backing=FileNode(self.base, read_only=True, locking=False),
            data_file=self.data and file(self.data),
            read_only=log is None,
        )

    def crash(self, log: Log, position: int, chance: float, rnd: random.Random) -> None:
        """What was complete when a sync began that is complete; of the rest sectors by chance."""
        entries = log.entries[:position]
        contents = {path: bytearray(data) for path, data in self.initial.items()}
        synced = dict.fromkeys(contents, 0)
        for kind, path, begun, _ in entries:
            if kind == "sync":
                synced[path] = begun
        for i, (kind, path, offset, data) in enumerate(entries):
            if kind != "write":
                continue
            for at, new in [(offset, data)] if i < synced[path] else sectors(offset, data):
                if i < synced[path] or rnd.random() < chance:
                    content = contents[path]
                    content.extend(bytes(max(0, at + len(new) - len(content))))
                    content[at : at + len(new)] = new
        for path, content in contents.items():
            path.write_bytes(content)


@pytest.mark.parametrize("kind", ["backing", "subclusters", "data file"])
def test_what_was_complete_before_a_flush_outlives_a_crash_after_it(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(freespace, "GRACE", 0.0)
    for number in range(int(os.environ.get("FLEECE_SOAK", "1"))):
        seed = int(os.environ.get("FLEECE_SEED", "1")) * 1000 + number
        rnd = random.Random(seed)
        monkeypatch.setattr(pending, "MOST", rnd.choice([3, 1024]))
        monkeypatch.setattr(metadata, "DIRTY_LIMIT", rnd.choice([0, 8 << 20]))
        directory = tmp_path / str(number)
        directory.mkdir()
        image, log = Image(directory, kind), Log()
        node = image.open(log)
        try:
            with frequent_switches(), ThreadPoolExecutor(WRITERS) as pool:
                seeds = [random.Random(rnd.random()) for _ in range(WRITERS)]
                done = [pool.submit(write, node, log, n, r, 25) for n, r in enumerate(seeds)]
                for future in done:
                    future.result(60)
        finally:
            node.close()
        examine(image, log, rnd)


def examine(image: Image, log: Log, rnd: random.Random) -> None:
    ends = [end for end, _ in log.flushes]
    positions = [*rnd.sample(ends, min(12, len(ends))), *rnd.sample(range(len(log.entries)), 12)]
    for position in positions:
        for chance in (0.0, 0.3, 1.0):
            image.crash(log, position, chance, rnd)
            node = image.open()
            try:
                content = pread(node, SIZE, 0)
            finally:
                node.close()
            explained(log, content, position)
        qemu_img("check", "-U", "-f", "qcow2", image.path, ok=(CLEAN, LEAKS))

"""Every prefix of what a resize writes is the old disk or the new one, with leaks at most."""

import random
from pathlib import Path
from typing import Any

import pytest

from fleece.block.file import FileNode
from fleece.formats.qcow2 import snapshots
from fleece.formats.qcow2.image import Qcow2Node
from fleece.formats.qcow2.resize import resize
from tests.support.qcow2 import LEAKS, RecordingFile, make, opened, pread, qemu_img

KiB = 1024


def _prepare(path: Path, size: int, options: dict[str, Any], snapshot: bool) -> bytes:
    """An image with data in it, packed clusters too; its contents."""
    rng = random.Random(size)
    make(path, size, cluster_size=4096, **options)
    with opened(path) as node:
        for _ in range(20):
            offset = rng.randrange(size - 9000)
            node.pwrite(memoryview(rng.randbytes(rng.randrange(1, 9000))), offset)
        node.flush()
        for cluster in range(0, size // 4096, 7):
            if not node._map.entry(cluster):
                node.write_compressed(memoryview(b"text" * 1024), cluster * 4096)
        if snapshot:
            snapshots.create(node, "one")
        return pread(node, size, 0)


def _state(original: bytes, log: list[tuple[str, int, bytes]]) -> bytes:
    data = bytearray(original)
    for kind, offset, part in log:
        if kind == "write":
            data.extend(bytes(max(0, offset + len(part) - len(data))))
            data[offset : offset + len(part)] = part
    return bytes(data)


@pytest.mark.parametrize("snapshot", [False, True])
@pytest.mark.parametrize(
    ("old", "new"),
    [(1024 * KiB, 9 * 1024 * KiB), (6 * 1024 * KiB, 300 * KiB), (999 * KiB, 1001 * KiB)],
)
@pytest.mark.parametrize("options", [{}, {"refcount_bits": 8}], ids=str)
def test_every_prefix_is_the_old_or_the_new_disk(
    tmp_path: Path, old: int, new: int, snapshot: bool, options: dict[str, Any]
) -> None:
    """formats.md §1.8: own before publish, and header pointers last."""
    path = tmp_path / "disk.qcow2"
    before = _prepare(path, old, options, snapshot)
    original = path.read_bytes()
    after = before[:new] + bytes(max(0, new - old))
    file = RecordingFile(FileNode(path))
    node = Qcow2Node(file)
    resize(node, new, shrink=True)
    node.close()
    log = file.log
    state, seen = tmp_path / "state.qcow2", set()
    for count in range(len(log) + 1):
        if count and log[count - 1][0] == "sync":
            continue
        data = _state(original, log[:count])
        state.write_bytes(data)
        qemu_img("check", "-U", "-f", "qcow2", state, ok=(0, LEAKS))
        with opened(state, read_only=True) as reader:
            contents = pread(reader, reader.size, 0)
        assert contents in (before, after), count
        seen.add(contents == after)
    assert seen == {False, True}


def test_a_full_disk_leaves_the_old_disk_and_a_node_that_works(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    before = _prepare(path, 512 * KiB, {}, False)

    class Full(RecordingFile):
        left = 3

        def pwrite(self, buf: memoryview, offset: int, fua: bool = False) -> None:
            self.left -= 1
            if self.left < 0:
                raise OSError(28, "No space left on device")
            super().pwrite(buf, offset, fua)

    failed = 0
    for left in range(9):
        file = Full(FileNode(path))
        node = Qcow2Node(file)
        file.left = left
        try:
            resize(node, 64 * 1024 * KiB)
        except OSError:
            failed += 1
            file.left = 1 << 30
            assert node.size == 512 * KiB
            assert pread(node, node.size, 0) == before
            node.close()
            qemu_img("check", "-f", "qcow2", path, ok=(0, LEAKS))
        else:
            file.left = 1 << 30
            node.close()
            break
    assert failed

"""Seeded operations on images that QEMU made with every feature, compared with a bytearray."""

import random
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from fleece.block.file import FileNode
from fleece.formats.qcow2.image import Qcow2Node
from nbdwire.constants import CMD_FLAG_NO_HOLE
from tests.support.qcow2 import assert_clean, assert_same, pread, qemu_img, qemu_io

SIZE = 1_900_032  # ends inside a cluster
BACKING = 1_300_000

FEATURES = {
    "plain": "compat=1.1",
    "extended": "extended_l2=on,cluster_size=64k",
    "extended-16k": "extended_l2=on,cluster_size=16k",
    "lazy": "lazy_refcounts=on",
    "small": "cluster_size=512,refcount_bits=16",
    "data-file": "data_file={data}",
    "raw-data-file": "data_file={data},data_file_raw=on",
    "extended-data-file": "data_file={data},extended_l2=on",
    "zstd": "compression_type=zstd",
    "v2": "compat=0.10",
}
NO_BACKING = ("raw-data-file",)
NO_SNAPSHOTS = ("data-file", "raw-data-file", "extended-data-file")


class Disk:
    """An image of QEMU's with content, perhaps compressed or shared with a snapshot."""

    def __init__(self, directory: Path, feature: str, start: str) -> None:
        self.rnd = random.Random(f"{feature} {start}")
        self.path = directory / "disk.qcow2"
        self.lazy = feature == "lazy"
        self.data_file = directory / "disk.data" if "data_file" in FEATURES[feature] else None
        self.base: Path | None = None
        options = FEATURES[feature].format(data=self.data_file)
        content = self.rnd.randbytes(BACKING)
        if start == "backing":
            self.base = directory / "base.raw"
            self.base.write_bytes(content)
            backing = ["-b", str(self.base), "-F", "raw"]
            qemu_img("create", "-q", "-f", "qcow2", *backing, "-o", options, self.path, str(SIZE))
        else:
            source = directory / "source.raw"
            source.write_bytes(content.ljust(SIZE, b"\0"))
            packed = ["-c"] if start == "compressed" else []
            qemu_img("convert", *packed, "-O", "qcow2", "-o", options, source, self.path)
        self.snapshot = bytes(content.ljust(SIZE, b"\0")) if start == "snapshot" else b""
        if self.snapshot:
            qemu_img("snapshot", "-c", "before", self.path)
        self.model = bytearray(content.ljust(SIZE, b"\0"))

    def open(self) -> Qcow2Node:
        backing = FileNode(self.base, read_only=True, locking=False) if self.base else None
        data = FileNode(self.data_file, locking=False) if self.data_file else None
        return Qcow2Node(FileNode(self.path, locking=False), backing=backing, data_file=data)

    def operate(self, node: Any) -> None:
        rnd = self.rnd
        offset = rnd.randrange(SIZE)
        length = min(rnd.choice([1, 511, 2048, 9000, 65536, 200_000]), SIZE - offset)
        if rnd.random() < 0.4:
            offset &= ~2047
        part = slice(offset, offset + length)
        kind = rnd.choice(["write"] * 6 + ["fua", "zero", "keep", "trim", "flush"])
        if kind in ("write", "fua"):
            data = rnd.randbytes(length)
            node.pwrite(memoryview(data), offset, kind == "fua")
            self.model[part] = data
        elif kind in ("zero", "keep"):
            node.zero(offset, length, CMD_FLAG_NO_HOLE if kind == "keep" else 0)
            self.model[part] = bytes(length)
        elif kind == "trim":
            node.trim(offset, length)
            now = pread(node, length, offset)
            before = self.model[part]
            assert all(a in (0, b) for a, b in zip(now, before, strict=True)), "foreign data"
            self.model[part] = now
        else:
            node.flush()
            if not self.lazy:  # its counts are behind until it is closed
                assert_clean(self.path)
        low = max(0, offset - 3000)
        assert pread(node, length, low) == self.model[low : low + length]

    def check(self) -> None:
        assert_clean(self.path)
        assert_same(self.path, self.model)
        if self.snapshot:
            old = self.path.with_suffix(".old")
            qemu_img("convert", "-l", "before", "-O", "raw", self.path, old)
            assert old.read_bytes() == self.snapshot


CASES = [
    (feature, start)
    for feature in FEATURES
    for start in ("filled", "backing", "compressed", "snapshot")
    if not (start == "backing" and feature in NO_BACKING)
    and not (start in ("snapshot", "compressed") and feature in NO_SNAPSHOTS)
]


@pytest.mark.parametrize(("feature", "start"), CASES)
def test_operations_leave_the_image_as_a_bytearray_would_be(
    feature: str, start: str, tmp_path: Path
) -> None:
    disk = Disk(tmp_path, feature, start)
    for _ in range(3):
        with ExitStack() as stack:
            node = disk.open()
            stack.callback(node.close)
            for _ in range(14):
                disk.operate(node)
            assert pread(node, SIZE, 0) == disk.model
        disk.check()


def test_qemu_and_fleece_take_turns_on_subclusters(tmp_path: Path) -> None:
    disk = Disk(tmp_path, "extended", "backing")
    for turn in range(6):
        node = disk.open()
        for _ in range(6):
            disk.operate(node)
        node.close()
        disk.check()
        at, value = disk.rnd.randrange(0, SIZE - 70_000) & ~511, turn + 1
        qemu_io(disk.path, f"write -P {value} {at} 5k", f"write -z {at + 40_960} 8k")
        disk.model[at : at + 5120] = bytes([value]) * 5120
        disk.model[at + 40_960 : at + 49_152] = bytes(8192)
        disk.check()

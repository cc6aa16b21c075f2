import random
from pathlib import Path
from typing import Any

import pytest

from fleece.block.file import FileNode
from fleece.errors import ImageError, UnsupportedFeature
from fleece.formats.qcow2 import bitmaps, snapshots
from fleece.formats.qcow2.image import Qcow2Node
from fleece.formats.qcow2.resize import resize
from tests.support.qcow2 import assert_clean, assert_same, make, opened, pread, qemu_img

KiB = 1024
MiB = 1024 * KiB

VARIANTS: list[dict[str, Any]] = [
    {"cluster_size": 4096},
    {"cluster_size": 512},
    {"cluster_size": 65536},
    {"cluster_size": 65536, "extended_l2": True},
    {"cluster_size": 4096, "version": 2},
    {"cluster_size": 4096, "refcount_bits": 1},
    {"cluster_size": 4096, "lazy_refcounts": True},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("backed", [False, True])
def test_a_disk_that_grows_and_shrinks_reads_as_the_model(
    tmp_path: Path, options: dict[str, Any], backed: bool
) -> None:
    """formats.md §1.10: what is new reads as zeroes, whatever was there before or is below."""
    rng = random.Random(str(options) + str(backed))
    most = 3 * MiB
    base = tmp_path / "base.raw"
    base.write_bytes(rng.randbytes(2 * MiB))
    more = {"backing": base.name, "backing_format": "raw"} if backed else {}
    path = make(tmp_path / "disk.qcow2", MiB, **options, **more)
    model = bytearray(base.read_bytes()[:MiB] if backed else MiB)
    for number in range(14):
        below = FileNode(base, read_only=True) if backed else None
        with opened(path, below) as node:
            for _ in range(4):
                length = rng.randrange(1, 100_000)
                offset = rng.randrange(max(1, len(model) - length))
                data = rng.randbytes(min(length, len(model) - offset))
                node.pwrite(memoryview(data), offset)
                model[offset : offset + len(data)] = data
            size = rng.randrange(1, most // 512) * 512
            resize(node, size, shrink=True)
            model = model[:size] + bytes(max(0, size - len(model)))
            assert node.size == size
            assert pread(node, size, 0) == model
            node.pwrite(memoryview(b"end"), size - 3)
            model[size - 3 :] = b"end"
        if number % 4 == 3:
            assert_clean(path)
            assert_same(path, model)


@pytest.mark.parametrize("mode", ["metadata", "falloc", "full"])
@pytest.mark.parametrize("options", [{}, {"extended_l2": True}, {"data_file": "d.raw"}], ids=str)
def test_what_is_new_can_be_preallocated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, options: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)  # QEMU looks for the data file there
    path = make(tmp_path / "disk.qcow2", MiB, **options)
    data = FileNode(tmp_path / "d.raw") if "data_file" in options else None
    node = Qcow2Node(FileNode(path), data_file=data)
    resize(node, 9 * MiB, preallocation=mode)
    assert pread(node, 9 * MiB, 0) == bytes(9 * MiB)
    node.close()
    assert_clean(path)
    big = (tmp_path / "d.raw") if data else path
    if mode != "metadata":
        assert big.stat().st_blocks * 512 >= 8 * MiB
    if data is None:
        assert_same(path, bytes(9 * MiB))


def test_a_disk_that_got_smaller_gives_its_space_back(tmp_path: Path) -> None:
    path = make(tmp_path / "disk.qcow2", 64 * MiB, cluster_size=4096)
    with opened(path) as node:
        node.pwrite(memoryview(b"x" * (64 * MiB)), 0)
    with opened(path) as node:
        resize(node, MiB, shrink=True)
    assert path.stat().st_size < 3 * MiB
    assert_clean(path)
    assert_same(path, b"x" * MiB)


def test_snapshots_keep_their_disk_when_its_size_changes(tmp_path: Path) -> None:
    path = make(tmp_path / "disk.qcow2", 4 * MiB, cluster_size=4096)
    with opened(path) as node:
        node.pwrite(memoryview(b"a" * (4 * MiB)), 0)
        snapshots.create(node, "before")
        resize(node, MiB, shrink=True)
        node.pwrite(memoryview(b"b" * 5000), 1000)
        resize(node, 6 * MiB)
    assert_clean(path)
    assert_same(path, b"a" * 1000 + b"b" * 5000 + b"a" * (MiB - 6000) + bytes(5 * MiB))
    with opened(path) as node:
        snapshots.apply(node, "before")
    assert_clean(path)
    assert_same(path, b"a" * (4 * MiB))


def test_compressed_clusters_go_with_what_they_lie_in(tmp_path: Path) -> None:
    path = make(tmp_path / "disk.qcow2", 8 * MiB, cluster_size=4096)
    with opened(path) as node:
        for offset in range(0, 8 * MiB, 4096):
            assert node.write_compressed(memoryview(b"text" * 1024), offset)
    with opened(path) as node:
        resize(node, MiB + 512, shrink=True)
    assert_clean(path)
    assert_same(path, b"text" * (MiB // 4 + 128))


def test_bitmaps_get_the_new_size_and_what_is_new_is_clean(tmp_path: Path) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(b"b" * (8 * MiB))
    path = make(tmp_path / "disk.qcow2", MiB, backing=base.name, backing_format="raw")
    with opened(path, FileNode(base, read_only=True)) as node:
        bitmaps.add(node, "nightly", granularity=65536)
        node.pwrite(memoryview(b"x"), 70_000)
        resize(node, 9 * MiB)
    with opened(path, FileNode(base, read_only=True), read_only=True) as node:
        (bitmap,) = bitmaps.load(node)
        assert bitmap.size == 9 * MiB
        assert list(bitmap.dirty_extents()) == [(65536, 65536)]
    assert_clean(path)


def test_an_image_of_version_2_with_snapshots_keeps_its_size(tmp_path: Path) -> None:
    path = make(tmp_path / "disk.qcow2", MiB, version=2)
    qemu_img("snapshot", "-c", "one", path)
    with opened(path) as node, pytest.raises(UnsupportedFeature, match="version 2"):
        resize(node, 2 * MiB)
    assert_clean(path)


@pytest.mark.parametrize(
    ("size", "more", "text"),
    [
        (1000, {"shrink": True}, "multiple of 512"),
        (512, {}, "--shrink"),
        (512, {"shrink": True, "preallocation": "full"}, "growing"),
        (1 << 62, {}, "too many"),
    ],
)
def test_what_cannot_be_is_refused(
    tmp_path: Path, size: int, more: dict[str, Any], text: str
) -> None:
    path = make(tmp_path / "disk.qcow2", MiB)
    before = path.read_bytes()
    with opened(path) as node, pytest.raises(ImageError, match=text):
        resize(node, size, **more)
    assert path.read_bytes() == before

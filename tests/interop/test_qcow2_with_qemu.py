"""qcow2 images go back and forth between QEMU and us, and both see the same disk."""

import random
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fleece.errors import FleeceError, ImageCorrupt, UnsupportedFeature
from fleece.formats import open_image
from nbdwire.constants import STATE_ZERO
from tests.support.qcow2 import (
    assert_clean,
    assert_same,
    make,
    opened,
    pread,
    qemu_img,
    qemu_io,
    qemu_map,
)
from tests.support.tools import require

MiB = 1 << 20


def qemu_made(path: Path, size: int, options: str, backing: Path | None = None) -> Path:
    more = [] if backing is None else ["-b", backing, "-F", "raw"]
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, *more, path, str(size))
    qemu_io(
        path,
        "write -P 1 0 70000",
        "write -P 2 1M 300k",
        "write -z 1100k 128k",
        "write -z -u 1300k 64k",
        "discard 64k 64k",
        f"write -P 3 {size - 4096} 4096",
    )
    return path


def raw_of(path: Path) -> bytes:
    raw = path.with_suffix(".raw")
    qemu_img("convert", "-U", "-f", "qcow2", "-O", "raw", path, raw)
    return raw.read_bytes()


def scribble(node: Any, model: bytearray, seed: int, count: int = 12) -> None:
    rnd = random.Random(seed)
    for _ in range(count):
        offset = rnd.randrange(len(model))
        length = min(rnd.choice([1, 4096, 100_000]), len(model) - offset)
        part = slice(offset, offset + length)
        if rnd.random() < 0.3:
            node.zero(offset, length)
            model[part] = bytes(length)
        else:
            model[part] = rnd.randbytes(length)
            node.pwrite(memoryview(bytes(model[part])), offset)


OPTIONS = [
    *(f"compat=1.1,cluster_size={1 << bits}" for bits in range(9, 22)),
    "compat=0.10,cluster_size=4k",
    "compat=0.10",
    "compat=1.1,refcount_bits=8",
    "compat=1.1,refcount_bits=32",
    "compat=1.1,refcount_bits=64,cluster_size=512",
    "compat=1.1,lazy_refcounts=on",
]
# QEMU does not preallocate an image that has a backing file.
MADE = [(options, backed) for options in OPTIONS for backed in (False, True)]
MADE.append(("compat=1.1,preallocation=metadata", False))


@pytest.mark.parametrize(("options", "with_backing"), MADE)
def test_we_read_and_write_what_qemu_made(options: str, with_backing: bool, tmp_path: Path) -> None:
    size = 2 * MiB + 512
    backing = None
    if with_backing:
        backing = tmp_path / "base.img"
        backing.write_bytes(random.Random(5).randbytes(MiB + 77_777))
    path = qemu_made(tmp_path / "disk.qcow2", size, options, backing)
    model = bytearray(raw_of(path))
    node = open_image(path, "qcow2")
    assert pread(node, size, 0) == model
    scribble(node, model, seed=len(options))
    assert pread(node, size, 0) == model
    node.close()
    assert_clean(path)
    assert_same(path, model)
    qemu_io(path, "write -P 9 500000 100000", "write -z 1M 64k")
    model = bytearray(raw_of(path))
    node = open_image(path, read_only=True)
    assert pread(node, size, 0) == model
    node.close()
    assert_clean(path)


@pytest.mark.parametrize("bits", range(9, 22))
@pytest.mark.parametrize("version", [2, 3])
def test_what_we_make_is_clean_before_and_after_qemu_writes(
    bits: int, version: int, tmp_path: Path
) -> None:
    path = make(tmp_path / "disk.qcow2", 3 * MiB, cluster_size=1 << bits, version=version)
    assert_clean(path)
    qemu_io(path, "write -P 7 100k 1M")
    assert_clean(path)
    node = open_image(path)
    assert pread(node, 10, 100 << 10) == b"\7" * 10
    node.close()


def test_a_refcount_table_that_must_grow_moves(tmp_path: Path) -> None:
    path = make(tmp_path / "disk.qcow2", 64 * MiB, cluster_size=512)
    data = random.Random(3).randbytes(4 * MiB)
    before = path.read_bytes()[48:60]
    with opened(path) as node:
        for offset in range(0, 48 * MiB, len(data)):
            node.pwrite(memoryview(data), offset)
            if offset % (8 * MiB) == 0:
                node.flush()
                assert_clean_but_leaks(path)
    assert path.read_bytes()[48:60] != before
    assert_clean(path)
    with opened(path, read_only=True) as node:
        assert pread(node, len(data), 44 * MiB) == data
    with opened(path) as node:
        node.pwrite(memoryview(data), 50 * MiB)
    assert_clean(path)


def assert_clean_but_leaks(path: Path) -> None:
    qemu_img("check", "-U", "-f", "qcow2", path, ok=(0, 3))


def test_compressed_clusters_are_read_and_overwritten(tmp_path: Path) -> None:
    source = tmp_path / "source.raw"
    text = b"a line of text that compresses well\n" * 30_000
    noise = random.Random(2).randbytes(MiB)
    source.write_bytes((text + noise)[: 2 * MiB].ljust(2 * MiB, b"\0"))
    path = tmp_path / "packed.qcow2"
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", source, path)
    assert any(not entry.get("offset") and entry["data"] for entry in qemu_map(path))
    model = bytearray(source.read_bytes())
    with opened(path) as node:
        assert pread(node, len(model), 0) == model
        assert pread(node, 5000, 70_001) == model[70_001:75_001]
        scribble(node, model, seed=6, count=20)
        assert pread(node, len(model), 0) == model
    assert_clean(path)
    assert_same(path, model)


def test_extents_say_zero_where_qemu_does(tmp_path: Path) -> None:
    path = qemu_made(tmp_path / "disk.qcow2", 2 * MiB, "compat=1.1")
    zero = bytearray(2 * MiB)
    for entry in qemu_map(path):
        if entry["zero"]:
            zero[entry["start"] : entry["start"] + entry["length"]] = b"\1" * entry["length"]
    with opened(path, read_only=True) as node:
        for extent in node.extents(0, node.size):
            expected = b"\1" if extent.status & STATE_ZERO else b"\0"
            assert zero[extent.offset : extent.end] == expected * extent.length


def test_a_chain_of_images_reads_through(tmp_path: Path) -> None:
    base, middle, top = (tmp_path / name for name in ("base.img", "middle.qcow2", "top.qcow2"))
    base.write_bytes(random.Random(1).randbytes(MiB))
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base.img", "-F", "raw", middle, "1536k")
    qemu_img("create", "-q", "-f", "qcow2", "-b", "middle.qcow2", "-F", "qcow2", top, "2M")
    qemu_io(middle, "write -P 5 200k 300k", "write -z 900k 64k")
    qemu_io(top, "write -P 6 400k 10k")
    model = bytearray(raw_of(top))
    node = open_image(top, "qcow2")
    assert pread(node, node.size, 0) == model
    scribble(node, model, seed=4)
    assert pread(node, node.size, 0) == model
    node.close()
    assert_clean(top)
    assert_same(top, model)


def test_an_image_that_qemu_left_dirty_is_repaired_before_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "dirty.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", path, "8M")
    commands = ["-c", "write -P 4 1M 2M", "-c", "flush", "-c", "abort"]
    subprocess.run([require("qemu-io"), "-f", "qcow2", *commands, path], capture_output=True)
    assert "dirty" in qemu_img("info", "--output=json", path)
    qemu_img("check", path, ok=(2, 3))
    node = open_image(path, read_only=True)
    assert pread(node, 4, MiB) == b"\4" * 4
    node.close()
    node = open_image(path)
    node.pwrite(memoryview(b"x" * 5000), 7 * MiB)
    node.close()
    assert_clean(path)
    node = open_image(path)
    assert pread(node, 2 * MiB, MiB) == b"\4" * (2 * MiB)
    assert pread(node, 5000, 7 * MiB) == b"x" * 5000
    node.close()


def _create(options: str) -> Any:
    def run(path: Path) -> None:
        qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, "1M")

    return run


def _corrupt(path: Path) -> None:
    _create("compat=1.1")(path)
    with path.open("r+b") as file:
        file.seek(79)
        file.write(b"\2")


def _unknown_compression(path: Path) -> None:
    _create("compression_type=zstd")(path)
    with path.open("r+b") as file:
        file.seek(104)
        file.write(b"\2")


def _unknown_bit(path: Path) -> None:
    _create("compat=1.1")(path)
    with path.open("r+b") as file:
        file.seek(78)
        file.write(b"\1")


def _encrypted(path: Path) -> None:
    secret = ["--object", "secret,id=s,data=secret"]
    options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"
    for _ in range(5):  # QEMU measures the processor for this, and gives up now and then
        command = [require("qemu-img"), "create", "-q", *secret, "-f", "qcow2", "-o", options]
        if subprocess.run([*command, path, "1M"], capture_output=True).returncode == 0:
            return
    pytest.fail("qemu-img could not make an encrypted image")


REFUSED = [
    (_encrypted, True, FleeceError, "encrypted"),
    (_unknown_compression, True, UnsupportedFeature, "compression type"),
    (_unknown_bit, True, UnsupportedFeature, "incompatible bit 8"),
    (_corrupt, False, ImageCorrupt, "marked corrupt"),
]


@pytest.mark.parametrize(("build", "always", "kind", "text"), REFUSED, ids=lambda v: str(v)[:24])
def test_what_is_not_supported_is_refused_by_name(
    build: Any, always: bool, kind: type[FleeceError], text: str, tmp_path: Path
) -> None:
    path = tmp_path / "disk.qcow2"
    build(path)
    before = path.read_bytes()
    with pytest.raises(kind, match=text) as caught:
        open_image(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    if always:
        with pytest.raises(kind, match=text):
            open_image(path, read_only=True)
    else:
        node = open_image(path, read_only=True)
        assert pread(node, 512, 0) == bytes(512)
        node.close()
    assert path.read_bytes() == before

"""The header: what is written is read back, and nothing else is believed."""

import random
import struct
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fleece.block.file import FileNode
from fleece.errors import FleeceError, ImageCorrupt, NotAnImage, UnsupportedFeature
from fleece.formats.qcow2 import header as headers
from fleece.formats.qcow2.create import CreateOptions, create
from fleece.formats.qcow2.header import Header
from fleece.formats.qcow2.image import Qcow2Node
from tests.support.qcow2 import make, pread, qemu_img

GOOD = Header(
    version=3,
    cluster_bits=16,
    size=1 << 30,
    l1_size=2,
    l1_offset=3 << 16,
    refcount_table_offset=1 << 16,
    refcount_table_clusters=1,
)
END = 4 << 16


def parse(header: Header, **fields: int) -> Header:
    return headers.parse(headers.build(replace(header, **fields)), END, "x.qcow2")


def test_a_header_is_read_as_it_was_built() -> None:
    header = replace(
        GOOD,
        backing_file="./a:b.img",
        backing_format="raw",
        extensions=((0xE2792ACA, b"raw"), (0x12345678, b"unknown things")),
    )
    assert headers.parse(headers.build(header), END, "x") == header
    old = replace(GOOD, version=2, header_length=72)
    assert headers.parse(headers.build(old), END, "x") == old


def test_a_name_that_looks_like_a_protocol_is_written_as_a_path() -> None:
    assert headers.backing_name("nbd:thing") == "./nbd:thing"
    assert headers.backing_name("/a/nbd:thing") == "/a/nbd:thing"
    assert headers.backing_name("dir/a:b") == "dir/a:b"


@pytest.mark.parametrize(
    ("fields", "kind", "text"),
    [
        ({"version": 4}, UnsupportedFeature, "version 4"),
        ({"cluster_bits": 8}, ImageCorrupt, "cluster size"),
        ({"size": 1 << 63}, ImageCorrupt, "virtual size"),
        ({"size": 3 << 30}, ImageCorrupt, "too small"),
        ({"l1_size": 1 << 30}, ImageCorrupt, "above the limit"),
        ({"l1_offset": 0}, ImageCorrupt, "outside of the file"),
        ({"l1_offset": (3 << 16) + 512}, ImageCorrupt, "not aligned"),
        ({"l1_offset": 1 << 62}, ImageCorrupt, "outside of the file"),
        ({"l1_offset": 1 << 16}, ImageCorrupt, "overlap"),
        ({"refcount_table_offset": 4 << 16}, ImageCorrupt, "outside of the file"),
        ({"refcount_table_clusters": 0}, ImageCorrupt, "refcount table"),
        ({"refcount_table_clusters": 1 << 31}, ImageCorrupt, "refcount table"),
        ({"refcount_order": 7}, ImageCorrupt, "refcount order"),
        ({"snapshots": 1 << 20}, ImageCorrupt, "internal snapshots"),
        ({"crypt_method": 9}, ImageCorrupt, "encryption method"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    fields: dict[str, int], kind: type[FleeceError], text: str
) -> None:
    with pytest.raises(kind, match=text) as caught:
        parse(GOOD, **fields)
    assert str(caught.value).startswith("x.qcow2: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"QFI", b"QFI\xfb" + bytes(10), b"KDMV" + bytes(600)])
def test_what_is_no_qcow2_image_is_said_so(data: bytes) -> None:
    with pytest.raises(NotAnImage, match="not a qcow2 image"):
        headers.parse(data, len(data), "x")


def test_a_file_that_ends_in_its_header_is_corrupt() -> None:
    with pytest.raises(ImageCorrupt, match="ends inside"):
        headers.parse(headers.build(GOOD)[:90], END, "x")


def test_an_extension_longer_than_its_place_is_corrupt() -> None:
    data = bytearray(headers.build(GOOD).ljust(65536, b"\0"))
    struct.pack_into(">II", data, 112, 0x99, 1 << 31)
    with pytest.raises(ImageCorrupt, match="extension 0x99"):
        headers.parse(bytes(data), END, "x")


def test_a_backing_name_outside_of_the_first_cluster_is_corrupt() -> None:
    data = bytearray(headers.build(replace(GOOD, backing_file="base")).ljust(65536, b"\0"))
    for offset, length in [(65530, 20), (200, 1024), (1 << 40, 5), (50, 4)]:
        struct.pack_into(">QI", data, 8, offset, length)
        with pytest.raises(ImageCorrupt, match="name"):
            headers.parse(bytes(data), END, "x")


def test_a_backing_name_that_does_not_fit_is_refused_and_no_file_is_left(tmp_path: Path) -> None:
    options = CreateOptions(cluster_size=512, backing="x" * 600, backing_format="raw")
    with pytest.raises(FleeceError, match="does not fit"):
        create(tmp_path / "a", 1 << 20, options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("size", "options", "text"),
    [
        (1 << 20, CreateOptions(cluster_size=1000), "cluster size"),
        (1 << 20, CreateOptions(cluster_size=1 << 22), "cluster size"),
        (1 << 20, CreateOptions(version=4), "version"),
        (1 << 20, CreateOptions(version=2, lazy_refcounts=True), "lazy"),
        (1 << 20, CreateOptions(backing="a"), "needs a format"),
        (1 << 40, CreateOptions(cluster_size=512), "too small"),
    ],
)
def test_an_image_that_cannot_be_is_not_made(
    size: int, options: CreateOptions, text: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedFeature, match=text):
        create(tmp_path / "a", size, options)
    assert not list(tmp_path.iterdir())


def test_an_image_is_never_made_over_a_file(tmp_path: Path) -> None:
    path = make(tmp_path / "a.qcow2", 1 << 20)
    before = path.read_bytes()
    with pytest.raises(FileExistsError):
        make(path, 1 << 20)
    assert path.read_bytes() == before


def test_a_large_image_with_small_clusters_has_all_its_counts(tmp_path: Path) -> None:
    path = make(tmp_path / "a.qcow2", 100 << 30, cluster_size=512)
    qemu_img("check", "-f", "qcow2", path)


def exercise(path: Path, read_only: bool) -> None:
    """All verbs, on the beginning and the end of the disk."""
    file = FileNode(path, read_only=read_only, locking=False)
    try:
        node = Qcow2Node(file, read_only=read_only)
    except BaseException:
        file.close()
        raise
    try:
        for at in (0, max(0, node.size - 70_000)):
            length = min(70_000, node.size - at)
            if length:
                pread(node, length, at)
                node.prefetch(at, length)
                assert node.extents(at, length)
                assert node.map(at, length)
            if length and not read_only:
                node.pwrite(memoryview(b"x" * length), at)
                node.zero(at, length)
                node.flush()
    finally:
        node.close()


def problem_of(path: Path, read_only: bool) -> FleeceError | OSError | None:
    """What `exercise` raises; any other kind of exception goes on."""
    try:
        exercise(path, read_only)
    except (FleeceError, OSError) as error:
        return error
    return None


def mutated(original: bytes, rnd: random.Random) -> bytes:
    """Some fields of header and tables changed: bytes, all ones, offsets of other things."""
    data = bytearray(original)
    for _ in range(rnd.choice([1, 1, 2, 5])):
        where = rnd.choice([112, 112, 600, len(data)])
        at = rnd.randrange(where) & ~rnd.choice([0, 3, 7])
        kind = rnd.randrange(4)
        if kind == 0:
            data[at] ^= 1 << rnd.randrange(8)
        elif kind == 1:
            data[at : at + 8] = b"\xff" * 8
        elif kind == 2:
            data[at : at + 8] = struct.pack(
                ">Q", rnd.choice([1 << 63, 0]) | rnd.randrange(16) << 12
            )
        else:
            data[at : at + 4] = struct.pack(">I", rnd.choice([0, 1, 1 << 31, 0xFFFF]))
    return bytes(data[: rnd.choice([len(data)] * 8 + [rnd.randrange(len(data))])])


@pytest.mark.parametrize("version", [2, 3])
def test_mutated_images_give_clear_errors_in_bounded_time(version: int, tmp_path: Path) -> None:
    path = make(tmp_path / "a.qcow2", 3 << 20, cluster_size=4096, version=version)
    file = FileNode(path, locking=False)
    node = Qcow2Node(file)
    node.pwrite(memoryview(b"abc" * 30_000), 5000)
    node.zero(20_000, 30_000)
    node.pwrite(memoryview(b"abc" * 30_000), (3 << 20) - 90_000)
    node.close()
    original = path.read_bytes()
    rnd = random.Random(version)
    refused = 0
    for number in range(160):
        path.write_bytes(mutated(original, rnd))
        began = time.monotonic()
        for read_only in (True, False):
            problem = problem_of(path, read_only)
            refused += problem is not None
            assert "\n" not in str(problem), number
        assert time.monotonic() - began < 10, number
    assert 20 < refused < 320

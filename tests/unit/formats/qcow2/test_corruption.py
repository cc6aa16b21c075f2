"""Corruption prevention: a write that would hit metadata fails, and closes the image to writes."""

import errno
import struct
from dataclasses import dataclass
from pathlib import Path

import pytest

from fleece.block.file import FileNode
from fleece.errors import ImageCorrupt
from fleece.formats.qcow2 import overlap
from fleece.formats.qcow2.image import Qcow2Node, read_header
from fleece.formats.qcow2.options import Qcow2Options
from tests.support.qcow2 import pread, qemu_img, qemu_io

CLUSTER = 65536
SIZE = 8 << 20
COPIED = 1 << 63
MASK = 0x00FFFFFFFFFFFE00


def number(path: Path, at: int) -> int:
    with path.open("rb") as file:
        file.seek(at)
        return int(struct.unpack(">Q", file.read(8))[0])


def patch(path: Path, at: int, value: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(struct.pack(">Q", value))


@dataclass
class Image:
    """An image with one internal snapshot and its own tables; ``l2`` is the active L2 table."""

    path: Path
    places: dict[str, int]

    @property
    def l2(self) -> int:
        return self.places["active L2 table"]


@pytest.fixture
def image(tmp_path: Path) -> Image:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, str(SIZE))
    qemu_io(path, "write -P 1 0 256k")
    qemu_img("snapshot", "-c", "one", path)
    qemu_io(path, "write -P 2 0 64k")
    l1 = number(path, 40)
    snapshot_table = number(path, 64)
    inactive_l1 = number(path, snapshot_table)
    refcounts = number(path, 48)
    places = {
        "qcow2_header": 0,
        "active L1 table": l1,
        "active L2 table": number(path, l1) & MASK,
        "refcount table": refcounts,
        "refcount block": number(path, refcounts),
        "snapshot table": snapshot_table,
        "inactive L1 table": inactive_l1,
        "inactive L2 table": number(path, inactive_l1) & MASK,
    }
    assert len(set(places.values())) == len(places)
    return Image(path, places)


def open_node(path: Path, **options: object) -> Qcow2Node:
    return Qcow2Node(FileNode(path, locking=False), options=Qcow2Options(**options))  # type: ignore[arg-type]


KINDS = [name for name in overlap.NAMES.values() if name not in ("bitmap", "LUKS header")]


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "bitmap directory"])
def test_a_write_that_would_hit_metadata_fails_and_closes_the_image(
    image: Image, kind: str
) -> None:
    """The guest's second cluster claims to lie where this metadata is."""
    patch(image.path, image.l2 + 8, COPIED | image.places[kind])
    if image.places[kind] == 0:  # offset 0 means unallocated: the header needs another way in
        patch(image.path, image.l2 + 8, COPIED | CLUSTER // 2)
    before = image.path.read_bytes()
    told: list[str] = []
    node = open_node(image.path, on_corrupt=told.append)
    with pytest.raises(OSError, match=r"Preventing|corrupt") as caught:
        node.pwrite(memoryview(b"guest" * 100), CLUSTER + 4096)
    assert caught.value.errno == errno.EIO
    if kind != "qcow2_header":
        text = f"Preventing invalid write on metadata (overlaps with {kind})"
        assert text in str(caught.value)
        assert told == [text]
    with pytest.raises(OSError, match="closed to writes"):
        node.pwrite(memoryview(b"x"), 3 * CLUSTER)
    assert pread(node, 4, 0) == b"\2" * 4  # what can be read is read
    node.close()
    after = bytearray(image.path.read_bytes())
    assert after[79] == before[79] | 2
    after[79] = before[79]
    assert after == before
    with pytest.raises(ImageCorrupt, match=r"check -r all"):
        open_node(image.path)
    reader = Qcow2Node(FileNode(image.path, read_only=True, locking=False), read_only=True)
    assert pread(reader, 4, 0) == b"\2" * 4
    reader.close()


@pytest.mark.parametrize("kind", ["active L1 table", "refcount block"])
def test_an_l2_table_in_the_place_of_other_metadata_is_not_written(image: Image, kind: str) -> None:
    table = image.path.read_bytes()[image.places[kind] : image.places[kind] + CLUSTER]
    patch(image.path, image.places["active L1 table"], COPIED | image.places[kind])
    node = open_node(image.path)

    def write() -> None:
        node.pwrite(memoryview(b"x" * CLUSTER), 6 << 20)
        node.flush()

    with pytest.raises(OSError, match=r"overlaps with|corrupt"):
        write()
    node.close()
    if kind != "active L1 table":
        assert image.path.read_bytes()[image.places[kind] :][:CLUSTER] == table


def test_control_without_the_checks_the_refcounts_are_overwritten(image: Image) -> None:
    block = image.places["refcount block"]
    patch(image.path, image.l2 + 8, COPIED | block)
    node = open_node(image.path, overlap_check=overlap.NONE)
    node.pwrite(memoryview(b"guest" * 100), CLUSTER + 4096)
    node.close()
    assert b"guestguest" in image.path.read_bytes()[block : block + CLUSTER]


def test_repair_opens_the_image_again(image: Image) -> None:
    patch(image.path, image.l2 + 8, COPIED | image.places["refcount block"])
    node = open_node(image.path)
    with pytest.raises(OSError, match="overlaps with refcount block"):
        node.pwrite(memoryview(b"x"), CLUSTER)
    node.close()
    file = FileNode(image.path, read_only=True, locking=False)
    assert read_header(file, "disk").corrupt
    file.close()
    # QEMU understands the mark, and takes it away when nothing is wrong any more.
    patch(image.path, image.l2 + 8, 0)
    qemu_img("check", "-q", "-r", "all", image.path)
    open_node(image.path).close()

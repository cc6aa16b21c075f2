"""Changing options: formats.md §1.10. `tests.support.qcow2` asks QEMU whether it is right."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fleece.block.file import FileNode
from fleece.block.node import Filter
from fleece.errors import ImageError, UnsupportedFeature
from fleece.formats.qcow2.amend import Changes, amend
from fleece.formats.qcow2.header import Header
from fleece.formats.qcow2.image import read_header
from tests.support.qcow2 import RecordingFile, assert_clean, make, qemu_img, qemu_io

MiB = 1 << 20


def amended(path: Path, wrap: Callable[[FileNode], Any] = lambda file: file, **changes: Any) -> Any:
    """Amend it; what ``wrap`` made of the file."""
    file = FileNode(path)
    wrapped = wrap(file)
    try:
        header = read_header(file, str(path))
        after = amend(wrapped, header, Changes(**changes), str(path))
        assert replace(after, extensions=()) == replace(
            read_header(FileAsItIs(file), str(path)), extensions=()
        )
    finally:
        file.close()
    return wrapped


class FileAsItIs(Filter):
    """With the size that it has now."""

    def __init__(self, file: FileNode) -> None:
        super().__init__(file.name, file)
        self.size = Path(file.name).stat().st_size


def header_of(path: Path) -> Header:
    file = FileNode(path, read_only=True, locking=False)
    try:
        return read_header(file, str(path))
    finally:
        file.close()


def contents(path: Path) -> tuple[bytes, bytes]:
    """The disk and its internal snapshot, as QEMU reads them."""
    out = path.with_suffix(".out")
    qemu_img("convert", "-O", "raw", path, out)
    disk = out.read_bytes()
    qemu_img("convert", "-l", "s1", "-O", "raw", path, out)
    return disk, out.read_bytes()


@pytest.fixture(params=["alone", "with a backing file"])
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Data, zero clusters of both kinds, in the disk and in a snapshot that share tables."""
    path = tmp_path / "disk.qcow2"
    arguments: list[str | Path] = []
    if request.param != "alone":
        base = tmp_path / "base"
        base.write_bytes(b"\xaa" * (4 * MiB))
        arguments = ["-b", base, "-F", "raw"]
    qemu_img("create", "-f", "qcow2", "-o", "cluster_size=4k", *arguments, path, "4M")
    qemu_io(path, "write -P 1 0 1M", "write -z 500k 100k", "write -z -u 2M 300k", "write 3M 1k")
    qemu_img("snapshot", "-c", "s1", path)
    qemu_io(path, "write -P 3 90k 200k", "write -z 10k 50k", "write -z -u 3M 64k")
    return path


@pytest.mark.parametrize("bits", [2, 4, 8, 32, 64])
def test_the_refcount_width_changes_and_nothing_else(image: Path, bits: int) -> None:
    before = contents(image)
    amended(image, refcount_bits=bits)
    assert header_of(image).refcount_order == bits.bit_length() - 1
    assert_clean(image)
    assert contents(image) == before
    amended(image, refcount_bits=16)
    assert_clean(image)


def test_a_width_that_cannot_hold_a_count_is_refused_before_anything_is_written(
    image: Path,
) -> None:
    before = image.read_bytes()
    with pytest.raises(ImageError, match="references"):
        amended(image, refcount_bits=1)
    assert image.read_bytes() == before


def test_version_2_has_no_zero_clusters_and_reads_the_same(image: Path) -> None:
    before = contents(image)
    amended(image, version=2)
    assert header_of(image).version == 2
    assert_clean(image)
    assert contents(image) == before
    amended(image, version=3, lazy_refcounts=True)
    header = header_of(image)
    assert (header.version, header.lazy_refcounts) == (3, True)
    assert_clean(image)
    assert contents(image) == before


def test_a_recount_frees_what_leaked(image: Path) -> None:
    qemu_img("bitmap", "--add", image, "b0")
    amended(image, version=2)
    assert_clean(image)


def test_a_crash_at_any_write_leaves_the_old_image_or_the_new_one(tmp_path: Path) -> None:
    """formats.md §1.8: leaks are allowed, wrong data and counts that are too low are not."""
    base = tmp_path / "base"
    base.write_bytes(b"\xaa" * (1 * MiB))
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-f", "qcow2", "-b", base, "-F", "raw", path, "1M")
    qemu_io(path, "write -P 1 0 200k", "write -z 64k 64k", "write -z -u 512k 128k")
    before = path.read_bytes()
    out = tmp_path / "out"
    qemu_img("convert", "-O", "raw", path, out)
    disk = out.read_bytes()
    log = amended(path, RecordingFile, version=2).log
    writes = [entry for entry in log if entry[0] == "write"]
    assert len(writes) > 5
    state = bytearray(before)
    for _, offset, data in writes:
        state[len(state) : offset] = bytes(max(0, offset - len(state)))
        state[offset : offset + len(data)] = data
        path.write_bytes(state)
        qemu_img("check", path, ok=(0, 3))
        qemu_img("convert", "-O", "raw", path, out)
        assert out.read_bytes() == disk


@pytest.mark.parametrize(
    ("made", "changes", "message"),
    [
        ({"refcount_bits": 8}, {"version": 2}, "refcount_bits=16"),
        ({"extended_l2": True}, {"version": 2}, "extended L2"),
        ({"compression_type": "zstd"}, {"version": 2}, "zstd"),
        ({"data_file": "d"}, {"version": 2}, "data file"),
        ({}, {"version": 2, "refcount_bits": 32}, "refcount_bits=16"),
        ({}, {"version": 2, "lazy_refcounts": True}, "compat=1.1"),
        ({}, {"refcount_bits": 12}, "power of two"),
        ({}, {"data_file": "x"}, "no external data file"),
        ({}, {"data_file_raw": True}, "data_file_raw"),
        ({}, {"backing_file": "x"}, "rebase"),
        ({}, {"backing_format": "raw"}, "rebase"),
    ],
)
def test_what_cannot_be_is_refused_with_nothing_changed(
    tmp_path: Path, made: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    path = make(tmp_path / "x.qcow2", MiB, **made)
    before = path.read_bytes()
    with pytest.raises((ImageError, UnsupportedFeature), match=message):
        amended(path, **changes)
    assert path.read_bytes() == before


def test_the_data_file_gets_another_name(tmp_path: Path) -> None:
    path = make(tmp_path / "x.qcow2", MiB, data_file="d", data_file_raw=True)
    amended(path, data_file="other.raw", data_file_raw=False)
    header = header_of(path)
    assert header.data_file == "other.raw"
    assert not header.raw_data_file
    assert header.has_data_file


def test_a_dirty_image_has_to_be_repaired_first(tmp_path: Path) -> None:
    path = make(tmp_path / "x.qcow2", MiB, lazy_refcounts=True)
    with path.open("r+b") as file:
        file.seek(79)
        file.write(b"\1")
    with pytest.raises(ImageError, match="check -r all"):
        amended(path, lazy_refcounts=False)

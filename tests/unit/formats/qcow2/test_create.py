"""New images: formats.md §1.10, §11. That they are QEMU's own: interop/test_image_create."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fleece.block.file import FileNode
from fleece.errors import FleeceError, ImageError, ImageInUse, UnsupportedFeature, UsageError
from fleece.formats import creating
from fleece.formats.qcow2.create import CreateOptions, create
from fleece.formats.qcow2.image import read_header
from fleece.formats.qcow2.layout import count_blocks, pack_ones
from fleece.formats.qcow2.luks import LuksOptions
from tests.support.qcow2 import assert_clean, make

MiB = 1 << 20


def header_of(path: Path) -> Any:
    file = FileNode(path, read_only=True, locking=False)
    try:
        return read_header(file, str(path))
    finally:
        file.close()


def code(text: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, check=True
    ).stdout


def test_creating_needs_neither_numpy_nor_cryptography() -> None:
    modules = "fleece.formats.creating, fleece.formats.qcow2.create"
    out = code(f"import {modules}, sys; print([m for m in ('numpy', 'cryptography') "
               "if m in sys.modules])")  # fmt: skip
    assert out.strip() == "[]"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cluster_size": 3000}, "power of two"),
        ({"cluster_size": 256}, "power of two"),
        ({"cluster_size": 4 * MiB}, "power of two"),
        ({"version": 4}, "version 4"),
        ({"version": 2, "lazy_refcounts": True}, "version 3"),
        ({"version": 2, "refcount_bits": 8}, "version 3"),
        ({"version": 2, "extended_l2": True}, "version 3"),
        ({"version": 2, "compression_type": "zstd"}, "version 3"),
        ({"version": 2, "data_file": "d"}, "version 3"),
        ({"refcount_bits": 3}, "64"),
        ({"refcount_bits": 128}, "64"),
        ({"refcount_bits": 0}, "64"),
        ({"extended_l2": True, "cluster_size": 8192}, "16 KiB"),
        ({"compression_type": "lz4"}, "lz4"),
        ({"preallocation": "some"}, "some"),
        ({"data_file_raw": True}, "needs data_file"),
        ({"backing": "b"}, "needs a format"),
        ({"backing": "b", "backing_format": "raw", "preallocation": "metadata"}, "extended_l2"),
        (
            {"backing": "b", "backing_format": "raw", "data_file": "d", "data_file_raw": True},
            "backing",
        ),
        ({"data_file": "x.qcow2"}, "itself"),
        ({"backing": "b" * 1024, "backing_format": "raw"}, "does not fit"),
        ({"cluster_size": 512, "data_file": "d" * 600}, "does not fit"),
    ],
)
def test_what_cannot_be_is_said_and_leaves_nothing(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        make(tmp_path / "x.qcow2", MiB, **options)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (1 << 63, {}),
        (-1, {}),
        (64 << 50, {}),
        (1 << 40, {"cluster_size": 512}),
        (1 << 50, {"refcount_bits": 64, "cluster_size": 65536, "preallocation": "metadata"}),
    ],
)
def test_a_size_above_the_limits_is_refused_at_once(
    tmp_path: Path, size: int, options: dict[str, Any]
) -> None:
    """formats.md §12: L1 32 MiB, refcount table 8 MiB."""
    with pytest.raises(UnsupportedFeature):
        make(tmp_path / "x.qcow2", size, **options)
    assert list(tmp_path.iterdir()) == []


def test_the_largest_disk_of_2_mib_clusters_can_be_made(tmp_path: Path) -> None:
    path = make(tmp_path / "x.qcow2", 1 << 61, cluster_size=2 * MiB)
    assert header_of(path).size == 1 << 61
    assert_clean(path)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("cluster_size", [512, 4096, 65536, 2 * MiB])
def test_each_refcount_width_counts_itself(tmp_path: Path, bits: int, cluster_size: int) -> None:
    path = tmp_path / "x.qcow2"
    size = 3 * MiB + 512
    make(path, size, refcount_bits=bits, cluster_size=cluster_size, preallocation="metadata")
    assert header_of(path).refcount_order == bits.bit_length() - 1
    assert_clean(path)


def test_counts_below_a_byte_fill_it_from_the_lowest_bit() -> None:
    """formats.md §1.3."""
    assert pack_ones(3, 1) == b"\x07"
    assert pack_ones(3, 2) == b"\x15"
    assert pack_ones(3, 4) == b"\x11\x01"
    assert pack_ones(2, 64) == (bytes(7) + b"\1") * 2


@pytest.mark.parametrize("bits", [9, 16])
@pytest.mark.parametrize("width", [1, 16, 64])
@pytest.mark.parametrize("others", [1, 62, 63, 64, 4000, 100_000])
def test_blocks_and_table_hold_everything_and_no_more(bits: int, width: int, others: int) -> None:
    blocks, table = count_blocks(bits, width, others)
    per_block = (8 << bits) // width
    assert blocks * per_block >= others + blocks + table
    assert table << bits >= blocks * 8
    fewer = (blocks - 1) * per_block
    assert fewer < others + blocks - 1 + table


def test_a_file_that_is_there_stays_unless_it_shall_be_replaced(tmp_path: Path) -> None:
    path = tmp_path / "x.qcow2"
    path.write_bytes(b"precious")
    with pytest.raises(FileExistsError):
        create(path, MiB)
    assert path.read_bytes() == b"precious"
    create(path, MiB, CreateOptions(overwrite=True))
    assert_clean(path)


def test_an_image_in_use_is_not_replaced(tmp_path: Path) -> None:
    path = make(tmp_path / "x.qcow2", MiB)
    before = path.read_bytes()
    file = FileNode(path)
    try:
        with pytest.raises(ImageInUse):
            create(path, MiB, CreateOptions(overwrite=True))
    finally:
        file.close()
    assert path.read_bytes() == before


def test_a_fifo_is_not_an_image_to_be(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises((FleeceError, OSError)):
        create(tmp_path / "pipe", MiB, CreateOptions(overwrite=True))


def test_the_header_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image that was cut off while it was made does not look like one."""
    order: list[int] = []
    real = os.pwrite

    def recording(fd: int, data: Any, offset: int) -> int:
        order.append(offset)
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", recording)
    make(tmp_path / "x.qcow2", MiB, preallocation="metadata")
    assert order[-1] == 0
    assert 0 not in order[:-1]


def test_a_failure_in_the_middle_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    for options in ({}, {"overwrite": True}):
        with pytest.raises(OSError, match="No space"):
            make(tmp_path / "x.qcow2", MiB, **options)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", ["falloc", "full"])
def test_preallocated_space_is_there(tmp_path: Path, mode: str) -> None:
    path = make(tmp_path / "x.qcow2", 4 * MiB, preallocation=mode)
    assert path.stat().st_blocks * 512 >= 4 * MiB
    assert_clean(path)


@pytest.mark.parametrize(
    ("verbatim", "recorded"), [(True, "nbd://host/x"), (False, "./nbd://host/x")]
)
def test_a_path_is_never_taken_for_a_protocol(
    tmp_path: Path, verbatim: bool, recorded: str
) -> None:
    options = {"backing_format": "raw", "backing_verbatim": verbatim}
    path = make(tmp_path / "x.qcow2", MiB, backing="nbd://host/x", **options)
    assert header_of(path).backing_file == recorded


def test_a_relative_data_file_lies_beside_the_image(tmp_path: Path) -> None:
    """formats.md §1.6: not in the directory of whoever calls."""
    make(tmp_path / "x.qcow2", MiB, data_file="x.raw")
    assert (tmp_path / "x.raw").stat().st_size == MiB
    header = header_of(tmp_path / "x.qcow2")
    assert header.data_file == "x.raw"
    assert not header.raw_data_file


def test_the_passphrase_is_in_no_repr() -> None:
    options = CreateOptions(encryption=LuksOptions(), passphrase=b"hunter2")
    assert "hunter2" not in repr(options)


class TestOptionsAsText:
    @pytest.mark.parametrize(
        ("fmt", "text", "message"),
        [
            ("qcow2", "foo=1", "no option 'foo'"),
            ("qcow2", "compat=0.9", "compat"),
            ("qcow2", "cluster_size=64kk", "64kk"),
            ("qcow2", "refcount_bits=many", "number"),
            ("qcow2", "lazy_refcounts=maybe", "on or off"),
            ("raw", "preallocation=metadata", "falloc"),
            ("raw", "cluster_size=4k", "no option"),
            ("vmdk", "", "cannot be made"),
        ],
    )
    def test_what_is_wrong_is_named(self, fmt: str, text: str, message: str) -> None:
        with pytest.raises((UsageError, UnsupportedFeature), match=message):
            creating.recipe(fmt, [text] if text else [], {})

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("encrypt.format=luks", "key-secret"),
            ("encrypt.key-secret=s", "encrypt.format"),
            ("encrypt.format=luks,encrypt.key-secret=other", "no secret 'other'"),
            ("encrypt.format=aes,encrypt.key-secret=s", "luks only"),
            ("encryption=on", "luks only"),
            ("backing_fmt=raw", "needs a backing file"),
        ],
    )
    def test_what_does_not_go_together_is_said(self, text: str, message: str) -> None:
        recipe = creating.recipe("qcow2", [text], {"s": b"x"})
        with pytest.raises((UsageError, UnsupportedFeature), match=message):
            creating.qcow2_options(recipe)

    def test_a_raw_file_has_its_size_and_its_space(self, tmp_path: Path) -> None:
        recipe = creating.recipe("raw", ["preallocation=falloc"], {}, size="1000")
        assert recipe.size == 1000
        creating.make(tmp_path / "r", 1000, recipe, overwrite=False)
        assert (tmp_path / "r").stat().st_size == 1024
        with pytest.raises(FileExistsError):
            creating.make(tmp_path / "r", 1000, recipe, overwrite=False)
        creating.make(tmp_path / "r", 4096, recipe, overwrite=True)
        assert (tmp_path / "r").read_bytes() == bytes(4096)

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleece.block.file import FileNode
from fleece.errors import FleeceError
from fleece.formats.checking import check_image, open_for_check
from fleece.formats.qcow2.check import ALL, LEAKS, Current, check, read_damaged
from fleece.formats.qcow2.stored import pack, unpack
from tests.support.qcow2 import make


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.sampled_from([1, 2, 4, 8, 16, 32, 64]), st.binary(min_size=64, max_size=64))
def test_counts_of_every_width_survive_unpacking(width: int, data: bytes) -> None:
    counts = unpack(data, width)
    assert len(counts) == 64 * 8 // width
    assert int(counts.max()) < 1 << width
    assert pack(counts, width) == data


def test_counts_below_a_byte_begin_at_its_least_bit() -> None:
    """formats.md §1.3"""
    assert unpack(b"\x01\x80", 1).tolist() == [1] + [0] * 14 + [1]
    assert unpack(b"\x21", 4).tolist() == [1, 2]
    assert unpack(b"\1\2", 16).tolist() == [0x102]


def _check(path: Path, repair: str | None = None) -> tuple[int, int, int]:
    node, fmt = open_for_check(str(path), None, writable=repair is not None)
    try:
        result = check_image(node, fmt, repair=repair)
    finally:
        node.close()
    return result.corruptions, result.leaks, result.check_errors


def test_a_new_image_is_sound(tmp_path: Path) -> None:
    assert _check(make(tmp_path / "a.qcow2", 1 << 20)) == (0, 0, 0)


def test_a_sparse_file_of_many_tebibytes_takes_little_time_and_memory(tmp_path: Path) -> None:
    path = make(tmp_path / "a.qcow2", 1 << 20)
    os.truncate(path, 8 << 40)
    assert _check(path) == (0, 0, 0)
    assert _check(path, ALL) == (0, 0, 0)


def test_a_refcount_table_that_is_nowhere_is_made_anew(tmp_path: Path) -> None:
    path = make(tmp_path / "a.qcow2", 1 << 20)
    for place in (0, 513, 1 << 20, (1 << 64) - 1):
        with path.open("r+b") as file:
            file.seek(48)
            file.write(place.to_bytes(8, "big"))
        assert _check(path)[0] > 0
        assert _check(path, ALL) == (0, 0, 0)


def test_counts_that_are_gone_are_not_made_anew_to_free_leaks(tmp_path: Path) -> None:
    path = make(tmp_path / "a.qcow2", 1 << 20)
    with path.open("r+b") as file:
        file.seek(48)
        file.write(bytes(8))
    with pytest.raises(OSError, match="made anew"):
        _check(path, LEAKS)


def test_a_check_that_only_looks_writes_nothing(tmp_path: Path) -> None:
    path = make(tmp_path / "a.qcow2", 1 << 20)
    path.write_bytes(path.read_bytes() + bytes(65536))
    before = path.read_bytes()
    assert _check(path)[:2] == (0, 0)
    assert path.read_bytes() == before


def test_progress_ends_at_the_whole(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    file = FileNode(make(tmp_path / "a.qcow2", 1 << 30), read_only=True)
    try:
        header = read_damaged(Current(file))
        check(file, header, name="a", progress=lambda done, total: seen.append((done, total)))
    finally:
        file.close()
    assert seen
    assert all(0 <= done <= total for done, total in seen)


def test_an_unknown_feature_is_not_checked(tmp_path: Path) -> None:
    path = make(tmp_path / "a.qcow2", 1 << 20)
    with path.open("r+b") as file:
        file.seek(72)
        file.write((1 << 40).to_bytes(8, "big"))
    with pytest.raises(FleeceError, match="incompatible bit 40"):
        _check(path)


def test_counts_are_as_numpy_has_them() -> None:
    assert unpack(pack(np.arange(8, dtype=np.uint16), 16), 16).tolist() == list(range(8))

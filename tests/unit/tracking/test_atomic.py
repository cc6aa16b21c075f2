# SPDX-License-Identifier: Apache-2.0
import os
from pathlib import Path

import pytest

from fleece.tracking.atomic import file_stem, replace_file, temporary_of


def test_a_file_is_made_and_replaced_by_one_buffer_or_by_several(tmp_path: Path) -> None:
    path = tmp_path / "state"
    replace_file(path, b"one")
    assert path.read_bytes() == b"one"
    replace_file(path, [b"t", bytearray(b"w"), memoryview(b"o")], durable=False)
    assert path.read_bytes() == b"two"
    replace_file(path, [])
    assert path.read_bytes() == b""
    assert os.listdir(tmp_path) == ["state"]


def test_only_its_owner_may_read_it(tmp_path: Path) -> None:
    replace_file(tmp_path / "state", b"x")
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o600


def test_what_a_killed_writer_left_is_written_over(tmp_path: Path) -> None:
    path = tmp_path / "state"
    temporary_of(path).write_bytes(b"a long leftover")
    replace_file(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["state"]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "state"
    replace_file(path, b"old")

    def parts() -> object:
        yield b"ne"
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        replace_file(path, parts())  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["state"]


def test_a_link_in_the_place_of_the_temporary_file_is_not_followed(tmp_path: Path) -> None:
    path, victim = tmp_path / "state", tmp_path / "victim"
    victim.write_bytes(b"precious")
    temporary_of(path).symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"):
        replace_file(path, b"new")
    assert victim.read_bytes() == b"precious"


def test_any_name_becomes_a_file_name_that_is_short_enough_and_its_own() -> None:
    names = ["disk", "a/b", "a%2Fb", "ü" * 100, "ü" * 99 + "ö", "x" * 300]
    stems = [file_stem(name) for name in names]
    assert stems[0] == "disk"
    assert len(set(stems)) == len(names)
    assert all(len(stem.encode()) <= 200 and "/" not in stem for stem in stems)

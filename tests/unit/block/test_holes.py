import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fleece.block import holes as holes_module
from fleece.block.fallocate import PUNCH_HOLE, fallocate
from fleece.block.holes import HoleMap

MiB = 1 << 20
SIZE = 16 * MiB


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    number = os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT)
    os.pwrite(number, b"x" * SIZE, 0)
    yield number
    os.close(number)


@pytest.fixture
def seeks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Every question for a hole or data: (offset, whence)."""
    asked: list[tuple[int, int]] = []

    def lseek(fd: int, offset: int, whence: int) -> int:
        if whence != os.SEEK_END:
            asked.append((offset, whence))
        return os.lseek(fd, offset, whence)

    monkeypatch.setattr(holes_module, "lseek", lseek)
    return asked


def test_long_data_is_asked_for_once(fd: int, seeks: list[tuple[int, int]]) -> None:
    holes = HoleMap(fd)
    assert holes.walk(0, SIZE) == [(0, SIZE, True)]
    assert holes.walk(5 * MiB, MiB) == [(5 * MiB, 6 * MiB, True)]
    assert seeks == [(0, os.SEEK_HOLE)]


def test_a_punched_hole_is_seen_and_the_data_around_it_still_known(
    fd: int, seeks: list[tuple[int, int]]
) -> None:
    holes = HoleMap(fd)
    holes.walk(0, SIZE)
    fallocate(fd, PUNCH_HOLE, 4 * MiB, MiB)
    holes.punched(4 * MiB, 5 * MiB)
    seeks.clear()
    assert holes.walk(0, 4 * MiB) == [(0, 4 * MiB, True)]
    assert holes.walk(5 * MiB, MiB) == [(5 * MiB, 6 * MiB, True)]
    assert seeks == []
    assert (4 * MiB, 5 * MiB, False) in holes.walk(0, SIZE)


def test_an_answer_from_before_a_punch_is_not_remembered(
    fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel says "data", then another thread punches: a memory of that would be stale."""
    holes = HoleMap(fd)

    def lseek(fd: int, offset: int, whence: int) -> int:
        answer = os.lseek(fd, offset, whence)
        if whence == os.SEEK_HOLE and offset == 0 and answer == SIZE:
            fallocate(fd, PUNCH_HOLE, 0, SIZE)
            holes.punched(0, SIZE)
        return answer

    monkeypatch.setattr(holes_module, "lseek", lseek)
    assert holes.walk(0, SIZE) == [(0, SIZE, True)], "true when it was asked"
    assert holes.walk(0, SIZE) == [(0, SIZE, False)]


def test_a_file_that_changes_between_two_questions_counts_as_data(
    fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        holes_module,
        "lseek",
        lambda fd, offset, whence: SIZE if whence == os.SEEK_END else offset,
    )
    assert HoleMap(fd).walk(100, 5000) == [(100, 5100, True)]


def test_a_file_system_that_cannot_tell_has_data_only(
    fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lseek(fd: int, offset: int, whence: int) -> int:
        if whence != os.SEEK_END:
            raise OSError(22, "Invalid argument")
        return os.lseek(fd, offset, whence)

    monkeypatch.setattr(holes_module, "lseek", lseek)
    assert HoleMap(fd).walk(0, SIZE + 10) == [(0, SIZE, True), (SIZE, SIZE + 10, False)]


STEPS = st.lists(
    st.tuples(st.sampled_from(["write", "punch", "walk"]), st.integers(0, 63), st.integers(1, 40)),
    max_size=25,
)


def test_it_always_agrees_with_the_kernel(tmp_path: Path) -> None:
    unit, count = 256 << 10, 64  # remembered from 4 units on

    @settings(
        derandomize=True, deadline=None, max_examples=60, suppress_health_check=list(HealthCheck)
    )
    @given(steps=STEPS)
    def check(steps: list[tuple[str, int, int]]) -> None:
        with (tmp_path / "f").open("w+b") as file:
            fd = file.fileno()
            os.truncate(fd, unit * count)
            holes, data = HoleMap(fd), [False] * count
            for kind, first, length in steps:
                last = min(first + length, count)
                if kind == "write":
                    for index in range(first, last):
                        os.pwrite(fd, b"x" * unit, index * unit)
                elif kind == "punch":
                    fallocate(fd, PUNCH_HOLE, first * unit, (last - first) * unit)
                    holes.punched(first * unit, last * unit)
                if kind != "walk":
                    data[first:last] = [kind == "write"] * (last - first)
                found = holes.walk(first * unit, (last - first) * unit)
                assert flat(found, unit) == data[first:last]
            assert flat(holes.walk(0, unit * count), unit) == data

    check()


def flat(stretches: list[tuple[int, int, bool]], unit: int) -> list[bool]:
    """One bool for each unit; neighbours must differ."""
    assert all(a[1] == b[0] and a[2] != b[2] for a, b in pairwise(stretches))
    return [data for start, stop, data in stretches for _ in range(start, stop, unit)]

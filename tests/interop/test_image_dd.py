"""`fleece image dd` and `bench` beside qemu-img."""

import json
import re
from pathlib import Path

import pytest

from tests.support.imagetool import MiB, disk, fleece, ok, qemu

NAMES = ("ours", "theirs")


@pytest.mark.parametrize(
    "operands",
    [
        [],
        ["bs=64k", "count=3"],
        ["bs=100", "count=1"],
        ["bs=100", "count=7", "skip=3"],
        ["bs=1M", "skip=1"],
        ["count=0"],
        ["bs=1M", "count=99"],
        ["bs=1M", "skip=99"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_the_part_is_the_one_that_qemu_copies(
    tmp_path: Path, operands: list[str], fmt: str
) -> None:
    disk(tmp_path / "a.raw", 3 * MiB)
    for program, name in ((fleece, "ours"), (qemu, "theirs")):
        words = ["-f", "raw", "-O", fmt, "if=a.raw", f"of={name}", *operands]
        done = program("dd", *words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert ("cannot skip" in done.stderr) == ("skip=99" in operands)
    sizes = [json.loads(ok(qemu("info", "--output=json", n, cwd=tmp_path))) for n in NAMES]
    assert sizes[0]["virtual-size"] == sizes[1]["virtual-size"]
    ok(qemu("compare", "-f", fmt, "-F", fmt, "ours", "theirs", cwd=tmp_path))
    if fmt == "raw":
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize(
    "words",
    [
        ["if=a.raw"],
        ["if=a.raw", "of=b", "bs=0"],
        ["if=a.raw", "of=b", "count=a"],
        ["if=a.raw", "of=b", "foo=1"],
        ["if=missing", "of=b"],
        ["-O", "nosuch", "if=a.raw", "of=b"],
    ],
    ids=" ".join,
)
def test_what_qemu_refuses_is_refused(tmp_path: Path, words: list[str]) -> None:
    disk(tmp_path / "a.raw", MiB)
    one, other = (program("dd", *words, cwd=tmp_path) for program in (fleece, qemu))
    assert one.returncode == other.returncode == 1
    assert one.stderr.count("\n") == 1
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["-c", "20"],
        ["-c", "20", "-d", "3", "-s", "8k", "-S", "1M", "-o", "64k"],
        ["-w", "-c", "20", "-d", "2", "--pattern", "7", "--flush-interval", "4"],
        ["-w", "-c", "20", "-d", "2", "--flush-interval=4", "--no-drain"],
        ["-c", "0"],
    ],
    ids=" ".join,
)
def test_bench_says_what_qemu_says(tmp_path: Path, words: list[str]) -> None:
    told = []
    for program in (fleece, qemu):
        path = disk(tmp_path / "a.raw", 3 * MiB)
        done = program("bench", *words, "-f", "raw", path, cwd=tmp_path)
        told.append(re.sub(r"\d+\.\d+ sec", "N sec", ok(done)))
    assert told[0] == told[1]


def test_bench_writes_the_pattern(tmp_path: Path) -> None:
    path = tmp_path / "a.raw"
    path.write_bytes(bytes(MiB))
    ok(fleece("bench", "-w", "-c", "256", "--pattern", "7", "-f", "raw", path, cwd=tmp_path))
    assert path.read_bytes() == b"\7" * MiB


@pytest.mark.parametrize(
    "words",
    [
        ["--flush-interval=3", "-c", "3"],
        ["-w", "--flush-interval=1", "-d", "3"],
        ["-s", "8M", "-c", "3"],
        ["-d", "x"],
        ["-w", "--pattern=300"],
        ["-c", "-1"],
    ],
    ids=" ".join,
)
def test_bench_refuses_what_qemu_refuses(tmp_path: Path, words: list[str]) -> None:
    path = disk(tmp_path / "a.raw", MiB)
    done = [p("bench", *words, "-f", "raw", path, cwd=tmp_path) for p in (fleece, qemu)]
    assert [one.returncode for one in done] == [1, 1]
    assert done[0].stderr.count("\n") == 1

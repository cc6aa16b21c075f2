"""`fleece image resize` beside qemu-img."""

from pathlib import Path

import pytest

from tests.support.imagetool import MiB, clean, disk, fleece, ok, qemu, same
from tests.support.qcow2 import qemu_io


def _pair(directory: Path, fmt: str, options: str = "") -> list[Path]:
    """Two images alike, for each of the programs one."""
    disk(directory / "a.raw", 3 * MiB)
    words = ["-o", options] if options else []
    paths = [directory / "ours", directory / "theirs"]
    for path in paths:
        ok(qemu("convert", "-f", "raw", "-O", fmt, *words, "a.raw", path, cwd=directory))
    return paths


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
@pytest.mark.parametrize(
    "sizes", [["5M"], ["+1M", "+512"], ["3M"], ["1M", "4M"], ["-512k"], ["-1M", "+100M"]], ids=str
)
def test_the_disk_is_the_one_that_qemu_makes(tmp_path: Path, fmt: str, sizes: list[str]) -> None:
    ours, theirs = _pair(tmp_path, fmt)
    for size in sizes:
        done = fleece("resize", "--shrink", "-f", fmt, ours, size, cwd=tmp_path)
        words = ["--shrink", "-f", fmt, theirs, "--", size]
        assert ok(done) == ok(qemu("resize", *words, cwd=tmp_path)) == "Image resized.\n"
    if fmt == "qcow2":
        clean(ours)
    same(ours, theirs, fmt, fmt)


@pytest.mark.parametrize("mode", ["off", "metadata", "falloc", "full"])
@pytest.mark.parametrize("options", ["", "cluster_size=4k", "extended_l2=on", "compat=0.10"])
def test_preallocation(tmp_path: Path, mode: str, options: str) -> None:
    ours, theirs = _pair(tmp_path, "qcow2", options)
    words = ["-f", "qcow2", f"--preallocation={mode}"]
    ok(fleece("resize", *words, ours, "12M", cwd=tmp_path))
    ok(qemu("resize", *words, theirs, "12M", cwd=tmp_path))
    clean(ours)
    same(ours, theirs, "qcow2", "qcow2")
    qemu_io(ours, "write -P 3 2900k 5M", "read -P 3 2900k 5M")
    clean(ours)


def test_a_longer_backing_file_does_not_shine_through(tmp_path: Path) -> None:
    """formats.md §1.10"""
    (tmp_path / "base.raw").write_bytes(b"b" * (4 * MiB))
    for name in ("ours", "theirs"):
        words = ["-f", "qcow2", "-b", "base.raw", "-F", "raw", name, "1000k"]
        ok(qemu("create", "-q", *words, cwd=tmp_path))
    ok(fleece("resize", "-f", "qcow2", "ours", "6M", cwd=tmp_path))
    ok(qemu("resize", "-f", "qcow2", "theirs", "6M", cwd=tmp_path))
    clean(tmp_path / "ours")
    same(tmp_path / "ours", tmp_path / "theirs", "qcow2", "qcow2")


@pytest.mark.parametrize(
    "words",
    [
        ["-f", "raw", "a.raw", "1M"],
        ["-f", "raw", "--shrink", "a.raw", "0"],
        ["-f", "raw", "--shrink", "a.raw", "-5G"],
        ["-f", "raw", "a.raw", "abc"],
        ["-f", "raw", "--preallocation=metadata", "a.raw", "9M"],
        ["-f", "raw", "--preallocation=falloc", "--shrink", "a.raw", "1M"],
        ["-f", "qcow2", "ours", "1000"],
        ["-f", "qcow2", "ours", "+1000"],
        ["-f", "qcow2", "--preallocation=bad", "ours", "9M"],
        ["-f", "qcow2", "ours", "7E"],
        ["ours"],
        ["missing", "1M"],
    ],
    ids=" ".join,
)
def test_what_qemu_refuses_is_refused(tmp_path: Path, words: list[str]) -> None:
    _pair(tmp_path, "qcow2")
    before = [(tmp_path / name).read_bytes() for name in ("ours", "a.raw")]
    theirs = ["--" if word.startswith("-5") else word for word in words]
    ours = fleece("resize", *words, cwd=tmp_path)
    done = qemu("resize", *theirs, cwd=tmp_path)
    assert ours.returncode == done.returncode == 1
    assert ours.stderr.splitlines()[-1].startswith("fleece: ")
    assert [(tmp_path / name).read_bytes() for name in ("ours", "a.raw")] == before

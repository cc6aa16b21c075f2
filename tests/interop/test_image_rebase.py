"""`fleece image rebase` beside qemu-img."""

import random
from pathlib import Path

import pytest

from tests.support.imagetool import MiB, clean, disk, fleece, ok, qemu, same
from tests.support.qcow2 import qemu_io


def _overlays(directory: Path, options: str = "", size: str = "3M") -> list[Path]:
    """Two alike over old.raw, and new.raw, which differs from it here and there."""
    disk(directory / "old.raw", 2 * MiB)
    disk(directory / "new.raw", 4 * MiB, seed=2)
    rng = random.Random(3)
    old = (directory / "old.raw").read_bytes()
    with (directory / "new.raw").open("r+b") as file:
        for at in rng.sample(range(0, 2 * MiB, 65536), 12):
            file.seek(at)
            file.write(old[at : at + 65536])
    paths = [directory / "ours", directory / "theirs"]
    for path in paths:
        words = ["-o", options] if options else []
        words += ["-b", "old.raw", "-F", "raw", str(path), size]
        ok(qemu("create", "-q", "-f", "qcow2", *words, cwd=directory))
        qemu_io(path, "write -P 5 100k 70k", "write -z 1M 128k")
    return paths


@pytest.mark.parametrize("options", ["", "cluster_size=4k", "extended_l2=on", "compat=0.10"])
@pytest.mark.parametrize("size", ["3M", "1999k", "5M"])
def test_the_guest_sees_the_same_disk_over_the_new_file(
    tmp_path: Path, options: str, size: str
) -> None:
    ours, theirs = _overlays(tmp_path, options, size)
    ok(qemu("convert", "-f", "qcow2", "-O", "raw", ours, "before", cwd=tmp_path))
    for program, path in ((fleece, ours), (qemu, theirs)):
        words = ["-f", "qcow2", "-b", "new.raw", "-F", "raw", path]
        ok(program("rebase", *words, cwd=tmp_path))
    clean(ours)
    same(tmp_path / "before", ours, other="qcow2")
    assert "new.raw" in ok(qemu("info", ours, cwd=tmp_path))
    assert ours.stat().st_size <= theirs.stat().st_size + 65536 * 3


@pytest.mark.parametrize("size", ["3M", "1200k"])
def test_an_overlay_can_stand_alone_and_get_a_backing_file_again(tmp_path: Path, size: str) -> None:
    ours = _overlays(tmp_path, size=size)[0]
    ok(qemu("convert", "-f", "qcow2", "-O", "raw", ours, "before", cwd=tmp_path))
    ok(fleece("rebase", "-b", "", "-f", "qcow2", ours, cwd=tmp_path))
    assert "backing" not in ok(qemu("info", ours, cwd=tmp_path))
    clean(ours)
    same(tmp_path / "before", ours, other="qcow2")
    ok(fleece("rebase", "-p", "-b", "new.raw", "-F", "raw", "-f", "qcow2", ours, cwd=tmp_path))
    clean(ours)
    same(tmp_path / "before", ours, other="qcow2")


def test_unsafe_changes_the_name_and_nothing_else(tmp_path: Path) -> None:
    ours, theirs = _overlays(tmp_path)
    for program, path in ((fleece, ours), (qemu, theirs)):
        words = ["-u", "-f", "qcow2", "-b", "nowhere", "-F", "qcow2", path]
        ok(program("rebase", *words, cwd=tmp_path))
    assert ours.read_bytes() == theirs.read_bytes()
    ok(fleece("rebase", "-u", "-f", "qcow2", "-b", "", ours, cwd=tmp_path))
    assert "backing" not in ok(qemu("info", ours, cwd=tmp_path))


@pytest.mark.parametrize(
    "words",
    [
        ["-b", "new.raw", "ours"],
        ["ours"],
        ["-b", "missing", "-F", "raw", "ours"],
        ["-b", "new.raw", "-F", "qcow2", "ours"],
        ["-f", "raw", "-b", "new.raw", "-F", "raw", "old.raw"],
        ["-b", "new.raw", "-F", "raw", "missing"],
    ],
    ids=" ".join,
)
def test_what_qemu_refuses_is_refused(tmp_path: Path, words: list[str]) -> None:
    ours = _overlays(tmp_path)[0]
    before = ours.read_bytes()
    done = fleece("rebase", *words, cwd=tmp_path)
    assert ours.read_bytes() == before
    assert done.stderr.count("\n") == 1
    assert done.returncode == qemu("rebase", *words, cwd=tmp_path).returncode == 1

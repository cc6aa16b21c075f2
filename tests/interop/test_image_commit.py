"""`fleece image commit` beside qemu-img."""

import shutil
from pathlib import Path

import pytest

from tests.support.imagetool import MiB, clean, disk, fleece, ok, qemu, same
from tests.support.qcow2 import qemu_io


def _chain(directory: Path, base: str, options: str = "") -> Path:
    """top over mid over base, 3, 2 and 2 MiB."""
    directory.mkdir()
    disk(directory / "a.raw", 2 * MiB)
    ok(qemu("convert", "-f", "raw", "-O", base, "a.raw", "base", cwd=directory))
    words = ["-o", options] if options else []
    for name, below, fmt, size in (("mid", "base", base, "2M"), ("top", "mid", "qcow2", "3M")):
        more = ["-b", below, "-F", fmt, name, size]
        ok(qemu("create", "-q", "-f", "qcow2", *words, *more, cwd=directory))
    qemu_io(directory / "mid", "write -P 5 100k 300k", "write -P 6 1500k 200k")
    qemu_io(directory / "top", "write -P 7 200k 70k", "write -z 1M 128k", "write -P 8 2500k 10k")
    return directory


@pytest.mark.parametrize("base", ["raw", "qcow2"])
@pytest.mark.parametrize("options", ["", "cluster_size=4k", "extended_l2=on", "compat=0.10"])
@pytest.mark.parametrize("flags", [[], ["-d"], ["-b", "base"], ["-b", "mid", "-p"]], ids=str)
def test_the_layers_hold_what_they_hold_after_qemu(
    tmp_path: Path, base: str, options: str, flags: list[str]
) -> None:
    ours = _chain(tmp_path / "ours", base, options)
    theirs = tmp_path / "theirs"
    shutil.copytree(ours, theirs)
    before = tmp_path / "before"
    ok(qemu("convert", "-f", "qcow2", "-O", "raw", "top", before, cwd=ours))
    assert "Image committed.\n" in ok(fleece("commit", *flags, "-f", "qcow2", "top", cwd=ours))
    ok(qemu("commit", *flags, "-f", "qcow2", "top", cwd=theirs))
    for name, fmt in (("top", "qcow2"), ("mid", "qcow2"), ("base", base)):
        same(ours / name, theirs / name, fmt, fmt)
        if fmt == "qcow2":
            clean(ours / name)
    same(before, ours / "top", other="qcow2")
    emptied = (ours / "top").stat().st_size
    assert emptied <= (theirs / "top").stat().st_size + 65536


@pytest.mark.parametrize(
    "words",
    [["base"], ["-b", "missing", "top"], ["missing"], ["-b", "top", "top"], ["-f", "raw", "base"]],
    ids=" ".join,
)
def test_what_qemu_refuses_is_refused(tmp_path: Path, words: list[str]) -> None:
    ours = _chain(tmp_path / "ours", "qcow2")
    before = [(ours / name).read_bytes() for name in ("top", "mid", "base")]
    one, other = (program("commit", *words, cwd=ours) for program in (fleece, qemu))
    assert one.returncode == other.returncode == 1
    assert one.stderr.count("\n") == 1
    assert [(ours / name).read_bytes() for name in ("top", "mid", "base")] == before

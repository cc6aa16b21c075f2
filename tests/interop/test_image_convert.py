"""`fleece image convert` beside qemu-img: what one writes the other one reads."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fleece.formats.qcow2 import snapshots
from tests.support.imagetool import MiB, clean, disk, fleece, ok, qemu, same
from tests.support.peers import nbdkit, qemu_nbd
from tests.support.qcow2 import make, opened, qemu_img
from tests.support.threads import wait_until

TARGETS = [
    "",
    "cluster_size=512",
    "cluster_size=2M",
    "cluster_size=4k,compat=0.10",
    "extended_l2=on",
    "refcount_bits=1",
    "lazy_refcounts=on",
    "preallocation=metadata",
    "preallocation=full",
    "data_file=data.raw",
    "data_file=data.raw,data_file_raw=on",
]


@pytest.mark.parametrize("options", TARGETS)
@pytest.mark.parametrize("size", [3 * MiB, 1_000_001])
def test_raw_becomes_qcow2_and_raw_again(tmp_path: Path, options: str, size: int) -> None:
    source = disk(tmp_path / "a.raw", size)
    words = ["-o", options] if options else []
    ok(fleece("convert", "-f", "raw", "-O", "qcow2", *words, "a.raw", "b.qcow2", cwd=tmp_path))
    clean(tmp_path / "b.qcow2")
    same(source, tmp_path / "b.qcow2", other="qcow2")
    ok(fleece("convert", "-f", "qcow2", "b.qcow2", "c.raw", cwd=tmp_path))
    same(source, tmp_path / "c.raw")
    ok(qemu("convert", "-f", "raw", "a.raw", "q.raw", cwd=tmp_path))
    assert (tmp_path / "c.raw").read_bytes() == (tmp_path / "q.raw").read_bytes()


@pytest.mark.parametrize(
    "flags",
    [
        ["-c"],
        ["-c", "-o", "compression_type=zstd"],
        ["-c", "-o", "cluster_size=4k", "-m", "16"],
        ["-c", "-o", "extended_l2=on"],
        ["-c", "-W"],
        ["-W", "-m", "16"],
        ["-S", "0"],
        ["-S", "64k"],
        ["-r", "1G"],
        ["-t", "writeback"],
        ["-t", "none", "-p"],
        ["--dedup"],
        ["--dedup", "-c"],
        ["--dedup", "-o", "refcount_bits=1"],
        ["--dedup", "-o", "refcount_bits=2,cluster_size=4k"],
        ["--dedup", "-o", "extended_l2=on", "--dedup-memory", "1"],
    ],
    ids=" ".join,
)
def test_the_flags_change_the_form_and_not_the_disk(tmp_path: Path, flags: list[str]) -> None:
    source = disk(tmp_path / "a.raw", 5 * MiB)
    with source.open("r+b") as file:  # something to deduplicate
        part = file.read(MiB)
        file.seek(2 * MiB)
        file.write(part)
    ok(fleece("convert", "-O", "qcow2", *flags, "-f", "raw", "a.raw", "b.qcow2", cwd=tmp_path))
    clean(tmp_path / "b.qcow2")
    same(source, tmp_path / "b.qcow2", other="qcow2")


def test_our_compressed_image_is_about_as_small_as_theirs(tmp_path: Path) -> None:
    disk(tmp_path / "a.raw", 8 * MiB)
    ok(fleece("convert", "-c", "-O", "qcow2", "-f", "raw", "a.raw", "b.qcow2", cwd=tmp_path))
    ok(qemu("convert", "-c", "-O", "qcow2", "-f", "raw", "a.raw", "q.qcow2", cwd=tmp_path))
    sizes = [(tmp_path / name).stat().st_size for name in ("b.qcow2", "q.qcow2")]
    assert sizes[0] <= sizes[1] * 1.05 + 65536


def test_nothing_is_written_for_zeroes_as_with_qemu(tmp_path: Path) -> None:
    source = disk(tmp_path / "a.raw", 8 * MiB)
    for flags in ([], ["-S", "0"]):
        for name, tool in (("b.raw", fleece), ("q.raw", qemu)):
            ok(tool("convert", "-f", "raw", *flags, "a.raw", name, cwd=tmp_path))
        ours, theirs = ((tmp_path / name).stat().st_blocks for name in ("b.raw", "q.raw"))
        assert ours <= theirs + 64
        assert bool(flags) == (ours * 512 >= 8 * MiB)
        same(source, tmp_path / "b.raw")


def test_several_inputs_become_one_disk(tmp_path: Path) -> None:
    disk(tmp_path / "a.raw", MiB, 1)
    disk(tmp_path / "b.raw", 700_000, 2)
    disk(tmp_path / "c.raw", 512, 3)
    for name, tool in (("f.qcow2", fleece), ("q.qcow2", qemu)):
        words = ["-f", "raw", "-O", "qcow2", "a.raw", "b.raw", "c.raw", name]
        ok(tool("convert", *words, cwd=tmp_path))
    same(tmp_path / "f.qcow2", tmp_path / "q.qcow2", "qcow2", "qcow2")
    clean(tmp_path / "f.qcow2")


def test_a_chain_becomes_one_image_or_stays_an_overlay(tmp_path: Path) -> None:
    disk(tmp_path / "base.raw", 2 * MiB)
    make(tmp_path / "top.qcow2", 3 * MiB, backing="base.raw", backing_format="raw")
    qemu_img("info", tmp_path / "top.qcow2")
    from tests.support.qcow2 import qemu_io

    qemu_io(tmp_path / "top.qcow2", "write -P 7 100k 300k", "write -z 1M 128k")
    ok(fleece("convert", "-O", "qcow2", "top.qcow2", "flat.qcow2", cwd=tmp_path))
    same(tmp_path / "top.qcow2", tmp_path / "flat.qcow2", "qcow2", "qcow2")
    words = ["-O", "qcow2", "-B", "base.raw", "-F", "raw", "top.qcow2", "copy.qcow2"]
    ok(fleece("convert", *words, cwd=tmp_path))
    same(tmp_path / "top.qcow2", tmp_path / "copy.qcow2", "qcow2", "qcow2")
    clean(tmp_path / "copy.qcow2")
    assert (tmp_path / "copy.qcow2").stat().st_size < MiB


def test_a_snapshot_can_be_the_source(tmp_path: Path) -> None:
    disk(tmp_path / "a.raw", 2 * MiB)
    ok(qemu("convert", "-f", "raw", "-O", "qcow2", "a.raw", "b.qcow2", cwd=tmp_path))
    with opened(tmp_path / "b.qcow2") as node:
        snapshots.create(node, "then")
        node.pwrite(memoryview(b"now" * 5000), 70_000)
    for which in ("then", "snapshot.name=then", "snapshot.id=1"):
        ok(fleece("convert", "-l", which, "-O", "raw", "b.qcow2", "c.raw", cwd=tmp_path))
        same(tmp_path / "a.raw", tmp_path / "c.raw")


def test_an_encrypted_target_opens_with_its_passphrase(tmp_path: Path) -> None:
    source = disk(tmp_path / "a.raw", MiB)
    secret = ["--object", "secret,id=s,data=open sesame"]
    options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=20"
    words = ["-f", "raw", "-O", "qcow2", "-o", options, "a.raw", "b.qcow2"]
    ok(fleece("convert", *secret, *words, cwd=tmp_path))
    opts = "driver=qcow2,encrypt.key-secret=s,file.filename=b.qcow2"
    ok(qemu("check", *secret, "--image-opts", opts, cwd=tmp_path))
    ok(qemu("convert", *secret, "--image-opts", opts, "-O", "raw", "c.raw", cwd=tmp_path))
    same(source, tmp_path / "c.raw")


def test_nbd_on_both_sides(tmp_path: Path) -> None:
    source = disk(tmp_path / "a.raw", 4 * MiB)
    with qemu_nbd(source, tmp_path / "s") as uri:
        ok(fleece("convert", "-O", "qcow2", uri, "b.qcow2", cwd=tmp_path))
    same(source, tmp_path / "b.qcow2", other="qcow2")
    with nbdkit(tmp_path / "t", "memory", str(4 * MiB)) as uri:
        for flags in ([], ["-n"], ["-n", "-W", "--target-is-zero"]):
            ok(fleece("convert", *flags, "-O", "raw", "b.qcow2", uri, cwd=tmp_path))
        ok(qemu("convert", "-f", "raw", uri, "c.raw", cwd=tmp_path))
    same(source, tmp_path / "c.raw")


def test_bitmaps_are_copied(tmp_path: Path) -> None:
    disk(tmp_path / "a.raw", 2 * MiB)
    ok(qemu("convert", "-f", "raw", "-O", "qcow2", "a.raw", "b.qcow2", cwd=tmp_path))
    qemu_img("bitmap", "--add", tmp_path / "b.qcow2", "on")
    qemu_img("bitmap", "--add", "--disable", "-g", "4k", tmp_path / "b.qcow2", "off")
    from tests.support.qcow2 import qemu_io

    qemu_io(tmp_path / "b.qcow2", "write -P 1 1M 8k")
    for name, tool in (("f.qcow2", fleece), ("q.qcow2", qemu)):
        ok(tool("convert", "--bitmaps", "-O", "qcow2", "b.qcow2", name, cwd=tmp_path))
    clean(tmp_path / "f.qcow2")
    shown = [
        [line for line in ok(qemu("info", name, cwd=tmp_path)).splitlines() if "name" in line]
        for name in ("f.qcow2", "q.qcow2")
    ]
    assert len(shown[0]) == len(shown[1])
    with opened(tmp_path / "f.qcow2", read_only=True) as node:
        from fleece.formats.qcow2 import bitmaps

        assert list(bitmaps.find(node, "on").dirty_extents()) == [(MiB, 65536)]


@pytest.mark.parametrize(
    "words",
    [
        ["a.raw"],
        ["-O", "raw", "-c", "a.raw", "b"],
        ["-O", "nosuch", "a.raw", "b"],
        ["-S", "100", "a.raw", "b"],
        ["-m", "17", "a.raw", "b"],
        ["-t", "what", "a.raw", "b"],
        ["--target-is-zero", "a.raw", "b"],
        ["-n", "a.raw", "missing"],
        ["-n", "-f", "raw", "a.raw", "small"],
        ["-l", "nosuch", "a.raw", "b"],
        ["-O", "qcow2", "-B", "missing", "-F", "raw", "a.raw", "b"],
        ["-O", "qcow2", "-o", "cluster_size=3", "a.raw", "b"],
        ["missing", "b"],
        ["-f", "qcow2", "a.raw", "b"],
        ["-r", "x", "a.raw", "b"],
        ["--skip-broken-bitmaps", "a.raw", "b"],
        ["a.raw", "a.raw"],
    ],
    ids=" ".join,
)
def test_what_qemu_refuses_is_refused_in_one_line(tmp_path: Path, words: list[str]) -> None:
    disk(tmp_path / "a.raw", MiB)
    before = (tmp_path / "a.raw").read_bytes()
    (tmp_path / "small").write_bytes(bytes(1024))
    ours, theirs = (tool("convert", *words, cwd=tmp_path) for tool in (fleece, qemu))
    assert ours.returncode == theirs.returncode == 1
    assert ours.stderr.count("\n") == 1
    assert ours.stderr.startswith("fleece: ")
    assert (tmp_path / "a.raw").read_bytes() == before
    (tmp_path / "b").unlink(missing_ok=True)


def test_a_read_error_leaves_no_target_unless_it_is_salvaged(tmp_path: Path) -> None:
    source = disk(tmp_path / "a.raw", 4 * MiB)
    plugin = ["--filter=error", "file", str(source), "error-pread-rate=100%"]
    trigger = tmp_path / "broken"
    with nbdkit(tmp_path / "s", *plugin, f"error-file={trigger}") as uri:
        trigger.touch()
        done = fleece("convert", "-f", "raw", "-O", "qcow2", uri, "b.qcow2", cwd=tmp_path)
        assert done.returncode == 1
        assert "error while reading at byte " in done.stderr
        assert not (tmp_path / "b.qcow2").exists()
        words = ["--salvage", "-f", "raw", "-O", "qcow2", uri, "c.qcow2"]
        done = fleece("convert", *words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "error while reading offset" in done.stderr
    clean(tmp_path / "c.qcow2")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_copy_leaves_nothing_that_looks_whole(tmp_path: Path, number: int) -> None:
    disk(tmp_path / "a.raw", 64 * MiB)
    words = ["-r", "1M", "-f", "raw", "-S", "0", "-O", "qcow2", "a.raw", "b.qcow2"]
    command = [sys.executable, "-m", "fleece", "image", "convert", *words]
    target = tmp_path / "b.qcow2"
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs the tests in the background lets them ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        wait_until(lambda: target.exists() and target.stat().st_size > 2 * MiB)
        os.kill(process.pid, number)
        _, stderr = process.communicate(timeout=20)
        assert process.returncode == 130
    assert "Traceback" not in stderr
    assert not target.exists()


def test_what_was_deduplicated_can_be_written_by_qemu_and_by_us(tmp_path: Path) -> None:
    """formats.md §1.11: a write to one sharer leaves the others as they are."""
    data = os.urandom(MiB) * 4
    (tmp_path / "a.raw").write_bytes(data)
    words = ["--dedup", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4k", "a.raw", "b.qcow2"]
    ok(fleece("convert", *words, cwd=tmp_path))
    assert (tmp_path / "b.qcow2").stat().st_size < 2 * MiB
    model = bytearray(data)
    for number in range(4):
        with opened(tmp_path / "b.qcow2") as node:
            for at in (0, 5000, MiB // 2):
                text = bytes([number + 1]) * 6000
                node.pwrite(memoryview(text), number * MiB + at)
                model[number * MiB + at : number * MiB + at + 6000] = text
                node.flush()
                clean_now(tmp_path / "b.qcow2")
        clean(tmp_path / "b.qcow2")
        (tmp_path / "model").write_bytes(model)
        same(tmp_path / "model", tmp_path / "b.qcow2", other="qcow2")


def clean_now(path: Path) -> None:
    ok(qemu("check", "-U", "-f", "qcow2", path, cwd=path.parent))

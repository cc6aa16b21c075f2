"""``fleece image compare`` against ``qemu-img compare``, and the contents of the corpus."""

import subprocess
from itertools import pairwise
from pathlib import Path

import pytest

from tests.support.corpus import NAMES, OBJECT, Image
from tests.support.qcow2 import qemu_img, qemu_io
from tests.support.tools import require


def ours(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str]:
    from fleece.cli.main import main

    status = main(["image", "compare", *map(str, words)])
    return status, capsys.readouterr().out


def theirs(*words: str | Path) -> tuple[int, str]:
    command = [require("qemu-img"), "compare", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_every_image_holds_what_qemu_reads_from_it(
    name: str, corpus: dict[str, Image], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, raw = corpus[name], tmp_path / "expected.raw"
    qemu_img("convert", "-O", "raw", *image.arguments, raw)
    if not image.options:
        assert ours(capsys, "-F", "raw", *image.arguments, raw) == (0, "Images are identical.\n")
    else:
        target = f"driver=raw,file.filename={raw}"
        assert ours(capsys, *image.arguments, target) == (0, "Images are identical.\n")
    if raw.stat().st_size > 1 << 32 or not raw.stat().st_size:
        return
    with raw.open("r+b") as file:  # the control: one byte is seen
        file.seek(raw.stat().st_size - 1500)
        file.write(bytes([file.read(1)[0] ^ 1]))
    second = target if image.options else raw
    flags = [] if image.options else ["-F", "raw"]
    found = ours(capsys, *flags, *image.arguments, second)
    assert found == theirs(*flags, *image.arguments, second)
    assert found[0] == 1


def _pairs() -> list[tuple[str, str]]:
    names = ("v3", "v2", "extended", "raw-sparse", "chain", "nothing-written", "compressed")
    return [(a, b) for a in names for b in names]


@pytest.mark.parametrize("flags", [[], ["-s"], ["-q"], ["-p"], ["-p", "-s"]])
def test_the_texts_and_statuses_are_qemus(
    flags: list[str], corpus: dict[str, Image], capsys: pytest.CaptureFixture[str]
) -> None:
    """formats.md §11: exit 0 the same, 1 they differ."""
    for first, second in _pairs():
        if flags and {first, second} - {"v3", "raw-sparse", "v2"}:
            continue
        a, b = corpus[first], corpus[second]
        words = [*flags, "-f", a.fmt, "-F", b.fmt, a.path, b.path]
        expected, found = theirs(*words), ours(capsys, *words)
        if "-p" in flags:
            assert found[0] == expected[0]
            assert found[1].splitlines()[-1] in expected[1]
            assert "(100.00/100%)" in found[1] or expected[0]
        else:
            assert found == expected, (first, second)


def test_what_cannot_be_opened_is_2_and_what_cannot_be_read_is_4(
    corpus: dict[str, Image], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = corpus["compressed"].path
    words = [tmp_path / "none", good]
    assert ours(capsys, *words)[0] == theirs(*words)[0] == 2
    broken = tmp_path / "broken.qcow2"
    data = bytearray(good.read_bytes())
    at = data.index(_stream(data)) + 20
    data[at : at + 200] = b"\xff" * 200
    broken.write_bytes(data)
    raw = tmp_path / "expected.raw"
    qemu_img("convert", "-O", "raw", good, raw)
    words = ["-f", "qcow2", "-F", "raw", broken, raw]
    assert ours(capsys, *words)[0] == theirs(*words)[0] == 4


def _stream(data: bytearray) -> bytes:
    """The first bytes of the first compressed cluster."""
    l1 = int.from_bytes(data[40:48], "big")
    l2 = int.from_bytes(data[l1 : l1 + 8], "big") & 0x00FFFFFFFFFFFE00
    for at in range(l2, l2 + 65536, 8):
        entry = int.from_bytes(data[at : at + 8], "big")
        if entry >> 62 == 1:
            start = entry & ((1 << 54) - 1)
            return bytes(data[start : start + 32])
    raise AssertionError("there is no compressed cluster")


def test_an_allocation_that_cannot_be_found_out_is_3(
    corpus: dict[str, Image], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, broken = corpus["v3"].path, tmp_path / "broken.qcow2"
    data = bytearray(good.read_bytes())
    l1 = int.from_bytes(data[40:48], "big")
    l2 = int.from_bytes(data[l1 : l1 + 8], "big") & 0x00FFFFFFFFFFFE00
    data[l2 : l2 + 8] = ((1 << 63) | 0x50200).to_bytes(8, "big")
    broken.write_bytes(data)
    for flags in ([], ["-s"]):
        words = [*flags, "-f", "qcow2", "-F", "qcow2", broken, good]
        assert ours(capsys, *words)[0] == 3
    again = tmp_path / "again.qcow2"
    again.write_bytes(data)  # QEMU marks it corrupt
    assert theirs("-f", "qcow2", "-F", "qcow2", again, good)[0] == 3


def test_encrypted_images_are_compared_as_plain_text(
    corpus: dict[str, Image], capsys: pytest.CaptureFixture[str]
) -> None:
    plain = f"driver=qcow2,file.filename={corpus['v3'].path}"
    for name in ("luks", "aes"):
        words = [*OBJECT, "--image-opts", corpus[name].source, plain]
        assert ours(capsys, *words) == theirs(*words) == (0, "Images are identical.\n")


def test_holes_of_the_files_are_zeroes_and_what_is_written_into_them_is_seen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Clusters that are there without data are not read, so a byte in one must be found."""
    first, second = tmp_path / "first.qcow2", tmp_path / "second.qcow2"
    for path in (first, second):
        qemu_img("create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", path, "64M")
    assert ours(capsys, first, second) == (0, "Images are identical.\n")
    for offset in (64 << 20, 40 << 20, (10 << 20) + 70144, 0):
        at = max(0, offset - 512)
        qemu_io(second, f"write -P 7 {at} 512")
        found = ours(capsys, first, second)
        assert found == (1, f"Content mismatch at offset {at}!\n")
        assert found == theirs(first, second)


def test_a_long_chain_is_compared_as_it_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each layer has zeroes over data and data over zeroes of the one below."""
    names = [tmp_path / f"{number}.qcow2" for number in range(3)]
    qemu_img("create", "-q", "-f", "qcow2", names[0], "8M")
    qemu_io(names[0], "write -P 1 0 4M", "write -z 4M 1M")
    for below, path in pairwise(names):
        qemu_img("create", "-q", "-f", "qcow2", "-b", below, "-F", "qcow2", path, "12M")
        qemu_io(path, "write -z 1M 1M", "write -P 2 4500k 64k")
        qemu_io(path, "write -P 3 11M 64k", "discard 2M 1M")
    flat = tmp_path / "flat.raw"
    qemu_img("convert", "-O", "raw", names[-1], flat)
    assert ours(capsys, "-F", "raw", names[-1], flat) == (0, "Images are identical.\n")
    assert ours(capsys, names[-1], names[0]) == theirs(names[-1], names[0])
    assert ours(capsys, names[-1], names[1]) == theirs(names[-1], names[1])

"""``fleece image snapshot`` and ``qemu-img snapshot`` on the same images, in turns."""

import json
import subprocess
from pathlib import Path

import pytest

from fleece.cli.main import main
from tests.support.qcow2 import assert_clean, qemu_img, qemu_io
from tests.support.tools import require

Capture = pytest.CaptureFixture[str]


def fleece(capsys: Capture, *arguments: str | Path) -> tuple[int, str, str]:
    capsys.readouterr()
    status = main(["image", "snapshot", *map(str, arguments)])
    return status, *capsys.readouterr()


def theirs(*arguments: str | Path) -> int:
    command = [require("qemu-img"), "snapshot", *map(str, arguments)]
    return subprocess.run(command, capture_output=True).returncode


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "16M")
    qemu_io(path, "write -P 1 0 3M")
    return path


def saved(path: Path, name: str) -> bytes:
    out = path.with_suffix(".saved")
    qemu_img("convert", "-f", "qcow2", "-l", name, "-O", "raw", path, out)
    return out.read_bytes()


def test_the_list_is_qemus_to_the_byte(image: Path, capsys: Capture) -> None:
    qemu_img("snapshot", "-c", "theirs", image)
    assert fleece(capsys, "-c", "a rather long name, longer than its column", image)[0] == 0
    assert fleece(capsys, "-l", image) == (0, qemu_img("snapshot", "-l", image), "")
    assert fleece(capsys, image) == (0, qemu_img("snapshot", "-l", image), "")


def test_the_json_is_that_of_info(image: Path, capsys: Capture) -> None:
    qemu_img("snapshot", "-c", "one", image)
    fleece(capsys, "-c", "two", image)
    info = json.loads(qemu_img("info", "--output=json", image))
    for option in (["--json"], ["--output", "json"]):
        assert json.loads(fleece(capsys, "-l", *option, image)[1]) == info["snapshots"]


def test_each_reads_applies_and_deletes_what_the_other_made(image: Path, capsys: Capture) -> None:
    """formats.md §1.4, both ways."""
    first = saved_disk(image)
    assert fleece(capsys, "-c", "ours", image) == (0, "", "")
    qemu_io(image, "write -P 2 1M 4M")
    second = saved_disk(image)
    qemu_img("snapshot", "-c", "theirs", image)
    qemu_io(image, "write -P 3 0 16M")
    assert_clean(image)
    assert (saved(image, "ours"), saved(image, "theirs")) == (first, second)
    assert fleece(capsys, "-a", "theirs", image)[0] == 0
    assert_clean(image)
    assert saved_disk(image) == second
    qemu_img("snapshot", "-a", "ours", image)
    assert saved_disk(image) == first
    qemu_img("snapshot", "-d", "ours", image)
    assert fleece(capsys, "-d", "theirs", image)[0] == 0
    assert_clean(image)
    assert saved_disk(image) == first
    assert fleece(capsys, "-l", image) == (0, "", "")


def saved_disk(path: Path) -> bytes:
    out = path.with_suffix(".now")
    qemu_img("convert", "-f", "qcow2", "-O", "raw", path, out)
    return out.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["-d", "nope"], "Could not delete snapshot 'nope': "),
        (["-a", "nope"], "Could not apply snapshot 'nope': "),
        (["-l", "-c", "x"], "not allowed with argument"),
        (["-c"], "expected one argument"),
    ],
)
def test_errors_are_one_line_and_qemus_status(
    arguments: list[str], text: str, image: Path, capsys: Capture
) -> None:
    where = [] if arguments == ["-c"] else [image]
    status, out, error = fleece(capsys, *arguments, *where)
    assert (status, out) == (theirs(*arguments, *where), "")
    assert text in error
    assert error.count("\n") == 1


def test_refcounts_of_one_bit_are_refused_as_qemu_refuses_them(
    tmp_path: Path, capsys: Capture
) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "refcount_bits=1", path, "1M")
    qemu_io(path, "write 0 64k")
    before = path.read_bytes()
    status, _, error = fleece(capsys, "-c", "x", path)
    assert path.read_bytes()[: len(before)] == before
    assert_clean(path)
    assert (status, theirs("-c", "x", path)) == (1, 1)
    assert "1 bit refcounts" in error


def test_raw_disks_have_no_snapshots(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(1 << 20))
    opts = f"driver=raw,file.filename={path}"
    assert fleece(capsys, "-l", "--image-opts", opts) == (0, "", "")
    status, _, error = fleece(capsys, "-c", "x", "--image-opts", opts)
    assert (status, theirs("-c", "x", "--image-opts", opts)) == (1, 1)
    assert "only qcow2 images have internal snapshots" in error


def test_names_of_hostile_images_cannot_command_a_terminal(image: Path, capsys: Capture) -> None:
    qemu_img("snapshot", "-c", "\x1b[31mred", image)
    assert "\x1b" not in fleece(capsys, "-l", image)[1]

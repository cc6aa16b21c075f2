"""Persistent bitmaps between fleece and QEMU's tools, both ways."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fleece.cli.main import main
from fleece.formats.qcow2 import bitmaps
from tests.support.peers import qemu_nbd, running, wait_for_socket
from tests.support.qcow2 import assert_clean, make, opened, qemu_img, qemu_io
from tests.support.tools import require

Capture = pytest.CaptureFixture[str]
MiB = 1 << 20
SIZE = 16 * MiB


def fleece(capsys: Capture, *arguments: str | Path) -> tuple[int, str, str]:
    capsys.readouterr()
    status = main(["image", "bitmap", *map(str, arguments)])
    return status, *capsys.readouterr()


def theirs(*arguments: str | Path) -> int:
    command = [require("qemu-img"), "bitmap", *map(str, arguments)]
    return subprocess.run(command, capture_output=True).returncode


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, SIZE)
    return path


def info(path: Path) -> list[dict[str, Any]]:
    found = json.loads(qemu_img("info", "--output=json", path))
    return list(found["format-specific"]["data"].get("bitmaps", []))


def seen_by_qemu(path: Path, name: str) -> list[tuple[int, int]]:
    """What ``nbdinfo`` says is dirty on ``qemu-nbd -B``."""
    socket = path.with_suffix(".sock")
    with qemu_nbd(path, socket, "-r", "-B", name, fmt="qcow2") as uri:
        command = [require("nbdinfo"), "--json", f"--map=qemu:dirty-bitmap:{name}", uri]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [(e["offset"], e["length"]) for e in json.loads(out) if e["type"] == 1]


def seen_by_us(path: Path, name: str) -> list[tuple[int, int]]:
    with opened(path, read_only=True) as node:
        return list(bitmaps.find(node, name).dirty_extents())


@pytest.mark.parametrize("cluster", [512, 4096, 65536])
@pytest.mark.parametrize("granularity", [512, 65536])
def test_what_we_record_is_what_qemu_shows(cluster: int, granularity: int, tmp_path: Path) -> None:
    path = make(tmp_path / "disk.qcow2", SIZE + 512, cluster_size=cluster)
    with opened(path) as node:
        bitmaps.add(node, "b0", granularity=granularity)
        for offset in (0, 5000, 3 * MiB, SIZE + 500):
            node.pwrite(memoryview(b"x" * 7), offset)
        node.zero(7 * MiB, 5 * MiB)
        bitmaps.disable(node, "b0")
    assert_clean(path)
    found = seen_by_us(path, "b0")
    assert found == seen_by_qemu(path, "b0")
    assert sum(length for _, length in found) >= 5 * MiB
    with opened(path) as node:
        node.pwrite(memoryview(b"x"), 0)  # stored once more, from what was stored
        bitmaps.enable(node, "b0")
        node.pwrite(memoryview(b"x"), 14 * MiB)
        bitmaps.disable(node, "b0")
    assert_clean(path)
    assert seen_by_us(path, "b0") == seen_by_qemu(path, "b0") == [*found[:-1], *added(found)]


def added(found: list[tuple[int, int]]) -> list[tuple[int, int]]:
    granule = 512 if found[0][1] < 65536 else 65536
    return [(14 * MiB, granule), found[-1]]


def test_all_dirty_is_all_dirty_to_qemu(image: Path) -> None:
    with opened(image) as node:
        bitmaps.add(node, "b0", enabled=False)
        bitmaps.find(node, "b0").mark(0, SIZE)
        bitmaps.find(node, "b0")
        bitmaps.enable(node, "b0", enabled=False)
    assert seen_by_qemu(image, "b0") == [(0, SIZE)]


def test_qemu_records_in_our_bitmap_and_we_in_what_it_left(image: Path, capsys: Capture) -> None:
    assert fleece(capsys, "--add", "-g", "64k", image, "b0") == (0, "", "")
    qemu_io(image, "write 1M 128k", "write -z 5M 64k")
    assert seen_by_us(image, "b0") == [(MiB, 131072), (5 * MiB, 65536)]
    with opened(image) as node:
        node.pwrite(memoryview(b"x"), 9 * MiB)
    qemu_io(image, "write 10M 1")
    assert_clean(image)
    expected = [(MiB, 131072), (5 * MiB, 65536), (9 * MiB, 65536), (10 * MiB, 65536)]
    assert seen_by_us(image, "b0") == expected
    qemu_img("bitmap", "--disable", image, "b0")
    assert seen_by_qemu(image, "b0") == expected


def test_each_shows_the_flags_and_granularity_of_the_other(image: Path, capsys: Capture) -> None:
    fleece(capsys, "--add", image, "ours")
    fleece(capsys, "--add", "--disable", "-g", "1M", image, "off")
    qemu_img("bitmap", "--add", "-g", "4k", image, "theirs")
    expected = [
        {"name": "ours", "granularity": 65536, "flags": ["auto"]},
        {"name": "off", "granularity": MiB, "flags": []},
        {"name": "theirs", "granularity": 4096, "flags": ["auto"]},
    ]
    assert sorted(info(image), key=lambda b: b["granularity"]) == sorted(
        expected, key=lambda b: int(str(b["granularity"]))
    )
    assert json.loads(fleece(capsys, "--enable", "--json", image, "off")[1]) == {
        "name": "off", "granularity": MiB, "flags": ["auto"],
    }  # fmt: skip
    assert fleece(capsys, "--clear", "--disable", image, "theirs")[0] == 0
    assert {b["name"]: b["flags"] for b in info(image)}["theirs"] == []
    assert_clean(image)


def test_while_we_write_qemu_calls_it_in_use_and_after_a_crash_inconsistent(
    image: Path, capsys: Capture, tmp_path: Path
) -> None:
    qemu_img("bitmap", "--add", image, "b0")
    crashed = tmp_path / "crashed.qcow2"
    with opened(image) as node:
        node.pwrite(memoryview(b"x"), 0)
        node.flush()
        crashed.write_bytes(image.read_bytes())
    assert info(image)[0]["flags"] == ["auto"]
    assert info(crashed)[0]["flags"] == ["in-use", "auto"]
    for verb in ("--clear", "--enable", "--disable", "--add"):
        status, _, error = fleece(capsys, verb, crashed, "b0")
        assert status == theirs(verb, crashed, "b0") == 1
        assert f"Operation {verb[2:]} on bitmap b0 failed: Bitmap " in error
    assert theirs("--merge", "b0", crashed, "b0") == 1
    assert fleece(capsys, "--merge", "b0", crashed, "b0")[0] == 1
    assert fleece(capsys, "--remove", crashed, "b0") == (0, "", "")
    assert info(crashed) == []
    assert_clean(crashed)


def test_a_merge_from_another_image_is_qemus(image: Path, tmp_path: Path, capsys: Capture) -> None:
    other = tmp_path / "other.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", other, SIZE)
    qemu_img("bitmap", "--add", "-g", "4k", other, "source")
    qemu_io(other, "write 100k 1k", "write 3M 1M")
    copy = tmp_path / "copy.qcow2"
    copy.write_bytes(image.read_bytes())
    words = ["--add", "--disable", "--merge", "source", "-b", other, "-F", "qcow2"]
    assert fleece(capsys, *words, image, "all")[0] == 0
    assert theirs(*words, copy, "all") == 0
    assert seen_by_qemu(image, "all") == seen_by_us(copy, "all") == [
        (65536, 65536), (3 * MiB, MiB),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "arguments",
    [
        ["--add", "-g", "3000", "IMAGE", "b1"],
        ["--add", "IMAGE", "b0"],
        ["--add", "IMAGE", ""],
        ["--add", "IMAGE", "n" * 1024],
        ["--remove", "IMAGE", "zz"],
        ["--merge", "zz", "IMAGE", "b0"],
        ["IMAGE", "b0"],
        ["--add", "IMAGE"],
        ["--clear", "-g", "64k", "IMAGE", "b0"],
        ["--add", "-F", "qcow2", "IMAGE", "b1"],
        ["--clear", "-b", "IMAGE", "IMAGE", "b0"],
    ],
    ids=" ".join,
)
def test_errors_are_one_line_and_qemus_status(
    arguments: list[str], image: Path, capsys: Capture
) -> None:
    qemu_img("bitmap", "--add", image, "b0")
    before = image.read_bytes()
    words = [str(image) if word == "IMAGE" else word for word in arguments]
    status, out, error = fleece(capsys, *words)
    assert image.read_bytes() == before
    assert (status, out) == (theirs(*words), "")
    assert status == 1
    assert error.count("\n") == 1


def test_a_bitmap_of_the_storage_daemon_is_read(image: Path, tmp_path: Path) -> None:
    """Added over QMP as persistent, written over NBD, stored when the daemon ends."""
    nbd, qmp = tmp_path / "nbd.sock", tmp_path / "qmp.sock"
    command = [
        require("qemu-storage-daemon"),
        "--blockdev", f"driver=qcow2,node-name=d,file.driver=file,file.filename={image}",
        "--nbd-server", f"addr.type=unix,addr.path={nbd}",
        "--export", "type=nbd,id=e,node-name=d,writable=on",
        "--chardev", f"socket,path={qmp},server=on,wait=off,id=c",
        "--monitor", "chardev=c",
    ]  # fmt: skip
    with running(command) as process:
        wait_for_socket(nbd, process)
        wait_for_socket(qmp, process)
        ask(qmp, "block-dirty-bitmap-add", node="d", name="live", persistent=True, granularity=4096)
        uri = f"nbd+unix:///d?socket={nbd}"
        command = [require("qemu-io"), "-f", "raw", "-c", "write 2M 6k", uri]
        subprocess.run(command, capture_output=True, check=True)
    assert seen_by_us(image, "live") == [(2 * MiB, 8192)]


def ask(socket_path: Path, command: str, **arguments: Any) -> None:
    """One QMP command, which must succeed."""
    import socket

    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(10)
        sock.connect(str(socket_path))
        with sock.makefile("rw") as stream:
            stream.readline()
            for name, values in (("qmp_capabilities", {}), (command, arguments)):
                stream.write(json.dumps({"execute": name, "arguments": values}) + "\n")
                stream.flush()
                assert "return" in json.loads(stream.readline())

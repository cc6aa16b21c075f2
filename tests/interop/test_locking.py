"""We and QEMU keep out of each other's images, in both directions, with QEMU's own lock scheme."""

import subprocess
from contextlib import closing
from pathlib import Path

import pytest

from fleece.block.file import FileNode
from fleece.errors import ImageInUse
from tests.support.peers import qemu_nbd
from tests.support.tools import require

SIZE = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(SIZE))
    return path


def qemu(*command: str | Path) -> subprocess.CompletedProcess[str]:
    program, *arguments = (str(word) for word in command)
    return subprocess.run([require(program), *arguments], capture_output=True, text=True)


def qemu_io(image: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return qemu("qemu-io", *options, "-f", "raw", "-c", "read 0 512", image)


def assert_locked_out(result: subprocess.CompletedProcess[str]) -> None:
    assert result.returncode != 0
    assert " lock" in result.stderr, result.stderr


@pytest.fixture
def qcow2(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    assert qemu("qemu-img", "create", "-q", "-f", "qcow2", path, "1M").returncode == 0
    return path


def test_qemu_does_not_write_what_we_write(image: Path) -> None:
    with closing(FileNode(image)):
        assert_locked_out(qemu_io(image))
    assert qemu_io(image).returncode == 0, "the lock ends with the node"


def test_qemu_nbd_refuses_what_we_write_even_to_read_it(image: Path, tmp_path: Path) -> None:
    with closing(FileNode(image)):
        for options in ([], ["-r"]):
            command = ["qemu-nbd", *options, "-f", "raw", "-k", tmp_path / "s", image]
            assert_locked_out(qemu(*command))


def test_qemu_img_does_not_write_what_we_write(image: Path, tmp_path: Path) -> None:
    source = tmp_path / "source.raw"
    source.write_bytes(b"x" * SIZE)
    write = ["qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", source, image]
    with closing(FileNode(image)):
        assert_locked_out(qemu(*write))
        assert_locked_out(qemu("qemu-img", "resize", "-f", "raw", image, "2M"))
    assert image.read_bytes() == bytes(SIZE)
    assert qemu(*write).returncode == 0


def test_qemu_img_does_not_open_a_qcow2_file_that_we_write(qcow2: Path) -> None:
    with closing(FileNode(qcow2)):
        assert_locked_out(qemu("qemu-img", "info", qcow2))
        assert qemu("qemu-img", "info", "-U", qcow2).returncode == 0
    assert qemu("qemu-img", "info", qcow2).returncode == 0


def test_qemu_reads_what_we_only_read_but_does_not_write_it(image: Path, tmp_path: Path) -> None:
    with closing(FileNode(image, read_only=True)):
        assert qemu_io(image, "-r").returncode == 0
        copy = qemu("qemu-img", "convert", "-f", "raw", "-O", "raw", image, tmp_path / "copy")
        assert copy.returncode == 0, copy.stderr
        assert_locked_out(qemu_io(image))


def test_without_locking_nobody_is_kept_out(image: Path) -> None:
    with closing(FileNode(image, locking=False)):
        assert qemu_io(image).returncode == 0


@pytest.mark.parametrize("read_only", [False, True])
def test_we_refuse_what_qemu_nbd_writes(image: Path, tmp_path: Path, read_only: bool) -> None:
    with qemu_nbd(image, tmp_path / "s"):
        with pytest.raises(ImageInUse, match=r"in use by another process .it holds a write lock"):
            FileNode(image, read_only=read_only)
        FileNode(image, read_only=read_only, locking=False).close()
    FileNode(image, read_only=read_only).close()


@pytest.mark.parametrize("read_only", [False, True])
def test_we_refuse_a_qcow2_file_that_qemu_writes(
    qcow2: Path, tmp_path: Path, read_only: bool
) -> None:
    with qemu_nbd(qcow2, tmp_path / "s", fmt="qcow2"), pytest.raises(ImageInUse):
        FileNode(qcow2, read_only=read_only)


def test_we_read_but_do_not_write_what_qemu_only_reads(qcow2: Path, tmp_path: Path) -> None:
    with qemu_nbd(qcow2, tmp_path / "s", "-r", fmt="qcow2"):
        FileNode(qcow2, read_only=True).close()
        with pytest.raises(ImageInUse, match=r"excludes writers.*open the image read-only"):
            FileNode(qcow2)

import errno
import fcntl
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from fleece.block.file import FileNode
from fleece.block.locks import lock_image
from fleece.errors import ImageError, ImageInUse


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(4096))
    return path


@pytest.fixture
def fd(image: Path) -> Iterator[int]:
    number = os.open(image, os.O_RDWR)
    yield number
    os.close(number)


def test_a_second_writer_is_refused_and_told_what_to_do(image: Path) -> None:
    with closing(FileNode(image)), pytest.raises(ImageInUse) as caught:
        FileNode(image)
    assert str(caught.value) == (
        f"image {image} is in use by another process (it holds a write lock); "
        "stop that program, or read a snapshot that it exports"
    )


def test_a_reader_does_not_read_what_is_being_written(image: Path) -> None:
    with closing(FileNode(image)), pytest.raises(ImageInUse, match="holds a write lock"):
        FileNode(image, read_only=True)


def test_several_may_read_and_none_of_them_lets_a_writer_in(image: Path) -> None:
    with (
        closing(FileNode(image, read_only=True)),
        closing(FileNode(image, read_only=True)),
        pytest.raises(ImageInUse, match="open the image read-only"),
    ):
        FileNode(image)
    FileNode(image).close()


def test_a_refused_one_leaves_no_lock_behind(image: Path, fd: int) -> None:
    with closing(FileNode(image)), pytest.raises(ImageInUse):
        lock_image(fd, str(image), write=True)
    FileNode(image).close()  # fd is still open


def test_the_lock_dies_with_a_killed_process(image: Path) -> None:
    code = (
        "import sys; from fleece.block.file import FileNode; n = FileNode(sys.argv[1]);"
        "print('open', flush=True); sys.stdin.read()"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", code, str(image)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"open\n"
        with pytest.raises(ImageInUse):
            FileNode(image)
        process.kill()
    FileNode(image).close()


def failing_with(number: int) -> object:
    def fail(*_: object) -> bytes:
        raise OSError(number, os.strerror(number))

    return fail


def test_a_file_system_without_locks_is_logged_and_used(
    image: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fcntl, "fcntl", failing_with(errno.ENOLCK))
    with caplog.at_level(logging.WARNING):
        FileNode(image).close()
    assert "goes unlocked" in caplog.text


def test_any_other_failure_to_lock_is_an_error(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "fcntl", failing_with(errno.EIO))
    with pytest.raises(ImageError, match="cannot lock image"):
        FileNode(image)

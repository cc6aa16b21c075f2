"""Which files an image may make us open, and how a format is guessed."""

import errno
import os
from pathlib import Path

import pytest

from fleece.errors import (
    FleeceError,
    ImageCorrupt,
    ImageError,
    NotFound,
    UnsupportedFeature,
    UsageError,
)
from fleece.formats import open_image, probe
from fleece.formats.qcow2.constants import MAX_CHAIN_DEPTH
from tests.support.qcow2 import make, pread

SIZE = 1 << 20


def image(path: Path, backing: str, fmt: str = "raw") -> Path:
    return make(path, SIZE, backing=backing, backing_format=fmt)


def refuse(path: Path, kind: type[FleeceError], text: str, **options: str) -> None:
    open_files = os.listdir("/proc/self/fd")
    with pytest.raises(kind, match=text) as caught:
        open_image(path, "qcow2", **options)
    assert "\n" not in str(caught.value)
    assert len(os.listdir("/proc/self/fd")) == len(open_files), "a file was left open"


def test_a_backing_file_beside_or_below_the_image_is_followed(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/base").write_bytes(b"\5" * SIZE)
    for number, name in enumerate(["sub/base", str(tmp_path / "sub/base"), "./sub/../sub/base"]):
        node = open_image(image(tmp_path / f"{number}.qcow2", name), "qcow2")
        assert pread(node, 100, SIZE - 100) == b"\5" * 100
        node.close()


def test_names_are_relative_to_the_image_that_has_them(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/base").write_bytes(b"\6" * SIZE)
    image(tmp_path / "sub/middle.qcow2", "base")
    node = open_image(image(tmp_path / "top.qcow2", "sub/middle.qcow2", "qcow2"))
    assert pread(node, 100, 0) == b"\6" * 100
    node.close()


def test_a_backing_file_elsewhere_is_followed_only_if_that_is_allowed(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "secret").write_bytes(b"\7" * SIZE)
    (home / "link").symlink_to(tmp_path / "secret")
    for number, name in enumerate(["../secret", str(tmp_path / "secret"), "link"]):
        path = image(home / f"{number}.qcow2", name)
        refuse(path, ImageError, "lies outside of")
        refuse(path, ImageError, "not allowed", backing="none")
        node = open_image(path, backing="any-local")
        assert pread(node, 10, 0) == b"\7" * 10
        node.close()


@pytest.mark.parametrize(
    "name", ["json:{}", "nbd:localhost:10809", "file:base", "nbd+unix:///x?socket=/s", "fat:/etc"]
)
def test_a_name_that_is_no_path_is_never_followed(name: str, tmp_path: Path) -> None:
    path = tmp_path / "top.qcow2"
    image(path, "x" * len(name))
    path.write_bytes(path.read_bytes().replace(b"x" * len(name), name.encode()))
    (tmp_path / name.split("/")[0]).touch()
    refuse(path, ImageError, "not a plain path", backing="any-local")


def test_what_is_no_regular_file_is_never_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    refuse(image(tmp_path / "a.qcow2", "fifo"), ImageError, "not a regular file")
    refuse(image(tmp_path / "b.qcow2", "."), ImageError, "not a regular file")
    device = image(tmp_path / "c.qcow2", "/dev/null")
    refuse(device, ImageError, "not a regular file", backing="any-local")
    refuse(image(tmp_path / "d.qcow2", "missing"), NotFound, "does not exist")


def test_a_backing_file_without_a_format_is_not_guessed(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(b"QFI\xfb")
    path = image(tmp_path / "top.qcow2", "base")
    data = bytearray(path.read_bytes())
    at = data.index((0xE2792ACA).to_bytes(4, "big"))
    data[at : at + 4] = b"\1\2\3\4"
    path.write_bytes(data)
    refuse(path, ImageError, "without a format")
    refuse(image(tmp_path / "b.qcow2", "base", "vmdk"), UnsupportedFeature, "'vmdk'")


def test_a_chain_that_comes_back_to_a_file_is_refused(tmp_path: Path) -> None:
    image(tmp_path / "a.qcow2", "b.qcow2", "qcow2")
    image(tmp_path / "b.qcow2", "a.qcow2", "qcow2")
    node_kinds = (FleeceError, "comes back|in use")
    refuse(tmp_path / "a.qcow2", *node_kinds)
    image(tmp_path / "self.qcow2", "self.qcow2", "qcow2")
    with pytest.raises(ImageCorrupt, match="comes back"):
        open_image(tmp_path / "self.qcow2", read_only=True)


def test_a_chain_may_be_long_but_not_endless(tmp_path: Path) -> None:
    (tmp_path / "0").write_bytes(b"\3" * SIZE)
    for number in range(1, MAX_CHAIN_DEPTH + 1):
        fmt = "qcow2" if number > 1 else "raw"
        image(tmp_path / str(number), str(number - 1), fmt)
    node = open_image(tmp_path / str(MAX_CHAIN_DEPTH - 1), "qcow2")
    assert pread(node, SIZE, 0) == b"\3" * SIZE
    assert node.extents(0, SIZE)[0].length == SIZE
    assert node.map(0, SIZE)[0][2] == SIZE
    node.prefetch(0, SIZE)
    node.close()
    refuse(tmp_path / str(MAX_CHAIN_DEPTH), ImageError, "more than")


def test_a_format_is_guessed_by_its_magic(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(b"\0" * 4096)
    (tmp_path / "empty").touch()
    assert probe(tmp_path / "raw") == "raw"
    assert probe(tmp_path / "empty") == "raw"
    assert probe(make(tmp_path / "q", SIZE)) == "qcow2"
    with pytest.raises(NotFound):
        probe(tmp_path / "none")


def test_an_unknown_format_or_policy_is_refused(tmp_path: Path) -> None:
    path = make(tmp_path / "q", SIZE)
    with pytest.raises(UnsupportedFeature, match="'vmdk'"):
        open_image(path, "vmdk")
    with pytest.raises(UsageError, match="'all'"):
        open_image(path, backing="all")


def test_a_guessed_raw_disk_cannot_be_made_another_format_by_its_user(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"\0" * 4096)
    node = open_image(path)
    node.pwrite(memoryview(b"QFI"), 0)
    for data, offset in [(b"QFI\xfb" + bytes(508), 0), (b"\xfb", 3), (b"I\xfb", 2)]:
        with pytest.raises(OSError, match="qcow2") as caught:
            node.pwrite(memoryview(data), offset)
        assert caught.value.errno == errno.EPERM
    node.pwrite(memoryview(b"QFI\xfb"), 4)
    node.pwrite(memoryview(b"\xfa"), 3)
    node.close()
    assert path.read_bytes()[:8] == b"QFI\xfaQFI\xfb"
    node = open_image(path, "raw")
    node.pwrite(memoryview(b"QFI\xfb"), 0)
    node.close()


def test_a_raw_disk_is_the_file_without_a_hop(tmp_path: Path) -> None:
    from fleece.block.file import FileNode

    path = tmp_path / "disk"
    path.write_bytes(b"\0" * 4096)
    node = open_image(path, "raw")
    assert type(node) is FileNode
    node.close()


def test_the_formats_are_imported_without_numpy() -> None:
    import subprocess
    import sys

    script = "import sys, fleece.formats; sys.exit('numpy' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", script], env=env).returncode == 0

"""Images over the feature matrix, made by the real qemu-img and qemu-io.

`build(directory)` makes them all (some 3 s) and returns them by name; the fixture ``corpus`` of
tests/interop/conftest.py does it once for a session. The images are small and must not be changed:
a test that writes copies first. `NAMES` is there without building anything, to parametrise with.

An `Image` has ``source``: what to give to a program as its filename; with ``options`` it is one of
--image-opts (an encrypted image, whose secret is `OBJECT`). ``feature`` says why it is there.
"""

import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests.support.qcow2 import qemu_img
from tests.support.tools import require

OBJECT = ("--object", "secret,id=sec0,data=geheim")
MIB = 1 << 20


class Image(NamedTuple):
    name: str
    path: Path
    source: str
    fmt: str
    options: bool = False

    @property
    def arguments(self) -> list[str]:
        """``[flags..., source]`` for qemu-img and for us alike."""
        if self.options:
            return [*OBJECT, "--image-opts", self.source]
        return ["-f", self.fmt, self.source]


Maker = Callable[[Path], Path | Image]
_MAKERS: dict[str, Maker] = {}


def _io(path: Path, *commands: str, fmt: str = "qcow2", ok: bool = True) -> None:
    words = [word for command in commands for word in ("-c", command)]
    done = subprocess.run(
        [require("qemu-io"), "-f", fmt, *words, str(path)], capture_output=True, text=True
    )
    assert not ok or done.returncode == 0, done.stdout + done.stderr


def _create(path: Path, *options: str, size: str = "4M", extra: tuple[str, ...] = ()) -> Path:
    wanted = ("-o", ",".join(options)) if options else ()
    qemu_img("create", "-q", "-f", "qcow2", *extra, *wanted, path, size)
    return path


_WRITES = (
    "write -P 1 0 70000",
    "write -P 2 1M 256k",
    "write -z 1088k 64k",
    "write -P 3 3000k 4k",
    "discard 1152k 64k",
)


def _plain(*options: str) -> Maker:
    def make(directory: Path) -> Path:
        path = _create(directory / "image.qcow2", *options)
        _io(path, *_WRITES)
        return path

    return make


for _name, _options in {
    "v2": ("compat=0.10",),
    "v3": ("compat=1.1",),
    "cluster-512": ("cluster_size=512",),
    "cluster-4k": ("cluster_size=4k",),
    "cluster-2m": ("cluster_size=2M",),
    "refcount-1": ("refcount_bits=1",),
    "refcount-8": ("refcount_bits=8",),
    "refcount-64": ("refcount_bits=64",),
    "lazy": ("lazy_refcounts=on",),
    "extended": ("extended_l2=on",),
    "extended-16k": ("extended_l2=on,cluster_size=16k",),
    "zstd": ("compression_type=zstd",),
    "preallocated-metadata": ("preallocation=metadata",),
    "preallocated-falloc": ("preallocation=falloc",),
    "preallocated-full": ("preallocation=full",),
}.items():
    _MAKERS[_name] = _plain(*_options)


def _maker(name: str) -> Callable[[Maker], Maker]:
    def add(function: Maker) -> Maker:
        _MAKERS[name] = function
        return function

    return add


def _raw(path: Path) -> Image:
    return Image("", path, str(path), "raw")


@_maker("raw-sparse")
def _raw_sparse(directory: Path) -> Image:
    path = directory / "image.raw"
    qemu_img("create", "-q", "-f", "raw", path, "4M")
    _io(path, "write -P 7 1M 64k", "write -P 8 3M 4k", fmt="raw")
    return _raw(path)


@_maker("raw-odd-size")
def _raw_odd(directory: Path) -> Image:
    path = directory / "image.raw"
    path.write_bytes(b"x" * 70_001)
    return _raw(path)


@_maker("raw-empty")
def _raw_empty(directory: Path) -> Image:
    path = directory / "image.raw"
    path.touch()
    return _raw(path)


@_maker("nothing-written")
def _nothing(directory: Path) -> Path:
    return _create(directory / "image.qcow2", size="1T")


def _compressed(*options: str) -> Maker:
    def make(directory: Path) -> Path:
        source = directory / "source.raw"
        source.write_bytes((b"compress me " * 6000)[:65536] * 20 + bytes(MIB) + b"tail" * 999)
        path = directory / "image.qcow2"
        wanted = ("-o", ",".join(options)) if options else ()
        qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", *wanted, source, path)
        _io(path, "write -P 9 64k 4k", "write -z 256k 64k")
        return path

    return make


_MAKERS["compressed"] = _compressed()
_MAKERS["compressed-zstd"] = _compressed("compression_type=zstd")
_MAKERS["compressed-extended"] = _compressed("extended_l2=on")


def _overlay(directory: Path, fmt: str, base: Path, size: str, *options: str) -> Path:
    path = _create(
        directory / "image.qcow2", *options, size=size, extra=("-b", base.name, "-F", fmt)
    )
    _io(path, "write -P 4 64k 4k", "write -z 512k 64k", "write -P 5 900k 200k")
    return path


def _on_raw(size: int, *options: str) -> Maker:
    def make(directory: Path) -> Path:
        base = directory / "base.raw"
        base.write_bytes((b"\6" * 65536 + bytes(65536)) * (size // 131072) + b"end")
        return _overlay(directory, "raw", base, "2M", *options)

    return make


_MAKERS["backing-shorter"] = _on_raw(MIB)
_MAKERS["backing-longer"] = _on_raw(4 * MIB)
_MAKERS["backing-extended"] = _on_raw(MIB, "extended_l2=on")
_MAKERS["backing-v2"] = _on_raw(2 * MIB, "compat=0.10")


@_maker("chain")
def _chain(directory: Path) -> Path:
    base = _create(directory / "base.qcow2", "cluster_size=4k", size="3M")
    _io(base, "write -P 1 0 1M", "write -P 2 2M 100k")
    middle = _create(
        directory / "middle.qcow2",
        "cluster_size=2M",
        size="4M",
        extra=("-b", base.name, "-F", "qcow2"),
    )
    _io(middle, "write -P 3 500k 100k")
    top = _create(directory / "image.qcow2", size="5M", extra=("-b", middle.name, "-F", "qcow2"))
    _io(top, "write -P 4 550k 100k", "write -z 64k 64k")
    return top


@_maker("snapshots")
def _snapshots(directory: Path) -> Path:
    path = _plain()(directory)
    assert isinstance(path, Path)
    for name in ("one", "a name that is longer than its column", "drei-ü"):
        qemu_img("snapshot", "-c", name, path)
        _io(path, "write -P 6 2M 128k")
    qemu_img("resize", "-q", path, "6M")
    return path


@_maker("bitmaps")
def _bitmaps(directory: Path) -> Path:
    path = _plain()(directory)
    assert isinstance(path, Path)
    qemu_img("bitmap", "--add", path, "auto")
    qemu_img("bitmap", "--add", "--disable", "-g", "32k", path, "still ü")
    _io(path, "write -P 6 2M 128k")
    return path


@_maker("bitmap-in-use")
def _bitmap_in_use(directory: Path) -> Path:
    path = _bitmaps(directory)
    assert isinstance(path, Path)
    _io(path, "write 0 64k", "flush", "abort", ok=False)
    return path


@_maker("dirty")
def _dirty(directory: Path) -> Path:
    path = _create(directory / "image.qcow2", "lazy_refcounts=on")
    _io(path, "write -P 5 0 200k", "flush", "abort", ok=False)
    return path


@_maker("corrupt")
def _corrupt(directory: Path) -> Path:
    path = _plain()(directory)
    assert isinstance(path, Path)
    with path.open("r+b") as file:
        file.seek(72)
        file.write(struct.pack(">Q", 2))
    return path


@_maker("leaked")
def _leaked(directory: Path) -> Path:
    path = _plain()(directory)
    assert isinstance(path, Path)
    with path.open("r+b") as file:
        file.seek(24 + 16)
        (l1,) = struct.unpack(">Q", file.read(8))
        file.seek(l1)
        file.write(bytes(8))
    return path


def _data_file(*options: str) -> Maker:
    def make(directory: Path) -> Path:
        data = directory / "data.raw"
        path = _create(directory / "image.qcow2", f"data_file={data}", *options)
        _io(path, "write -P 1 0 70000", "write -z 1M 64k", "write -P 2 3M 64k")
        return path

    return make


_MAKERS["data-file"] = _data_file()
_MAKERS["data-file-raw"] = _data_file("data_file_raw=on")


def _encrypted(method: str) -> Maker:
    def make(directory: Path) -> Image:
        path = directory / "image.qcow2"
        options = [f"encrypt.format={method}", "encrypt.key-secret=sec0"]
        options += ["encrypt.iter-time=10"] if method == "luks" else []
        # QEMU measures the speed of the machine for it, which fails now and then.
        for _ in range(5):
            words = ["create", "-q", "-f", "qcow2", *OBJECT, "-o", ",".join(options)]
            if subprocess.run([require("qemu-img"), *words, path, "4M"]).returncode == 0:
                break
        source = f"driver=qcow2,encrypt.key-secret=sec0,file.filename={path}"
        commands = [word for command in _WRITES for word in ("-c", command)]
        subprocess.run(
            [require("qemu-io"), *OBJECT, *commands, "--image-opts", source],
            check=True,
            capture_output=True,
        )
        return Image("", path, source, "qcow2", options=True)

    return make


_MAKERS["luks"] = _encrypted("luks")
_MAKERS["aes"] = _encrypted("aes")


@_maker("luks-file")
def _luks_file(directory: Path) -> Image:
    path = directory / "image.luks"
    for _ in range(5):
        words = ["create", "-q", "-f", "luks", *OBJECT, "-o", "key-secret=sec0,iter-time=10"]
        if subprocess.run([require("qemu-img"), *words, path, "1M"]).returncode == 0:
            break
    source = f"driver=luks,key-secret=sec0,file.filename={path}"
    command = [require("qemu-io"), *OBJECT, "-c", "write -P 1 1000 70000", "--image-opts", source]
    subprocess.run(command, check=True, capture_output=True)
    return Image("", path, source, "luks", options=True)


NAMES: tuple[str, ...] = tuple(_MAKERS)


def build(directory: Path) -> dict[str, Image]:
    """All images, each in a directory of its own below ``directory``."""
    found = {}
    for name, maker in _MAKERS.items():
        place = directory / name
        place.mkdir()
        made = maker(place)
        if isinstance(made, Path):
            made = Image(name, made, str(made), "qcow2")
        found[name] = made._replace(name=name)
    return found

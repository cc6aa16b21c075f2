"""Several threads change one qcow2 image at once, each its own slots, which share clusters.

Nobody else touches the bytes of a slot, so at every moment they are what its owner wrote last.
"""

import os
import random
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from fleece.block.file import FileNode
from fleece.block.node import Node
from fleece.formats.qcow2 import bitmaps, luks
from fleece.formats.qcow2.crypt import EncryptedNode
from fleece.formats.qcow2.image import Qcow2Node, read_header
from fleece.formats.qcow2.options import Qcow2Options
from nbdwire.constants import CMD_FLAG_FUA, CMD_FLAG_NO_HOLE, STATE_ZERO
from nbdwire.export import OPAQUE_RUN, ZERO_RUN
from tests.support.qcow2 import make, pread, qemu_img

SIZE: Final = 2_000_384
GRANULE: Final = 4096


@dataclass
class Image:
    """What a worker may use: ``open(read_only)``, and ``model``, the disk as it has to be.

    ``snapshot``: the disk at its internal snapshot ``one``.
    """

    path: Path
    model: bytearray
    backing: Path | None = None
    data_file: Path | None = None
    options: Qcow2Options = field(default_factory=Qcow2Options)
    snapshot: bytes | None = None
    key: Any = None
    bitmap: bool = False
    wrap: Callable[[Node], Node] = field(default=lambda node: node)

    def open(self, *, read_only: bool = False) -> Qcow2Node:
        file: Node = FileNode(self.path, read_only=read_only, locking=False)
        file = file if read_only else self.wrap(file)
        backing = self.backing and FileNode(self.backing, read_only=True, locking=False)
        data: Any = self.data_file and FileNode(self.data_file, read_only=read_only, locking=False)
        if data is not None and not read_only:
            data = self.wrap(data)
        header = read_header(file, "x")
        if self.key is not None:
            data = EncryptedNode(file, self.key)
        return Qcow2Node(
            file,
            backing=backing or None,
            data_file=data or None,
            read_only=read_only,
            header=header,
            options=self.options,
        )

    def check(self, *, clean: bool = True) -> None:
        """QEMU and a node that is opened anew read the model."""
        if clean:
            qemu_img("check", "-U", *self.source())
        node = self.open(read_only=True)
        try:
            assert_equal(pread(node, SIZE, 0), self.model, "opened again")
        finally:
            node.close()
        self._compare()
        if self.snapshot is not None:
            raw = self.path.with_suffix(".snapshot")
            qemu_img("convert", "-U", "-l", "snapshot.name=one", "-O", "raw", self.path, raw)
            assert_equal(raw.read_bytes(), self.snapshot, "the snapshot")

    def _compare(self) -> None:
        expected = self.path.with_suffix(".expected")
        expected.write_bytes(self.model)
        if self.key is None:
            qemu_img("compare", "-U", "-f", "qcow2", "-F", "raw", self.path, expected)
        else:
            raw = f"driver=raw,file.filename={expected}"
            qemu_img("compare", "-U", *self.source(), raw)

    def source(self) -> list[str]:
        if self.key is None:
            return ["-f", "qcow2", str(self.path)]
        options = f"driver=qcow2,file.filename={self.path},encrypt.key-secret=s"
        return ["--object", "secret,id=s,data=hunter2", "--image-opts", options]

    def check_bitmap(self, before: bytes) -> None:
        node = self.open(read_only=True)
        try:
            dirty = bytearray(SIZE)
            for offset, length in bitmaps.find(node, "b").dirty_extents():
                dirty[offset : offset + length] = b"\1" * length
        finally:
            node.close()
        for at in range(0, SIZE, GRANULE):
            if before[at : at + GRANULE] != self.model[at : at + GRANULE]:
                assert dirty[at], f"the change at {at} was not recorded"


def assert_equal(got: bytes, expected: bytes | bytearray, what: str, base: int = 0) -> None:
    if got != expected:
        at = next(i for i in range(len(expected)) if got[i] != expected[i])
        count = sum(a != b for a, b in zip(got, expected, strict=True))
        raise AssertionError(
            f"{what}: {count} bytes differ from {base + at}: {got[at : at + 8].hex()} and not "
            f"{bytes(expected[at : at + 8]).hex()}"
        )


def slots(rnd: random.Random, scale: int) -> list[tuple[int, int]]:
    """All of the disk, in pieces from some bytes to some clusters."""
    found, at = [], 0
    sizes = [100, 512, 1024, 1024, 1024, 4096, 5000, scale, 3 * scale]
    while at < SIZE:
        end = min(SIZE, at + rnd.choice(sizes))
        found.append((at, end))
        at = end
    return found


class Worker:
    """Changes and reads ``own`` slots of ``node``; ``model`` is shared, and so are clusters."""

    def __init__(
        self, node: Qcow2Node, model: bytearray, own: list[tuple[int, int]], seed: int
    ) -> None:
        self.node = node
        self.model = model
        self.own = own
        self.rnd = random.Random(seed)
        self.trims = node.options.discard

    def run(self, steps: int) -> None:
        operations: list[Callable[[int, int], None]] = [
            *[self.write] * 4,
            self.write_in_pieces,
            self.write_in_pieces,
            self.write_stable,
            self.zero,
            self.trim,
            self.read,
            self.read,
            self.follow_map,
            self.look_at_extents,
            self.read_others,
        ]
        for number in range(steps):
            low, high = self.rnd.choice(self.own)
            if number % 37 == 36:
                self.node.flush()
            self.rnd.choice(operations)(low, high)

    def some(self, low: int, high: int) -> tuple[int, int]:
        """All of the slot, or a part."""
        if self.rnd.random() < 0.6:
            return low, high
        a, b = sorted((self.rnd.randrange(low, high + 1), self.rnd.randrange(low, high + 1)))
        return (a, b) if a < b else (low, high)

    def write(self, low: int, high: int, *, fua: bool = False) -> None:
        low, high = self.some(low, high)
        data = self.rnd.randbytes(high - low)
        self.node.pwrite(memoryview(data), low, fua)
        self.model[low:high] = data

    def write_in_pieces(self, low: int, high: int) -> None:
        """Pieces that overlap, in any order: a cluster is whole after some of them."""
        cuts = sorted(self.rnd.randrange(low, high + 1) for _ in range(3))
        pieces = [
            (max(low, a - self.rnd.randrange(3000)), min(high, b + self.rnd.randrange(3000)))
            for a, b in zip([low, *cuts], [*cuts, high], strict=True)
            if a < b
        ]
        self.rnd.shuffle(pieces)
        for start, stop in pieces:
            data = self.rnd.randbytes(stop - start)
            self.node.pwrite(memoryview(data), start)
            self.model[start:stop] = data

    def write_stable(self, low: int, high: int) -> None:
        self.write(low, high, fua=self.rnd.random() < 0.3)

    def zero(self, low: int, high: int) -> None:
        low, high = self.some(low, high)
        flags = self.rnd.choice([0, 0, CMD_FLAG_NO_HOLE, CMD_FLAG_FUA])
        self.node.zero(low, high - low, flags)
        self.model[low:high] = bytes(high - low)

    def trim(self, low: int, high: int) -> None:
        self.node.trim(low, high - low)
        got = pread(self.node, high - low, low)
        for at in range(0, high - low, 64):  # no unit is smaller than that
            stop = min(at + 64, high - low)
            if got[at:stop] != self.model[low + at : low + stop]:
                pieces = zip(got[at:stop], self.model[low + at : low + stop], strict=True)
                assert all(a in (0, b) for a, b in pieces), f"a trim left foreign data at {at}"
        self.model[low:high] = got

    def read(self, low: int, high: int) -> None:
        got = pread(self.node, high - low, low)
        assert_equal(got, self.model[low:high], "read", low)

    def read_others(self, low: int, high: int) -> None:
        at = self.rnd.randrange(SIZE)
        pread(self.node, min(100_000, SIZE - at), at)

    def follow_map(self, low: int, high: int) -> None:
        for fd, where, length in self.node.map(low, high - low):
            if fd == ZERO_RUN:
                got = bytes(length)
            elif fd == OPAQUE_RUN:
                got = pread(self.node, length, low)
            else:
                got = os.pread(fd, length, where).ljust(length, b"\0")
            assert_equal(got, self.model[low : low + length], "map", low)
            low += length

    def look_at_extents(self, low: int, high: int) -> None:
        for extent in self.node.extents(low, high - low):
            if extent.status & STATE_ZERO:
                assert not any(self.model[extent.offset : extent.end]), "an extent is not zero"


def run(image: Image, seed: int, *, threads: int = 4, rounds: int = 3, steps: int = 60) -> None:
    """All of it; AssertionError or OSError if anything is wrong."""
    rnd = random.Random(seed)
    before = bytes(image.model)
    node = image.open()
    try:
        pieces = slots(rnd, node.header.cluster_size)
        workers = [Worker(node, image.model, pieces[n::threads], seed + n) for n in range(threads)]
        lazy = node._meta._lazy
        for _ in range(rounds):
            with ThreadPoolExecutor(threads) as pool:
                for future in [pool.submit(worker.run, steps) for worker in workers]:
                    future.result(120)
            assert_equal(pread(node, SIZE, 0), image.model, "live")
            node.flush()
            assert not node._pending
            image.check(clean=not lazy)
    finally:
        node.close()
    image.check()
    if image.bitmap:
        image.check_bitmap(before)


def seed_of(name: str) -> int:
    """Fixed, unless FLEECE_SEED says otherwise."""
    return int(os.environ.get("FLEECE_SEED", "1")) * 1000 + zlib.crc32(name.encode()) % 1000


# Images to begin with


def _plain(directory: Path, rnd: random.Random, **options: Any) -> Image:
    return Image(make(directory / "d.qcow2", SIZE, **options), bytearray(SIZE))


def _chain(directory: Path, rnd: random.Random, length: int, **options: Any) -> Image:
    base = directory / "base.raw"
    base.write_bytes(rnd.randbytes(length))
    path = make(directory / "d.qcow2", SIZE, backing=str(base), backing_format="raw", **options)
    model = bytearray(base.read_bytes()[:SIZE].ljust(SIZE, b"\0"))
    return Image(path, model, backing=base)


def _fill(image: Image, rnd: random.Random) -> Image:
    node = image.open()
    try:
        for at in range(0, SIZE, 150_000):
            data = rnd.randbytes(min(100_000, SIZE - at))
            node.pwrite(memoryview(data), at)
            image.model[at : at + len(data)] = data
    finally:
        node.close()
    return image


def _compressed(directory: Path, rnd: random.Random, **options: Any) -> Image:
    raw, path = directory / "from.raw", directory / "d.qcow2"
    raw.write_bytes(b"".join(bytes([rnd.randrange(256)]) * 997 for _ in range(SIZE // 997 + 1)))
    os.truncate(raw, SIZE)
    given = ",".join(f"{name}={value}" for name, value in options.items())
    more = ["-o", given] if given else []
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", *more, raw, path)
    return Image(path, bytearray(raw.read_bytes()))


def _snapshot(image: Image, rnd: random.Random) -> Image:
    _fill(image, rnd)
    qemu_img("snapshot", "-c", "one", image.path)
    image.snapshot = bytes(image.model)
    return image


def _data_file(directory: Path, rnd: random.Random, *, raw: bool = False) -> Image:
    data = directory / "d.data"
    image = _plain(directory, rnd, data_file=str(data), data_file_raw=raw)
    image.data_file = data
    return image


def _data_file_and_backing(directory: Path, rnd: random.Random) -> Image:
    data = directory / "d.data"
    image = _chain(directory, rnd, SIZE, data_file=str(data))
    image.data_file = data
    return image


def _luks(directory: Path, rnd: random.Random, *, backing: bool = False) -> Image:
    options = {"encryption": luks.LuksOptions(iteration_ms=1), "passphrase": b"hunter2"}
    image = (
        _chain(directory, rnd, SIZE, **options) if backing else _plain(directory, rnd, **options)
    )
    file = FileNode(image.path, read_only=True, locking=False)
    try:
        image.key = luks.open_key(file, read_header(file, "x"), b"hunter2", "x")
    finally:
        file.close()
    return image


def _bitmap(image: Image) -> Image:
    qemu_img("bitmap", "--add", "-g", str(GRANULE), image.path, "b")
    image.bitmap = True
    return image


def _small_caches(image: Image) -> Image:
    size = 4096
    image.options = Qcow2Options(l2_cache_bytes=size, refcount_cache_bytes=size)
    return image


def _no_unref(image: Image) -> Image:
    image.options = Qcow2Options(discard_no_unref=True)
    return image


IMAGES: Final[dict[str, Callable[[Path, random.Random], Image]]] = {
    "plain": _plain,
    "version 2": lambda d, r: _plain(d, r, version=2),
    "preallocated": lambda d, r: _plain(d, r, preallocation="metadata"),
    "shorter backing": lambda d, r: _chain(d, r, 900_100),
    "longer backing": lambda d, r: _chain(d, r, SIZE + 70_000),
    "version 2, backing": lambda d, r: _chain(d, r, SIZE, version=2),
    "subclusters": lambda d, r: _plain(d, r, extended_l2=True),
    "subclusters, backing": lambda d, r: _chain(d, r, 1_500_100, extended_l2=True),
    "subclusters, snapshot": lambda d, r: _snapshot(_chain(d, r, SIZE, extended_l2=True), r),
    "subclusters, compressed": lambda d, r: _compressed(d, r, extended_l2="on"),
    "compressed": _compressed,
    "compressed, small": lambda d, r: _compressed(d, r, cluster_size=4096),
    "snapshot": lambda d, r: _snapshot(_plain(d, r), r),
    "snapshot, backing, small": lambda d, r: _snapshot(_chain(d, r, SIZE, cluster_size=2048), r),
    "data file": _data_file,
    "data file, raw": lambda d, r: _data_file(d, r, raw=True),
    "data file, backing": _data_file_and_backing,
    "LUKS": _luks,
    "LUKS, backing": lambda d, r: _luks(d, r, backing=True),
    "clusters of 512": lambda d, r: _chain(d, r, SIZE, cluster_size=512),
    "clusters of 512, small caches": lambda d, r: _small_caches(
        _chain(d, r, SIZE, cluster_size=512)
    ),
    "1-bit refcounts": lambda d, r: _chain(d, r, SIZE, refcount_bits=1, cluster_size=4096),
    "64-bit refcounts": lambda d, r: _chain(d, r, SIZE, refcount_bits=64, cluster_size=1024),
    "lazy refcounts": lambda d, r: _chain(d, r, SIZE, lazy_refcounts=True),
    "bitmap": lambda d, r: _bitmap(_chain(d, r, SIZE)),
    "no unref": lambda d, r: _no_unref(_chain(d, r, SIZE)),
    "no unref, subclusters": lambda d, r: _no_unref(_chain(d, r, SIZE, extended_l2=True)),
}

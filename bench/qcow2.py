# SPDX-License-Identifier: Apache-2.0
"""qcow2 images over NBD: ``fleece export`` and ``qemu-nbd``, in turns, on the same image.

Both serve the very same file, one after the other, so that it lies in the page cache in the same
way for both. Images that a row writes new clusters into are made anew for each run.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.fio import Job, perform
from bench.images import make_real
from bench.results import Row, Sample
from bench.servers import Server
from bench.tools import MiB, make_images, need, run, say, settle

SIZE = 512 * MiB
PACKED_SIZE = 256 * MiB
_BLOCKS = {"4k": 4 << 10, "64k": 64 << 10, "256k": 256 << 10, "1m": MiB}
# Of random writes of 4 KiB into new clusters: two for each cluster of the image.
_FEW_WRITES = SIZE >> 16 << 13


@dataclass(frozen=True)
class ImageCase:
    """One row. ``image`` is what it runs on, as `Qcow2Images` makes it."""

    image: str
    pattern: str
    block: str
    depth: int

    @property
    def name(self) -> str:
        """Such as ``image-deflate-read-64k-d8``."""
        return f"image-{self.image}-{self.pattern}-{self.block}-d{self.depth}"

    @property
    def writes(self) -> bool:
        """Whether the image has to be writable."""
        return "write" in self.pattern

    @property
    def allocates(self) -> bool:
        """Whether its writes go into new clusters: then it ends when it has been everywhere."""
        return self.image in ("new", "top", "subclusters")

    def job(self, seconds: float) -> Job:
        """For fio."""
        size = PACKED_SIZE if self.image in ("deflate", "zstd") else SIZE
        once = self.allocates
        total = _FEW_WRITES if once and self.pattern == "randwrite" else 0
        if once and self.pattern == "write" and self.block == "4k":
            size //= 4
        bound = 60.0 if once else seconds
        return Job(self.pattern, _BLOCKS[self.block], self.depth, 1, size, bound, once, total)


_ROWS = (
    ("plain", "randread 4k 1, randread 4k 32, read 256k 8, randwrite 4k 32, write 64k 8"),
    ("new", "write 4k 16, randwrite 4k 16, write 64k 8, write 1m 4"),
    ("deflate", "randread 4k 8, read 64k 8, read 256k 8"),
    ("zstd", "randread 4k 8, read 64k 8, read 256k 8"),
    ("chain", "randread 4k 32, read 256k 8"),
    ("top", "randwrite 4k 16"),
    ("subclusters", "randwrite 4k 16"),
)


def cases() -> list[ImageCase]:
    """All rows: clusters that are there, new ones, compressed ones, two layers, subclusters."""
    jobs = [(image, *job.split()) for image, every in _ROWS for job in every.split(", ")]
    return [ImageCase(image, pattern, block, int(depth)) for image, pattern, block, depth in jobs]


class Qcow2Images:
    """The images that the rows need, each made when the first row asks for it."""

    def __init__(self, names: Sequence[str], directory: Path, seconds: float) -> None:
        self._names = list(names)
        self._directory = directory
        self._seconds = seconds
        self._made: dict[str, Path] = {}

    def start(self) -> None:
        """Nothing is needed before the first row."""

    def stop(self) -> None:
        """Remove the images."""
        for path in self._made.values():
            path.unlink(missing_ok=True)

    def row(self, case: ImageCase, repeats: int) -> Row:
        """Every server ``repeats`` times, in an order that rotates."""
        row = Row(case.name)
        for turn in range(repeats):
            start = turn % len(self._names)
            for name in self._names[start:] + self._names[:start]:
                row.add(name, self._sample(name, case))
        say(row.line())
        return row

    def _sample(self, name: str, case: ImageCase) -> Sample:
        image = self._image(case.image, anew=case.allocates)
        settle([image])
        server = Server(name, image, self._directory, fmt="qcow2", read_only=not case.writes)
        try:
            server.start()
            before = server.process.cpu_seconds()
            result = perform(case.job(self._seconds), server.uri, self._directory)
            spent = server.process.cpu_seconds() - before
            return Sample(result, spent, server.process.peak_memory())
        finally:
            server.stop()

    def _image(self, kind: str, *, anew: bool = False) -> Path:
        path = self._made.setdefault(kind, self._directory / f"images-{kind}")
        if anew or not path.exists():
            path.unlink(missing_ok=True)
            self._makers()[kind](path)
        return path

    def _makers(self) -> dict[str, Callable[[Path], None]]:
        return {
            "random": lambda path: make_images([path], SIZE),
            "real": lambda path: make_real(path, PACKED_SIZE),
            "plain": lambda path: self._convert("random", path),
            "deflate": lambda path: self._convert("real", path, "-c"),
            "zstd": lambda path: self._convert("real", path, "-c", "-o", "compression_type=zstd"),
            "new": lambda path: _create(path),
            "top": self._above,
            "subclusters": lambda path: self._above(path, "-o", "extended_l2=on"),
            "chain": self._chain,
        }

    def _convert(self, source: str, path: Path, *options: str) -> None:
        words = ["convert", "-f", "raw", "-O", "qcow2", *options]
        run([need("qemu-img"), *words, str(self._image(source)), str(path)])

    def _above(self, path: Path, *options: str) -> None:
        _create(path, "-b", str(self._image("plain")), "-F", "qcow2", *options)

    def _chain(self, path: Path) -> None:
        """The upper image has every second stretch of 1 MiB, the lower one has all."""
        self._above(path)
        writes = [word for at in range(0, SIZE, 2 * MiB) for word in ("-c", f"write -q {at} 1M")]
        run([need("qemu-io"), "-f", "qcow2", *writes, str(path)])


def _create(path: Path, *options: str) -> None:
    run([need("qemu-img"), "create", "-q", "-f", "qcow2", *options, str(path), str(SIZE)])

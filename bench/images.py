# SPDX-License-Identifier: Apache-2.0
"""Images for the benchmarks: one with very many clusters, and one with data as disks have it.

The large one has its tables and counts and no data: the clusters are holes of a sparse file, so a
disk of 1 TiB with 10 million clusters of 64 KiB takes about 110 MB here. A quarter of them lies out
of order, as in a disk that has been written for a while.
"""

import multiprocessing
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.tools import BenchFailed

BITS = 16
SIZE = 1 << BITS
MiB = 1 << 20
PER_TABLE = SIZE // 8
PER_BLOCK = SIZE // 2
COPIED = 1 << 63


@dataclass(frozen=True)
class Layout:
    """Where things lie, in host clusters: header, refcount table, L1, L2 tables, data, blocks."""

    virtual: int
    clusters: int

    def __str__(self) -> str:
        return f"{self.virtual >> 30} GiB with {self.clusters:,} clusters, the data being holes"

    @property
    def l1_entries(self) -> int:
        """Entries of the L1 table."""
        return -(-self.virtual // (SIZE * PER_TABLE))

    @property
    def l1(self) -> int:
        """The L1 table."""
        return 2

    @property
    def tables(self) -> int:
        """The first L2 table."""
        return self.l1 + -(-self.l1_entries * 8 // SIZE)

    @property
    def data(self) -> int:
        """The first cluster of data."""
        return self.tables + self.l1_entries

    @property
    def blocks(self) -> int:
        """The first refcount block."""
        return self.data + self.clusters

    @property
    def block_count(self) -> int:
        """Refcount blocks."""
        count = 1
        while -(-(self.blocks + count) // PER_BLOCK) > count:
            count += 1
        return count


LARGE = Layout(1 << 40, 10_000_000)
SMALLER = Layout(64 << 30, 600_000)


def make_large(path: Path, layout: Layout) -> None:
    """The image with many clusters. By a process of its own, so that this one stays small."""
    maker = multiprocessing.get_context("spawn").Process(target=_make_large, args=(path, layout))
    maker.start()
    maker.join()
    if maker.exitcode:
        raise BenchFailed(f"{path} could not be made")


def _make_large(path: Path, layout: Layout) -> None:
    import numpy as np

    everywhere = layout.l1_entries * PER_TABLE
    rng = np.random.default_rng(7)
    used = np.zeros(everywhere, np.bool_)
    within = layout.virtual // SIZE
    used[np.sort(rng.permutation(within)[: layout.clusters])] = True
    hosts = np.arange(layout.data, layout.data + layout.clusters, dtype=np.uint64)
    moved = np.flatnonzero(rng.random(layout.clusters) < 0.25)
    hosts[moved] = hosts[rng.permutation(moved)]
    entries = np.zeros(everywhere, np.uint64)
    entries[used] = (hosts << np.uint64(BITS)) | np.uint64(COPIED)
    with path.open("wb") as file:
        _write_header(file.fileno(), layout)
        first = layout.tables << BITS
        os.pwrite(file.fileno(), entries.astype(">u8").tobytes(), first)
        l1 = first + np.arange(layout.l1_entries, dtype=np.uint64) * np.uint64(SIZE)
        os.pwrite(
            file.fileno(), (l1 | np.uint64(COPIED)).astype(">u8").tobytes(), layout.l1 << BITS
        )
        _write_counts(file.fileno(), layout)


def _write_header(fd: int, layout: Layout) -> None:
    head = struct.pack(
        ">4sIQIIQIIQQIIQ",
        *(b"QFI\xfb", 3, 0, 0, BITS, layout.virtual, 0),
        *(layout.l1_entries, layout.l1 << BITS, SIZE, 1, 0, 0),
    )
    os.pwrite(fd, head + struct.pack(">QQQII", 0, 0, 0, 4, 112) + bytes(16), 0)


def _write_counts(fd: int, layout: Layout) -> None:
    import numpy as np

    end = layout.blocks + layout.block_count
    counts = np.zeros(layout.block_count * PER_BLOCK, ">u2")
    counts[:end] = 1
    os.pwrite(fd, counts.tobytes(), layout.blocks << BITS)
    places = [(layout.blocks + n) << BITS for n in range(layout.block_count)]
    os.pwrite(fd, struct.pack(f">{len(places)}Q", *places), SIZE)


def make_real(path: Path, size: int) -> None:
    """``size`` bytes of the files of /usr/lib: programs, libraries and texts; no random bytes."""
    left = size
    with path.open("wb") as file:
        while left:
            before = left
            for data in _installed():
                file.write(data[:left])
                left -= len(data[:left])
                if not left:
                    return
            if left == before:
                raise BenchFailed("there is nothing to read in /usr/lib")


def _installed() -> Iterator[bytes]:
    """What is in the files, in the order of their names; each begins in a new block of 4 KiB."""
    for directory, folders, names in os.walk("/usr/lib"):
        folders.sort()
        for name in sorted(names):
            path = Path(directory, name)
            if path.is_file() and not path.is_symlink():
                data = path.read_bytes()
                yield data + bytes(-len(data) % 4096)


def make_holed(path: Path, real: Path) -> None:
    """As large as ``real``; every second stretch of 4 MiB is its data, the others are holes."""
    with real.open("rb") as source, path.open("wb") as file:
        size = real.stat().st_size
        file.truncate(size)
        for start in range(0, size, 8 * MiB):
            source.seek(start)
            file.seek(start)
            file.write(source.read(4 * MiB))

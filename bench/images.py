# SPDX-License-Identifier: Apache-2.0
"""``check`` and ``map`` of a large image against qemu-img: time and memory, in ratios.

``python bench/images.py [--size-gib 1024] [--clusters 10000000] [--dir DIR] [--keep]``

The image has its tables and counts and no data: the clusters are holes of a sparse file, so a disk
of 1 TiB with 10 million clusters of 64 KiB takes about 110 MB here. A quarter of them lies out of
order, as in a disk that has been written for a while.
"""

import argparse
import multiprocessing
import os
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.tools import need

BITS = 16
SIZE = 1 << BITS
PER_TABLE = SIZE // 8
PER_BLOCK = SIZE // 2
COPIED = 1 << 63


@dataclass(frozen=True)
class Layout:
    """Where things lie, in host clusters: header, refcount table, L1, L2 tables, data, blocks."""

    virtual: int
    clusters: int

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


def make(path: Path, layout: Layout) -> None:
    """The image."""
    import numpy as np  # here, so that the process which measures stays small

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


def measure(command: list[str], runs: int) -> tuple[float, float]:
    """The least seconds, and the peak MiB, of a program that must succeed."""
    seconds, memory = float("inf"), 0.0
    for _ in range(runs):
        begin = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        seconds = min(seconds, time.perf_counter() - begin)
        memory = max(memory, usage.ru_maxrss / 1024)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)}: exit status {process.returncode}")
    return seconds, memory


def compare(name: str, ours: list[str], theirs: list[str], runs: int) -> None:
    """Print one row."""
    fast, lean = measure(ours, runs)
    slow, fat = measure(theirs, runs)
    print(
        f"{name:12} fleece {fast:6.2f} s {lean:6.0f} MiB   qemu-img {slow:6.2f} s {fat:6.0f} MiB"
        f"   time x{fast / slow:.2f}  memory x{lean / fat:.2f}"
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--size-gib", type=int, default=1024)
    parser.add_argument("--clusters", type=int, default=10_000_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", default="", help="rows that begin so")
    parser.add_argument("--dir", type=Path, default=Path("/var/tmp"))
    parser.add_argument("--keep", action="store_true", help="do not delete the image")
    options = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="fleece-images-", dir=options.dir))
    path = directory / "large.qcow2"
    try:
        # In a process of its own: the peak of a child is never below that of who started it.
        maker = multiprocessing.get_context("spawn").Process(
            target=make, args=(path, Layout(options.size_gib << 30, options.clusters))
        )
        maker.start()
        maker.join()
        if maker.exitcode:
            raise SystemExit("the image could not be made")
        fleece = [sys.executable, "-m", "fleece", "image"]
        qemu = need("qemu-img")
        for name, words in (
            ("check", ["check", "-f", "qcow2", str(path)]),
            ("map", ["map", "-f", "qcow2", "--output=json", str(path)]),
            ("map, text", ["map", "-f", "qcow2", str(path)]),
        ):
            if name.startswith(options.only):
                compare(name, [*fleece, *words], [qemu, *words], options.runs)
    finally:
        if options.keep:
            print(path)
        else:
            shutil.rmtree(directory)


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    main()

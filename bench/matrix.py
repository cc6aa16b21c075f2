# SPDX-License-Identifier: Apache-2.0
"""The plain matrix: our ``fleece export`` and its peers, in turns, on equal images."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.fio import Job, perform
from bench.results import Row, Sample
from bench.servers import Server
from bench.tools import make_images, say, settle

KiB = 1 << 10
_PATTERNS = ("randread", "read", "randwrite", "write")
_BLOCKS = {"4k": 4 * KiB, "64k": 64 * KiB, "256k": 256 * KiB, "1m": 1024 * KiB}
_DEPTHS = (1, 8, 32)
_CONNECTIONS = (1, 4)

# The rows of --quick: those of the design's table, and one of every kind beside them.
QUICK = (
    "randread-4k-d1-c1-cached",
    "randread-4k-d32-c1-cached",
    "randread-4k-d32-c4-cached",
    "randwrite-4k-d1-c1-cached",
    "randwrite-4k-d32-c1-cached",
    "read-64k-d8-c1-cached",
    "read-256k-d8-c1-cached",
    "read-1m-d8-c4-cached",
    "write-64k-d8-c1-cached",
    "write-256k-d8-c1-cached",
    "write-1m-d8-c4-cached",
    "randread-4k-d32-c1-uncached",
    "read-1m-d8-c1-uncached",
)


@dataclass(frozen=True)
class Case:
    """One row: what is asked of every server."""

    pattern: str
    block: str
    depth: int
    connections: int
    cached: bool

    @property
    def name(self) -> str:
        """Such as ``randread-4k-d32-c1-cached``."""
        state = "cached" if self.cached else "uncached"
        return f"{self.pattern}-{self.block}-d{self.depth}-c{self.connections}-{state}"

    def job(self, size: int, seconds: float) -> Job:
        """For fio. What is not in the page cache can be read only once."""
        return Job(
            self.pattern,
            _BLOCKS[self.block],
            self.depth,
            self.connections,
            size,
            seconds,
            once=not self.cached,
        )


def cases() -> list[Case]:
    """All rows; those with a warm page cache first, because only new images have that."""
    product = itertools.product((True, False), _PATTERNS, _BLOCKS, _DEPTHS, _CONNECTIONS)
    return [Case(p, b, d, c, cached) for cached, p, b, d, c in product]


class Matrix:
    """Servers that run side by side, each on its own copy of one random image."""

    def __init__(self, names: Sequence[str], directory: Path, size: int, seconds: float) -> None:
        self._directory = directory
        self._size = size
        self._seconds = seconds
        self.servers = [Server(name, directory / f"{name}.raw", directory) for name in names]

    def start(self) -> None:
        """Make the images and start the servers."""
        make_images([server.image for server in self.servers], self._size)
        for server in self.servers:
            server.start()

    def stop(self) -> None:
        """End the servers and remove the images."""
        for server in self.servers:
            server.stop()
            server.image.unlink(missing_ok=True)

    def row(self, case: Case, repeats: int) -> Row:
        """Every server ``repeats`` times, in an order that rotates."""
        row = Row(case.name)
        for turn in range(repeats):
            start = turn % len(self.servers)
            for server in self.servers[start:] + self.servers[:start]:
                row.add(server.name, self._sample(server, case))
        say(row.line())
        return row

    def _sample(self, server: Server, case: Case) -> Sample:
        server.process.check()
        images = [other.image for other in self.servers]
        settle(images, drop=None if case.cached else server.image)
        before = server.process.cpu_seconds()
        result = perform(case.job(self._size, self._seconds), server.uri, self._directory)
        spent = server.process.cpu_seconds() - before
        return Sample(result, spent, server.process.peak_memory())

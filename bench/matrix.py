# SPDX-License-Identifier: Apache-2.0
"""The plain matrix: our ``fleece export`` and its peers, in turns, on equal images."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from bench import commands, lean, qcow2
from bench.fio import Job, Result, perform
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
    "tls-randread-4k-d1-c1-cached",
    "tls-randread-4k-d32-c1-cached",
    "tls-read-256k-d8-c1-cached",
    "tls-write-256k-d8-c1-cached",
    "form-simple-read-4k-d32",
    "form-structured-read-4k-d32",
    "form-extended-read-4k-d32",
    "connect-list-leave",
    "image-plain-randread-4k-d32",
    "image-plain-read-256k-d8",
    "image-new-write-64k-d8",
    "image-deflate-read-64k-d8",
    "image-chain-read-256k-d8",
    "command-convert-raw-qcow2",
    "command-compare-raw-qcow2",
    "command-check-large",
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


@dataclass(frozen=True)
class TLSCase(Case):
    """As a plain one, on servers that require TLS."""

    @property
    def name(self) -> str:
        """Such as ``tls-randread-4k-d32-c1-cached``."""
        return f"tls-{super().name}"


@dataclass(frozen=True)
class FormCase:
    """One form of requests and replies. Who has no extended headers answers in structured ones."""

    form: str
    pattern: str  # read, write
    block: str
    depth: int
    cached: bool = True

    @property
    def name(self) -> str:
        """Such as ``form-simple-read-4k-d32``."""
        return f"form-{self.form}-{self.pattern}-{self.block}-d{self.depth}"

    def load(self, size: int, seconds: float) -> lean.Load:
        """For the lean client; random places."""
        write, block = self.pattern == "write", _BLOCKS[self.block]
        return lean.Load(self.form, write, block, self.depth, size, seconds)


@dataclass(frozen=True)
class ConnectCase:
    """``count`` connections, each of which asks what there is and leaves."""

    name: str
    count: int
    cached: bool = True


AnyCase: TypeAlias = Case | FormCase | ConnectCase

_FEW = (("{}read", "4k", 1), ("{}read", "4k", 32), ("{}write", "4k", 32), ("read", "256k", 8),
        ("write", "256k", 8))  # fmt: skip


def tls_cases() -> list[TLSCase]:
    """The rows over TLS."""
    return [TLSCase(pattern.format("rand"), b, d, 1, True) for pattern, b, d in _FEW]


def form_cases() -> list[FormCase]:
    """The rows that tell the forms apart."""
    return [FormCase(form, p.format(""), b, d) for form in lean.FORMS for p, b, d in _FEW]


def connect_cases() -> list[ConnectCase]:
    """The rows of connections."""
    return [ConnectCase("connect-list-leave", 200)]


def names() -> list[str]:
    """Of every row, without those of live writes."""
    every = (*cases(), *tls_cases(), *form_cases(), *connect_cases())
    images = (*qcow2.cases(), *commands.cases())
    return [case.name for case in (*every, *images)]


class Matrix:
    """Servers that run side by side, each on its own copy of one random image."""

    def __init__(
        self,
        names: Sequence[str],
        directory: Path,
        size: int,
        seconds: float,
        certificates: Path | None = None,
    ) -> None:
        self._directory = directory
        self._size = size
        self._seconds = seconds
        self._home = None if certificates is None else certificates / "home"
        self.servers = [
            Server(name, directory / f"{name}.raw", directory, certificates) for name in names
        ]

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

    def row(self, case: AnyCase, repeats: int) -> Row:
        """Every server ``repeats`` times, in an order that rotates."""
        row = Row(case.name)
        for turn in range(repeats):
            start = turn % len(self.servers)
            for server in self.servers[start:] + self.servers[:start]:
                row.add(server.name, self._sample(server, case))
        say(row.line())
        return row

    def _sample(self, server: Server, case: AnyCase) -> Sample:
        server.process.check()
        images = [other.image for other in self.servers]
        settle(images, drop=None if case.cached else server.image)
        before = server.process.cpu_seconds()
        result = self._perform(case, server.uri)
        spent = server.process.cpu_seconds() - before
        return Sample(result, spent, server.process.peak_memory())

    def _perform(self, case: AnyCase, uri: str) -> Result:
        if isinstance(case, FormCase):
            return lean.perform(case.load(self._size, self._seconds), uri)
        if isinstance(case, ConnectCase):
            return lean.connections(uri, case.count)
        return perform(case.job(self._size, self._seconds), uri, self._directory, self._home)

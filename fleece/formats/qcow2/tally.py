# SPDX-License-Identifier: Apache-2.0
"""Counts of references per host cluster, and the problems that are found while they are counted."""

import enum
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fleece.errors import UnsupportedFeature
from fleece.formats.qcow2.header import Header

Numbers: TypeAlias = NDArray[np.int64]
Counts: TypeAlias = NDArray[np.unsignedinteger]

# As QEMU: more host clusters than this are not counted (128 TiB at 64 KiB).
_MOST_CLUSTERS: Final = (1 << 31) - 1
# So many problems of a kind are reported one by one; a hostile image could have a billion.
_MOST_REPORTED: Final = 10_000
# References that are spread over more clusters than this are sorted instead of tabulated.
_WINDOW: Final = 1 << 20
_MOST: Final = (1 << 32) - 1


class ProblemKind(enum.Enum):
    """What is wrong with an entry of a table, or with the place of something."""

    L1_RESERVED = "reserved bits of an L1 entry are set"
    L1_UNALIGNED = "an L2 table is not aligned to a cluster"
    L2_RESERVED = "reserved bits of an L2 entry are set"
    ZERO_FLAG = "the zero flag of an L2 entry is set where there is no such flag"
    DATA_UNALIGNED = "a data cluster is not aligned"
    ZERO_UNALIGNED = "a preallocated cluster without data is not aligned"
    COMPRESSED_COPIED = "the COPIED flag of a compressed cluster is set"
    COMPRESSED_DATA_FILE = "there is a compressed cluster and an external data file"
    COMPRESSED_BITMAP = "a compressed cluster has subcluster bits"
    SUBCLUSTER_BOTH = "a subcluster is both allocated and zero"
    SUBCLUSTER_NO_HOST = "a subcluster is allocated and its cluster is not"
    BEYOND_END = "something lies behind the end of the file"
    OVERFLOW = "a cluster has more references than can be counted"
    SNAPSHOT_TABLE = "the snapshot table is not valid"
    SNAPSHOT_L1_UNALIGNED = "the L1 table of a snapshot is not aligned to a cluster"
    SNAPSHOT_L1_SIZE = "the L1 table of a snapshot is too large"
    BITMAP_DIRECTORY = "the bitmap directory is not valid"
    BITMAP_ENTRY = "an entry of a bitmap table is not valid"
    CRYPTO_HEADER = "the place of the LUKS header is not valid"
    REFCOUNT_RESERVED = "reserved bits of a refcount table entry are set"
    REFCOUNT_UNALIGNED = "a refcount block is not aligned to a cluster"
    REFCOUNT_OUTSIDE = "a refcount block lies behind the end of the file"
    REFCOUNT_SHARED = "a refcount block has other references"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong, seen ``times`` times (from so many L1 tables).

    ``at``: host offset of the entry that is wrong, -1 if it is none or if this stands for
    ``times`` more of the kind. ``entry``, ``bitmap``: its words. ``offset``, ``length``: bytes of
    the file that it refers to (of OVERFLOW and REFCOUNT_SHARED: the cluster). ``index``: the
    number of the snapshot, bitmap or refcount block.
    """

    kind: ProblemKind
    at: int = -1
    entry: int = 0
    offset: int = 0
    length: int = 0
    times: int = 1
    bitmap: int = 0
    index: int = -1


class Tally:
    """One number per host cluster, which stays at the most that the refcount width can hold.

    `UnsupportedFeature` if the file has over 2^31 clusters. Memory: 1 byte for each cluster that is
    counted, 2 or 4 once a count needs that; parts of the file that nothing refers to cost none.
    """

    def __init__(
        self, header: Header, file_size: int, on_problem: Callable[[Problem], None] | None
    ) -> None:
        self._bits = header.cluster_bits
        self._size = header.cluster_size
        self.file_size = file_size
        self._on_problem = on_problem
        self._reported: Counter[ProblemKind] = Counter()
        if -(-file_size // self._size) > _MOST_CLUSTERS:
            raise UnsupportedFeature(f"a file of {file_size} bytes has too many clusters to count")
        self.clusters = clusters = -(-file_size // self._size)
        self._limit = min((1 << (1 << header.refcount_order)) - 1, _MOST)
        # What ends less than a cluster behind the end is legal, hence one more.
        self._counts: Counts = np.zeros(clusters + 1, np.uint8)

    @property
    def counts(self) -> Counts:
        """The counts so far, one for each cluster up to the end of the file or one more."""
        return self._counts if self._counts[-1] else self._counts[:-1]

    def problem(self, problem: Problem) -> None:
        """Tell it, if anyone listens."""
        if self._on_problem is not None:
            self._on_problem(problem)

    def problems(
        self, kind: ProblemKind, make: Callable[[int], Problem], positions: Numbers, times: int
    ) -> None:
        """One for each of ``positions`` (``make`` gives it); from a limit on, one for all."""
        if self._on_problem is None or not len(positions):
            return
        room = max(0, _MOST_REPORTED - self._reported[kind])
        self._reported[kind] += len(positions)
        for position in positions[:room].tolist():
            self._on_problem(make(position))
        if len(positions) > room:
            self._on_problem(Problem(kind, times=(len(positions) - room) * times))

    def add_range(self, offset: int, length: int, times: int = 1) -> bool:
        """``times`` references to the clusters of ``length`` bytes; False if they are not there."""
        if length <= 0:
            return True
        if offset + length - self.file_size >= self._size:
            self.problem(Problem(ProblemKind.BEYOND_END, offset=offset, length=length, times=times))
            return False
        first, last = offset >> self._bits, (offset + length - 1) >> self._bits
        self._add_dense(first, np.full(last - first + 1, min(times, _MOST), np.int64))
        return True

    def inside(self, offsets: Numbers, lengths: Numbers | int, times: int) -> NDArray[np.bool_]:
        """Which of these ranges may be counted; a problem for each of the others."""
        ok = offsets + lengths - self.file_size < self._size
        sizes = np.broadcast_to(np.asarray(lengths), offsets.shape)

        def make(i: int) -> Problem:
            place, length = int(offsets[i]), int(sizes[i])
            return Problem(ProblemKind.BEYOND_END, offset=place, length=length, times=times)

        if not ok.all():
            self.problems(ProblemKind.BEYOND_END, make, np.flatnonzero(~ok), times)
        return np.asarray(ok)

    def add(self, clusters: Numbers, times: int = 1) -> None:
        """``times`` references to each of ``clusters``, which are known to be there."""
        if not len(clusters):
            return
        low, high = int(clusters.min()), int(clusters.max())
        times = min(times, _MOST)
        if high - low < max(_WINDOW, len(clusters) * 4):
            self._add_dense(low, np.bincount(clusters - low) * times)
            return
        unique, found = np.unique(clusters, return_counts=True)
        self._counts[unique] = self._fitting(self._counts[unique] + found * times, unique)

    def _add_dense(self, first: int, more: Numbers) -> None:
        stop = first + len(more)
        total = self._fitting(self._counts[first:stop] + more, None, first)
        self._counts[first:stop] = total

    def _fitting(self, total: Numbers, clusters: Numbers | None, first: int = 0) -> Numbers:
        """The new counts of ``clusters``, or of those from ``first``, as far as they can be."""
        most = int(total.max())
        if most > self._limit:
            over = np.flatnonzero(total > self._limit)
            self._overflow(over + first if clusters is None else clusters[over])
            total = np.minimum(total, self._limit)
        most = min(most, self._limit)
        if most > np.iinfo(self._counts.dtype).max:
            self._counts = self._counts.astype(np.uint16 if most <= 0xFFFF else np.uint32)
        return total

    def _overflow(self, clusters: Numbers) -> None:
        def make(i: int) -> Problem:
            return Problem(ProblemKind.OVERFLOW, offset=i << self._bits, length=self._size)

        self.problems(ProblemKind.OVERFLOW, make, clusters, 1)

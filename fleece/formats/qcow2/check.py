# SPDX-License-Identifier: Apache-2.0
"""Check the metadata of a qcow2 image, and repair it: QEMU's algorithm, with its figures.

A *leak* is a cluster that is counted and that nobody uses: space is lost, nothing else. A
*corruption* is anything that is wrong, or that lets the next write make it so. A *check error* is
what could not be looked at.

1. All references are counted (`references`); what cannot be is a corruption.
2. They are compared with the counts of the image (`comparing`).
3. The COPIED flags of the active disk are compared with those counts (`copied`).

Repair happens in between and is told in `repair`.
"""

import errno
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

from fleece.block.node import Filter, Node
from fleece.errors import UnsupportedFeature
from fleece.formats.qcow2 import constants as c
from fleece.formats.qcow2 import header as headers
from fleece.formats.qcow2 import repair as repairs
from fleece.formats.qcow2.comparing import Comparer, Comparison, Report
from fleece.formats.qcow2.copied import CopiedPass, Flagged
from fleece.formats.qcow2.header import Header
from fleece.formats.qcow2.hosting import regular_end
from fleece.formats.qcow2.references import References, count_references
from fleece.formats.qcow2.stored import StoredCounts
from fleece.formats.qcow2.tally import Problem, ProblemKind
from fleece.units import align_up

Progress: TypeAlias = Callable[[int, int], None]

LEAKS: Final = "leaks"
ALL: Final = "all"

_PLACES: Final = struct.Struct(">QIIQ")
_FATAL: Final = frozenset((ProblemKind.SNAPSHOT_TABLE, ProblemKind.BITMAP_DIRECTORY))
_STRUCTURAL: Final = frozenset(
    (
        ProblemKind.REFCOUNT_RESERVED,
        ProblemKind.REFCOUNT_UNALIGNED,
        ProblemKind.REFCOUNT_OUTSIDE,
        ProblemKind.REFCOUNT_SHARED,
    )
)


@dataclass(frozen=True)
class CheckResult:
    """What is wrong with an image, after what was ``..._fixed`` is right; figures in clusters.

    ``image_end_offset``: bytes, behind the last cluster in use. ``header``: as it is now.
    """

    header: Header
    check_errors: int = 0
    corruptions: int = 0
    leaks: int = 0
    corruptions_fixed: int = 0
    leaks_fixed: int = 0
    image_end_offset: int = 0
    total_clusters: int = 0
    allocated_clusters: int = 0
    fragmented_clusters: int = 0
    compressed_clusters: int = 0

    @property
    def repaired(self) -> bool:
        """Whether the image was changed, so that it should be looked at again."""
        return bool(self.corruptions_fixed or self.leaks_fixed)


def check(
    file: Node,
    header: Header,
    *,
    name: str,
    repair: str | None = None,
    report: Report | None = None,
    progress: Progress | None = None,
) -> CheckResult:
    """Check ``file``, an image with ``header``; with ``repair`` (`LEAKS` or `ALL`) also mend it.

    Nobody else may use the image. ``report`` gets one line for each finding, ``progress`` what is
    done, of how much. OSError if the image cannot be checked at all (its tables cannot be read,
    its snapshot table or bitmap directory is not one, the counts would have to be made anew and
    ``repair`` is not `ALL`); `UnsupportedFeature` if it is too large.
    """
    meter = _Meter(file, _work(file, header), progress) if progress else file
    return _Check(Current(meter), header, name, repair, report or (lambda line: None)).run()


class _Check:
    def __init__(
        self, file: "Current", header: Header, name: str, repair: str | None, report: Report
    ) -> None:
        self._file = file
        self._name = name
        self._repair = repair
        self._report = report
        self._result = CheckResult(header, total_clusters=-(-header.size // header.cluster_size))
        self._problems: list[Problem] = []

    @property
    def _header(self) -> Header:
        return self._result.header

    def run(self) -> CheckResult:
        if self._repair:
            self._update(header=repairs.drop_stale(self._file, self._header, self._name))
        found = self._count()
        if self._repair == ALL:
            found = self._fix_entries(found)
        structural = self._problems_as_corruptions(found)
        comparison = self._compare_counts(found, structural=structural)
        self._add(check_errors=comparison.unreadable)
        end = (comparison.highest + 1) << self._header.cluster_bits
        self._update(image_end_offset=end)
        if self._repair:
            self._mark_good()
        return self._result

    def _count(self) -> References:
        self._problems = []
        self._file.measure()
        header = self._header
        return count_references(
            self._file, header, data_file=header.has_data_file, on_problem=self._problems.append
        )

    def _problems_as_corruptions(self, found: References) -> bool:
        """Report all problems; whether the refcount structures have to be made anew."""
        for problem in self._problems:
            self._report(f"ERROR {describe(problem)}")
            if problem.kind in _FATAL:
                raise OSError(errno.EINVAL, f"{problem.kind.value}, so the rest means nothing")
        lacking = repairs.incomplete_snapshots(self._file, self._header)
        if lacking:
            self._report(f"ERROR {lacking} snapshot table entries are incomplete")
        if self._header.has_data_file and self._header.snapshots:
            lacking += 1
            self._report("ERROR an image with a data file cannot have snapshots, and it does")
        self._add(corruptions=lacking + self._weight(found))
        kinds = {problem.kind for problem in self._problems} & _STRUCTURAL
        # A block that is outside counts nothing yet: it may stay when only leaks are to go.
        return bool(kinds - {ProblemKind.REFCOUNT_OUTSIDE} if self._repair == LEAKS else kinds)

    def _weight(self, found: References) -> int:
        """How many corruptions the problems are: of refcount blocks at one place, one is right."""
        shared = Counter(
            p.offset for p in self._problems if p.kind is ProblemKind.REFCOUNT_SHARED and p.at >= 0
        )
        bits = self._header.cluster_bits
        right = sum(times == found.counts[at >> bits] for at, times in shared.items())
        return sum(problem.times for problem in self._problems) - int(right)

    def _fix_entries(self, found: References) -> References:
        """Mend what can be mended before anything is compared, and count once more."""
        writer = repairs.Writer(self._file, self._header, found)
        fixed = repairs.zero_entries(writer, self._problems, self._report)
        header, mended = repairs.mend_snapshots(self._file, self._header, self._report)
        self._update(header=header)
        if not fixed + mended:
            return found
        self._add(corruptions_fixed=fixed + mended)
        return self._count()

    def _compare_counts(self, found: References, *, structural: bool) -> Comparison:
        stored = StoredCounts(self._file, self._header)
        comparer = Comparer(stored, found.counts, self._report)
        comparison = comparer.compare(repairing=self._repair, settle=not self._repair)
        if self._repair:
            found, comparison = self._repair_counts(found, comparison, structural=structural)
            stored = StoredCounts(self._file, self._header)
        self._add(corruptions=comparison.low, leaks=comparison.leaks)
        self._check_copied(found, stored)
        return comparison

    def _repair_counts(
        self, found: References, before: Comparison, *, structural: bool
    ) -> tuple[References, Comparison]:
        """Make the counts right; what is left to say about them."""
        broken = structural or before.zero
        if broken and self._repair == LEAKS:
            raise OSError(errno.EIO, "the refcounts have to be made anew, with: -r all")
        if structural or before.missing:
            return self._rebuild(before)
        comparer = Comparer(StoredCounts(self._file, self._header), found.counts, lambda line: None)
        if self._repair == ALL and before.low:
            self._add(corruptions_fixed=comparer.raise_counts())
        if before.leaks:
            self._add(leaks_fixed=comparer.lower_counts())
        return found, comparer.compare(settle=True)

    def _rebuild(self, before: Comparison) -> tuple[References, Comparison]:
        """New refcount structures; what was wrong with the old ones, or leaked, is gone."""
        self._report("Rebuilding refcount structure")
        was = self._result.corruptions + before.low
        header = repairs.rebuild_counts(self._file, self._header, before.highest, self._name)
        self._update(header=header, corruptions=0)
        found = self._count()
        self._add(corruptions=self._weight(found))
        comparer = Comparer(StoredCounts(self._file, header), found.counts, lambda line: None)
        after = comparer.compare(settle=True)
        now = self._result.corruptions + after.low
        self._add(
            corruptions_fixed=max(0, was - now), leaks_fixed=max(0, before.leaks - after.leaks)
        )
        return found, after

    def _check_copied(self, found: References, stored: StoredCounts) -> None:
        result = self._result
        safe = not (result.check_errors or result.corruptions or result.leaks)
        repair = self._repair == ALL or (self._repair == LEAKS and safe)
        writer = repairs.Writer(self._file, self._header, found)
        flags = CopiedPass(
            self._file, self._header, stored, found.counts, writer.forbidden, self._report
        ).run(repair=repair)
        self._add(corruptions=flags.wrong - flags.fixed, corruptions_fixed=flags.fixed)
        self._set_figures(flags)

    def _set_figures(self, flags: Flagged) -> None:
        self._update(
            allocated_clusters=flags.allocated,
            fragmented_clusters=flags.fragmented,
            compressed_clusters=flags.compressed,
        )

    def _mark_good(self) -> None:
        """Nothing is wrong any more (but leaks perhaps): the image is not dirty, nor corrupt."""
        if self._result.check_errors or self._result.corruptions:
            return
        marks = c.INCOMPATIBLE_DIRTY | c.INCOMPATIBLE_CORRUPT
        if self._header.incompatible & marks:
            bits = self._header.incompatible & ~marks
            self._update(header=repairs.set_incompatible(self._file, self._header, bits))

    def _update(self, **fields: object) -> None:
        self._result = replace(self._result, **fields)  # type: ignore[arg-type]

    def _add(self, **more: int) -> None:
        result = self._result
        self._update(**{key: getattr(result, key) + value for key, value in more.items()})


def _work(file: Node, header: Header) -> int:
    """About how many bytes of tables will be read: those of the disk twice, and the counts."""
    per_cluster = 16 + (2 << header.refcount_order) // 8
    return (min(file.size, header.size * 2) >> header.cluster_bits) * per_cluster


class Current(Filter):
    """The file with the length that it has now: a repair makes it grow."""

    def __init__(self, file: Node) -> None:
        super().__init__(file.name, file)
        self.measure()

    def measure(self) -> None:
        """Look again."""
        self.size = max(self.next.size, regular_end(self.next))


class _Meter(Filter):
    """Tells how much of the metadata has been read, of what is about all: tables are read twice."""

    def __init__(self, file: Node, total: int, progress: Progress) -> None:
        super().__init__(file.name, file)
        self._progress = progress
        self._seen = 0
        self._total = max(1, total)

    def pread_into(self, buf: memoryview, offset: int) -> None:
        """Pass on, and count."""
        self.next.pread_into(buf, offset)
        self._seen += len(buf)
        self._progress(min(self._seen, self._total), self._total)


def describe(problem: Problem) -> str:
    """One line about it."""
    parts = [problem.kind.value]
    if problem.at >= 0:
        parts.append(f"entry {problem.entry:#x} at {problem.at:#x}")
    if problem.length:
        parts.append(f"{problem.length} bytes at {problem.offset:#x}")
    if problem.times > 1:
        parts.append(f"{problem.times} times")
    return ", ".join(parts)


def read_damaged(file: Node) -> Header:
    """The header of an image whose refcounts or snapshot table may be anywhere.

    What the first cluster must tell before anything can be checked is believed only as far as
    `headers.parse` believes it: `NotAnImage`, `UnsupportedFeature` or `ImageCorrupt`.
    """
    start = _read(file, 512)
    data = bytearray(_read(file, headers.cluster_size_of(start)))
    if len(data) < c.V2_HEADER_LENGTH:
        return headers.parse(bytes(data), file.size, file.name)
    end = int.from_bytes(data[40:48], "big") + int.from_bytes(data[36:40], "big") * 8
    table, clusters, snapshots, place = _PLACES.unpack_from(data, c.AT_REFCOUNT_TABLE)
    # For `parse` they lie behind everything, in a file that is long enough.
    stand_in = align_up(max(file.size, min(end, c.MAX_SIZE >> 1)), headers.cluster_size_of(start))
    _PLACES.pack_into(data, c.AT_REFCOUNT_TABLE, stand_in, 1, 0, 0)
    header = headers.parse(bytes(data), stand_in + 1, file.name)
    supported(header, file.name)
    limit = c.MAX_REFCOUNT_TABLE_BYTES >> header.cluster_bits
    return replace(
        header,
        refcount_table_offset=table,
        refcount_table_clusters=min(clusters, limit),
        snapshots=snapshots,
        snapshots_offset=place,
    )


def _read(file: Node, length: int) -> bytes:
    data = bytearray(min(file.size, length))
    if data:
        file.pread_into(memoryview(data), 0)
    return bytes(data)


def supported(header: Header, name: str) -> None:
    """`UnsupportedFeature` for an image with features that could hold references unknown here."""
    unknown = header.incompatible & ~c.KNOWN_INCOMPATIBLE
    if unknown:
        bit = (unknown & -unknown).bit_length() - 1
        text = header.feature_name(0, bit)
        raise UnsupportedFeature(f"{name}: incompatible bit {bit}, {text}, is not supported")

# SPDX-License-Identifier: Apache-2.0
"""Counts on disk against the references that were found: what leaks, and what is too low.

The counts that were found become, in place, the counts on disk (`settle`): the pass over the COPIED
flags needs the latter, and one array of a number for each host cluster is enough.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from fleece.formats.qcow2.stored import Stored, StoredCounts, Stretch
from fleece.formats.qcow2.tally import Counts, Numbers

Report = Callable[[str], None]

MOST_LINES: Final = 10_000
"""So many lines about clusters are printed; a hostile image could have a billion of them."""

_SEGMENT: Final = 1 << 20


@dataclass
class Comparison:
    """Clusters whose count is too high (``leaks``) or too low, blocks' worth that is unreadable.

    ``zero``: a cluster in use has the count 0, so somebody might take it. ``missing``: there is no
    block to put a count into. ``highest``: the last cluster with a count or a reference.
    """

    leaks: int = 0
    low: int = 0
    unreadable: int = 0
    zero: bool = False
    missing: bool = False
    highest: int = 0


class Comparer:
    """Walks over all clusters of ``found``."""

    def __init__(self, stored: StoredCounts, found: Counts, report: Report) -> None:
        self._stored = stored
        self._found = found
        self._report = report
        self._lines = 0

    def compare(self, *, repairing: str | None = None, settle: bool = False) -> Comparison:
        """Nothing is written. ``repairing`` chooses the words; ``settle`` is told above."""
        result = Comparison()
        for stretch in self._stored.stretches(len(self._found)):
            found = self._found[stretch.first : stretch.stop]
            try:
                stored = self._read(stretch)
            except OSError as error:
                self._unreadable(result, stretch, error)
                continue
            self._compare(result, stretch, stored, found, repairing)
            if settle:
                _settle(found, stored)
        self._say_more()
        return result

    def _read(self, stretch: Stretch) -> Stored | None:
        if stretch.block < 0:
            return None
        return self._stored.read(stretch.block)[: stretch.stop - stretch.first]

    def _unreadable(self, result: Comparison, stretch: Stretch, error: OSError) -> None:
        result.unreadable += stretch.stop - stretch.first
        last = stretch.stop - 1
        self._report(f"Can't get refcount for clusters {stretch.first}-{last}: {error.strerror}")

    def _compare(
        self,
        result: Comparison,
        stretch: Stretch,
        stored: Stored | None,
        found: Counts,
        repairing: str | None,
    ) -> None:
        used = nonzero(found) if stored is None else np.flatnonzero(found | stored)
        if not len(used):
            return
        result.highest = stretch.first + int(used[-1])
        wrong = used if stored is None else np.flatnonzero(stored != found)
        if not len(wrong):
            return
        have = np.zeros(len(wrong), np.uint64) if stored is None else stored[wrong]
        need = found[wrong]
        low = have < need
        result.low += int(low.sum())
        result.leaks += int((~low).sum())
        empty = (have == 0) & low
        result.zero = result.zero or bool(empty.any())
        result.missing = result.missing or (stored is None)
        self._tell(wrong + stretch.first, have, need, repairing)

    def _tell(self, clusters: Numbers, have: Stored, need: Counts, repairing: str | None) -> None:
        room = max(0, MOST_LINES - self._lines)
        self._lines += len(clusters)
        rows = zip(
            clusters[:room].tolist(), have[:room].tolist(), need[:room].tolist(), strict=True
        )
        for cluster, count, references in rows:
            word = _word(count, references, repairing)
            self._report(f"{word} cluster {cluster} refcount={count} reference={references}")

    def _say_more(self) -> None:
        if self._lines > MOST_LINES:
            self._report(f"... and {self._lines - MOST_LINES} clusters more")

    def raise_counts(self) -> int:
        """Raise what is too low, durably; how many clusters. Blocks that are missing stay so."""
        return self._change(np.maximum)

    def lower_counts(self) -> int:
        """Lower what is too high, durably; how many clusters."""
        return self._change(np.minimum)

    def _change(self, choose: Callable[[Stored, Counts], Stored]) -> int:
        changed = 0
        for stretch in self._stored.stretches(len(self._found)):
            if stretch.block < 0:
                continue
            try:
                stored = self._stored.read(stretch.block)
            except OSError:
                continue
            found = self._found[stretch.first : stretch.stop]
            part = stored[: len(found)]
            wanted = choose(part, found)
            different = int((wanted != part).sum())
            if different:
                part[:] = wanted
                self._stored.write(stretch.block, stored)
                changed += different
        if changed:
            self._stored.flush()
        return changed


def nonzero(counts: Counts) -> Numbers:
    """Where they are not 0. Quick about large parts that are: of a file that is mostly holes."""
    parts = [np.zeros(0, np.int64)]
    for start in range(0, len(counts), _SEGMENT):
        part = counts[start : start + _SEGMENT]
        if part.any():
            parts.append(np.flatnonzero(part) + start)
    return np.concatenate(parts)


def _settle(found: Counts, stored: Stored | None) -> None:
    """What was found becomes what is stored. Memory that nothing was ever put into stays so."""
    if stored is None:
        found[nonzero(found)] = 0
    else:
        found[:] = np.minimum(stored, np.iinfo(found.dtype).max)


def _word(count: int, references: int, repairing: str | None) -> str:
    if count < references:
        return "Repairing" if repairing == "all" else "ERROR"
    return "Repairing" if repairing else "Leaked"

# SPDX-License-Identifier: Apache-2.0
"""Replace zero clusters, which version 2 does not have, by what reads the same there.

Without a backing file that is "not allocated"; with one it is a cluster full of zeroes. In this
order, so that a crash leaks at worst: zeroes, then counts, then L2 tables, then counts once more
for what lost its last reference. Source: QEMU's ``docs/interop/qcow2``, "L2 table entry".
"""

from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fleece.block.node import Node
from fleece.errors import UnsupportedFeature
from fleece.formats.qcow2 import constants as c
from fleece.formats.qcow2.header import Header
from fleece.formats.qcow2.recount import Added, grown, recount
from fleece.formats.qcow2.references import References, count_references, read_tables

_ZEROES: Final = memoryview(bytes(1 << 20))
_MASK: Final = np.uint64(c.OFFSET_MASK)


def expand_zero_clusters(
    file: Node, header: Header, name: str, progress: Callable[[int, int], None] | None = None
) -> Header:
    """In all L2 tables of the disk and of its snapshots; the header as it is on disk then."""
    file = grown(file)
    found = count_references(file, header, data_file=False)
    needed = _count(file, header, found)
    if needed is None:
        return header
    if header.crypt_method:
        raise UnsupportedFeature(
            f"{name}: it is encrypted and has zero clusters, which compat=0.10 does not know; "
            "make such an image with: fleece image convert -o compat=0.10"
        )
    first = max(-(-file.size // header.cluster_size), len(found.counts))
    if len(needed):
        _write_zeroes(file, first << header.cluster_bits, len(needed) << header.cluster_bits)
        header = recount(file, header, name, added=Added(first, needed))
    _Rewriter(file, header, found, first).run(progress)
    return recount(file, header, name)


def _count(file: Node, header: Header, found: References) -> NDArray[np.uint32] | None:
    """References to each new cluster, in the order of tables and entries; None: no zero cluster."""
    parts: list[NDArray[np.uint32]] = []
    any_zero = False
    at = 0
    for offsets, words in read_tables(file, header, found.tables):
        users = found.table_users[at : at + len(offsets)].astype(np.uint32)
        at += len(offsets)
        zero = _zero(words)
        any_zero |= bool(zero.any())
        fresh = zero & _needs_cluster(words, header, found)
        parts.append(np.repeat(users, fresh.sum(axis=1)))
    if not any_zero:
        return None
    return np.concatenate(parts) if parts else np.zeros(0, np.uint32)


def _zero(words: NDArray[np.uint64]) -> NDArray[np.bool_]:
    return np.asarray(words & np.uint64(c.ZERO | c.COMPRESSED) == np.uint64(c.ZERO))


def _own(words: NDArray[np.uint64], header: Header, found: References) -> NDArray[np.bool_]:
    """Whether the cluster of an entry has no other reference, so that zeroes may be written."""
    clusters = ((words & _MASK) >> np.uint64(header.cluster_bits)).astype(np.int64)
    inside = (clusters > 0) & (clusters < len(found.counts))
    return np.asarray(inside & (found.counts[np.where(inside, clusters, 0)] == 1))


def _needs_cluster(
    words: NDArray[np.uint64], header: Header, found: References
) -> NDArray[np.bool_]:
    """Of zero entries: with a backing file, unless there is a cluster that can be used."""
    if header.backing_file is None:
        return np.zeros(words.shape, np.bool_)
    return ~_own(words, header, found)


def _write_zeroes(file: Node, offset: int, length: int) -> None:
    for at in range(0, length, len(_ZEROES)):
        file.pwrite(_ZEROES[: length - at], offset + at)
    file.flush()


class _Rewriter:
    """Writes the tables; new clusters are given out as `_count` counted them."""

    def __init__(self, file: Node, header: Header, found: References, first: int) -> None:
        self._file = file
        self._header = header
        self._found = found
        self._next = first << header.cluster_bits

    def run(self, progress: Callable[[int, int], None] | None) -> None:
        found = self._found
        self._zero_kept()
        self._file.flush()
        at = 0
        for offsets, words in read_tables(self._file, self._header, found.tables):
            for number, offset in enumerate(offsets.tolist()):
                alone = int(found.table_users[at + number]) == 1
                self._table(offset, words[number], alone)
            at += len(offsets)
            if progress is not None:
                progress(at, len(found.tables))
        self._file.flush()

    def _zero_kept(self) -> None:
        """What zero clusters have on disk is anything; it will be read."""
        size = self._header.cluster_size
        if self._header.backing_file is None:
            return
        for _, words in read_tables(self._file, self._header, self._found.tables):
            kept = words[_zero(words) & _own(words, self._header, self._found)] & _MASK
            for offset in kept.tolist():
                for start in range(0, size, len(_ZEROES)):
                    self._file.pwrite(_ZEROES[: size - start], offset + start)

    def _table(self, offset: int, words: NDArray[np.uint64], alone: bool) -> None:
        zero = _zero(words)
        if not zero.any():
            return
        new = words.copy()
        if self._header.backing_file is None:
            new[zero] = 0
        else:
            own = _own(words, self._header, self._found)
            new[zero & own] &= ~np.uint64(c.ZERO)
            fresh = np.flatnonzero(zero & ~own)
            flag = c.COPIED if alone else 0
            for index in fresh.tolist():
                new[index] = self._next | flag
                self._next += self._header.cluster_size
        self._file.pwrite(memoryview(new.astype(">u8").tobytes()), offset)

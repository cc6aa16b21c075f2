# SPDX-License-Identifier: Apache-2.0
"""`MetadataMap`: what kind of metadata each host cluster holds, so that no write hits any.

One byte per 16 host clusters says whether there is any, so that a look costs a search in bytes;
only where there is some is it looked for in what was found at open (a sorted array) and in what
changed since (a dict). Source: QEMU's option ``overlap-check`` of the qcow2 driver: the names of
the kinds, and which of the levels has which. Bitmap tables and their data, and the LUKS header, are
ours; so is that all of them are cheap.
"""

from functools import partial
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from fleece.block.node import Node
from fleece.formats.qcow2 import constants as c
from fleece.formats.qcow2.header import Header
from fleece.formats.qcow2.structures import (
    bitmap_directory,
    bitmap_tables,
    crypto_header,
    snapshot_l1_tables,
)
from fleece.formats.qcow2.tally import Numbers, Problem

if TYPE_CHECKING:
    from collections.abc import Callable

# Kinds, as bits of ``overlap_check``
MAIN_HEADER: Final = 1 << 0
ACTIVE_L1: Final = 1 << 1
ACTIVE_L2: Final = 1 << 2
REFCOUNT_TABLE: Final = 1 << 3
REFCOUNT_BLOCK: Final = 1 << 4
SNAPSHOT_TABLE: Final = 1 << 5
INACTIVE_L1: Final = 1 << 6
INACTIVE_L2: Final = 1 << 7
BITMAP_DIRECTORY: Final = 1 << 8
BITMAP_DATA: Final = 1 << 9  # bitmap tables too
LUKS_HEADER: Final = 1 << 10

# Levels
NONE: Final = 0
CONSTANT: Final = (
    MAIN_HEADER | ACTIVE_L1 | REFCOUNT_TABLE | SNAPSHOT_TABLE | BITMAP_DIRECTORY | LUKS_HEADER
)
CACHED: Final = CONSTANT | ACTIVE_L2 | REFCOUNT_BLOCK | INACTIVE_L1 | BITMAP_DATA
ALL: Final = CACHED | INACTIVE_L2

LEVELS: Final = {"none": NONE, "constant": CONSTANT, "cached": CACHED, "all": ALL}
"""The values of the option ``overlap-check.template``."""

SWITCHES: Final = {
    "main-header": MAIN_HEADER,
    "active-l1": ACTIVE_L1,
    "active-l2": ACTIVE_L2,
    "refcount-table": REFCOUNT_TABLE,
    "refcount-block": REFCOUNT_BLOCK,
    "snapshot-table": SNAPSHOT_TABLE,
    "inactive-l1": INACTIVE_L1,
    "inactive-l2": INACTIVE_L2,
    "bitmap-directory": BITMAP_DIRECTORY,
    "bitmap-data": BITMAP_DATA,
    "luks-header": LUKS_HEADER,
}
"""The options ``overlap-check.NAME``, which override the level; the last two are ours."""

NAMES: Final = {
    MAIN_HEADER: "qcow2_header",
    ACTIVE_L1: "active L1 table",
    ACTIVE_L2: "active L2 table",
    REFCOUNT_TABLE: "refcount table",
    REFCOUNT_BLOCK: "refcount block",
    SNAPSHOT_TABLE: "snapshot table",
    INACTIVE_L1: "inactive L1 table",
    INACTIVE_L2: "inactive L2 table",
    BITMAP_DIRECTORY: "bitmap directory",
    BITMAP_DATA: "bitmap",
    LUKS_HEADER: "LUKS header",
}
"""What messages call them."""

_GROUP: Final = 4  # clusters of one byte of the filter, as a shift
# Of what lies behind 2^28 clusters (16 TiB at 64 KiB) every look is exact.
_MOST_GROUPS: Final = 1 << 24


class MetadataMap:
    """Which host clusters hold which metadata.

    ``checks``: bits of the kinds that `hit` tells of; all are remembered. `hit` may be called
    without a lock, the others need the metadata lock.
    """

    def __init__(self, header: Header, checks: int = ALL) -> None:
        self.checks = checks
        self._header = header
        self._bits = header.cluster_bits
        self._filter = bytearray()
        self._far = False
        self._clusters: Numbers = np.zeros(0, np.int64)
        self._kinds: NDArray[np.uint16] = np.zeros(0, np.uint16)
        self._changed: dict[int, int] = {}
        self._inactive: Callable[[], None] | None = None
        self.claim(MAIN_HEADER, 0, header.cluster_size)

    def load(self, file: Node, header: Header | None = None) -> None:
        """Find all metadata of an image, as far as its tables can be read and believed.

        The L2 tables of snapshots are looked for when the first `hit` would tell of them. To be
        called again, with the new header, when snapshots or bitmaps were changed: the node is
        drained and flushed then, so that the tables on disk are those in memory.
        """
        self._header = header or self._header
        self._changed = {}
        found = _Found(file, self._header)
        found.main_tables()
        self._inactive = None
        if snapshots := found.snapshots():
            self._inactive = partial(self._load_inactive, file, snapshots)
        found.bitmaps()
        if span := crypto_header(self._header, _ignore):
            found.add(LUKS_HEADER, *span)
        self._clusters, self._kinds = found.sorted()
        self._set_filter(self._clusters)

    def reload(self, file: Node, header: Header) -> None:
        """Find it again after the tables were rearranged; all of them are on disk."""
        self._header = header
        self._changed, self._filter, self._far = {}, bytearray(), False
        self.claim(MAIN_HEADER, 0, header.cluster_size)
        self.load(file)

    def _load_inactive(self, file: Node, tables: list[tuple[int, int]]) -> None:
        found = _Found(file, self._header)
        for offset, entries in tables:
            found.l2_tables(INACTIVE_L2, offset, entries)
        for cluster in found.sorted()[0].tolist():
            self._change(cluster, self._of(cluster) | INACTIVE_L2)

    def _set_filter(self, clusters: Numbers) -> None:
        groups = clusters >> _GROUP
        near = groups[groups < _MOST_GROUPS]
        self._far = self._far or len(near) < len(groups)
        if len(near):
            self._extend(int(near.max()))
            np.frombuffer(self._filter, np.uint8)[near] = 1

    def _extend(self, group: int) -> None:
        missing = group + 1 - len(self._filter)
        if missing > 0:
            self._filter = self._filter + bytes(missing)

    def _of(self, cluster: int) -> int:
        """All kinds of one cluster."""
        kinds = self._changed.get(cluster)
        if kinds is not None:
            return kinds
        at = int(np.searchsorted(self._clusters, cluster))
        there = at < len(self._clusters) and self._clusters[at] == cluster
        return int(self._kinds[at]) if there else 0

    def _change(self, cluster: int, kinds: int) -> None:
        self._changed[cluster] = kinds
        group = cluster >> _GROUP
        if group >= _MOST_GROUPS:
            self._far = True
            return
        self._extend(group)
        self._filter[group] = 1

    def _numbers(self, offset: int, length: int) -> range:
        return range(offset >> self._bits, ((offset + length - 1) >> self._bits) + 1)

    def claim(self, kind: int, offset: int, length: int) -> None:
        """These bytes of the file hold metadata of this kind from now on."""
        for cluster in self._numbers(offset, length):
            self._change(cluster, self._of(cluster) | kind)

    def release(self, kind: int, offset: int, length: int) -> None:
        """They do not any more: a kind has one claim on a cluster, however often it was made."""
        for cluster in self._numbers(offset, length):
            if kinds := self._of(cluster):
                self._change(cluster, kinds & ~kind)

    def forget(self, kinds: int) -> None:
        """No cluster holds metadata of these kinds any more."""
        self._kinds = self._kinds & np.uint16(~kinds & 0xFFFF)
        self._changed = {n: held & ~kinds for n, held in self._changed.items()}
        if kinds & INACTIVE_L2:
            self._inactive = None

    def hit(self, offset: int, length: int, *, ignore: int = 0) -> str | None:
        """What a write of these bytes would destroy, in words; None if it harms nothing.

        ``ignore``: bits of kinds that the writer writes.
        """
        first, last = offset >> self._bits, (offset + length - 1) >> self._bits
        if self._inactive is not None and self.checks & INACTIVE_L2 & ~ignore:
            load, self._inactive = self._inactive, None
            load()
        if self._filter.find(1, first >> _GROUP, (last >> _GROUP) + 1) < 0 and (
            not self._far or last >> _GROUP < _MOST_GROUPS
        ):
            return None
        found = self._kinds_of(first, last + 1) & self.checks & ~ignore
        return NAMES[found & -found] if found else None

    def _kinds_of(self, first: int, stop: int) -> int:
        low, high = np.searchsorted(self._clusters, (first, stop)).tolist()
        changed = {n: self._changed[n] for n in range(first, stop) if n in self._changed}
        found = 0
        for kinds in changed.values():
            found |= kinds
        for at in range(low, high):
            if int(self._clusters[at]) not in changed:
                found |= int(self._kinds[at])
        return found

    def known(self, first: int, count: int) -> NDArray[np.bool_]:
        """For each of ``count`` clusters from ``first``, whether it holds any metadata."""
        out = np.zeros(count, np.bool_)
        low, high = np.searchsorted(self._clusters, (first, first + count)).tolist()
        out[self._clusters[low:high] - first] = self._kinds[low:high] != 0
        changed = self._changed
        for cluster in changed if len(changed) < count else range(first, first + count):
            if first <= cluster < first + count and cluster in changed:
                out[cluster - first] = changed[cluster] != 0
        return out


class _Found:
    """Metadata as the tables on disk tell of it. What cannot be is left out."""

    def __init__(self, file: Node, header: Header) -> None:
        self._file = file
        self._header = header
        self._bits = header.cluster_bits
        self._most = file.size >> self._bits
        self._parts: list[tuple[int, Numbers]] = []

    def add(self, kind: int, offset: int, length: int) -> bool:
        """Clusters of a span; False if it is not in the file."""
        stop = ((offset + length - 1) >> self._bits) + 1
        if length <= 0 or offset >> self._bits > self._most or stop > self._most + 1:
            return False
        self._parts.append((kind, np.arange(offset >> self._bits, stop)))
        return True

    def add_all(self, kind: int, offsets: Numbers) -> None:
        """One cluster at each of these."""
        clusters = offsets >> self._bits
        self._parts.append((kind, clusters[(offsets != 0) & (clusters <= self._most)]))

    def main_tables(self) -> None:
        """Header, active L1 and L2 tables, refcount table and blocks."""
        header = self._header
        self.add(MAIN_HEADER, 0, header.cluster_size)
        self.add(ACTIVE_L1, header.l1_offset, header.l1_size * 8)
        self.l2_tables(ACTIVE_L2, header.l1_offset, header.l1_size)
        length = header.refcount_table_clusters << self._bits
        self.add(REFCOUNT_TABLE, header.refcount_table_offset, length)
        entries = self._entries(header.refcount_table_offset, length // 8)
        self.add_all(REFCOUNT_BLOCK, (entries & np.uint64(~0x1FF & c.MAX_SIZE)).astype(np.int64))

    def l2_tables(self, kind: int, offset: int, entries: int) -> None:
        """The L2 tables of an L1 table."""
        l1 = self._entries(offset, entries)
        self.add_all(kind, (l1 & np.uint64(c.OFFSET_MASK)).astype(np.int64))

    def _entries(self, offset: int, count: int) -> NDArray[np.uint64]:
        length = max(0, min(count * 8, self._file.size - offset)) & ~7
        data = bytearray(length)
        if length:
            self._file.pread_into(memoryview(data), offset)
        return np.frombuffer(data, ">u8").astype(np.uint64)

    def snapshots(self) -> list[tuple[int, int]]:
        """Add the snapshot table and the L1 tables; ``(offset, entries)`` of the latter."""

        def found(offset: int, length: int) -> bool:
            return self.add(SNAPSHOT_TABLE, offset, length)

        tables = snapshot_l1_tables(self._file, self._header, found, _ignore)
        return [span for span in tables if self.add(INACTIVE_L1, span[0], span[1] * 8)]

    def bitmaps(self) -> None:
        """Add the directory, the tables and the data of bitmaps."""
        place = bitmap_directory(self._header)

        def found(offset: int, length: int) -> bool:
            is_directory = place is not None and offset == place[1]
            return self.add(BITMAP_DIRECTORY if is_directory else BITMAP_DATA, offset, length)

        for offsets in bitmap_tables(self._file, self._header, found, _ignore):
            self.add_all(BITMAP_DATA, offsets)

    def sorted(self) -> tuple[Numbers, NDArray[np.uint16]]:
        """All clusters, ascending, each once, and the bits of their kinds."""
        empty = np.zeros(0, np.int64)
        clusters = np.concatenate([empty, *(part for _, part in self._parts)])
        kinds = [np.full(len(part), kind, np.uint16) for kind, part in self._parts]
        bits = np.concatenate([np.zeros(0, np.uint16), *kinds])
        order = np.argsort(clusters, kind="stable")
        clusters, bits = clusters[order], bits[order]
        starts = np.flatnonzero(np.diff(clusters, prepend=-1))
        if not len(starts):
            return empty, bits
        return clusters[starts], np.bitwise_or.reduceat(bits, starts)


def _ignore(_: Problem) -> None:
    """What is wrong with the tables is for the checker to say."""

# SPDX-License-Identifier: Apache-2.0
"""Where the bytes of a disk live, layer by layer: what ``qemu-img map`` prints (QEMU 7.2).

A `Batch` holds some ten thousand entries as numpy arrays, so a map of any length streams in
constant memory. Each layer answers for a window of the disk; where it has nothing the layer below
does, and neighbours that go on from each other are joined at the end.

The entries are those of a disk that nobody writes: the L2 tables are read from the file.
"""

from collections.abc import Iterator
from typing import Final, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fleece.block.node import Node
from fleece.block.window import Window
from fleece.errors import ImageError
from fleece.formats.info import actual_size
from fleece.formats.opening import Layer
from fleece.formats.qcow2 import constants as c
from fleece.formats.qcow2.header import Header
from fleece.units import align_up
from nbdwire.constants import STATE_HOLE, STATE_ZERO

Ints: TypeAlias = NDArray[np.int64]
Codes: TypeAlias = NDArray[np.uint16]

DATA: Final = 1
ZERO: Final = 2
PRESENT: Final = 4
OFFSET: Final = 8
COMPRESSED: Final = 16
DEPTH_SHIFT: Final = 8
"""An entry's code: the bits above, and how many layers below the top it was found."""

_SECTOR: Final = 512
_MOST_ENTRIES: Final = 1 << 13
_MOST_STRETCHES: Final = 1 << 20


class Batch(NamedTuple):
    """Entries in order without gaps: ``starts[i]`` to ``starts[i + 1]``, the last one to ``stop``.

    ``hosts`` is where the first byte lies in the file of its layer; 0 without `OFFSET`.
    """

    starts: Ints
    codes: Codes
    hosts: Ints
    stop: int

    @property
    def lengths(self) -> Ints:
        """Bytes of each entry."""
        return np.diff(self.starts, append=self.stop)


class _Source(Protocol):
    """One layer. ``size`` is in bytes, whole sectors."""

    size: int

    def batch(self, start: int, stop: int) -> Batch:
        """What the layer knows of the beginning of [start, stop); code 0: nothing is there."""
        ...


def walk(layers: list[Layer], start: int, stop: int) -> Iterator[Batch]:
    """The entries of [start, stop) of the disk whose top is ``layers[0]``. OSError."""
    sources = [_source(layer) for layer in layers]
    last: Batch | None = None
    stop = min(stop, sources[0].size)
    while start < stop:
        batch = _joined(_chain(sources, start, stop, 0))
        start = batch.stop
        if last is not None:
            batch = _continued(last, batch)
            if len(last.starts) > 1:
                yield Batch(
                    last.starts[:-1], last.codes[:-1], last.hosts[:-1], int(last.starts[-1])
                )
        last = batch
    if last is not None:
        yield last


def _without_last(batch: Batch) -> Batch:
    starts, codes, hosts, _ = batch
    return Batch(starts[:-1], codes[:-1], hosts[:-1], int(starts[-1]))


def disk_size(layers: list[Layer]) -> int:
    """Bytes of the disk, in whole sectors as QEMU has it."""
    return _source(layers[0]).size


def _continued(last: Batch, batch: Batch) -> Batch:
    """``batch`` with the last entry of the one before it in front, joined if it goes on."""
    front = Batch(
        np.concatenate([last.starts[-1:], batch.starts]),
        np.concatenate([last.codes[-1:], batch.codes]),
        np.concatenate([last.hosts[-1:], batch.hosts]),
        batch.stop,
    )
    return _joined(front)


def _joined(batch: Batch) -> Batch:
    """Neighbours of equal code become one where the second goes on behind the first."""
    starts, codes, hosts, stop = batch
    goes_on = hosts[1:] - hosts[:-1] == np.diff(starts)
    same = (codes[1:] == codes[:-1]) & (goes_on | (codes[1:] & OFFSET == 0))
    keep = np.flatnonzero(np.concatenate([[True], ~same]))
    return Batch(starts[keep], codes[keep], hosts[keep], stop)


def _chain(sources: list[_Source], start: int, stop: int, depth: int) -> Batch:
    """What layer ``depth`` and those below it know of the beginning of [start, stop)."""
    parts: list[Batch] = []
    below = stop
    while depth < len(sources):
        source = sources[depth]
        if start >= source.size:
            break
        part = source.batch(start, min(below, source.size))
        parts.append(part)
        below = part.stop
        if np.all(part.codes & (DATA | ZERO)):
            break
        depth += 1
    return _merged(parts, below)


def _merged(parts: list[Batch], stop: int) -> Batch:
    """The topmost layer that has something wins; where none has, it is zero at the lowest."""
    stop = min(part.stop for part in parts)
    starts = parts[0].starts
    if len(parts) > 1:
        starts = np.unique(np.concatenate([part.starts for part in parts]))
        starts = starts[starts < stop]
    codes = np.zeros(len(starts), np.uint16)
    hosts = np.zeros(len(starts), np.int64)
    open_ = np.ones(len(starts), bool)
    for depth, part in enumerate(parts):
        at = np.searchsorted(part.starts, starts, "right") - 1
        found, host = part.codes[at], part.hosts[at] + (starts - part.starts[at])
        codes[open_] = found[open_] | np.uint16(depth << DEPTH_SHIFT)
        hosts[open_] = np.where(found & OFFSET, host, 0)[open_]
        open_ &= found & (DATA | ZERO) == 0
    codes[open_] |= ZERO
    return Batch(starts, codes, hosts, stop)


def _source(layer: Layer) -> _Source:
    if layer.header is not None:
        if layer.header.extended_l2:
            return _Subclusters(layer, layer.header)
        return _Clusters(layer, layer.header)
    return _Encrypted(layer) if layer.driver == "luks" else _Raw(layer)


class _Encrypted:
    """A LUKS file: data all over, and none of it lies anywhere as it is."""

    def __init__(self, layer: Layer) -> None:
        from fleece.formats.qcow2 import luks

        header = luks.read_header(layer.node, 0, layer.node.size, layer.name)
        self.size = align_up(layer.node.size - header.length, _SECTOR)

    def batch(self, start: int, stop: int) -> Batch:
        """One entry."""
        codes = np.array([DATA | PRESENT], np.uint16)
        return Batch(np.array([start], np.int64), codes, np.zeros(1, np.int64), stop)


class _Raw:
    """A raw image: data and holes of its file, or what an NBD server says."""

    def __init__(self, layer: Layer) -> None:
        self._base = layer.options.get("offset", 0) if layer.driver == "raw" else 0
        window = layer.options.get("size") if layer.driver == "raw" else None
        self._node = layer.node
        self.size = align_up(Window(layer.node, self._base, window).size, _SECTOR)
        self._known: Batch | None = None

    def batch(self, start: int, stop: int) -> Batch:
        """All entries have an offset; PRESENT, as the file has every byte of the disk."""
        if self._known is None or not self._known.starts[0] <= start < self._known.stop:
            self._known = self._ask(start, stop)
        return _part(self._known, start, stop)

    def _ask(self, start: int, stop: int) -> Batch:
        end = min(stop, self._node.size - self._base)
        if start >= end:  # the rest of the last sector
            return self._batch([start], [STATE_HOLE | STATE_ZERO], stop)
        found = self._node.extents(self._base + start, end - start)
        starts = [extent.offset - self._base for extent in found]
        statuses = [extent.status for extent in found]
        covered = found[-1].offset + found[-1].length - self._base
        if covered == end < stop == self.size:
            if statuses[-1] & STATE_ZERO == 0:
                starts, statuses = [*starts, end], [*statuses, STATE_HOLE | STATE_ZERO]
            covered = stop
        return self._batch(starts, statuses, covered)

    def _batch(self, starts: list[int], statuses: list[int], stop: int) -> Batch:
        places = np.array(starts, np.int64)
        status = np.array(statuses, np.uint16)
        codes = np.where(status & STATE_HOLE, OFFSET, DATA | OFFSET).astype(np.uint16)
        codes[status & STATE_ZERO != 0] |= ZERO
        codes[codes & (DATA | ZERO) != 0] |= PRESENT
        return Batch(places, codes, places + self._base, stop)


def _part(batch: Batch, start: int, stop: int) -> Batch:
    """The entries of ``batch`` from ``start`` up to ``stop`` or its own end."""
    stop = min(stop, batch.stop)
    first = int(np.searchsorted(batch.starts, start, "right")) - 1
    last = int(np.searchsorted(batch.starts, stop, "left"))
    starts = batch.starts[first:last].copy()
    hosts = batch.hosts[first:last].copy()
    hosts[0] += start - starts[0]
    starts[0] = start
    return Batch(starts, batch.codes[first:last], hosts, stop)


class _Clusters:
    """The active tables of a qcow2 image."""

    parts = 1
    """Pieces of a cluster that have a state of their own."""

    def __init__(self, layer: Layer, header: Header) -> None:
        self.size = align_up(header.size, _SECTOR)
        self._file = layer.node
        self._name = layer.name
        self._header = header
        self._cover = header.l2_entries << header.cluster_bits
        self._tables = max(1, _MOST_ENTRIES // (header.l2_entries * self.parts))
        self._l1 = _read_table(layer.node, header.l1_offset, header.l1_size)
        self._l1 &= np.uint64(c.OFFSET_MASK)
        self._used = np.flatnonzero(self._l1)
        self._has_offset = 0 if header.crypt_method else OFFSET
        self._holes = _recursion(layer, header)
        self._known: Batch | None = None

    def batch(self, start: int, stop: int) -> Batch:
        """What the tables of the beginning say; a stretch without tables is one entry."""
        if self._known is None or not self._known.starts[0] <= start < self._known.stop:
            self._known = self._look(start)
        return _part(self._known, start, stop)

    def _look(self, start: int) -> Batch:
        index = start // self._cover
        at = int(np.searchsorted(self._used, index))
        following = int(self._used[at]) if at < len(self._used) else len(self._l1)
        begin = index * self._cover
        if following > index:
            stop = min(following * self._cover, self.size)
            return Batch(np.array([begin]), np.zeros(1, np.uint16), np.zeros(1, np.int64), stop)
        count = min(self._tables, len(self._l1) - index)
        entries = self._entries(index, count)
        codes, hosts = self._decode(entries)
        unit = self._header.cluster_size // self.parts
        starts = begin + np.arange(len(codes), dtype=np.int64) * unit
        batch = Batch(starts, codes, hosts, begin + count * self._cover)
        batch = _joined(batch)
        batch = batch if self._holes is None else self._holes.mark(batch)
        return _part(batch, begin, self.size)

    def _entries(self, index: int, count: int) -> NDArray[np.uint64]:
        """The L2 entries of ``count`` tables as they are; zeroes where there is no table."""
        size = self._header.cluster_size
        data = bytearray(count * size)
        view = memoryview(data)
        for number in range(count):
            offset = int(self._l1[index + number])
            if offset & (size - 1):
                raise self._corrupt(f"L1 entry {index + number} points inside a cluster")
            if offset:
                self._read(view[number * size : (number + 1) * size], offset)
        return np.frombuffer(data, ">u8").astype(np.uint64)

    def _read(self, view: memoryview, offset: int) -> None:
        if offset < self._file.size:
            self._file.pread_into(view, offset)

    def _corrupt(self, what: str) -> ImageError:
        return ImageError(
            f"{self._name}: the image is corrupt: {what}; see: fleece image check {self._name}"
        )

    def _decode(self, entries: NDArray[np.uint64]) -> tuple[Codes, Ints]:
        """Codes and host offsets of whole clusters (qcow2, "L1 and L2 table entries")."""
        hosts, packed, there = self._places(entries)
        zero = (entries & np.uint64(c.ZERO) != 0) & ~packed
        if self._header.version == 2 and zero.any():
            raise self._corrupt("a version 2 image has zero clusters")
        codes = np.zeros(len(entries), np.uint16)
        codes[there] = DATA | PRESENT | self._has_offset
        codes[packed] = DATA | PRESENT | COMPRESSED
        codes[zero] = ZERO | PRESENT
        codes[zero & (hosts != 0)] |= self._has_offset
        hosts[codes & OFFSET == 0] = 0
        return codes, hosts

    def _places(
        self, entries: NDArray[np.uint64]
    ) -> tuple[Ints, NDArray[np.bool_], NDArray[np.bool_]]:
        """``(host offsets, which are compressed, which have a host cluster)``."""
        packed = entries & np.uint64(c.COMPRESSED) != 0
        hosts = (entries & np.uint64(c.OFFSET_MASK)).astype(np.int64)
        hosts[packed] = 0
        if (hosts & (self._header.cluster_size - 1)).any():
            raise self._corrupt("an L2 entry points inside a cluster")
        there = hosts != 0
        if self._header.has_data_file:
            there |= entries & np.uint64(c.COPIED) != 0
        return hosts, packed, there & ~packed


class _Subclusters(_Clusters):
    """An image with extended L2 entries: each of the 32 parts of a cluster has a state."""

    parts = c.SUBCLUSTERS

    def _decode(self, entries: NDArray[np.uint64]) -> tuple[Codes, Ints]:
        words, bitmaps = entries[0::2], entries[1::2]
        hosts, packed, there = self._places(words)
        bits = np.arange(self.parts, dtype=np.uint64)
        allocated = (bitmaps[:, None] >> bits & np.uint64(1)).astype(bool)
        zero = (bitmaps[:, None] >> (bits + np.uint64(32)) & np.uint64(1)).astype(bool)
        if (allocated & zero).any() or (allocated & ~there[:, None]).any():
            raise self._corrupt("an L2 entry has a subcluster bitmap that cannot be")
        codes = np.zeros((len(words), self.parts), np.uint16)
        codes[there] = self._has_offset  # told even of a part that has no data of its own
        codes[allocated] |= DATA | PRESENT
        codes[zero] |= ZERO | PRESENT
        codes[packed] = DATA | PRESENT | COMPRESSED
        unit = self._header.cluster_size // self.parts
        places = hosts[:, None] + np.arange(self.parts, dtype=np.int64) * unit
        places[codes & OFFSET == 0] = 0
        return codes.reshape(-1), places.reshape(-1)


def _read_table(file: Node, offset: int, count: int) -> NDArray[np.uint64]:
    data = bytearray(count * 8)
    if data:
        file.pread_into(memoryview(data), offset)
    return np.frombuffer(data, ">u8").astype(np.uint64)


class _Holes:
    """Where a file reads as zeroes because it has nothing there, and behind its end."""

    def __init__(self, file: Node) -> None:
        starts, zeroes = [], []
        at, size = 0, file.size
        while at < size:
            for offset, length, status in file.extents(at, size - at):
                starts.append(offset)
                zeroes.append(bool(status & STATE_ZERO))
                at = offset + length
            if len(starts) > _MOST_STRETCHES:  # the rest is taken for data: never wrong
                starts.append(at)
                zeroes.append(False)
                break
        else:
            starts.append(size)
            zeroes.append(True)
        self._starts = np.array(starts, np.int64)
        self._zeroes = np.array(zeroes, bool)

    def mark(self, batch: Batch) -> Batch:
        """``batch`` cut where holes begin and end: data that lies in one is zero as well."""
        starts, codes, hosts, stop = batch
        data = codes & (DATA | OFFSET) == DATA | OFFSET
        first = self._stretch(hosts)
        more = np.where(data, self._stretch(hosts + batch.lengths - 1) - first, 0)
        entry = np.repeat(np.arange(len(starts)), more + 1)
        number = np.arange(len(entry)) - np.repeat(np.cumsum(more + 1) - more - 1, more + 1)
        stretch = first[entry] + number
        skipped = np.where(number, self._starts[stretch] - hosts[entry], 0)
        marked = codes[entry]
        marked[data[entry] & self._zeroes[stretch]] |= ZERO
        places = hosts[entry] + skipped
        return Batch(starts[entry] + skipped, marked, places, stop)

    def _stretch(self, hosts: Ints) -> NDArray[np.intp]:
        """The number of the stretch in which each of ``hosts`` lies."""
        return np.asarray(np.searchsorted(self._starts, hosts, "right") - 1)


def _recursion(layer: Layer, header: Header) -> _Holes | None:
    """The file's holes, if they count as zeroes: where metadata seem to be preallocated only.

    QEMU's rule (7.2): at least a ninth more clusters are in use than the file takes on disk.
    """
    actual = actual_size(layer.node)
    if actual is None:
        return None
    real = actual // header.cluster_size
    threshold = max(real * 10 // 9, real + 2)
    clusters = -(-layer.node.size // header.cluster_size)
    if _used_clusters(layer.node, header, clusters, threshold) < threshold:
        return None
    return _Holes(layer.node if layer.data is None else layer.data)


def _used_clusters(file: Node, header: Header, clusters: int, enough: int) -> int:
    """How many of the first ``clusters`` of the file have a count; not beyond ``enough``."""
    table = _read_table(
        file,
        header.refcount_table_offset,
        (header.refcount_table_clusters << header.cluster_bits) // 8,
    )
    bits = 1 << header.refcount_order
    per_block = header.cluster_size * 8 // bits
    used = 0
    for number in np.flatnonzero(table[: -(-clusters // per_block)]).tolist():
        offset = int(table[number])
        if used >= enough or offset % header.cluster_size or offset >= file.size:
            break
        data = bytearray(header.cluster_size)
        file.pread_into(memoryview(data), offset)
        counts = _nonzero(data, bits)[: clusters - number * per_block]
        used += int(np.count_nonzero(counts))
    return used


def _nonzero(data: bytearray, bits: int) -> NDArray[np.bool_]:
    """One item for each count of a refcount block: whether there is a reference."""
    if bits >= 8:
        each = np.frombuffer(data, np.uint8).reshape(-1, bits // 8)
    else:
        each = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little").reshape(-1, bits)
    return np.asarray(each.any(axis=1))

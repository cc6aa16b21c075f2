# SPDX-License-Identifier: Apache-2.0
"""The sink of a copy that writes identical clusters once.

The second guest cluster with the same bytes gets an L2 entry for the host cluster of the first one,
whose count goes up; the COPIED flags of both are clear then, so that whoever writes to one of them,
QEMU too, takes a new cluster for it. That is plain qcow2: there is nothing on disk that a program
would have to know. See `fleece.formats.qcow2.sharing` for the end of it, the last of the sharers.

Clusters are found by a hash of 128 bits, and compared before they are shared. The index is bounded:
what was used least recently is forgotten, which costs space and nothing else.
"""

import threading
from collections import OrderedDict
from hashlib import blake2b
from typing import Final, NamedTuple

import numpy as np

from fleece.block import zeroes
from fleece.errors import UnsupportedFeature
from fleece.formats.qcow2 import compressed
from fleece.formats.qcow2 import constants as c
from fleece.formats.qcow2.image import Qcow2Node

ENTRY_BYTES: Final = 320
"""What one cluster in the index costs, measured."""

_LEAST: Final = 1024
_ZERO: Final = b""


class Found(NamedTuple):
    """The L2 entry of a stored cluster (its COPIED flag does not count), and who had it first."""

    entry: int
    guest: int


class Index:
    """From hashes to clusters, at most ``most`` of them; the least recently used ones go first."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._clusters: OrderedDict[bytes, Found] = OrderedDict()

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._clusters

    def __len__(self) -> int:
        return len(self._clusters)

    def get(self, digest: bytes) -> Found | None:
        """Where such a cluster is."""
        with self._lock:
            found = self._clusters.get(digest)
            if found is not None:
                self._clusters.move_to_end(digest)
            return found

    def put(self, digest: bytes, found: Found) -> None:
        """It is there; forget another one if there is no room."""
        with self._lock:
            self._clusters[digest] = found
            self._clusters.move_to_end(digest)
            if len(self._clusters) > self._most:
                self._clusters.popitem(last=False)


class Cluster(NamedTuple):
    """One cluster of a piece; ``digest`` is empty for zeroes. ``packed``: compressed, if it is."""

    start: int
    stop: int
    digest: bytes
    packed: bytes | None


class Dedup:
    """Writes into ``target``, a new image. A `fleece.block.copy.Sink`, for a copy in order.

    ``memory`` bounds the index, in bytes. ``shared``: how many clusters were not written.
    """

    def __init__(self, target: Qcow2Node, memory: int, *, is_zero: bool, compress: bool) -> None:
        if target.header.has_data_file:
            raise UnsupportedFeature(
                f"{target.name}: clusters in a data file have fixed places and cannot be shared"
            )
        self.block = target.header.cluster_size
        self.index = Index(max(_LEAST, memory // ENTRY_BYTES))
        self.shared = 0
        self._target = target
        self._bits = target.header.cluster_bits
        self._type = target.header.compression_type
        self._is_zero = is_zero
        self._compress = compress
        self._buffer = memoryview(bytearray(self.block))

    def prepare(self, view: memoryview, offset: int) -> list[Cluster]:
        """Hash each cluster, and compress those that are not known."""
        found = []
        for start in range(0, len(view), self.block):
            part = view[start : start + self.block]
            digest = packed = None
            if zeroes.is_zero(part):
                digest = _ZERO
            else:
                digest = blake2b(part, digest_size=16).digest()
                if self._compress and digest not in self.index:
                    packed = self._pack(part)
            found.append(Cluster(start, start + len(part), digest, packed))
        return found

    def _pack(self, part: memoryview) -> bytes | None:
        return compressed.pack(part, self._type, self._bits)

    def store(self, prepared: list[Cluster], view: memoryview, offset: int) -> None:
        """What is new in as few writes as may be, in order; the rest by an entry."""
        new: list[Cluster] = []
        for one in prepared:
            if any(one.digest == other.digest for other in new):
                self._write(new, view, offset)
                new = []
            part = view[one.start : one.stop]
            if one.digest == _ZERO:
                self._write(new, view, offset)
                new = []
                self.zero(offset + one.start, len(part))
            elif not self._share(one, part, offset + one.start):
                new.append(one)
            elif new:
                self._write(new, view, offset)
                new = []
        self._write(new, view, offset)

    def zero(self, offset: int, length: int) -> None:
        """Nothing, where the target is zero."""
        if not self._is_zero:
            self._target.zero(offset, length)

    def _write(self, new: list[Cluster], view: memoryview, offset: int) -> None:
        run: list[Cluster] = []
        for one in new:
            packed = one.packed
            if self._compress and packed is None:
                packed = self._pack(view[one.start : one.stop])
            if packed is None and (not run or run[-1].stop == one.start):
                run.append(one)
                continue
            self._write_run(run, view, offset)
            run = []
            if packed is None:
                run.append(one)
            else:
                self._target.write_packed(packed, offset + one.start)
                self._remember(one, offset)
        self._write_run(run, view, offset)

    def _write_run(self, run: list[Cluster], view: memoryview, offset: int) -> None:
        if run:
            self._target.pwrite(view[run[0].start : run[-1].stop], offset + run[0].start)
        for one in run:
            self._remember(one, offset)

    def _remember(self, one: Cluster, offset: int) -> None:
        guest = (offset + one.start) >> self._bits
        if one.stop - one.start < self.block:
            return  # the end of a disk, in a cluster that has more
        with self._target._lock:
            entry = self._target._map.entry(guest) & ~c.COPIED
        if entry:
            self.index.put(one.digest, Found(entry, guest))

    def _share(self, one: Cluster, part: memoryview, offset: int) -> bool:
        """Refer to a cluster with the same bytes; False if there is none that can be had."""
        found = self.index.get(one.digest) if len(part) == self.block else None
        if found is None or not self._equal(found.entry, part):
            return False
        node, guest = self._target, offset >> self._bits
        node._change(offset, len(part))
        with node._ranges.exclusive(guest, guest + 1):
            node._own_tables(guest, guest + 1)
            with node._lock:
                if not self._count_up(found.entry):
                    return False
                self._refer(guest, found)
        self.shared += 1
        if node._meta.crowded:
            node.flush()
        return True

    def _equal(self, entry: int, part: memoryview) -> bool:
        node = self._target
        if entry & c.COMPRESSED:
            data = compressed.read(node.file, entry, self._bits, self._type)
            return data == bytes(part)
        node.data.pread_into(self._buffer, entry & c.OFFSET_MASK)
        return bytes(self._buffer) == bytes(part)

    def _count_up(self, entry: int) -> bool:
        """False if the count has no room for one more."""
        if entry & c.COMPRESSED:
            first, count = compressed.span(entry, self._bits)
        else:
            first, count = (entry & c.OFFSET_MASK) >> self._bits, 1
        counts = self._target._meta.counts
        if any(counts.get(cluster) >= counts.most for cluster in range(first, first + count)):
            return False
        counts.add_references(np.arange(first, first + count, dtype=np.int64))
        return True

    def _refer(self, guest: int, found: Found) -> None:
        """With the lock. No flag says any more that the cluster has one user."""
        node, host = self._target, found.entry
        bitmap = 0 if host & c.COMPRESSED else c.ALL_ALLOCATED
        words = [host, bitmap][: node._per_entry]
        if node._map.entry(found.guest) == host | c.COPIED:
            node._map.store(found.guest, words)
        node._publish(guest, words)
        node._meta.sharing.forget()

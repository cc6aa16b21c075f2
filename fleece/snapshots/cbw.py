# SPDX-License-Identifier: Apache-2.0
"""Copy-before-write: before the guest changes a cluster, its old data goes into an overlay.

Why a snapshot that is read without locks is exact
--------------------------------------------------
A writer, for each cluster that it touches: (1) copies the old data into the overlay, (2) sets
``saved`` for the cluster, (3) writes to the source. A reader that finds ``saved`` unset reads the
source and *then looks at ``saved`` again*: if it is still unset, no writer had come to (3), so what
it has read is old; if it is set, it reads that cluster again, from the overlay, where it is final.
So a reader never waits for a writer, and a slow or dead reader never delays the guest.

Between (1) and (3) two writers of one cluster must not both copy: the second would copy what the
first has begun to write. Hence the exclusive range lock, which is held while a cluster is copied
and not while the guest's data is written.

Several snapshots of one disk
-----------------------------
Each has a `Level`; the newest one takes what the guest overwrites. What an older snapshot has not
saved itself is found in the next newer level, and so on up to the live disk. Levels are pushed only
while the disk is drained, so every writer sees the same newest level.
"""

import errno
import os
import threading
from collections.abc import Callable, Iterator
from typing import Final

from fleece.block.node import Filter, Node
from fleece.block.ranges import RangeLock
from fleece.errors import SnapshotError
from fleece.formats.qcow2.overlay import Overlay
from nbdwire.constants import CMD_FLAG_FAST_ZERO
from nbdwire.export import ZERO_RUN

BREAK_SNAPSHOT: Final = "break-snapshot"
BREAK_GUEST_WRITE: Final = "break-guest-write"
POLICIES: Final = (BREAK_SNAPSHOT, BREAK_GUEST_WRITE)

COPY_BYTES: Final = 1 << 20  # one piece of a copy; larger pieces gain nothing


class Level:
    """What one snapshot of one disk has saved.

    ``saved`` has a byte for each cluster: 1 when the old data is in the overlay, and never 0 again.
    ``error`` is set when old data was lost; it is set before the write that destroys it begins.
    ``newer`` is the level of the next newer snapshot.
    """

    def __init__(
        self,
        name: str,
        overlay: Overlay | None,
        *,
        saved: bytearray,
        policy: str = BREAK_SNAPSHOT,
        error: OSError | None = None,
    ) -> None:
        self.name = name
        self.overlay = overlay
        self.policy = policy
        self.error = error
        self.saved = saved
        self.newer: Level | None = None
        self.dropped = False

    def chain(self) -> Iterator["Level"]:
        """The level itself and every newer one, in that order."""
        level: Level | None = self
        while level is not None:
            yield level
            level = level.newer


class CopyBeforeWrite(Filter):
    """Saves what the guest is about to overwrite into the newest level, for every live snapshot.

    ``on_broken(level)`` is called once for each level that breaks and was not dropped, from the
    guest's thread.
    """

    def __init__(
        self,
        child: Node,
        cluster_size: int,
        on_broken: Callable[[Level], None] | None = None,
    ) -> None:
        super().__init__(f"{child.name} (copy-before-write)", child)
        self.cluster_size = cluster_size
        self._bits = cluster_size.bit_length() - 1
        self._ranges = RangeLock()
        self._break_lock = threading.Lock()
        self._buffers: list[bytearray] = []
        self._on_broken = on_broken
        self.levels: tuple[Level, ...] = ()
        self._saved = bytearray()
        self.copied_bytes = 0

    # The graph: only while the disk is drained

    def push(self, level: Level) -> None:
        """A new instant: from now on old data goes into ``level``."""
        if level.overlay is not None and level.overlay.cluster_size != self.cluster_size:
            raise SnapshotError(
                f"the snapshots of one disk share one cluster size: {self.cluster_size} bytes here"
            )
        if self.levels:
            self.levels[-1].newer = level
        self.levels = (*self.levels, level)
        self._saved = level.saved

    def pop(self, level: Level) -> None:
        """Undo the `push` of the newest level."""
        if self.levels[-1] is not level:
            raise ValueError("only the newest level can be popped")
        self.levels = self.levels[:-1]
        if self.levels:
            self.levels[-1].newer = None
            self._saved = self.levels[-1].saved

    def retire(self) -> list[Level]:
        """Take out the dropped levels that no older snapshot needs; the caller removes their files.

        If that is all of them, the filter must be detached in the same drain.
        """
        with self._break_lock:  # nobody marks an overlay as broken once it is the caller's
            keep = list(self.levels)
            gone: list[Level] = []
            while keep and keep[0].dropped:
                gone.append(keep.pop(0))
            self.levels = tuple(keep)
        return gone

    # The guest

    def pwrite(self, buf: memoryview, offset: int, fua: bool = False) -> None:
        """Save, then write."""
        first = offset >> self._bits
        stop = ((offset + len(buf) - 1) >> self._bits) + 1
        if self._saved.find(0, first, stop) >= 0:
            self._save(first, stop)
        self.next.pwrite(buf, offset, fua)

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        """Save, then zero. A fast zero that has to save first is not fast: EOPNOTSUPP."""
        first = offset >> self._bits
        stop = ((offset + length - 1) >> self._bits) + 1
        if self._saved.find(0, first, stop) >= 0:
            if flags & CMD_FLAG_FAST_ZERO:
                raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
            self._save(first, stop)
        self.next.zero(offset, length, flags)

    def trim(self, offset: int, length: int, flags: int = 0) -> None:
        """Save, then trim: a trim changes what is read."""
        first = offset >> self._bits
        stop = ((offset + length - 1) >> self._bits) + 1
        if self._saved.find(0, first, stop) >= 0:
            self._save(first, stop)
        self.next.trim(offset, length, flags)

    # Saving

    def _save(self, first: int, stop: int) -> None:
        """Bring the clusters ``[first, stop)`` into the newest level.

        On return they are saved, or the snapshots are broken and say so; otherwise OSError, and
        then the guest's write must not be carried out.
        """
        level = self.levels[-1]
        if level.error is not None:
            return  # a broken snapshot costs the guest nothing more
        with self._ranges.exclusive(first, stop):
            try:
                for start, end in unsaved_runs(level.saved, first, stop):
                    self._copy(level, start, end)
            except OSError as problem:
                if self._guest_must_fail():
                    raise
                self._break(problem)

    def _copy(self, level: Level, first: int, stop: int) -> None:
        """Copy one run of unsaved clusters, zeroes without data, in bounded pieces."""
        offset, end = first << self._bits, min(stop << self._bits, self.size)
        position = first
        while offset < end:
            fd, _, length = self.next.map(offset, end - offset)[0]
            behind = offset + length
            edge = stop if behind >= end else behind >> self._bits
            if fd == ZERO_RUN and edge > position:
                self._store_zeroes(level, position, edge)
            else:
                # A run that ends inside a cluster takes the whole of that cluster along.
                edge = min(
                    stop, max(edge, position + 1), position + max(1, COPY_BYTES >> self._bits)
                )
                self._store(level, position, edge)
            position = edge
            offset = position << self._bits

    def _store_zeroes(self, level: Level, first: int, stop: int) -> None:
        assert level.overlay is not None
        level.overlay.store_zeroes(first, stop - first)
        level.saved[first:stop] = b"\1" * (stop - first)

    def _store(self, level: Level, first: int, stop: int) -> None:
        assert level.overlay is not None
        offset, end = first << self._bits, min(stop << self._bits, self.size)
        buffer = self._take_buffer(end - offset)
        view = memoryview(buffer)[: end - offset]
        self.next.pread_into(view, offset)
        level.overlay.store(first, stop - first, view)
        level.saved[first:stop] = b"\1" * (stop - first)
        self.copied_bytes += end - offset
        self._buffers.append(buffer)

    def _take_buffer(self, size: int) -> bytearray:
        try:
            buffer = self._buffers.pop()
        except IndexError:
            buffer = bytearray(max(COPY_BYTES, self.cluster_size))
        return buffer if len(buffer) >= size else bytearray(size)

    # Failure

    def _guest_must_fail(self) -> bool:
        """Whether a live snapshot was made with the promise that it outlives the guest's write."""
        return any(
            level.policy == BREAK_GUEST_WRITE and level.error is None and not level.dropped
            for level in self.levels
        )

    def _break(self, problem: OSError) -> None:
        """Old data will be lost: every level that could have needed it says so from now on."""
        with self._break_lock:
            broken = [level for level in self.levels if level.error is None]
            for level in broken:
                if level.overlay is not None:
                    level.overlay.mark_broken()
                level.error = problem
        for level in broken:
            if self._on_broken is not None and not level.dropped:
                self._on_broken(level)


def unsaved_runs(saved: bytearray, first: int, stop: int) -> Iterator[tuple[int, int]]:
    """The runs ``[start, end)`` of clusters in ``[first, stop)`` that are not saved."""
    start = saved.find(0, first, stop)
    while start >= 0:
        end = saved.find(1, start, stop)
        if end < 0:
            end = stop
        yield start, end
        start = saved.find(0, end, stop)

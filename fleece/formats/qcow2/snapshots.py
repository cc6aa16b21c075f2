# SPDX-License-Identifier: Apache-2.0
"""Internal snapshots of a qcow2 image: list, create, apply, delete, and read one.

A snapshot is an L1 table of its own that refers to the same clusters, each of which counts one more
reference. Before each of these operations the caller has drained the node: no other verb runs.

The order of writes (formats.md §1.4), with a sync between the steps, so that a crash leaves the old
or the new set of snapshots, leaked clusters, and COPIED flags that may be too few or belong to
leaked references, which does no harm:

* create: counts up and the L1 copy; COPIED cleared and the new snapshot table; the header; the old
  table is freed;
* apply: counts up and a new L1 table; COPIED cleared; the header (size and L1 table, in one write);
  counts of what was the disk down;
* delete: the new snapshot table; the header; counts down; COPIED where a count is 1 now.

Source: QEMU's ``docs/interop/qcow2``, "Snapshots".
"""

import errno
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fleece.errors import ImageCorrupt, ImageError, NotFound, UnsupportedFeature
from fleece.formats.qcow2 import bitmaps, overlap, snapshot_table
from fleece.formats.qcow2.entries import CorruptEntry
from fleece.formats.qcow2.freespace import OTHER, SNAPSHOT
from fleece.formats.qcow2.header import Header
from fleece.formats.qcow2.hosting import refresh_size
from fleece.formats.qcow2.image import Qcow2Node, read_header
from fleece.formats.qcow2.reader import Qcow2Reader
from fleece.formats.qcow2.snapshot_table import Snapshot
from fleece.formats.qcow2.tally import Numbers
from fleece.formats.qcow2.trees import Tree
from fleece.units import align_up

_TABLES: Final = overlap.ACTIVE_L2 | overlap.INACTIVE_L2


def list_snapshots(node: Qcow2Reader) -> list[Snapshot]:
    """All of them, the oldest first. `ImageCorrupt` or OSError."""
    return snapshot_table.read(node.file, node.header, node.name)


def find(snapshots: list[Snapshot], which: str | bytes, *, name_first: bool = False) -> int:
    """The index of the snapshot with this id, else of the first one with this name; -1 if none.

    ``name_first``: names come before ids.
    """
    wanted = which.encode("utf-8", "surrogateescape") if isinstance(which, str) else which
    by_id = next((i for i, s in enumerate(snapshots) if s.identity == wanted), -1)
    by_name = next((i for i, s in enumerate(snapshots) if s.name == wanted), -1)
    first, second = (by_name, by_id) if name_first else (by_id, by_name)
    return first if first >= 0 else second


def _found(node: Qcow2Reader, snapshots: list[Snapshot], which: str | bytes, **how: bool) -> int:
    index = find(snapshots, which, **how)
    if index < 0:
        known = ", ".join(repr(s.name.decode("utf-8", "replace")) for s in snapshots[:8])
        raise NotFound(
            f"{node.name}: there is no snapshot {which!r}; it has {known or 'no snapshots'}"
        )
    return index


def create(node: Qcow2Node, name: str | bytes, *, moment: float | None = None) -> Snapshot:
    """A new snapshot of the disk as it is now; ``moment``: seconds since 1970 (default: now).

    `UnsupportedFeature` (data file), `ImageError` (a limit, or refcounts that are too narrow),
    `ImageCorrupt` or OSError: there is no new snapshot then. Two may have one name, as in QEMU.
    """
    label = name.encode("utf-8", "surrogateescape") if isinstance(name, str) else name
    with _change(node) as change:
        snapshots = list_snapshots(node)
        l1_size = node.header.l1_size
        seconds, nanoseconds = divmod(
            time.time_ns() if moment is None else int(moment * 1e9), 10**9
        )
        snapshot = Snapshot(
            l1_offset=change.allocate(l1_size * 8),
            l1_size=l1_size,
            identity=str(_next_id(snapshots)).encode(),
            name=label,
            seconds=seconds & 0xFFFFFFFF,
            nanoseconds=nanoseconds,
            disk_size=node.size,
        )
        table = change.place_table([*snapshots, snapshot])
        tree = change.active_tree()
        change.add_references(tree)
        change.write_counts()
        tree.clear_copied(change.write_tables)
        change.write(snapshot.l1_offset, _packed(tree.l1), overlap.INACTIVE_L1)
        change.write_active_l1(tree)
        change.switch_table(table, len(snapshots) + 1)
        change.finish()
    return snapshot


def delete(node: Qcow2Node, which: str | bytes) -> Snapshot:
    """Remove a snapshot, by its name or else its id; what only it needed is free space then.

    `NotFound`, `ImageCorrupt` or OSError.
    """
    with _change(node) as change:
        snapshots = list_snapshots(node)
        gone = snapshots.pop(_found(node, snapshots, which, name_first=True))
        # Everything is looked at before anything is changed.
        tree = Tree.at(node.file, node.header, gone.l1_offset, gone.l1_size)
        tree.check()
        table = change.place_table(snapshots)
        change.write_counts()
        change.switch_table(table, len(snapshots))
        change.drop_references(tree)
        change.free(gone.l1_offset, gone.l1_size * 8)
        change.write_counts()
        active = change.active_tree()
        active.refresh_copied(change.write_tables, change.is_single)
        change.write_active_l1(active)
        change.finish()
    return gone


def apply(node: Qcow2Node, which: str | bytes) -> Snapshot:
    """The disk becomes what it was at this snapshot, by id or else name; its size as well.

    The snapshot stays. All that was written since the last snapshot is gone. Bitmaps that record
    changes are all dirty then. `NotFound`, `UnsupportedFeature` (another size, in an image of
    version 2 or with bitmaps that cannot be resized), `ImageError`, `ImageCorrupt` or OSError.
    """
    with _change(node) as change:
        snapshots = list_snapshots(node)
        chosen = snapshots[_found(node, snapshots, which)]
        size = _size_of(node, chosen)
        if size != node.size and node.header.version == 2:
            raise UnsupportedFeature(
                f"{node.name}: the snapshot has another size, and an image of version 2 keeps its "
                "own; first use: fleece image amend -o compat=1.1"
            )
        tree = Tree.at(node.file, node.header, chosen.l1_offset, chosen.l1_size)
        if size != node.size:
            bitmaps.check_resize(node, size)
        old, before = change.active_tree(), node.header
        old.check()
        l1_offset = change.allocate(chosen.l1_size * 8)
        change.add_references(tree)
        change.write_counts()
        tree.clear_copied(change.write_tables)
        change.write(l1_offset, _packed(tree.l1), overlap.ACTIVE_L1)
        change.sync()
        change.switch_disk(size, chosen.l1_size, l1_offset)
        if size != before.size:
            bitmaps.resize(node, size)
        bitmaps.mark_all(node)
        change.drop_references(old)
        change.free(before.l1_offset, before.l1_size * 8)
        change.write_counts()
        change.finish()
    return chosen


def open_snapshot(node: Qcow2Reader, which: str | bytes) -> Qcow2Reader:
    """The disk as it was at a snapshot, by id or else name: a node that can be read.

    It has the size that it had then. (QEMU's tools show it at the size that the disk has now.)
    It takes over all files of ``node``, which must not be used any more: close the new node only.
    `NotFound`, `UnsupportedFeature` (data file) or `ImageCorrupt`.
    """
    _check_data_file(node)
    snapshots = list_snapshots(node)
    chosen = snapshots[_found(node, snapshots, which)]
    name = chosen.name.decode("utf-8", "backslashreplace")
    size = _size_of(node, chosen)
    if chosen.l1_offset + chosen.l1_size * 8 > node.file.size:
        raise ImageCorrupt(f"{node.name}: the L1 table of snapshot {name!r} lies outside the file")
    if isinstance(node, Qcow2Node) and not node.read_only:
        node.flush()
    refresh_size(node.file)
    return Qcow2Reader(
        node.file,
        replace(node.header, size=size),
        node.backing,
        name=f"{node.name}@{name}",
        data=None if node.data is node.file else node.data,
        l1=(chosen.l1_offset, chosen.l1_size),
    )


def _size_of(node: Qcow2Reader, snapshot: Snapshot) -> int:
    """The size of its disk. `ImageCorrupt` if its L1 table is too small for that."""
    covered = snapshot.l1_size * node.header.l2_entries << node.header.cluster_bits
    size = node.size if snapshot.disk_size is None else snapshot.disk_size
    if size > covered:
        raise ImageCorrupt(f"{node.name}: the L1 table of a snapshot is too small for its disk")
    return size


def _next_id(snapshots: list[Snapshot]) -> int:
    numbers = [int(s.identity) for s in snapshots if s.identity.isdigit() and len(s.identity) < 20]
    return max(numbers, default=0) + 1


def _check_data_file(node: Qcow2Reader) -> None:
    if node.header.has_data_file:
        raise UnsupportedFeature(
            f"{node.name}: its data lies in another file, so it cannot have internal snapshots; "
            "make an overlay instead: fleece image create -b"
        )


def _packed(entries: NDArray[np.uint64]) -> bytes:
    return entries.astype(">u8").tobytes()


@contextmanager
def _change(node: Qcow2Node) -> Iterator["_Change"]:
    """All that was written is on disk before; afterwards the node's tables are right again.

    If it fails, what was added to the counts is taken back, as far as that can be written.
    """
    _check_data_file(node)
    change = _Change(node)
    try:
        change.begin()
        yield change
    except CorruptEntry as error:
        change.undo()
        raise ImageCorrupt(f"{node.name}: {error.strerror}") from error
    except BaseException:
        change.undo()
        raise


class _Change:
    """The steps of an operation. Each writes; `write_counts` and the switches also sync."""

    def __init__(self, node: Qcow2Node) -> None:
        self._node = node
        self._meta = node._meta
        self._counts = node._meta.counts
        self._switched = False
        self._own: list[tuple[int, int]] = []  # (offset, clusters) that nothing refers to yet
        self._added: Tree | None = None

    @property
    def _header(self) -> Header:
        return self._meta.header

    def begin(self) -> None:
        """Everything that is waiting goes to the disk, with the counts of a lazy image."""
        self._node._begin()
        self._node.flush()
        self._meta.write_all()
        refresh_size(self._node.file)

    def active_tree(self) -> Tree:
        """The disk as it is."""
        return Tree.at(self._node.file, self._header, self._header.l1_offset, self._header.l1_size)

    def allocate(self, length: int) -> int:
        """Room for ``length`` bytes; 0 for none."""
        clusters = align_up(length, self._header.cluster_size) >> self._header.cluster_bits
        if not clusters:
            return 0
        with self._meta.lock:
            offset = self._counts.allocate(clusters)
        self._own.append((offset, clusters))
        return offset

    def place_table(self, snapshots: list[Snapshot]) -> int:
        """Write a new snapshot table; where. `ImageError` if it would be too long."""
        try:
            data = snapshot_table.pack(snapshots)
        except ValueError as error:
            raise ImageError(f"{self._node.name}: {error}") from None
        offset = self.allocate(len(data))
        self.write(offset, data, overlap.SNAPSHOT_TABLE)
        return offset

    def write(self, offset: int, data: bytes, kind: int) -> None:
        """Metadata of this kind; `CorruptEntry` if another kind is there."""
        if data:
            self._meta.check_place(offset, len(data), ignore=kind)
            # The last cluster is whole: a table may be read to its end.
            whole = align_up(len(data), self._header.cluster_size)
            self._node.file.pwrite(memoryview(data.ljust(whole, b"\0")), offset)

    def write_tables(self, offset: int, data: bytes) -> None:
        """L2 tables, whoever they belong to."""
        self.write(offset, data, _TABLES)

    def write_active_l1(self, tree: Tree) -> None:
        """The flags of the active L1 table changed."""
        self.write(self._header.l1_offset, _packed(tree.l1), overlap.ACTIVE_L1)

    def sync(self) -> None:
        """All that was written is durable."""
        self._node.file.flush()

    def write_counts(self) -> None:
        """All counts are durable."""
        self._meta.write_all()

    def add_references(self, tree: Tree) -> None:
        """All or none. `ImageError` if a count would not fit."""
        done = 0
        try:
            for clusters in tree.references():
                with self._meta.lock:
                    self._counts.add_references(clusters)
                done += 1
        except OSError as error:
            self._drop(tree, done)
            if isinstance(error, CorruptEntry):
                raise
            hint = "; see: fleece image amend -o refcount_bits=16" * (error.errno == errno.EINVAL)
            raise ImageError(f"{self._node.name}: {error.strerror}{hint}") from error
        self._added = tree

    def drop_references(self, tree: Tree) -> None:
        """Nothing on disk has them any more."""
        self._drop(tree, None)

    def _drop(self, tree: Tree, portions: int | None) -> None:
        for number, clusters in enumerate(tree.references()):
            if number == portions:
                return
            with self._meta.lock:
                self._counts.drop_references(clusters, SNAPSHOT)

    def is_single(self, clusters: Numbers) -> NDArray[np.bool_]:
        """For each of these whether its count is 1."""
        with self._meta.lock:
            return np.asarray(self._counts.lookup(clusters) == 1)

    def free(self, offset: int, length: int) -> None:
        """Nothing on disk refers to these bytes any more."""
        clusters = align_up(length, self._header.cluster_size) >> self._header.cluster_bits
        if clusters:
            with self._meta.lock:
                self._counts.retire(offset >> self._header.cluster_bits, clusters, OTHER)

    def switch_table(self, offset: int, count: int) -> None:
        """The header names the new snapshot table; the old one is free."""
        old, length = self._header, len(snapshot_table.pack(list_snapshots(self._node)))
        self.sync()
        self._set_header(replace(old, snapshots=count, snapshots_offset=offset))
        self.free(old.snapshots_offset, length)

    def switch_disk(self, size: int, l1_size: int, l1_offset: int) -> None:
        """The header names another L1 table."""
        self._set_header(replace(self._header, size=size, l1_size=l1_size, l1_offset=l1_offset))

    def _set_header(self, header: Header) -> None:
        self._switched = True  # from here on nobody can say which header is on the disk
        self._node.set_header(header)

    def finish(self) -> None:
        """Free what is free now, and read the tables again."""
        self._meta.write_all()
        refresh_size(self._node.file)
        self._node.reload()

    def undo(self) -> None:
        """Best effort: what is left over is a leak. The node is right then, or closed to writes."""
        with suppress(Exception):
            if not self._switched:
                self._take_back()
            self._meta.write_all()
        try:
            refresh_size(self._node.file)
            self._meta.header = read_header(self._node.file, self._node.name)
            self._node.reload()
        except Exception as error:
            self._meta.broken = f"its tables cannot be read after a change failed: {error}"

    def _take_back(self) -> None:
        if self._added is not None:
            self._drop(self._added, None)
        with self._meta.lock:
            for offset, clusters in self._own:
                self._counts.release(offset, clusters)
        self._meta.write_all()
        if self._added is not None:
            active = self.active_tree()
            active.refresh_copied(self.write_tables, self.is_single)
            self.write_active_l1(active)

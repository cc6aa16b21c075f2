# SPDX-License-Identifier: Apache-2.0
"""The last user of a data cluster that had several, in an image without internal snapshots.

Guest clusters of one disk may share a host cluster (see `fleece.formats.qcow2.dedup`); their L2
entries have no COPIED flag then, so each write to one of them takes a new cluster. When all but one
have gone, the flag of the last one has to come back: without it nothing is lost, but ``qemu-img
check`` calls it an error. QEMU does not do that; ``check -r all`` of either program does.

The flag is set when the count of 1 has been written, and not synced: after a crash it may be
missing, or there while the count is still 2. There is one reference in either case.
Source: QEMU's ``docs/interop/qcow2``, "Cluster mapping".
"""

from typing import TYPE_CHECKING

import numpy as np

from fleece.block.node import Node
from fleece.formats.qcow2 import constants as c
from fleece.formats.qcow2 import overlap
from fleece.formats.qcow2.references import read_tables
from fleece.formats.qcow2.tally import Numbers

if TYPE_CHECKING:
    from fleece.formats.qcow2.metadata import Metadata


class Sharing:
    """Remembers which host clusters lost a user, and who their users are once that is asked."""

    def __init__(self, meta: "Metadata", file: Node) -> None:
        self._meta = meta
        self._file = file
        self._lost: set[int] = set()
        # Host and guest clusters of all entries without the flag, by host; None: not looked for.
        self._users: tuple[Numbers, Numbers] | None = None

    def lost_one(self, entry: int) -> None:
        """An L2 entry of data, with no COPIED flag, is gone (with the metadata lock)."""
        if not self._meta.header.snapshots:
            self._lost.add((entry & c.OFFSET_MASK) >> self._meta.header.cluster_bits)

    def forget(self) -> None:
        """There are new entries without the flag."""
        self._users = None

    def take(self) -> set[int]:
        """What was lost until now (with the lock); give it to `settle` when that is written."""
        lost, self._lost = self._lost, set()
        return lost

    def give_back(self, lost: set[int]) -> None:
        """It could not be written (with the lock)."""
        self._lost |= lost

    def settle(self, lost: set[int]) -> None:
        """Flag the last users; counts and tables have been written. Not with the lock."""
        with self._meta.lock:
            single = sorted(host for host in lost if self._meta.counts.get(host) == 1)
        if not single:
            return
        if self._users is None:
            self._users = self._find()
        hosts, guests = self._users
        for host in single:
            low, high = np.searchsorted(hosts, [host, host + 1]).tolist()
            for guest in guests[low:high].tolist():
                with self._meta.lock:
                    self._flag(guest, host)

    def _find(self) -> tuple[Numbers, Numbers]:
        """By the tables as they are on disk: entries never lose the flag while it is open."""
        header, table_map = self._meta.header, self._meta.map
        with self._meta.lock:
            l1 = np.frombuffer(bytes(table_map.l1), ">u8").astype(np.uint64)
        places = (l1 & np.uint64(c.OFFSET_MASK)).astype(np.int64)
        order = np.argsort(places, kind="stable")
        order = order[places[order] != 0]
        hosts, guests = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        done = 0
        for _, words in read_tables(self._file, header, places[order]):
            entries = words[..., 0] if header.extended_l2 else words
            rows, columns = np.nonzero(_shared(entries))
            found = (entries[rows, columns] & np.uint64(c.OFFSET_MASK)).astype(np.int64)
            hosts.append(found >> header.cluster_bits)
            guests.append(order[done + rows] * header.l2_entries + columns)
            done += len(entries)
        all_hosts, all_guests = np.concatenate(hosts), np.concatenate(guests)
        by_host = np.argsort(all_hosts, kind="stable")
        return all_hosts[by_host], all_guests[by_host]

    def _flag(self, guest: int, host: int) -> None:
        """With the lock; only if it is still so."""
        meta = self._meta
        header, per_table = meta.header, meta.header.l2_entries
        entry = meta.map.entry(guest)
        shared = not entry & (c.COPIED | c.COMPRESSED)
        if not shared or (entry & c.OFFSET_MASK) >> header.cluster_bits != host:
            return
        if meta.counts.get(host) != 1 or not meta.map.is_own(guest // per_table):
            return
        table = meta.map.table_at(guest // per_table)
        assert table is not None
        at = guest % per_table * header.l2_entry_size
        word = (entry | c.COPIED).to_bytes(8, "big")
        meta.check_place(table.offset + at, 8, ignore=overlap.ACTIVE_L2)
        self._file.pwrite(memoryview(word), table.offset + at)
        table.data[at : at + 8] = word


def _shared(entries: "np.ndarray[tuple[int, ...], np.dtype[np.uint64]]") -> Numbers:
    """Which entries have a place that others may have too."""
    flags = entries & np.uint64(c.COPIED | c.COMPRESSED)
    return np.asarray((flags == 0) & (entries & np.uint64(c.OFFSET_MASK) != 0))

# SPDX-License-Identifier: Apache-2.0
"""Find the snapshots of an earlier run of the daemon, before any client can write to a disk.

A snapshot goes on after a restart of the daemon, by whatever end of it, because the overlay has
each old cluster before the guest's write reaches the kernel. It does not survive a crash of the
host: the kernel may then have written the guest's data and not the overlay's. And one whose old
data cannot be found whole says that it is broken.

One that does not go on may still hold what an older snapshot of the same disk needs: it goes on as
dropped, and its files go when nobody needs them.
"""

import errno
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from fleece.errors import FleeceError, TrackingError
from fleece.formats.qcow2.overlay import Overlay
from fleece.snapshots.cbw import CopyBeforeWrite, Level
from fleece.snapshots.live import LivePart, ServedDisk, Snapshot
from fleece.snapshots.record import ACTIVE, CREATING, DROPPED, Part, Record, Records
from fleece.tracking.frozen import FrozenMap

log = logging.getLogger(__name__)


class Recovery:
    """One pass over the records of an earlier run."""

    def __init__(
        self,
        disks: Mapping[str, ServedDisk],
        records: Records,
        boot_id: str,
        on_broken: Callable[[Level], None],
    ) -> None:
        self._disks = disks
        self._records = records
        self._boot_id = boot_id
        self._on_broken = on_broken

    def run(self) -> list[Snapshot]:
        """The snapshots that go on, oldest first; dropped ones that may be needed among them."""
        found = []
        for record in self._records.load():
            if record.boot_id != self._boot_id:
                self._clean(record)
            else:
                found.append(self._restore(record))
        return found

    def _clean(self, record: Record) -> None:
        log.warning("snapshot %r is gone: the host was restarted since; take another", record.name)
        for part in record.parts:
            for path in part.files:
                path.unlink(missing_ok=True)
        self._records.remove(record)

    def _restore(self, record: Record) -> Snapshot:
        incomplete = record.phase == CREATING
        parts = [part for part in record.parts if part.disk in self._disks]
        if incomplete:
            # A file that cannot be opened was not complete, so it was never used.
            parts = [part for part in parts if _is_overlay(part.overlay)]
        reason = self._why_dropped(record)
        if reason is not None:
            log.warning("snapshot %r is gone: %s", record.name, reason)
            record.phase = DROPPED
            self._records.save(record)
        elif record.phase == ACTIVE:
            log.info("snapshot name=%r goes on", record.name)
        live = [self._restore_part(part, record) for part in parts]
        return Snapshot(record, live)

    def _why_dropped(self, record: Record) -> str | None:
        if record.phase == CREATING:
            return "it had not been completed"
        missing = [part.disk for part in record.parts if part.disk not in self._disks]
        if missing and record.phase == ACTIVE:
            return f"disk {missing[0]!r} is not served any more"
        return None

    def _restore_part(self, part: Part, record: Record) -> LivePart:
        served = self._disks[part.disk]
        level = self._open_level(part, record.name, served)
        level.dropped = record.phase == DROPPED
        if served.cbw is None:
            served.cbw = CopyBeforeWrite(served.disk.root, part.cluster_size, self._on_broken)
            served.disk.attach(served.cbw)
        if level.error is not None:
            for older in served.cbw.levels:  # they would look for their data in this one
                older.error = older.error or level.error
        served.cbw.push(level)
        live = LivePart(part, served, level)
        if record.phase == ACTIVE and level.error is None:
            self._restore_map(live)
        return live

    def _open_level(self, part: Part, name: str, served: ServedDisk) -> Level:
        try:
            overlay = Overlay.open(Path(part.overlay))
            self._check(part, overlay, served)
        except (FleeceError, OSError) as problem:
            log.error("snapshot %r of disk %r is broken: %s", name, part.disk, problem)
            error = OSError(errno.EIO, str(problem))
            return Level(name, None, saved=bytearray(), policy=part.policy, error=error)
        return Level(name, overlay, saved=overlay.saved_map(), policy=part.policy)

    @staticmethod
    def _check(part: Part, overlay: Overlay, served: ServedDisk) -> None:
        problem = None
        if overlay.broken:
            problem = "old data could not be saved when the guest wrote"
        elif not overlay.size == part.size == served.disk.size:
            problem = f"the size of disk {part.disk!r} has changed"
        elif overlay.cluster_size != part.cluster_size:
            problem = f"{part.overlay} is not the overlay that was made for it"
        elif served.tracking is not None and served.tracking.generation != part.generation:
            problem = served.tracking.reason_new or "the record of changes was replaced"
        if problem is not None:
            overlay.close()
            raise OSError(errno.EIO, problem)

    @staticmethod
    def _restore_map(live: LivePart) -> None:
        note, tracking = live.record, live.served.tracking
        if note.map_file is None or tracking is None or note.epoch is None:
            return
        tracking.pin(note.epoch)
        try:
            live.frozen = FrozenMap.load(Path(note.map_file))
        except TrackingError as problem:
            log.error("disk %r: %s; its consumers are told to read everything", note.disk, problem)
            note.reasons = dict.fromkeys(note.since, str(problem))
            note.since = dict.fromkeys(note.since)
            return
        live.build_views()


def _is_overlay(path: str) -> bool:
    try:
        Overlay.open(Path(path)).close()
    except (FleeceError, OSError):
        return False
    return True

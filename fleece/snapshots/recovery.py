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

from fleece.errors import FleeceError, SnapshotError, TrackingError
from fleece.formats.qcow2.overlay import Overlay
from fleece.snapshots.cbw import CopyBeforeWrite, Level
from fleece.snapshots.live import LivePart, ServedDisk, Snapshot
from fleece.snapshots.record import ACTIVE, CREATING, DROPPED, Part, Record, Records
from fleece.tracking.frozen import FrozenMap

log = logging.getLogger(__name__)


class Recovery:
    """One pass over the records of an earlier run. ``on_broken`` makes each disk's callback."""

    def __init__(
        self,
        disks: Mapping[str, ServedDisk],
        records: Records,
        boot_id: str,
        on_broken: Callable[[str], Callable[[Level], None]],
    ) -> None:
        self._disks = disks
        self._records = records
        self._boot_id = boot_id
        self._on_broken = on_broken
        self._newest: dict[str, LivePart] = {}

    def run(self) -> list[Snapshot]:
        """The snapshots that go on, oldest first; dropped ones that may be needed among them."""
        found = []
        for record in self._records.load():
            if record.boot_id != self._boot_id or not self._boot_id:
                self._clean(record)
            else:
                found.append(self._restore(record))
        for name, part in self._newest.items():
            self._check_link(self._disks[name], part, None)
        return found

    def _clean(self, record: Record) -> None:
        log.warning("snapshot %r is gone: the host was restarted since; take another", record.name)
        try:
            for part in record.parts:
                for path in part.files:
                    path.unlink(missing_ok=True)
            self._records.remove(record)
        except OSError as problem:
            log.error("files of snapshot %r cannot be removed: %s", record.name, problem)

    def _restore(self, record: Record) -> Snapshot:
        incomplete = record.phase == CREATING
        reason = self._why_dropped(record)
        if reason is not None:
            log.warning("snapshot %r is gone: %s", record.name, reason)
            self._drop(record)
        elif record.phase == ACTIVE:
            log.info("snapshot name=%r goes on", record.name)
        parts = [part for part in record.parts if part.disk in self._disks]
        if record.phase == DROPPED:
            parts = [part for part in parts if self._is_needed(part)]
        if incomplete:
            # A file that cannot be opened was not complete, so it was never used.
            parts = [part for part in parts if _is_overlay(part.overlay)]
        return Snapshot(record, [self._restore_part(part, record) for part in parts])

    def _why_dropped(self, record: Record) -> str | None:
        if record.phase == CREATING:
            return "it had not been completed"
        missing = [part.disk for part in record.parts if part.disk not in self._disks]
        if missing and record.phase == ACTIVE:
            return f"disk {missing[0]!r} is not served any more"
        return None

    def _drop(self, record: Record) -> None:
        try:
            self._records.drop(record)
        except SnapshotError as problem:
            # The next start comes to the same end by the same reasons. The disks must go on now.
            log.error("%s", problem)
            record.phase = DROPPED

    def _is_needed(self, part: Part) -> bool:
        """Whether a live snapshot may have to look for old data in this one, which is dropped."""
        cbw = self._disks[part.disk].cbw
        return cbw is not None and not all(level.dropped for level in cbw.levels)

    def _restore_part(self, part: Part, record: Record) -> LivePart:
        served = self._disks[part.disk]
        level = self._open_level(part, record, served)
        level.dropped = record.phase != ACTIVE
        if served.cbw is None:
            on_broken = self._on_broken(part.disk)
            served.cbw = CopyBeforeWrite(served.disk.root, part.cluster_size, on_broken)
            served.disk.attach(served.cbw)
        if level.error is not None:
            _break_all(served.cbw, level.error)  # they would look for their data in this one
        live = LivePart(part, served, level)
        if part.disk in self._newest:
            self._check_link(served, self._newest[part.disk], live)
        self._newest[part.disk] = live
        served.cbw.push(level)
        if record.phase == ACTIVE and level.error is None:
            _restore_map(live)
        return live

    def _open_level(self, part: Part, record: Record, served: ServedDisk) -> Level:
        try:
            overlay = Overlay.open(Path(part.overlay))
            try:
                self._check(part, record, overlay, served)
                saved = overlay.saved_map()
            except BaseException:
                overlay.close()
                raise
        except (FleeceError, OSError) as problem:
            text = str(problem)
            log.error("snapshot %r of disk %r is broken: %s", record.name, part.disk, text)
            error = OSError(errno.EIO, text)
            return Level(record.name, None, saved=bytearray(), policy=part.policy, error=error)
        return Level(record.name, overlay, saved=saved, policy=part.policy)

    def _check(self, part: Part, record: Record, overlay: Overlay, served: ServedDisk) -> None:
        """SnapshotError unless overlay and disk are what they were."""
        cbw, problem = served.cbw, None
        if overlay.broken:
            problem = "old data could not be saved when the guest wrote"
        elif not overlay.size == part.size == served.disk.size:
            problem = f"the size of disk {part.disk!r} has changed"
        elif overlay.cluster_size != (cbw.cluster_size if cbw is not None else part.cluster_size):
            problem = f"{part.overlay} is not the overlay that was made for it"
        elif record.phase == ACTIVE:
            problem = self._changed_behind_us(part, record, served)
        if problem is not None:
            raise SnapshotError(problem)

    def _changed_behind_us(self, part: Part, record: Record, served: ServedDisk) -> str | None:
        """Why the image may have been written while we did not run, or None.

        Whoever vouches for the record of changes vouches for the image. If it is not tracked, the
        time of the record says until when we may have written ourselves, as the heartbeat of a
        tracked disk does (`fleece.tracking.heartbeat`).
        """
        tracking, now = served.tracking, served.identity
        if tracking is not None:
            same = tracking.generation == part.generation
            return None if same else tracking.reason_new or "its record of changes was replaced"
        if part.inode != [now.device, now.inode]:
            return f"image {served.image} was replaced by another one while fleece was not running"
        if not now.is_block_device and now.mtime_ns > self._records.touched(record):
            return f"image {served.image} was changed while fleece was not running"
        return None

    @staticmethod
    def _check_link(served: ServedDisk, older: LivePart, newer: LivePart | None) -> None:
        """Break ``older``, and all before it, if what it needs is in an overlay of no record.

        Its overlay names where to look next: the image as long as it was the newest, then the
        overlay of the next snapshot, and that one stays as long as this one.
        """
        overlay = older.level.overlay
        behind = newer.record.overlay if newer is not None else None
        if overlay is None or overlay.backing_file in (older.record.image, behind):
            return
        text = f"old data that it needs is in {overlay.backing_file}, and that has no record"
        log.error("snapshot %r of disk %r is broken: %s", older.level.name, served.name, text)
        assert served.cbw is not None
        _break_all(served.cbw, OSError(errno.EIO, text))


def _break_all(cbw: CopyBeforeWrite, error: OSError) -> None:
    for level in cbw.levels:
        level.error = level.error or error


def _restore_map(live: LivePart) -> None:
    note = live.record
    if note.map_file is None or live.served.tracking is None or note.epoch is None:
        return
    live.pin()
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

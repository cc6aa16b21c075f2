# SPDX-License-Identifier: Apache-2.0
"""The snapshots of a daemon: made, listed, acknowledged, dropped, found again after a restart."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

from fleece.block.graph import DRAIN_SECONDS
from fleece.errors import (
    AlreadyExists,
    Busy,
    DrainTimeout,
    FleeceError,
    NotFound,
    SnapshotBroken,
    SnapshotError,
    UsageError,
)
from fleece.formats.qcow2.overlay import Overlay
from fleece.snapshots import instant
from fleece.snapshots.cbw import Level
from fleece.snapshots.fleecing import Fleecing
from fleece.snapshots.live import LivePart, ServedDisk, Snapshot, export_name, report, timestamp
from fleece.snapshots.plan import Defaults, Planner, Wishes, check_lease
from fleece.snapshots.record import ACTIVE, DROPPED, Record, Records
from fleece.snapshots.recovery import Recovery
from fleece.tracking.heartbeat import Heartbeat, alive_until
from fleece.tracking.identity import running_boot_id
from nbdwire.server import Server

log = logging.getLogger(__name__)

RETRY_DRAIN_SECONDS: Final = 0.2
"""How long a second attempt to let go of a disk, each second, may hold up its guests."""

Emit = Callable[[str, dict[str, Any]], None]


class SnapshotManager:
    """One operation at a time; the guests and the readers of snapshots never wait for one.

    ``emit(event, data)`` is called from any thread and must not block. ``clock`` gives seconds
    since 1970, for leases.
    """

    def __init__(
        self,
        disks: Mapping[str, ServedDisk],
        server: Server,
        directory: Path,
        defaults: Defaults,
        emit: Emit,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._disks = disks
        self._server = server
        self._records = Records(directory)
        self._emit = emit
        self._clock = clock
        self._boot_id = running_boot_id()
        self._planner = Planner(directory, defaults, self._boot_id)
        self._lock = threading.RLock()
        self._snapshots: dict[str, Snapshot] = {}
        self._ending: list[Snapshot] = []  # dropped, but an older snapshot needs what they saved
        self._serial = 0
        self._hung = False  # a reader is stuck: no descriptor that it may use is closed any more
        self._wake = threading.Event()
        self._stopping = False
        self._reaper = threading.Thread(target=self._reap, name="leases", daemon=True)
        self._heartbeat: Heartbeat | None = None

    # Life of the manager

    def start(self) -> None:
        """Find the snapshots of an earlier run again; before any client can write to a disk."""
        with self._lock:
            recovery = Recovery(self._disks, self._records, self._boot_id, self._callback)
            for snapshot in recovery.run():
                self._serial = max(self._serial, snapshot.record.serial)
                if snapshot.record.phase == DROPPED:
                    self._ending.append(snapshot)
                else:
                    self._snapshots[snapshot.name] = snapshot
                    self._offer(snapshot)
            for served in self._disks.values():
                self._sweep(served)
            self._forget_ended()
        self._heartbeat = Heartbeat("snapshots", self.beat)
        self._reaper.start()

    def stop(self) -> None:
        """Let go of the overlays without dropping a snapshot: the next start goes on with them.

        Every client must have been hung up, and every writer be gone.
        """
        self._stopping = True
        self._wake.set()
        if self._reaper.ident is not None:
            self._reaper.join()
        with self._lock:  # what still runs comes to its end; nothing else begins
            if self._heartbeat is not None:
                self._heartbeat.stop()
            for snapshot in [*self._snapshots.values(), *self._ending]:
                for part in snapshot.parts:
                    if part.view is not None:
                        part.view.close()
                    if part.level.overlay is not None:
                        part.level.overlay.close()

    @contextlib.contextmanager
    def _operation(self) -> Iterator[None]:
        """Alone, and not after the end."""
        with self._lock:
            if self._stopping:
                raise Busy("the daemon is ending; try again when it has been started again")
            yield

    # Create

    def create(
        self,
        disks: list[str],
        *,
        name: str | None = None,
        consumer: str | None = None,
        lease: float | None = None,
        cluster_size: int | None = None,
        policy: str | None = None,
    ) -> dict[str, Any]:
        """Take one instant of all ``disks`` and export it. See `fleece.snapshots.live.report`."""
        wishes = Wishes(name, consumer, lease, cluster_size, policy)
        with self._operation():
            served = self._select(disks)
            taken = {*self._snapshots, *(snapshot.name for snapshot in self._ending)}
            record = self._planner.plan(served, wishes, self._serial + 1, taken, self._clock())
            self._serial += 1
            self._records.save(record)
            snapshot = self._take(record, served)
            self._announce(snapshot)
            self._snapshots[record.name] = snapshot
            self._wake.set()
            log.info(
                "snapshot name=%r disks=%s consumer=%r drain-microseconds=%d",
                record.name,
                ",".join(part.disk for part in record.parts),
                record.consumer,
                record.drain_microseconds,
            )
            return report(snapshot, self._server.listeners)

    def _select(self, names: list[str]) -> list[ServedDisk]:
        if not names:
            raise UsageError("name at least one disk to take a snapshot of")
        if len(set(names)) != len(names):
            raise UsageError("a disk is named twice")
        for name in names:
            if name not in self._disks:
                known = ", ".join(sorted(self._disks)) or "none"
                raise NotFound(f"there is no disk named {name!r} (disks: {known})")
        return [self._disks[name] for name in names]

    def _take(self, record: Record, served: list[ServedDisk]) -> Snapshot:
        """Overlays, then the instant; all files are gone again if any of it fails."""
        pairs: list[instant.Pair] = []
        try:
            for disk, part in zip(served, record.parts, strict=True):
                callback = self._callback(disk.name)
                pairs.append(instant.prepare(disk, part, record.name, callback))
            record.drain_microseconds = instant.take(pairs)
        except BaseException:
            for live, _ in pairs:
                _discard(live.level.overlay)
            self._records.remove(record)
            raise
        return Snapshot(record, [part for part, _ in pairs])

    def _announce(self, snapshot: Snapshot) -> None:
        """The instant is taken: note what changed, record that it lives, export it."""
        record = snapshot.record
        try:
            for part in snapshot.parts:
                self._link(part)
                self._note_changes(part, record.consumer)
            record.phase = ACTIVE
            self._save(record)
            self._offer(snapshot)
        except BaseException as problem:
            # The record stays until the overlays can go: an older snapshot may need them.
            with contextlib.suppress(SnapshotError):
                self._records.drop(record)
            self._end(snapshot)
            if isinstance(problem, OSError):
                raise SnapshotError(
                    f"cannot keep snapshot {record.name!r}: {problem.strerror or problem}; "
                    "see to the place of its overlays"
                ) from problem
            raise

    def _save(self, record: Record) -> None:
        self._records.save(record)
        self._touch(record)

    def _note_changes(self, part: LivePart, consumer: str | None) -> None:
        """Fix, as of the instant, from where each consumer counts, and keep the map."""
        tracking, frozen, note = part.served.tracking, part.frozen, part.record
        if tracking is None or frozen is None or note.map_file is None:
            return
        note.epoch, note.generation = frozen.epoch, frozen.generation
        part.pin()
        names = {cursor.consumer for cursor in tracking.cursors()}
        for name in sorted(names | ({consumer} if consumer is not None else set())):
            since, reason = tracking.since(name)
            note.since[name] = since
            if reason is not None:
                note.reasons[name] = reason
        frozen.save(Path(note.map_file))
        part.build_views()

    @staticmethod
    def _link(part: LivePart) -> None:
        """The overlay of the snapshot before this one now has this one's overlay as its backing."""
        cbw = part.served.cbw
        if cbw is None or len(cbw.levels) < 2:
            return
        older = cbw.levels[-2].overlay
        if older is not None:
            older.set_backing(part.record.overlay, "qcow2")

    def _offer(self, snapshot: Snapshot) -> None:
        """Export every disk of the snapshot."""
        record = snapshot.record
        for part in snapshot.parts:
            assert part.served.cbw is not None
            name = export_name(part.served.name, record.name)
            view = Fleecing(name, part.served.cbw, part.level)
            description = f"disk {part.served.name} as it was at {timestamp(record.created)}"
            try:
                self._server.add(name, view, description=description, contexts=part.contexts())
            except ValueError as problem:
                raise AlreadyExists(
                    f"snapshot {record.name!r} cannot be exported: {problem}; choose another name"
                ) from None
            part.view = view

    # The others

    def list(self) -> list[dict[str, Any]]:
        """Every live snapshot, oldest first."""
        with self._lock:
            return [report(s, self._server.listeners) for s in self._snapshots.values()]

    def acknowledge(self, name: str, consumer: str | None = None) -> dict[str, Any]:
        """``consumer`` has all of the snapshot: its next one is counted from here."""
        with self._operation():
            snapshot = self._find(name)
            consumer = consumer or snapshot.record.consumer
            if consumer is None:
                raise UsageError(
                    f"snapshot {name!r} was made for no consumer; say whose it is with --consumer"
                )
            _may_acknowledge(snapshot)
            disks = []
            for part in snapshot.parts:
                tracking, note = part.served.tracking, part.record
                assert tracking is not None
                assert note.generation is not None
                assert note.epoch is not None
                epoch = tracking.acknowledge(consumer, note.generation, note.epoch)
                disks.append({"disk": note.disk, "epoch": epoch})
            if consumer not in snapshot.record.acknowledged:
                snapshot.record.acknowledged.append(consumer)
                self._save(snapshot.record)
            log.info("acknowledge snapshot=%r consumer=%r", name, consumer)
            return {"name": name, "consumer": consumer, "disks": disks}

    def extend(self, name: str, lease: float) -> dict[str, Any]:
        """Let the snapshot live ``lease`` seconds from now."""
        check_lease(lease)
        with self._operation():
            snapshot = self._find(name)
            before = snapshot.record.lease_expires
            snapshot.record.lease_expires = self._clock() + lease
            try:
                self._save(snapshot.record)
            except SnapshotError:
                snapshot.record.lease_expires = before
                raise
            self._wake.set()
            return report(snapshot, self._server.listeners)

    def drop(self, name: str) -> dict[str, Any]:
        """End the snapshot: its clients are hung up, its export and its overlays go.

        What an older snapshot of the same disk still needs stays until that one is dropped.
        """
        with self._operation():
            snapshot = self._find(name)
            self._records.drop(snapshot.record)
            del self._snapshots[name]
            freed = self._end(snapshot)
            log.info("drop snapshot=%r freed-bytes=%d", name, freed)
            return {"name": name, "freed-bytes": freed}

    def _find(self, name: str) -> Snapshot:
        try:
            return self._snapshots[name]
        except KeyError:
            known = ", ".join(self._snapshots) or "none"
            raise NotFound(f"there is no snapshot named {name!r} (snapshots: {known})") from None

    # The end of a snapshot

    def _end(self, snapshot: Snapshot) -> int:
        """Withdraw its exports and let its levels go; bytes of overlay that were freed."""
        self._ending.append(snapshot)
        for part in snapshot.parts:
            if part.view is not None:
                part.view.close()
                self._withdraw(part.view.name)
            part.level.dropped = True
            part.unpin()
        freed = sum(self._sweep(part.served) for part in snapshot.parts)
        self._wake.set()  # for what could not be freed now
        return freed

    def _withdraw(self, export: str) -> None:
        try:
            self._server.remove(export)
        except TimeoutError as problem:
            self._hung = True
            log.warning("%s; its clients read errors from now on", problem)

    def _sweep(self, served: ServedDisk, timeout: float = DRAIN_SECONDS) -> int:
        """Remove what no snapshot of the disk needs; what cannot be now is tried again later."""
        try:
            gone = instant.sweep(served, timeout)
        except DrainTimeout as problem:
            severity = logging.WARNING if timeout == DRAIN_SECONDS else logging.DEBUG
            log.log(severity, "the overlays of disk %r stay for now: %s", served.name, problem)
            return 0
        freed = 0
        for level in gone:
            if level.overlay is not None and not self._hung:
                freed += level.overlay.data_bytes
                _discard(level.overlay)
        self._forget_ended()
        return freed

    def _forget_ended(self) -> None:
        """Remove the files that nobody needs, and the records without any."""
        for snapshot in list(self._ending):
            needed = {p.record.overlay for p in snapshot.parts if _is_attached(p)}
            files = [path for part in snapshot.record.parts for path in part.files]
            try:
                for path in files:
                    if str(path) not in needed:
                        path.unlink(missing_ok=True)
                if not needed:
                    self._records.remove(snapshot.record)
                    self._ending.remove(snapshot)
            except OSError as problem:
                log.debug("files of snapshot %r stay for now: %s", snapshot.name, problem)

    # What happens by itself

    def _callback(self, disk: str) -> Callable[[Level], None]:
        return partial(self._broken, disk)

    def _broken(self, disk: str, level: Level) -> None:
        """From a guest's thread: nothing here may wait for the manager's lock."""
        error = level.error
        why = str(error.strerror or error) if error is not None else ""
        log.error(
            "snapshot %r is broken: old data of disk %r could not be saved: %s; "
            "drop it and take another",
            level.name,
            disk,
            why,
        )
        data = {"name": level.name, "disk": disk, "error": why}
        self._emit("X_FLEECE_SNAPSHOT_BROKEN", data)

    def beat(self) -> None:
        """Note that we live, once more after the disks are closed.

        No lock: an operation that takes long must not look like our end.
        """
        for snapshot in list(self._snapshots.values()):
            self._touch(snapshot.record)

    def _touch(self, record: Record) -> None:
        """Where tracking does not vouch for the image, the time of the record does."""
        served = [self._disks[part.disk] for part in record.parts if part.disk in self._disks]
        untracked = [disk for disk in served if disk.tracking is None]
        if untracked:
            self._records.touch(record, max(alive_until(disk.image) for disk in untracked))

    def _reap(self) -> None:
        while True:
            self._wake.clear()
            if self._stopping:  # looked at after the clear, or `stop` could be missed
                return
            self._wake.wait(self._next_look())
            try:
                self._tidy()
            except Exception as problem:  # or no lease would ever run out again
                log.error("snapshots could not be tidied up: %r", problem)

    def _next_look(self) -> float | None:
        """Seconds to sleep; looked at again at least each second, for the clock may be set."""
        with self._lock:
            leased = any(s.record.lease_expires is not None for s in self._snapshots.values())
            return 1.0 if leased or self._ending else None

    def _tidy(self) -> None:
        """Drop the snapshots whose lease has run out, and what could not be freed before."""
        with self._lock:
            if self._stopping:
                return
            now = self._clock()
            for snapshot in list(self._snapshots.values()):
                expires = snapshot.record.lease_expires
                if expires is not None and expires <= now:
                    self._expire(snapshot)
            for served in self._disks.values():
                if self._ending:
                    self._sweep(served, RETRY_DRAIN_SECONDS)

    def _expire(self, snapshot: Snapshot) -> None:
        log.warning("snapshot %r: its lease has run out", snapshot.name)
        self._emit("X_FLEECE_LEASE_EXPIRED", {"name": snapshot.name})
        try:
            self.drop(snapshot.name)
        except FleeceError as problem:
            log.error("snapshot %r cannot be dropped: %s", snapshot.name, problem)


def _may_acknowledge(snapshot: Snapshot) -> None:
    for part in snapshot.parts:
        if part.failure is not None:
            raise SnapshotBroken(
                f"snapshot {snapshot.name!r} is broken ({part.failure}): what was pulled of it "
                "may be wrong and cannot be acknowledged; drop it and take another"
            )
        if part.served.tracking is None:
            raise SnapshotError(
                f"changes of disk {part.record.disk!r} are not tracked: there is nothing to "
                "acknowledge; switch tracking on for it in the configuration"
            )


def _is_attached(part: LivePart) -> bool:
    cbw = part.served.cbw
    return cbw is not None and part.level in cbw.levels


def _discard(overlay: Overlay | None) -> None:
    """Delete the file, or at least let go of it."""
    if overlay is None:
        return
    try:
        overlay.remove()
    except OSError as problem:
        log.warning("overlay %s cannot be removed now: %s", overlay.path, problem.strerror)
        overlay.close()

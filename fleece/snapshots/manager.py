# SPDX-License-Identifier: Apache-2.0
"""The snapshots of a daemon: made, listed, acknowledged, dropped, found again after a restart."""

import logging
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from fleece.errors import (
    AlreadyExists,
    DrainTimeout,
    FleeceError,
    InvalidArgument,
    NotFound,
    SnapshotBroken,
    SnapshotError,
    UsageError,
)
from fleece.snapshots import instant
from fleece.snapshots.cbw import BREAK_SNAPSHOT, POLICIES, Level
from fleece.snapshots.fleecing import Fleecing
from fleece.snapshots.live import LivePart, ServedDisk, Snapshot, export_name, report, timestamp
from fleece.snapshots.record import ACTIVE, CREATING, DROPPED, Part, Record, Records
from fleece.snapshots.recovery import Recovery
from fleece.tracking.identity import running_boot_id
from fleece.units import KiB, MiB, is_power_of_two
from nbdwire.server import Server

log = logging.getLogger(__name__)

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:+-]{0,99}")
_MIN_CLUSTER: Final = 4 * KiB
_MAX_CLUSTER: Final = 2 * MiB

Emit = Callable[[str, dict[str, Any]], None]


@dataclass(frozen=True)
class Defaults:
    """What a snapshot is made with unless it is asked for otherwise."""

    overlay_directory: Path
    cluster_size: int = 64 * KiB
    policy: str = BREAK_SNAPSHOT
    lease: float | None = None


class SnapshotManager:
    """One operation at a time; the guests and the readers of snapshots never wait for one.

    ``emit(event, data)`` is called from any thread and must not block.
    """

    def __init__(
        self,
        disks: Mapping[str, ServedDisk],
        server: Server,
        directory: Path,
        defaults: Defaults,
        emit: Emit,
    ) -> None:
        self._disks = disks
        self._server = server
        self._records = Records(directory)
        self._defaults = defaults
        self._emit = emit
        self._boot_id = running_boot_id()
        self._lock = threading.RLock()
        self._snapshots: dict[str, Snapshot] = {}
        self._ending: list[Snapshot] = []  # dropped, but an older snapshot needs what they saved
        self._serial = 0
        self._hung = False  # a reader is stuck: no descriptor that it may use is closed any more
        self._wake = threading.Event()
        self._stopping = False
        self._reaper = threading.Thread(target=self._reap, name="leases", daemon=True)

    # Life of the manager

    def start(self) -> None:
        """Find the snapshots of an earlier run again; before any client can write to a disk."""
        with self._lock:
            recovery = Recovery(self._disks, self._records, self._boot_id, self._broken)
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
        self._reaper.start()

    def stop(self) -> None:
        """Let go of the overlays without dropping a snapshot: the next start goes on with them.

        Every client must have been hung up, and every writer be gone.
        """
        self._stopping = True
        self._wake.set()
        if self._reaper.ident is not None:
            self._reaper.join()
        for snapshot in [*self._snapshots.values(), *self._ending]:
            for part in snapshot.parts:
                if part.view is not None:
                    part.view.close()
                if part.level.overlay is not None:
                    part.level.overlay.close()

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
        with self._lock:
            served = self._select(disks)
            record = self._new_record(served, name, consumer, lease, cluster_size, policy)
            self._records.save(record)
            snapshot = self._take(record, served)
            try:
                self._announce(snapshot)
            except BaseException:
                # The record stays until the overlays can go: an older snapshot may need them.
                self._end(snapshot)
                raise
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

    def _new_record(
        self,
        served: list[ServedDisk],
        name: str | None,
        consumer: str | None,
        lease: float | None,
        cluster_size: int | None,
        policy: str | None,
    ) -> Record:
        now = time.time()
        name = self._free_name(name, now)
        lease = self._defaults.lease if lease is None else lease
        if lease is not None and not 0 < lease < 10 * 365 * 86400:
            raise InvalidArgument("a lease is a number of seconds above 0, of ten years at most")
        policy = policy or self._defaults.policy
        if policy not in POLICIES:
            raise InvalidArgument(f"on-cbw-error is {' or '.join(POLICIES)}, not {policy!r}")
        parts = [self._new_part(disk, name, consumer, cluster_size, policy) for disk in served]
        self._serial += 1
        return Record(
            name=name,
            serial=self._serial,
            created=now,
            boot_id=self._boot_id,
            phase=CREATING,
            consumer=consumer,
            lease_expires=None if lease is None else now + lease,
            parts=parts,
        )

    def _free_name(self, name: str | None, now: float) -> str:
        taken = {*self._snapshots, *(snapshot.name for snapshot in self._ending)}
        if name is None:
            base = time.strftime("%Y%m%d-%H%M%S", time.gmtime(now))
            numbered = (f"{base}-{number}" for number in range(2, len(taken) + 3))
            return next(free for free in (base, *numbered) if free not in taken)
        if not _NAME.fullmatch(name):
            raise InvalidArgument(
                f"{name!r} cannot name a snapshot: use up to 100 letters, digits and ._:+-"
            )
        if name in taken:
            raise AlreadyExists(
                f"there is a snapshot named {name!r} already; "
                f"drop it with 'fleece snapshot drop {name}' or choose another name"
            )
        return name

    def _new_part(
        self, served: ServedDisk, name: str, consumer: str | None, size: int | None, policy: str
    ) -> Part:
        """What is known before the instant; `_take` adds the rest."""
        cluster_size = size or (
            served.cbw.cluster_size if served.cbw else self._defaults.cluster_size
        )
        if not (is_power_of_two(cluster_size) and _MIN_CLUSTER <= cluster_size <= _MAX_CLUSTER):
            raise InvalidArgument("cluster-size is a power of two from 4 KiB to 2 MiB")
        if served.cbw is not None and served.cbw.cluster_size != cluster_size:
            raise InvalidArgument(
                f"disk {served.name!r} has a snapshot with clusters of {served.cbw.cluster_size} "
                "bytes; all its snapshots have that size until they are dropped"
            )
        if served.disk.read_only:
            log.info("disk %r is read-only: its snapshot will never have to save data", served.name)
        stem = quote(export_name(served.name, name), safe="@")
        tracked = served.tracking is not None
        if served.tracking is not None and consumer is not None:
            served.tracking.since(consumer)  # InvalidArgument for a name that cannot be
        return Part(
            disk=served.name,
            overlay=str(self._defaults.overlay_directory / f"{stem}.qcow2"),
            size=served.disk.size,
            cluster_size=cluster_size,
            policy=policy,
            map_file=str(self._records.directory / f"{stem}.map") if tracked else None,
        )

    def _take(self, record: Record, served: list[ServedDisk]) -> Snapshot:
        """Overlays, then the instant; all files are gone again if any of it fails."""
        pairs = []
        try:
            for disk, part in zip(served, record.parts, strict=True):
                pairs.append(instant.prepare(disk, part, record.name, self._broken))
            record.drain_microseconds = instant.take(pairs)
        except BaseException:
            for live, _ in pairs:
                if live.level.overlay is not None:
                    live.level.overlay.remove()
            self._records.remove(record)
            raise
        return Snapshot(record, [part for part, _ in pairs])

    def _announce(self, snapshot: Snapshot) -> None:
        """The instant is taken: note what changed, record that it lives, export it."""
        for part in snapshot.parts:
            self._link(part)
            self._note_changes(part, snapshot.record.consumer)
        snapshot.record.phase = ACTIVE
        self._records.save(snapshot.record)
        self._offer(snapshot)

    def _note_changes(self, part: LivePart, consumer: str | None) -> None:
        """Fix, as of the instant, from where each consumer counts, and keep the map."""
        tracking, frozen, note = part.served.tracking, part.frozen, part.record
        if tracking is None or frozen is None or note.map_file is None:
            return
        tracking.pin(frozen.epoch)
        note.epoch, note.generation = frozen.epoch, frozen.generation
        names = {cursor.consumer for cursor in tracking.cursors()}
        for name in names | ({consumer} if consumer is not None else set()):
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
            part.view = Fleecing(name, part.served.cbw, part.level)
            self._server.add(
                name,
                part.view,
                description=f"disk {part.served.name} as it was at {timestamp(record.created)}",
                contexts=part.contexts(),
            )

    # The others

    def list(self) -> list[dict[str, Any]]:
        """Every live snapshot, oldest first."""
        with self._lock:
            return [report(s, self._server.listeners) for s in self._snapshots.values()]

    def acknowledge(self, name: str, consumer: str | None = None) -> dict[str, Any]:
        """``consumer`` has all of the snapshot: its next one is counted from here."""
        with self._lock:
            snapshot = self._find(name)
            consumer = consumer or snapshot.record.consumer
            if consumer is None:
                raise UsageError(
                    f"snapshot {name!r} was made for no consumer; say whose it is with --consumer"
                )
            self._may_acknowledge(snapshot)
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
                self._records.save(snapshot.record)
            log.info("acknowledge snapshot=%r consumer=%r", name, consumer)
            return {"name": name, "consumer": consumer, "disks": disks}

    @staticmethod
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

    def extend(self, name: str, lease: float) -> dict[str, Any]:
        """Let the snapshot live ``lease`` seconds from now."""
        if not 0 < lease < 10 * 365 * 86400:
            raise InvalidArgument("a lease is a number of seconds above 0, of ten years at most")
        with self._lock:
            snapshot = self._find(name)
            snapshot.record.lease_expires = time.time() + lease
            self._records.save(snapshot.record)
            self._wake.set()
            return report(snapshot, self._server.listeners)

    def drop(self, name: str) -> dict[str, Any]:
        """End the snapshot: its clients are hung up, its export and its overlays go.

        What an older snapshot of the same disk still needs stays until that one is dropped.
        """
        with self._lock:
            snapshot = self._find(name)
            snapshot.record.phase = DROPPED
            self._records.save(snapshot.record)
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
            if part.record.epoch is not None and part.served.tracking is not None:
                part.served.tracking.unpin(part.record.epoch)
        return sum(self._sweep(part.served) for part in snapshot.parts)

    def _withdraw(self, export: str) -> None:
        try:
            self._server.remove(export)
        except KeyError:
            pass  # it was never offered: the snapshot failed before that
        except TimeoutError as problem:
            self._hung = True
            log.warning("%s; its clients read errors from now on", problem)

    def _sweep(self, served: ServedDisk) -> int:
        """Remove what no snapshot of the disk needs; what cannot be now is tried again later."""
        try:
            gone = instant.sweep(served)
        except DrainTimeout as problem:
            log.warning("the overlays of disk %r stay for now: %s", served.name, problem)
            return 0
        freed = 0
        for level in gone:
            if level.overlay is not None and not self._hung:
                freed += level.overlay.data_bytes
                level.overlay.remove()
        self._forget_ended()
        return freed

    def _forget_ended(self) -> None:
        for snapshot in list(self._ending):
            if not any(_is_attached(part) for part in snapshot.parts):
                self._ending.remove(snapshot)
                for part in snapshot.record.parts:
                    for path in part.files:
                        path.unlink(missing_ok=True)
                self._records.remove(snapshot.record)

    def _broken(self, level: Level) -> None:
        """From a guest's thread: nothing here may wait for the manager's lock."""
        error = level.error
        self._emit(
            "X_FLEECE_SNAPSHOT_BROKEN",
            {"snapshot": level.name, "error": str(error.strerror or error) if error else ""},
        )

    # Leases

    def _reap(self) -> None:
        while not self._stopping:
            self._wake.clear()
            self._wake.wait(self._next_expiry())
            if not self._stopping:
                self._drop_expired()

    def _next_expiry(self) -> float | None:
        """Seconds to sleep; looked at again at least each second, for the clock may be set."""
        with self._lock:
            leased = any(s.record.lease_expires is not None for s in self._snapshots.values())
            return 1.0 if leased or self._ending else None

    def _drop_expired(self) -> None:
        with self._lock:
            now = time.time()
            for snapshot in list(self._snapshots.values()):
                expires = snapshot.record.lease_expires
                if expires is not None and expires <= now:
                    log.warning("snapshot %r: its lease has run out", snapshot.name)
                    self._emit("X_FLEECE_LEASE_EXPIRED", {"snapshot": snapshot.name})
                    try:
                        self.drop(snapshot.name)
                    except (FleeceError, OSError) as problem:
                        log.error("snapshot %r cannot be dropped: %s", snapshot.name, problem)
            for served in self._disks.values():
                if self._ending:
                    self._sweep(served)


def _is_attached(part: LivePart) -> bool:
    cbw = part.served.cbw
    return cbw is not None and part.level in cbw.levels

# SPDX-License-Identifier: Apache-2.0
"""Snapshots while they live: their disks, their parts, and how they are reported."""

import errno
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fleece.block.graph import Disk
from fleece.snapshots.cbw import CopyBeforeWrite, Level
from fleece.snapshots.fleecing import Fleecing
from fleece.snapshots.record import Part, Record
from fleece.tracking.frozen import ChangedView, FrozenMap
from fleece.tracking.identity import Identity
from fleece.tracking.store import DiskTracking
from nbdwire.constants import CONTEXT_DIRTY_BITMAP_PREFIX
from nbdwire.uri import NBDURI


@dataclass
class ServedDisk:
    """A disk of the daemon. ``tracking`` is None for one whose changes are not recorded.

    ``identity`` is that of the image before it was opened for writing.
    """

    disk: Disk
    image: Path
    format: str
    identity: Identity
    tracking: DiskTracking | None = None
    cbw: CopyBeforeWrite | None = None

    @property
    def name(self) -> str:
        """The name that users know it by."""
        return self.disk.name


@dataclass
class LivePart:
    """One disk of a live snapshot. ``views``: what changed, for each consumer known then.

    ``view`` is what is exported, None as long as it is not. ``pinned`` says that the tracking
    keeps its epoch.
    """

    record: Part
    served: ServedDisk
    level: Level
    view: Fleecing | None = None
    frozen: FrozenMap | None = None
    pinned: bool = False
    views: dict[str, ChangedView] = field(default_factory=dict)

    @property
    def failure(self) -> str | None:
        """Why it is broken, or None."""
        error = self.level.error
        return None if error is None else (error.strerror or os.strerror(error.errno or errno.EIO))

    def pin(self) -> None:
        """Keep its epoch told apart: a consumer may acknowledge it."""
        if self.served.tracking is not None and self.record.epoch is not None:
            self.served.tracking.pin(self.record.epoch)
            self.pinned = True

    def unpin(self) -> None:
        """The reverse. Idempotent."""
        if self.pinned and self.served.tracking is not None and self.record.epoch is not None:
            self.served.tracking.unpin(self.record.epoch)
            self.pinned = False

    def build_views(self) -> None:
        """From the frozen map and what each consumer had acknowledged."""
        if self.frozen is not None:
            for consumer, since in self.record.since.items():
                self.views[consumer] = self.frozen.changed(since)

    def contexts(self) -> dict[str, ChangedView]:
        """The metadata contexts of its export, beside the allocation."""
        return {CONTEXT_DIRTY_BITMAP_PREFIX + name: view for name, view in self.views.items()}


@dataclass
class Snapshot:
    """A group of disks at one instant."""

    record: Record
    parts: list[LivePart]

    @property
    def name(self) -> str:
        """Unique among the snapshots of a daemon."""
        return self.record.name

    @property
    def broken(self) -> bool:
        """Whether any of its disks has lost old data."""
        return any(part.level.error is not None for part in self.parts)


def export_name(disk: str, snapshot: str) -> str:
    """Under which name a snapshot of a disk is exported."""
    return f"{disk}@{snapshot}"


def timestamp(seconds: float | None) -> str | None:
    """ISO 8601 in UTC, to the microsecond."""
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="microseconds")[:-6] + "Z"


def report(snapshot: Snapshot, listeners: list[NBDURI]) -> dict[str, Any]:
    """What ``--json`` and the control connection show of a snapshot."""
    record = snapshot.record
    return {
        "name": record.name,
        "created": timestamp(record.created),
        "state": "broken" if snapshot.broken else "active",
        "consumer": record.consumer,
        "lease-expires": timestamp(record.lease_expires),
        "acknowledged": record.consumer in record.acknowledged,
        "drain-microseconds": record.drain_microseconds,
        "disks": [_report_part(part, record, listeners) for part in snapshot.parts],
    }


def _report_part(part: LivePart, record: Record, listeners: list[NBDURI]) -> dict[str, Any]:
    export = export_name(part.served.name, record.name)
    overlay = part.level.overlay
    return {
        "disk": part.served.name,
        "export": export,
        "uris": [str(uri.with_export(export)) for uri in listeners],
        "size": part.record.size,
        **_report_changes(part, record.consumer),
        "epoch": part.record.epoch,
        "overlay": part.record.overlay,
        "overlay-bytes": overlay.data_bytes if overlay is not None else 0,
        "cluster-size": part.record.cluster_size,
        "state": "broken" if part.failure else "active",
        "error": part.failure,
    }


def _report_changes(part: LivePart, consumer: str | None) -> Mapping[str, Any]:
    """How much of the disk the snapshot's consumer has to read."""
    view = part.views.get(consumer) if consumer is not None else None
    since = part.record.since.get(consumer) if consumer is not None and view is not None else None
    return {
        "mode": "full" if since is None else "incremental",
        "reason": _why_full(part, consumer) if since is None else None,
        "bitmap": consumer if view is not None else None,
        "context": CONTEXT_DIRTY_BITMAP_PREFIX + consumer if view and consumer else None,
        "since-epoch": since,
        "dirty-bytes": view.dirty_bytes if view is not None else part.record.size,
    }


def _why_full(part: LivePart, consumer: str | None) -> str | None:
    if consumer is None:
        return "the snapshot was made for no consumer"
    if part.served.tracking is None:
        return f"changes of disk {part.served.name!r} are not tracked"
    if not part.views and part.failure is not None:
        return f"the snapshot is broken: {part.failure}"
    return part.record.reasons.get(consumer)

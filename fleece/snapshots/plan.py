# SPDX-License-Identifier: Apache-2.0
"""What a snapshot is going to be, checked before anything is touched."""

import re
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fleece.errors import AlreadyExists, InvalidArgument
from fleece.snapshots.cbw import BREAK_SNAPSHOT, POLICIES
from fleece.snapshots.live import ServedDisk, export_name
from fleece.snapshots.record import CREATING, Part, Record
from fleece.tracking.atomic import file_stem
from fleece.tracking.cursors import check_consumer
from fleece.units import KiB, MiB, is_power_of_two

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:+-]{0,99}")
_MIN_CLUSTER: Final = 4 * KiB
_MAX_CLUSTER: Final = 2 * MiB
_MAX_LEASE: Final = 10 * 365 * 86400


@dataclass(frozen=True)
class Defaults:
    """What a snapshot is made with unless it is asked for otherwise. ``lease`` in seconds."""

    overlay_directory: Path
    cluster_size: int = 64 * KiB
    policy: str = BREAK_SNAPSHOT
    lease: float | None = None


@dataclass(frozen=True)
class Wishes:
    """What was asked for; None: as the `Defaults` say, for ``name`` one made of the time."""

    name: str | None = None
    consumer: str | None = None
    lease: float | None = None
    cluster_size: int | None = None
    policy: str | None = None


@dataclass(frozen=True)
class Planner:
    """Makes records. ``directory`` is where the maps of changes go."""

    directory: Path
    defaults: Defaults
    boot_id: str

    def plan(
        self,
        served: Sequence[ServedDisk],
        wishes: Wishes,
        serial: int,
        taken: Collection[str],
        now: float,
    ) -> Record:
        """The record of a new snapshot, or a FleeceError that says why it cannot be.

        ``taken`` are the names that it cannot have; ``now`` is in seconds since 1970.
        """
        name = _free_name(wishes.name, now, taken)
        lease = self.defaults.lease if wishes.lease is None else check_lease(wishes.lease)
        if wishes.consumer is not None:
            check_consumer(wishes.consumer)
        return Record(
            name=name,
            serial=serial,
            created=now,
            boot_id=self.boot_id,
            phase=CREATING,
            consumer=wishes.consumer,
            lease_expires=None if lease is None else now + lease,
            parts=[self._part(disk, name, wishes) for disk in served],
        )

    def _part(self, served: ServedDisk, name: str, wishes: Wishes) -> Part:
        """What is known before the instant."""
        stem = _stem(served.name, name)
        overlay = self.defaults.overlay_directory / f"{stem}.qcow2"
        if overlay.exists():
            # Never ours: of a record that could not be read, or of somebody else.
            raise AlreadyExists(
                f"there is a file {overlay} already; remove it or choose another name"
            )
        return Part(
            disk=served.name,
            image=str(served.image),
            inode=[served.identity.device, served.identity.inode],
            overlay=str(overlay),
            size=served.disk.size,
            cluster_size=self._cluster_size(served, wishes.cluster_size),
            policy=_check_policy(wishes.policy or self.defaults.policy),
            map_file=str(self.directory / f"{stem}.map") if served.tracking is not None else None,
        )

    def _cluster_size(self, served: ServedDisk, asked: int | None) -> int:
        now = served.cbw.cluster_size if served.cbw is not None else None
        size = asked or now or self.defaults.cluster_size
        if not (is_power_of_two(size) and _MIN_CLUSTER <= size <= _MAX_CLUSTER):
            raise InvalidArgument("cluster-size is a power of two from 4 KiB to 2 MiB")
        if now is not None and now != size:
            raise InvalidArgument(
                f"disk {served.name!r} has a snapshot with clusters of {now} bytes; "
                "all its snapshots have that size until they are dropped"
            )
        return size


def check_lease(lease: float) -> float:
    """``lease`` in seconds if it can be one; else InvalidArgument."""
    if not 0 < lease < _MAX_LEASE:
        raise InvalidArgument("a lease is a number of seconds above 0, of ten years at most")
    return lease


def _check_policy(policy: str) -> str:
    if policy not in POLICIES:
        raise InvalidArgument(f"on-cbw-error is {' or '.join(POLICIES)}, not {policy!r}")
    return policy


def _free_name(name: str | None, now: float, taken: Collection[str]) -> str:
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


def _stem(disk: str, snapshot: str) -> str:
    """How its files are called: readable, and short enough for a name of any kind."""
    return file_stem(export_name(disk, snapshot), safe="@")

# SPDX-License-Identifier: Apache-2.0
"""Whether the record of a disk can be believed at start.

It is believed

- after an orderly end, if the image has the identity that was noted then; or
- after a kill, in the same boot of the host (the shared map is exact then), if the image is the
  same file and was not changed later than the killed process may have done.

Else a new generation begins, in which nothing is known: every consumer gets everything once, and is
told why. After a crash of the host that will change: the sidecar has room for an intent log, and
`_distrust` is where it is to be asked.
"""

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from fleece.tracking.cursors import Cursor
from fleece.tracking.heartbeat import alive_until
from fleece.tracking.identity import Identity
from fleece.tracking.sidecar import Damaged, Description, Lock, Sidecar
from fleece.units import format_size


class _Distrusted(Exception):
    """The text is the reason for a new generation."""


def open_record(
    path: Path, wanted: Description, image: Path, boot: str, cursors: Iterable[Cursor]
) -> tuple[Sidecar, str | None]:
    """The sidecar at ``path``, in use, and None; or that of a new generation, and why it is new.

    ``wanted`` describes the new generation, but for its reason. Raises `Busy` or OSError.
    """
    identity = Identity.of(image)
    with ExitStack() as undo:
        lock = Lock.take(path)
        if lock is not None:
            undo.callback(lock.release)
        try:
            sidecar = _reopen(lock, wanted, image, identity, boot, list(cursors))
        except _Distrusted as why:
            about = replace(wanted, reason=str(why))
            made = Sidecar.create(
                path,
                about,
                boot_id=boot,
                identity=identity,
                until=alive_until(image),
                replaced=lock,
            )
            return made, about.reason
        undo.pop_all()
        return sidecar, None


def _reopen(
    lock: Lock | None,
    wanted: Description,
    image: Path,
    identity: Identity,
    boot: str,
    cursors: list[Cursor],
) -> Sidecar:
    """The locked sidecar, in use. Raises `_Distrusted`, or OSError."""
    disk = f"disk {wanted.disk!r}"
    if lock is None:
        raise _Distrusted(
            f"the record of changes of {disk} is missing"
            if cursors
            else f"{disk} was not tracked before"
        )
    try:
        sidecar = Sidecar(lock)
    except Damaged as why:
        raise _Distrusted(f"the record of changes of {disk} {why}") from None
    with ExitStack() as undo:
        undo.callback(sidecar.unmap)
        reason = (
            _unfit(sidecar.description, wanted)
            or _distrust(sidecar, identity, image, boot)
            or _outdated(sidecar, cursors)
        )
        if reason:
            raise _Distrusted(reason)
        sidecar.begin(boot, identity, alive_until(image))
        undo.pop_all()
    return sidecar


def _unfit(found: Description, wanted: Description) -> str | None:
    """Why the sidecar is not one of this disk."""
    if found.disk != wanted.disk:
        return f"the record of changes of disk {wanted.disk!r} is one of disk {found.disk!r}"
    if found.size != wanted.size:
        return f"the size of disk {found.disk!r} changed from {found.size} to {wanted.size} bytes"
    if found.granularity != wanted.granularity:
        before, now = format_size(found.granularity), format_size(wanted.granularity)
        return f"the granularity of disk {found.disk!r} was changed from {before} to {now}"
    return None


def _distrust(sidecar: Sidecar, now: Identity, image: Path, boot: str) -> str | None:
    """Why the image may have changes that the sidecar does not have."""
    same_boot = boot != "" and sidecar.boot_id == boot
    before = sidecar.identity
    if sidecar.clean:
        return before.changed(now, image, same_boot=same_boot)
    if not same_boot:
        return (
            f"the host crashed or lost power while disk {sidecar.description.disk!r} was in use, "
            "and its record of changes may not be complete"
        )
    if not now.is_block_device and now.mtime_ns > sidecar.alive_until:
        return f"image {image} was changed after fleece was killed, before it was started again"
    return before.replaced(now, image)


def _outdated(sidecar: Sidecar, cursors: list[Cursor]) -> str | None:
    """Why the sidecar must be older than the cursors: a checkpoint in one is not in the other."""
    if any(
        cursor.generation == sidecar.map.generation and cursor.epoch >= sidecar.map.epoch
        for cursor in cursors
    ):
        return (
            f"the record of changes of disk {sidecar.description.disk!r} is older than its "
            "cursors (was an old copy of it restored?)"
        )
    return None

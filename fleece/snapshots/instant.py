# SPDX-License-Identifier: Apache-2.0
"""One instant of one or many disks: all of them, or nothing changed."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from fleece.block.graph import DRAIN_SECONDS, drained
from fleece.errors import SnapshotError
from fleece.formats.qcow2.overlay import Overlay
from fleece.snapshots.cbw import CopyBeforeWrite, Level
from fleece.snapshots.live import LivePart, ServedDisk
from fleece.snapshots.record import Part


def prepare(
    served: ServedDisk, part: Part, snapshot: str, on_broken: Callable[[Level], None]
) -> tuple[LivePart, CopyBeforeWrite]:
    """Make the overlay of one disk, and the filter if the disk has none; nothing is attached yet.

    SnapshotError if the overlay cannot be made, with no file left behind.
    """
    try:
        overlay = Overlay.create(
            Path(part.overlay),
            served.disk.size,
            backing=str(served.image),
            backing_format=served.format,
            cluster_size=part.cluster_size,
        )
    except OSError as problem:
        raise SnapshotError(
            f"cannot make the overlay {part.overlay}: {problem.strerror}; free some space there, "
            "or choose another place with overlay-directory"
        ) from problem
    clusters = -(-served.disk.size // part.cluster_size)
    level = Level(snapshot, overlay, saved=bytearray(clusters), policy=part.policy)
    cbw = served.cbw or CopyBeforeWrite(served.disk.root, part.cluster_size, on_broken)
    return LivePart(part, served, level), cbw


def take(parts: Sequence[tuple[LivePart, CopyBeforeWrite]], timeout: float = DRAIN_SECONDS) -> int:
    """The instant: drain, attach every filter and end every epoch, release. Microseconds it took.

    Whatever fails, every disk is as it was (an epoch may have ended, which changes no answer).
    """
    began = time.perf_counter_ns()
    with drained([part.served.disk for part, _ in parts], timeout), ExitStack() as undo:
        for part, cbw in parts:
            _attach(part.served, cbw, part.level, undo)
            if part.served.tracking is not None:
                part.frozen = part.served.tracking.checkpoint()
        undo.pop_all()
    return (time.perf_counter_ns() - began) // 1000


def _attach(served: ServedDisk, cbw: CopyBeforeWrite, level: Level, undo: ExitStack) -> None:
    cbw.push(level)
    undo.callback(cbw.pop, level)
    if served.cbw is None:
        served.disk.attach(cbw)
        served.cbw = cbw
        undo.callback(_detach, served, cbw)


def _detach(served: ServedDisk, cbw: CopyBeforeWrite) -> None:
    served.disk.detach(cbw)
    served.cbw = None


def sweep(served: ServedDisk, timeout: float = DRAIN_SECONDS) -> list[Level]:
    """Take out the levels that no snapshot needs any more; the filter too if it was the last.

    DrainTimeout, with nothing changed, if the disk does not come to rest.
    """
    cbw = served.cbw
    if cbw is None:
        return []
    if not all(level.dropped for level in cbw.levels):
        return cbw.retire()
    with drained([served.disk], timeout):
        _detach(served, cbw)
        return cbw.retire()

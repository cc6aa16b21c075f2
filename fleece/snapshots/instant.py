# SPDX-License-Identifier: Apache-2.0
"""One instant of one or many disks: all of them, or nothing changed."""

import errno
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from fleece.block.graph import DRAIN_SECONDS, Disk, drained
from fleece.errors import DrainTimeout, SnapshotError
from fleece.formats.qcow2.overlay import Overlay
from fleece.snapshots.cbw import CopyBeforeWrite, Level
from fleece.snapshots.live import LivePart, ServedDisk
from fleece.snapshots.record import Part

SETTLE_SECONDS: Final = 30.0

Pair = tuple[LivePart, CopyBeforeWrite]

_HINTS: Final = {
    errno.ENOSPC: "free some space there, or choose another place with overlay-directory",
    errno.EDQUOT: "free some space there, or choose another place with overlay-directory",
    errno.EFBIG: "choose a place with overlay-directory whose file system has larger files",
    errno.EMFILE: "raise the limit of open files (ulimit -n), or drop some snapshots",
}


def prepare(
    served: ServedDisk, part: Part, snapshot: str, on_broken: Callable[[Level], None]
) -> Pair:
    """Make the overlay of one disk, and the filter if the disk has none; nothing is attached yet.

    SnapshotError if the overlay cannot be made, with no file left behind.
    """
    try:
        overlay = Overlay.create(
            Path(part.overlay),
            served.disk.size,
            backing=part.image,
            backing_format=served.format,
            cluster_size=part.cluster_size,
        )
    except OSError as problem:
        hint = _HINTS.get(problem.errno or 0, "choose another place with overlay-directory")
        raise SnapshotError(
            f"cannot make the overlay {part.overlay}: {problem.strerror}; {hint}"
        ) from problem
    clusters = -(-served.disk.size // part.cluster_size)
    level = Level(snapshot, overlay, saved=bytearray(clusters), policy=part.policy)
    cbw = served.cbw or CopyBeforeWrite(served.disk.root, part.cluster_size, on_broken)
    return LivePart(part, served, level), cbw


def take(parts: Sequence[Pair], timeout: float = DRAIN_SECONDS) -> int:
    """The instant: drain, attach every filter and end every epoch, release. Microseconds it took.

    Whatever fails, every disk is as it was (an epoch may have ended, which changes no answer).
    """
    volatile = [part.served.disk for part, _ in parts if _is_volatile(part.served)]
    _settle(volatile, SETTLE_SECONDS)  # most of the work, while the guests go on
    began = time.perf_counter_ns()
    with drained([part.served.disk for part, _ in parts], timeout), ExitStack() as undo:
        _settle(volatile, timeout)
        for part, cbw in parts:
            _attach(part.served, cbw, part.level, undo)
            if part.served.tracking is not None:
                part.frozen = part.served.tracking.checkpoint()
        undo.pop_all()
    return (time.perf_counter_ns() - began) // 1000


def _is_volatile(served: ServedDisk) -> bool:
    """Whether a write that the guest was told is done can be lost by SIGKILL.

    So it is with the tables of a qcow2 image until they are flushed. The snapshot reads unsaved
    clusters from the disk, and the next increment counts from the instant: so what was written
    before it must outlive us.
    """
    return served.format != "raw" and not served.disk.read_only


def _settle(disks: Sequence[Disk], seconds: float) -> None:
    """Flush them, all at once. SnapshotError if one fails, DrainTimeout if it takes too long.

    In threads, for a storage that hangs must not hold the guests of the others for ever.
    """
    deadline = time.monotonic() + seconds
    flushes = [_Flush(disk) for disk in disks]
    for flush in flushes:
        flush.start()
    for flush in flushes:
        flush.join(max(0.0, deadline - time.monotonic()))
        if flush.is_alive():
            raise DrainTimeout(
                f"disk {flush.disk.name!r} could not be flushed within {seconds:.0f} s; "
                "nothing was changed, try again when the storage answers"
            )
        if flush.problem is not None:
            raise SnapshotError(
                f"disk {flush.disk.name!r} cannot be flushed: "
                f"{flush.problem.strerror or flush.problem}; see to its storage"
            ) from flush.problem


class _Flush(threading.Thread):
    """One flush of one disk; ``problem`` tells how it ended."""

    def __init__(self, disk: Disk) -> None:
        super().__init__(name=f"settle {disk.name}", daemon=True)
        self.disk = disk
        self.problem: OSError | None = None

    def run(self) -> None:
        try:
            self.disk.root.flush()
        except OSError as problem:
            self.problem = problem


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

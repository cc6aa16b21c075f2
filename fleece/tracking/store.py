# SPDX-License-Identifier: Apache-2.0
"""The change tracking of one disk: epoch map, tracker filter, checkpoints and cursors together."""

import threading
import uuid
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from fleece.block.node import Node
from fleece.errors import InvalidArgument, TrackingError
from fleece.tracking.atomic import file_stem
from fleece.tracking.cursors import Cursor, CursorStore, check_consumer
from fleece.tracking.epochs import GRANULARITY, EpochMap, check_granularity
from fleece.tracking.frozen import FrozenMap
from fleece.tracking.heartbeat import Heartbeat, alive_until
from fleece.tracking.identity import Identity, running_boot_id
from fleece.tracking.sidecar import Description, Sidecar
from fleece.tracking.tracker import Tracker
from fleece.tracking.trust import open_record


class DiskTracking:
    """All of the above for one disk. Made by `open`; safe for all threads unless said otherwise."""

    def __init__(
        self, image: Path, sidecar: Sidecar, cursors: CursorStore, reason_new: str | None
    ) -> None:
        self.disk = sidecar.description.disk
        self.reason_new = reason_new
        """Why `open` began a new generation; None if it went on with the old one."""
        self.map: EpochMap = sidecar.map
        self._image = image
        self._sidecar = sidecar
        self._cursors = cursors
        self._pins: Counter[int] = Counter()
        self._lock = threading.Lock()
        self._closed = False
        self._heartbeat = Heartbeat(self.disk, self._beat)

    @classmethod
    def open(
        cls,
        directory: Path,
        disk: str,
        size: int,
        image: Path,
        *,
        granularity: int = GRANULARITY,
        boot_id: str | None = None,
    ) -> "DiskTracking":
        """Go on with the record in ``directory`` (made if needed), or begin a new generation.

        ``size`` is that of the disk in bytes, ``image`` the file or block device that holds it,
        ``boot_id`` that of the running host unless given. Raises `Busy` if another process has the
        record open, `TrackingError` if it cannot be read or made; a damaged one is no error.
        """
        check_granularity(granularity)
        path = directory / f"{file_stem(disk)}.epochs"
        boot = running_boot_id() if boot_id is None else boot_id
        wanted = Description(disk, str(uuid.uuid4()), granularity, size, "")
        try:
            directory.mkdir(parents=True, exist_ok=True)
            cursors = CursorStore(path.with_suffix(".cursors"))
            sidecar, reason = open_record(path, wanted, image, boot, cursors.list())
        except OSError as error:
            raise TrackingError(
                f"disk {disk!r}: its record of changes {path} cannot be opened: {error.strerror}"
            ) from error
        try:
            return cls(image, sidecar, cursors, reason)
        except BaseException:
            sidecar.close()
            raise

    @property
    def generation(self) -> str:
        """Names the record: epochs of two generations cannot be compared."""
        return self.map.generation

    @property
    def epoch(self) -> int:
        """The current epoch."""
        return self.map.epoch

    @property
    def granularity(self) -> int:
        """Bytes."""
        return self.map.granularity

    def tracker(self, child: Node) -> Tracker:
        """A filter over ``child`` that marks in this record."""
        return Tracker(f"{self.disk}-tracker", child, self.map)

    def checkpoint(self) -> FrozenMap:
        """End the epoch and return the map as of now. Only while the disk is drained.

        `pin` its epoch as long as a consumer may acknowledge it.
        """
        self.map.advance(self._kept())
        return self.map.freeze()

    def since(self, consumer: str) -> tuple[int | None, str | None]:
        """``(epoch, None)``, what ``consumer`` has; or ``(None, reason)``: it needs everything.

        Raises `InvalidArgument` if that cannot be the name of a consumer.
        """
        check_consumer(consumer)
        cursor = self._cursors.get(consumer)
        if cursor is None:
            never = f"consumer {consumer!r} has never acknowledged a snapshot of disk {self.disk!r}"
            return None, self._cursors.problem or never
        if cursor.generation != self.generation:
            return None, self._sidecar.description.reason
        return cursor.epoch, None

    def acknowledge(self, consumer: str, generation: str, epoch: int) -> int:
        """``consumer`` has everything up to checkpoint ``epoch``. Returns what holds, for good.

        That is a later epoch if it acknowledged one before. Of an earlier ``generation`` it is
        stored too, unless the consumer is past that already, and still means "everything". Raises
        `InvalidArgument` for a name or an epoch that cannot be, `TrackingError` if it cannot be
        stored.
        """
        if epoch < 1 or (generation == self.generation and epoch >= self.epoch):
            raise InvalidArgument(f"disk {self.disk!r} has no checkpoint {epoch}")
        cursor = Cursor(consumer, generation, epoch)
        return self._cursors.acknowledge(cursor, self.generation).epoch

    def cursors(self) -> list[Cursor]:
        """All cursors by name; those of an earlier generation too."""
        return self._cursors.list()

    def remove_cursor(self, consumer: str) -> bool:
        """Forget ``consumer``; False if it is not known. Raises `TrackingError`."""
        return self._cursors.remove(consumer)

    def pin(self, epoch: int) -> None:
        """Keep checkpoint ``epoch`` told apart until `unpin`, as often as it was pinned."""
        self.keep((epoch,))

    def keep(self, epochs: Iterable[int]) -> None:
        """`pin` each."""
        with self._lock:
            self._pins.update(epochs)

    def unpin(self, epoch: int) -> None:
        """Take one `pin` back; nothing happens if there is none."""
        with self._lock:
            self._pins[epoch] -= 1
            if self._pins[epoch] <= 0:
                del self._pins[epoch]

    def _kept(self) -> set[int]:
        with self._lock:
            pinned = set(self._pins)
        return pinned | {c.epoch for c in self.cursors() if c.generation == self.generation}

    def _beat(self) -> None:
        self._sidecar.alive_until = alive_until(self._image)

    def close(self, *, clean: bool = True) -> None:
        """End the tracking; the trackers must not be used any more. Idempotent.

        The image must be closed, and synced, before: its identity is noted as final. Not ``clean``
        leaves the record as a kill would. Raises `TrackingError` if it cannot be written; it is
        closed all the same, and not clean.
        """
        if self._closed:
            return
        self._closed = True
        self._heartbeat.stop()
        try:
            if clean:
                self._sidecar.finish(Identity.of(self._image))
        except OSError as error:
            raise TrackingError(
                f"disk {self.disk!r}: its record of changes cannot be closed in order: "
                f"{error.strerror}; after a restart of the host everything is backed up again"
            ) from error
        finally:
            self._sidecar.close()

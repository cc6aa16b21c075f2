"""What the daemon is made of, in this process: disks, a server, a snapshot manager."""

import contextlib
import errno
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fleece.block.graph import Disk
from fleece.formats import open_image
from fleece.formats.qcow2.create import CreateOptions, create
from fleece.snapshots.live import ServedDisk
from fleece.snapshots.manager import SnapshotManager
from fleece.snapshots.plan import Defaults
from fleece.tracking.identity import Identity
from fleece.tracking.store import DiskTracking
from nbdwire.client import Client, connect
from nbdwire.extents import Extent
from nbdwire.server import Server
from nbdwire.uri import NBDURI

CLUSTER = 65536
SIZE = 4 << 20
GRANULE = 4096


class Clock:
    """Time that a test moves."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


class Managed:
    """A daemon in ``directory``. `start`, then `kill` or `stop`, then `start` again and so on."""

    def __init__(
        self,
        directory: Path,
        names: tuple[str, ...] = ("a",),
        *,
        size: int = SIZE,
        fmt: str = "raw",
        tracking: bool = True,
        clock: Callable[[], float] | None = None,
        fresh: bool = True,
    ) -> None:
        self.directory = directory
        self.names = names
        self.size = size
        self.fmt = fmt
        self.tracking = tracking
        self.clock = clock
        self.boot_id: str | None = None
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.records = directory / "snapshots"
        self.records.mkdir(exist_ok=not fresh)
        self.model = {name: self._make(name) if fresh else bytearray() for name in names}
        self.disks: dict[str, ServedDisk] = {}
        self._running = False

    def image(self, name: str) -> Path:
        return self.directory / f"{name}.img"

    def _make(self, name: str) -> bytearray:
        """Half of it data, half of it holes."""
        if self.fmt == "qcow2":
            create(self.image(name), self.size, CreateOptions())
            return bytearray(self.size)
        data = bytearray(self.size)
        half = self.size // 2
        data[:half] = random.Random(name).randbytes(half)
        with self.image(name).open("wb") as file:
            file.write(data[:half])
            file.truncate(self.size)
        return data

    # Life

    def start(self) -> "Managed":
        self.server = Server()
        self.disks = {name: self._open(name) for name in self.names}
        defaults = Defaults(overlay_directory=self.records)
        extra = {} if self.clock is None else {"clock": self.clock}
        self.manager = SnapshotManager(
            self.disks, self.server, self.records, defaults, self._emit, **extra
        )
        if self.boot_id is not None:
            self.manager._boot_id = self.boot_id
        self.manager.start()
        for name, served in self.disks.items():
            self.server.add(name, served.disk)
        self.server.listen(NBDURI(socket=str(self.directory / "nbd.sock")))
        self._running = True
        return self

    def _emit(self, name: str, data: dict[str, Any]) -> None:
        self.events.append((name, data))

    def _open(self, name: str) -> ServedDisk:
        image = self.image(name)
        identity = Identity.of(image)
        tracking = None
        if self.tracking:
            size = open_size(image, self.fmt)
            tracking = DiskTracking.open(
                self.directory / "tracking", name, size, image, granularity=GRANULE
            )
        node = open_image(image, self.fmt)
        disk = Disk(name, node if tracking is None else tracking.tracker(node))
        return ServedDisk(disk, image, self.fmt, identity, tracking)

    def kill(self) -> None:
        """Leave all files as SIGKILL does: descriptors close, and nobody notes anything."""
        manager = self.manager
        manager._stopping = True
        manager._wake.set()
        manager._reaper.join()
        if manager._heartbeat is not None:
            manager._heartbeat.stop()
        self.server.stop()
        for served in self.disks.values():
            for level in served.cbw.levels if served.cbw is not None else ():
                if level.overlay is not None:
                    level.overlay.close()
            for node in served.disk.nodes():
                file = getattr(node, "file", node)
                if hasattr(file, "fileno"):
                    file.close()
            if served.tracking is not None:
                served.tracking.close(clean=False)
        self._running = False

    def stop(self) -> None:
        """End as the daemon does on SIGTERM."""
        self.server.stop()
        self.manager.stop()
        for served in self.disks.values():
            served.disk.root.flush()
            served.disk.close()
            if served.tracking is not None:
                served.tracking.close()
        self.manager.beat()
        self._running = False

    def restart(self) -> "Managed":
        self.kill()
        return self.start()

    def close(self) -> None:
        if self._running:
            self.stop()

    # A guest and a reader

    def uri(self, export: str) -> NBDURI:
        return NBDURI(socket=str(self.directory / "nbd.sock"), export=export)

    def client(self, export: str, *contexts: str) -> Client:
        return connect(self.uri(export), contexts=contexts or ("base:allocation",))

    def write(self, data: bytes, offset: int, disk: str = "a") -> None:
        with self.client(disk) as client:
            client.pwrite(data, offset)
        self.model[disk][offset : offset + len(data)] = data

    def scribble(self, seed: int, disk: str = "a", count: int = 8) -> None:
        """Some writes, zeroes and trims, unaligned and across clusters."""
        dice = random.Random(seed)
        with self.client(disk) as client:
            for _ in range(count):
                length = dice.choice((1, 512, 4097, CLUSTER, 3 * CLUSTER + 5))
                offset = dice.randrange(self.size - length)
                part = slice(offset, offset + length)
                if dice.random() < 0.75:
                    data = dice.randbytes(length)
                    client.pwrite(data, offset)
                    self.model[disk][part] = data
                else:
                    client.zero(offset, length)
                    self.model[disk][part] = bytes(length)

    def instant(self, disk: str = "a") -> bytes:
        """What the model says now."""
        return bytes(self.model[disk])

    def read(self, export: str) -> bytes:
        with self.client(export) as client:
            return client.pread(client.size, 0)

    def dirty(self, export: str, consumer: str) -> list[Extent]:
        context = f"qemu:dirty-bitmap:{consumer}"
        with self.client(export, context) as client:
            return [e for e in client.extents(0, client.size, context) if e.is_dirty]

    def left(self) -> set[str]:
        """The names of the files that snapshots have on disk."""
        return {path.name for path in self.records.iterdir()}


def open_size(image: Path, fmt: str) -> int:
    look = open_image(image, fmt, read_only=True)
    try:
        return look.size
    finally:
        look.close()


@contextlib.contextmanager
def managed(directory: Path, *names: str, **options: Any) -> Iterator[Managed]:
    """A started `Managed`, stopped in the end unless it was killed."""
    rig = Managed(directory, names or ("a",), **options)
    rig.start()
    try:
        yield rig
    finally:
        rig.close()


def edit_record(rig: Managed, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the record of a snapshot behind the daemon's back."""
    path = rig.records / f"{name}.snapshot.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def patched(extents: list[Extent], old: bytes, new: bytes) -> bytes:
    """``old`` with the parts that ``extents`` name taken from ``new``: full plus increment."""
    data = bytearray(old)
    for extent in extents:
        data[extent.offset : extent.end] = new[extent.offset : extent.end]
    return bytes(data)


def full_disk(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, at: int = 1) -> None:
    """The call number ``at`` of a function finds no space, as do all later ones."""
    real = getattr(owner, name)
    calls = 0

    def replaced(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls >= at:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, replaced)

"""A live disk with snapshots, without a daemon: the source, the filter, levels and views."""

import itertools
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from fleece.block.graph import Disk, drained
from fleece.block.node import Node
from fleece.formats.qcow2.overlay import Overlay
from fleece.snapshots.cbw import BREAK_SNAPSHOT, CopyBeforeWrite, Level
from fleece.snapshots.fleecing import Fleecing

if TYPE_CHECKING:
    from collections.abc import Callable

CLUSTER = 65536


class ArrayNode(Node):
    """Bytes in memory, with a hook before and after each access: races become repeatable."""

    def __init__(self, data: bytes) -> None:
        super().__init__("array", len(data))
        self.data = bytearray(data)
        self.before_read: Callable[[int, int], None] = lambda offset, length: None
        self.after_read: Callable[[int, int], None] = lambda offset, length: None
        self.before_write: Callable[[int, int], None] = lambda offset, length: None
        self.zero_runs = False

    def pread_into(self, buf: memoryview, offset: int) -> None:
        self.before_read(offset, len(buf))
        buf[:] = memoryview(self.data)[offset : offset + len(buf)]
        self.after_read(offset, len(buf))

    def pwrite(self, buf: memoryview, offset: int, fua: bool = False) -> None:
        self.before_write(offset, len(buf))
        self.data[offset : offset + len(buf)] = buf

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        self.before_write(offset, length)
        self.data[offset : offset + length] = bytes(length)

    trim = zero


class Rig:
    """One disk; `snapshot` takes an instant as the daemon does: drained, newest level last."""

    def __init__(
        self,
        directory: Path,
        source: Node,
        cluster_size: int = CLUSTER,
        policy: str = BREAK_SNAPSHOT,
        view: type[Fleecing] = Fleecing,
    ) -> None:
        self.directory = directory
        self.source = source
        self.cluster_size = cluster_size
        self.policy = policy
        self.view = view
        self.disk = Disk("disk", source)
        self.broken: list[Level] = []
        self.cbw = CopyBeforeWrite(source, cluster_size, self.broken.append)
        self.views: list[Fleecing] = []
        self._numbers = itertools.count(1)
        self._session = self.disk.open_session()
        self._lock = threading.Lock()

    def overlay(self, name: str) -> Overlay:
        return Overlay.create(
            self.directory / name,
            self.source.size,
            backing=str(self.directory / "disk.img"),
            backing_format="raw",
            cluster_size=self.cluster_size,
        )

    def snapshot(self, overlay: Overlay | None = None) -> Fleecing:
        name = f"s{next(self._numbers)}"
        overlay = overlay or self.overlay(f"{name}.qcow2")
        clusters = -(-self.source.size // self.cluster_size)
        level = Level(name, overlay, saved=bytearray(clusters), policy=self.policy)
        with drained([self.disk]):
            if not self.cbw.levels:
                self.disk.attach(self.cbw)
            self.cbw.push(level)
        view = self.view(name, self.cbw, level)
        self.views.append(view)
        return view

    def drop(self, view: Fleecing) -> list[Level]:
        self.views.remove(view)
        view.close()
        view.level.dropped = True
        with drained([self.disk]):
            gone = self.cbw.retire()
            if not self.cbw.levels:
                self.disk.detach(self.cbw)
        for level in gone:
            assert level.overlay is not None
            level.overlay.remove()
        return gone

    def write(self, data: bytes, offset: int) -> None:
        with self._lock, self._session.gate:
            self._session.node.pwrite(memoryview(data), offset)

    def close(self) -> None:
        for level in self.cbw.levels:
            if level.overlay is not None:
                level.overlay.remove()


def read(node: Node, offset: int, length: int) -> bytes:
    buf = bytearray(length)
    node.pread_into(memoryview(buf), offset)
    return bytes(buf)

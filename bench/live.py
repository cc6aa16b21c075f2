# SPDX-License-Identifier: Apache-2.0
"""Random writes to a live disk under a fresh snapshot: ours against the storage daemon.

Nearly every write is the first one into its cluster, so that each pays for copy-before-write. Both
overlays are qcow2 files with 64 KiB clusters in the same directory.
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.fio import Job, perform
from bench.qmp import QMP
from bench.results import Row, Sample
from bench.servers import OURS, STORAGE_DAEMON, accepts
from bench.tools import Process, make_images, need, run, say, settle, wait_until

KiB = 1 << 10
CLUSTER = 64 * KiB
SECONDS = 60.0  # the jobs are bounded by bytes; this is for a server that hangs
# name, block size, depth
CASES = (("4k-d16", 4 * KiB, 16), ("64k-d4", 64 * KiB, 4), ("1m-d4", 1024 * KiB, 4))


class LiveDisk:
    """A server of one live disk that can take and drop a snapshot of it.

    It runs ``command``, answers at the socket ``control`` and exports the disk at ``uri``.
    """

    name = ""

    def __init__(self, image: Path, uri: str, control: Path, command: list[str]) -> None:
        self.image = image
        self.uri = uri
        self._control = control
        self._command = command
        self._process: Process | None = None

    @property
    def process(self) -> Process:
        """The running server."""
        assert self._process is not None
        return self._process

    def start(self) -> None:
        """Return when it answers."""
        self._process = Process(self.name, self._command, self._control.with_suffix(".log"))
        wait_until(self._ready, f"{self.name} did not listen")

    def _ready(self) -> bool:
        self.process.check()
        return accepts(self._control)

    def take(self) -> None:
        """Make a snapshot; the next write copies before it writes."""
        raise NotImplementedError

    def drop(self) -> None:
        """Remove it and its overlay."""
        raise NotImplementedError

    def stop(self) -> None:
        """End the server, in whatever state it is."""
        if self._process is not None:
            self._process.stop()


class Fleece(LiveDisk):
    """``fleece serve``, driven by its command line."""

    name = OURS

    def __init__(self, image: Path, directory: Path) -> None:
        where, control = directory / "live-fleece.sock", directory / "live-fleece.qmp"
        self._snapshot = ""
        self._fleece = [sys.executable, "-m", "fleece"]
        command = [*self._fleece, "serve", "--disk", f"disk0={image},format=raw"]
        command += ["--socket", str(where), "--control", str(control)]
        command += ["--state", str(directory / "live-state")]
        super().__init__(image, f"nbd+unix:///disk0?socket={where}", control, command)

    def _ask(self, *words: str) -> str:
        return run([*self._fleece, *words, "--json", "--control", str(self._control)])

    def take(self) -> None:
        """See `LiveDisk`."""
        self._snapshot = json.loads(self._ask("snapshot", "create", "disk0"))["name"]

    def drop(self) -> None:
        """See `LiveDisk`."""
        self._ask("snapshot", "drop", self._snapshot)


class StorageDaemon(LiveDisk):
    """``qemu-storage-daemon``: a copy-before-write node put under a raw node by reopening it."""

    name = STORAGE_DAEMON

    def __init__(self, image: Path, directory: Path) -> None:
        self._overlay = directory / "live-qsd.qcow2"
        where, monitor = directory / "live-qsd.sock", directory / "live-qsd.qmp"
        command = [need("qemu-storage-daemon")]
        command += ["--chardev", f"socket,path={monitor},server=on,wait=off,id=c"]
        command += ["--monitor", "chardev=c", "--nbd-server", f"addr.type=unix,addr.path={where}"]
        command += ["--blockdev", f"driver=file,filename={image},node-name=proto"]
        command += ["--blockdev", "driver=raw,file=proto,node-name=live"]
        command += ["--export", "type=nbd,id=live,node-name=live,name=disk0,writable=on"]
        super().__init__(image, f"nbd+unix:///disk0?socket={where}", monitor, command)

    def start(self) -> None:
        """See `LiveDisk`; and connect to the monitor."""
        super().start()
        self._qmp = QMP(self._control)

    def take(self) -> None:
        """See `LiveDisk`. The filter works from the moment at which the raw node is reopened."""
        size = str(self.image.stat().st_size)
        run([need("qemu-img"), "create", "-q", "-f", "qcow2", str(self._overlay), size])
        add = self._qmp.execute
        file = {"driver": "file", "filename": str(self._overlay)}
        add("blockdev-add", driver="qcow2", node_name="overlay", file=file)
        add(
            "blockdev-add",
            driver="copy-before-write",
            node_name="cbw",
            file="proto",
            target="overlay",
        )
        self._reopen("cbw")
        add("blockdev-add", driver="snapshot-access", node_name="access", file="cbw")
        add("block-export-add", type="nbd", id="snap", node_name="access", name="snap")

    def _reopen(self, child: str) -> None:
        options = [{"driver": "raw", "node-name": "live", "file": child}]
        self._qmp.execute("blockdev-reopen", options=options)

    def drop(self) -> None:
        """See `LiveDisk`."""
        self._qmp.execute("block-export-del", id="snap", mode="hard")
        self._qmp.wait_for("BLOCK_EXPORT_DELETED")
        self._qmp.execute("blockdev-del", node_name="access")
        self._reopen("proto")
        for node in ("cbw", "overlay"):
            self._qmp.execute("blockdev-del", node_name=node)
        self._overlay.unlink()


KINDS: dict[str, Callable[[Path, Path], LiveDisk]] = {OURS: Fleece, STORAGE_DAEMON: StorageDaemon}


class LiveWrites:
    """Both servers side by side, each on its own random image of ``size`` bytes."""

    def __init__(self, names: Sequence[str], directory: Path, size: int) -> None:
        self._names = names
        self._directory = directory
        self._size = size
        self.disks: list[LiveDisk] = []

    def start(self) -> None:
        """Make the images and start the servers."""
        images = [self._directory / f"live-{name}.raw" for name in self._names]
        make_images(images, self._size)
        for name, image in zip(self._names, images, strict=True):
            self.disks.append(KINDS[name](image, self._directory))
            self.disks[-1].start()

    def stop(self) -> None:
        """End the servers and remove the images."""
        for disk in self.disks:
            disk.stop()
            disk.image.unlink(missing_ok=True)

    def job(self, block: int, depth: int, turn: int) -> Job:
        """Random writes that touch about half of the clusters, each of them once if small."""
        total = self._size // 2 if block >= CLUSTER else self._size // CLUSTER // 2 * block
        return Job("randwrite", block, depth, 1, self._size, SECONDS, total=total, seed=1 + turn)

    def row(self, case: tuple[str, int, int], repeats: int) -> Row:
        """Every server ``repeats`` times, each time under a new snapshot."""
        name, block, depth = case
        row = Row(f"live-{name}")
        for turn in range(repeats):
            order = self.disks if turn % 2 == 0 else self.disks[::-1]
            for disk in order:
                row.add(disk.name, self._sample(disk, self.job(block, depth, turn)))
        say(row.line())
        return row

    def _sample(self, disk: LiveDisk, job: Job) -> Sample:
        settle([other.image for other in self.disks])
        disk.take()
        before = disk.process.cpu_seconds()
        result = perform(job, disk.uri, self._directory)
        spent = disk.process.cpu_seconds() - before
        disk.drop()
        return Sample(result, spent, disk.process.peak_memory())

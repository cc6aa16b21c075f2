# SPDX-License-Identifier: Apache-2.0
"""The main job, step by step. Every step shows something and proves something."""

import shutil
import time
from pathlib import Path
from typing import Any

from tests.demo import disk, model, pull
from tests.demo.daemon import Daemon
from tests.demo.model import Instant, Window
from tests.demo.screen import Screen
from tests.demo.tools import DemoFailed
from tests.demo.writer import Writers

MiB = 1 << 20
NAME = "disk0"
WRITERS = 3
SOME = 100  # writes of every writer: what "the writers go on" means here


def require(holds: bool, otherwise: str) -> None:
    """`DemoFailed` unless ``holds``."""
    if not holds:
        raise DemoFailed(otherwise)


def mib(count: int) -> str:
    """Bytes as MiB, for a person."""
    return f"{count / MiB:.1f} MiB"


class Story:
    """``tell`` runs all steps in ``directory``; ``close`` ends whatever still runs."""

    def __init__(self, directory: Path, size: int, database_bytes: int, screen: Screen) -> None:
        self._dir = directory
        self._size = size
        self._database_bytes = database_bytes
        self._screen = screen
        self._live = directory / f"{NAME}.raw"
        self._base = directory / "before-the-first-write.raw"
        self.daemon = Daemon(directory, NAME, self._live)
        self._writers: Writers | None = None
        self._overlays: list[Path] = []
        self._summary = [("read", "bytes", "and it is")]

    @property
    def writers(self) -> Writers:
        """The writers, once step 1 has started them."""
        if self._writers is None:
            raise DemoFailed("the writers do not run yet")
        return self._writers

    def tell(self) -> None:
        """All of it; `DemoFailed` at the first thing that is not as promised."""
        self._screen.title("fleece: a live disk, an instant of it, and what changed since")
        self._begin()
        first = self._instant()
        second = self._increment(first)
        self._second_consumer(second)
        self._drop()
        self._finish()
        self._screen.table(self._summary)
        self._screen.end("every proof held")

    def close(self) -> None:
        """End writers and daemon."""
        if self._writers is not None:
            for writer in self._writers.writers:
                writer.stop()
        self.daemon.close()
        if self._writers is not None:
            self._writers.stop()

    # Step 1

    def _begin(self) -> None:
        screen = self._screen
        screen.step(1, "A disk, served, and writers that never stop")
        made = disk.make(self._live, self._size, self._database_bytes)
        disk.copy_sparse(self._live, self._base)
        screen.note(
            f"{mib(made.size)} of ext4 by mke2fs -d: {made.files} real files of this machine "
            f"({mib(made.file_bytes)})"
        )
        screen.note(
            f"and {disk.DATABASE}, {mib(self._database_bytes)}, in {len(made.database)} extent(s)"
        )
        self.daemon.start()
        screen.note(f"fleece serve runs, pid {self.daemon.pid}: {self.daemon.uri}")
        self._writers = Writers(self.daemon.uri, made.database, WRITERS)
        self.writers.start()
        self.writers.wait_for(SOME)
        screen.proof(
            f"{WRITERS} connections update pages of {disk.DATABASE} in place, "
            f"{self.writers.total} writes so far"
        )

    # Step 2

    def _instant(self) -> Instant:
        screen = self._screen
        screen.step(2, "An instant of it, read while the writers go on")
        snapshot, window = self._create("nightly")
        entry = snapshot["disks"][0]
        require(entry["mode"] == "full", "the first snapshot of a consumer must be a full one")
        screen.note(
            f"fleece snapshot create: {entry['export']}, the writers were held for "
            f"{snapshot['drain-microseconds'] / 1000:.1f} ms"
        )
        self.writers.wait_for(SOME)  # now copy-before-write had to work
        before, begin = self.writers.total, time.monotonic()
        full = self._dir / "full.raw"
        client = pull.full_with_nbdcopy(entry["uris"][0], full)
        seconds = time.monotonic() - begin
        screen.note(
            f"{client} pulled it in {seconds:.2f} s; the writers did "
            f"{self.writers.total - before} writes meanwhile"
        )
        instant = self._prove(full, window, "instant-1.raw")
        self._check_files(full, instant)
        self._row(f"first snapshot, {client}", self._size, instant)
        return instant

    def _create(self, consumer: str) -> tuple[dict[str, Any], Window]:
        """Take a snapshot; returns it, and the writes between which its instant lies."""
        low = tuple(self.writers.acknowledged())
        snapshot = self.daemon.ask("snapshot", "create", NAME, "--consumer", consumer)
        high = tuple(self.writers.issued())
        self._overlays.append(Path(snapshot["disks"][0]["overlay"]))
        require(self._overlays[-1].exists(), f"there is no overlay {self._overlays[-1]}")
        return snapshot, Window(low, high)

    def _prove(self, pulled: Path, window: Window, name: str) -> Instant:
        logs = self.writers.logs
        instant = model.prove(pulled, self._base, logs, window, self._dir / name)
        self._screen.proof(
            f"byte for byte the disk after {instant.writes} writes, "
            f"the only one of {window.states} possible states"
        )
        self.writers.check()
        return instant

    def _check_files(self, pulled: Path, instant: Instant) -> None:
        """The pulled disk and the disk of the model must get the same findings."""
        ours, model_says = disk.check(pulled), disk.check(instant.path)
        require(ours == model_says, "e2fsck finds what the instant did not have: " + ours[1][-200:])
        require(ours[0] == 0, "e2fsck: the instant itself has errors: " + ours[1][-200:])
        self._screen.proof("e2fsck -fn: clean, as at the instant itself")

    def _row(self, what: str, count: int, instant: Instant) -> None:
        self._summary.append((what, mib(count), f"the disk after {instant.writes} writes"))

    # Step 3

    def _increment(self, first: Instant) -> Instant:
        screen = self._screen
        screen.step(3, "Acknowledged; the daemon is killed; then only what changed")
        old = self.daemon.ask("snapshot", "list")[0]
        self.daemon.ask("snapshot", "ack", old["name"])
        self.writers.wait_for(SOME)
        self._kill_and_restart()
        self._first_survived(first)
        snapshot, window = self._create("nightly")
        entry = snapshot["disks"][0]
        require(
            entry["mode"] == "incremental", f"nightly was told {entry['mode']}: {entry['reason']}"
        )
        self.writers.wait_for(SOME)
        extents, client = pull.dirty_extents(entry["uris"][0], entry["context"])
        dirty = sum(extent.length for extent in extents)
        screen.note(f"{client}: {len(extents)} dirty extents, {mib(dirty)}")
        target = self._dir / "full+increment.raw"
        disk.copy_sparse(self._dir / "full.raw", target)
        read = pull.increment(entry["uris"][0], extents, target)
        require(read == dirty, f"{read} bytes read, {dirty} were dirty")
        screen.note(f"the increment read {read} bytes: {read / self._size:.1%} of the disk")
        second = self._prove(target, window, "instant-2.raw")
        self._check_files(target, second)
        self._row("full + increment", read, second)
        return second

    def _kill_and_restart(self) -> None:
        before = self.daemon.pid
        self.daemon.kill()
        begin = time.monotonic()
        self.daemon.start()
        self.writers.wait_for(SOME)
        self._screen.note(
            f"kill -9 {before}; started again as {self.daemon.pid}, up in "
            f"{time.monotonic() - begin:.1f} s; the writers sent again what was in flight"
        )

    def _first_survived(self, first: Instant) -> None:
        """The first snapshot is still the same instant, in the new daemon."""
        [snapshot] = self.daemon.ask("snapshot", "list")
        require(snapshot["state"] == "active", f"the first snapshot is {snapshot['state']} now")
        again = self._dir / "first-again.raw"
        client = pull.full_with_qemu_img(snapshot["disks"][0]["uris"][0], again)
        require(model.equal(again, first.path), "the first snapshot changed when the daemon died")
        self._screen.proof(
            f"the first snapshot outlived it: {client} reads the same bytes as before"
        )
        self._row(f"first snapshot again, {client}", self._size, first)
        again.unlink()

    # Step 4

    def _second_consumer(self, second: Instant) -> None:
        screen = self._screen
        screen.step(4, "A consumer that never came before")
        mine = self._snapshot_of("nightly")
        before = self._what_nightly_knows(mine)
        snapshot, window = self._create("offsite")
        entry = snapshot["disks"][0]
        require(entry["mode"] == "full", f"offsite was told {entry['mode']}")
        screen.proof(f"told full: {entry['reason']}")
        self.writers.wait_for(SOME)
        image = self._dir / "offsite.raw"
        client = pull.full_with_nbdcopy(entry["uris"][0], image)
        instant = self._prove(image, window, "instant-3.raw")
        self._row(f"offsite's snapshot, {client}", self._size, instant)
        require(self._what_nightly_knows(mine) == before, "offsite changed nightly's increment")
        screen.proof("nightly's cursor and the extents of its increment are what they were")
        self._undisturbed(mine, second)

    def _what_nightly_knows(self, mine: dict[str, Any]) -> tuple[Any, Any]:
        """Its cursors, and the dirty extents of its snapshot."""
        cursors = [c for c in self.daemon.ask("cursor", "list") if c["consumer"] == "nightly"]
        return cursors, pull.dirty_extents(mine["uris"][0], mine["context"])[0]

    def _snapshot_of(self, consumer: str) -> dict[str, Any]:
        """The disk entry of the newest snapshot of ``consumer``."""
        every = self.daemon.ask("snapshot", "list")
        mine = [snapshot for snapshot in every if snapshot["consumer"] == consumer]
        require(bool(mine), f"the snapshot of {consumer} is gone")
        entry: dict[str, Any] = max(mine, key=lambda s: s["created"])
        return dict(entry["disks"][0], snapshot=entry["name"])

    def _undisturbed(self, mine: dict[str, Any], second: Instant) -> None:
        """Nightly's snapshot reads as before, and its next one counts from it."""
        image = self._dir / "nightly-again.raw"
        pull.full_with_qemu_img(mine["uris"][0], image)
        require(model.equal(image, second.path), "nightly's snapshot changed when offsite came")
        image.unlink()
        self.daemon.ask("snapshot", "ack", mine["snapshot"])
        snapshot, _ = self._create("nightly")
        entry = snapshot["disks"][0]
        require(entry["mode"] == "incremental", f"nightly is told {entry['mode']} now")
        require(
            entry["since-epoch"] == mine["epoch"],
            f"nightly's next increment counts from {entry['since-epoch']}, not {mine['epoch']}",
        )
        self._screen.proof(
            f"nightly's snapshot too; its next increment ({mib(entry['dirty-bytes'])}) "
            "counts from there"
        )

    # Step 5

    def _drop(self) -> None:
        screen = self._screen
        screen.step(5, "Dropped: nothing stays behind")
        names = [snapshot["name"] for snapshot in self.daemon.ask("snapshot", "list")]
        used = sum(path.stat().st_blocks * 512 for path in self._overlays)
        for name in names:
            self.daemon.ask("snapshot", "drop", name)
        require(self.daemon.ask("snapshot", "list") == [], "dropped snapshots are still listed")
        left = [path for path in self._overlays if path.exists()]
        left += list(self.daemon.state.rglob("*.qcow2"))
        require(not left, f"overlay files are still there: {', '.join(map(str, left))}")
        screen.proof(f"{len(names)} snapshots dropped, their overlays ({mib(used)}) are gone")

    def _finish(self) -> None:
        self.writers.wait_for(SOME // 4)
        self.writers.stop()
        self.writers.check()
        status = self.daemon.stop()
        require(status == 0, f"fleece serve ended with status {status} after SIGTERM")
        every = tuple(self.writers.issued())
        require(every == tuple(self.writers.acknowledged()), "a write was never acknowledged")
        final = model.prove(
            self._live, self._base, self.writers.logs, Window(every, every), self._dir / "final.raw"
        )
        require(disk.check(self._live)[0] == 0, "e2fsck finds errors on the live disk")
        self._screen.proof(
            f"SIGTERM, status 0; the live disk holds all {final.writes} acknowledged writes"
        )
        self._row("live disk at the end", self._size, final)
        shutil.rmtree(self.daemon.state, ignore_errors=True)

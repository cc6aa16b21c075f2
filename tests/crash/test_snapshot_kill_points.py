"""SIGKILL at each step of making and dropping a snapshot: the next start finds nothing half done.

A process of its own forks once for each point; the fork makes disks and snapshots, arms the point,
and is killed by its own hand when it comes there, some of them after the guest has written once
more. The test then starts over what it left.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.managed import Managed

ROOT = Path(__file__).parents[2]


class Point(NamedTuple):
    """The ``at``-th call of ``owner.name`` during ``operation``; killed before or after it."""

    operation: str
    owner: str
    name: str
    when: str
    at: int = 1

    def __str__(self) -> str:
        return f"{self.operation}-{self.when}-{self.owner}.{self.name}-{self.at}"


WHEN = ("before", "after")


def points(operation: str, owner: str, name: str, when: tuple[str, ...], *at: int) -> list[Point]:
    return [Point(operation, owner, name, moment, number) for moment in when for number in at]


POINTS = [
    *points("create", "Records", "save", WHEN, 1, 2),
    *points("create", "Overlay", "create", WHEN, 1, 2),
    *points("create", "instant", "take", WHEN, 1),
    *points("create", "CopyBeforeWrite", "push", ("after",), 1, 2),
    *points("create", "DiskTracking", "checkpoint", WHEN, 2),
    *points("create", "Overlay", "set_backing", WHEN, 1),
    *points("create", "FrozenMap", "save", WHEN, 1, 2),
    *points("create", "Path", "replace", WHEN, 1, 2, 3),
    *points("create", "Server", "add", ("after",), 1, 2),
    *points("drop-both", "Path", "unlink", ("after",), 1, 2, 3, 4),
]
for operation in ("drop-new", "drop-old"):
    POINTS += points(operation, "Records", "drop", WHEN, 1)
    POINTS += points(operation, "Server", "remove", WHEN, 1)
    POINTS += points(operation, "Overlay", "remove", WHEN, 1)
POINTS += points("drop-old", "Records", "remove", WHEN, 1)

SCRIPT = """
import os, signal, sys
from pathlib import Path
from fleece.formats.qcow2.overlay import Overlay
from fleece.snapshots import instant
from fleece.snapshots.cbw import CopyBeforeWrite
from fleece.snapshots.record import Records
from fleece.tracking.frozen import FrozenMap
from fleece.tracking.store import DiskTracking
from nbdwire.server import Server
from tests.crash.test_snapshot_kill_points import POINTS
from tests.support.managed import Managed

OWNERS = {
    "Records": Records, "Overlay": Overlay, "instant": instant, "CopyBeforeWrite": CopyBeforeWrite,
    "DiskTracking": DiskTracking, "FrozenMap": FrozenMap, "Server": Server, "Path": Path,
}

def arm(point, rig):
    owner, calls = OWNERS[point.owner], [0]
    real = getattr(owner, point.name)
    def die():
        for disk in "ab":  # the guest goes on until the last moment
            for cluster in (1, 7, 20):
                rig.disks[disk].disk.root.pwrite(memoryview(b"late" * 9000), cluster * 65536 + 9)
        os.kill(os.getpid(), signal.SIGKILL)
    def replaced(*args, **kwargs):
        calls[0] += 1
        if calls[0] == point.at and point.when == "before":
            die()
        result = real(*args, **kwargs)
        if calls[0] == point.at:
            die()
        return result
    setattr(owner, point.name, replaced)

def run(point, directory):
    directory.mkdir()
    rig = Managed(directory, ("a", "b")).start()
    rig.scribble(1)
    rig.manager.create(["a"], name="old")
    (directory / "old").write_bytes(rig.instant())
    rig.scribble(2)
    (directory / "new").write_bytes(rig.instant())
    if point.operation == "create":
        arm(point, rig)
        rig.manager.create(["a", "b"], name="new", consumer="c")
    rig.manager.create(["a", "b"], name="new", consumer="c")
    rig.scribble(3)
    if point.operation == "drop-both":
        rig.manager.drop("new")
    arm(point, rig)
    rig.manager.drop("new" if point.operation == "drop-new" else "old")
    os._exit(1)

for number, point in enumerate(POINTS):
    child = os.fork()
    if not child:
        try:
            run(point, Path(sys.argv[1]) / str(number))
        finally:
            os._exit(2)
    _, status = os.waitpid(child, 0)
    print(status)
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """Where all of them died, and how."""
    directory = tmp_path_factory.mktemp("points")
    path = os.pathsep.join([str(ROOT), str(ROOT / "nbd")])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(directory)],
        env={**os.environ, "PYTHONPATH": path},
        cwd=directory,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return directory, [int(word) for word in done.stdout.split()]


@pytest.mark.parametrize("number", range(len(POINTS)), ids=[str(point) for point in POINTS])
def test_after_a_kill_at_this_point_nothing_is_half_done(
    killed: tuple[Path, list[int]], number: int
) -> None:
    directory, statuses = killed[0] / str(number), killed[1]
    point = POINTS[number]
    assert os.WIFSIGNALED(statuses[number])
    assert os.WTERMSIG(statuses[number]) == signal.SIGKILL
    rig = Managed(directory, ("a", "b"), fresh=False)
    images = {name: rig.image(name).read_bytes() for name in "ab"}
    rig.start()
    try:
        check(rig, directory, point)
        assert {name: rig.image(name).read_bytes() for name in "ab"} == images
    finally:
        rig.close()


def check(rig: Managed, directory: Path, point: Point) -> None:
    """Those that live are exact; of the others nothing is left but what the older one needs."""
    listed = {snapshot["name"]: snapshot["state"] for snapshot in rig.manager.list()}
    assert set(listed.values()) <= {"active"}
    if point.operation in ("create", "drop-new"):
        assert "old" in listed
    for name in listed:
        assert rig.read(f"a@{name}") == (directory / name).read_bytes()
    known = {f"{disk}@{name}" for name in listed for disk in "ab"}
    strangers = {name for name in rig.left() if name.rsplit(".", 1)[0] in known or ".json" in name}
    rest = rig.left() - strangers
    assert rest <= {"a@new.qcow2"}  # what the older one may need
    for name in sorted(listed):
        rig.manager.drop(name)
    assert rig.left() == set()
    assert rig.disks["a"].cbw is rig.disks["b"].cbw is None

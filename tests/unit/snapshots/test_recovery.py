"""A new start over what an earlier one left: exact, or gone, or broken and said so."""

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fleece.errors import SnapshotBroken
from fleece.snapshots import recovery
from fleece.snapshots.record import Records
from nbdwire.errors import NBDError
from tests.support.managed import CLUSTER, GRANULE, SIZE, Managed, edit_record, managed, patched


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Managed]:
    with managed(tmp_path, "a", "b") as rig:
        yield rig


def states(rig: Managed) -> dict[str, str]:
    return {snapshot["name"]: snapshot["state"] for snapshot in rig.manager.list()}


def is_broken(rig: Managed, export: str, words: str) -> None:
    """Every read fails, and the list says why."""
    with rig.client(export) as client:
        for offset in (0, SIZE // 2, SIZE - 1):
            with pytest.raises(OSError, match="broken"):
                client.pread(1, offset)
        with pytest.raises(OSError, match="broken"):
            client.extents(0, SIZE)
    [part] = [d for s in rig.manager.list() for d in s["disks"] if d["export"] == export]
    assert part["state"] == "broken"
    assert words in part["error"]
    assert part["mode"] == "full"


# They go on


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
@pytest.mark.parametrize("end", ["kill", "stop"])
def test_snapshots_go_on_exactly(tmp_path: Path, fmt: str, end: str) -> None:
    with managed(tmp_path, fmt=fmt) as rig:
        instants = {}
        for number, name in enumerate(("one", "two", "three")):
            rig.scribble(number)
            rig.manager.create(["a"], name=name)
            instants[name] = rig.instant()
            for _ in range(2):
                getattr(rig, end)()
                rig.start()
                if fmt == "qcow2":
                    rig.model["a"][:] = rig.read("a")  # what was not flushed may be lost
                rig.scribble(number + 10)
                assert {n: rig.read(f"a@{n}") for n in instants} == instants
        for name in ("two", "three", "one"):
            rig.restart()
            rig.manager.drop(name)
            del instants[name]
            assert {n: rig.read(f"a@{n}") for n in instants} == instants
        assert rig.left() == set()


def test_what_a_snapshot_says_of_itself_is_the_same_after_a_restart(rig: Managed) -> None:
    rig.manager.create(["a", "b"], name="s", consumer="c", lease=1000)
    rig.write(b"x", 0)
    rig.manager.acknowledge("s")
    before = rig.manager.list()
    rig.restart()
    assert rig.manager.list() == before
    assert before[0]["acknowledged"] is True


def test_cursors_and_contexts_go_on(rig: Managed) -> None:
    rig.manager.create(["a"], name="one", consumer="first")
    full = rig.instant()
    rig.manager.acknowledge("one")
    rig.manager.acknowledge("one", "second")
    rig.scribble(1)
    rig.manager.create(["a"], name="two", consumer="first")
    at_two = rig.instant()
    before = {name: rig.dirty("a@two", name) for name in ("first", "second")}
    rig.restart()
    rig.scribble(2)
    assert {name: rig.dirty("a@two", name) for name in ("first", "second")} == before
    assert patched(before["first"], full, rig.read("a@two")) == at_two
    rig.manager.acknowledge("two")
    three = rig.manager.create(["a"], name="three", consumer="first")["disks"][0]
    assert three["mode"] == "incremental"
    assert patched(rig.dirty("a@three", "first"), at_two, rig.instant()) == rig.instant()


def test_an_epoch_that_may_be_acknowledged_is_kept_after_a_restart(tmp_path: Path) -> None:
    with managed(tmp_path, size=64 * GRANULE) as rig:
        rig.manager.create(["a"], name="held", consumer="c")
        rig.write(b"x", 5 * GRANULE)
        rig.restart()
        tracking = rig.disks["a"].tracking
        assert tracking is not None
        for _ in range(600):
            tracking.checkpoint()
        rig.manager.acknowledge("held")
        assert rig.manager.create(["a"], consumer="c")["disks"][0]["dirty-bytes"] == GRANULE


def test_a_map_of_changes_that_is_lost_means_everything(rig: Managed) -> None:
    for name in ("one", "two"):
        rig.manager.create(["a"], name=name, consumer="c")
        rig.manager.acknowledge(name)
    before = rig.instant()
    rig.kill()
    (rig.records / "a@two.map").write_bytes(b"torn")
    rig.start()
    [_, listed] = rig.manager.list()
    assert listed["state"] == "active"
    assert listed["disks"][0]["mode"] == "full"
    assert "is damaged" in listed["disks"][0]["reason"]
    assert rig.read("a@two") == before


def test_an_image_that_moved_with_its_contents_is_the_same_disk(rig: Managed) -> None:
    rig.manager.create(["a"], name="s")
    before = rig.instant()
    rig.scribble(1)
    rig.kill()
    moved = rig.directory / "elsewhere.img"
    rig.image("a").rename(moved)
    rig.image = lambda name: moved if name == "a" else rig.directory / f"{name}.img"  # type: ignore[method-assign]
    rig.start()
    assert rig.read("a@s") == before


# They are gone


def test_after_a_restart_of_the_host_they_are_gone_and_their_files_too(
    rig: Managed, caplog: pytest.LogCaptureFixture
) -> None:
    rig.manager.create(["a", "b"], name="s")
    rig.manager.create(["a"], name="t")
    rig.manager.drop("t")
    rig.scribble(1)
    rig.kill()
    for path in rig.records.glob("*.json"):
        path.write_text(path.read_text().replace('"boot_id": "', '"boot_id": "another '))
    rig.start()
    assert rig.manager.list() == []
    assert rig.left() == set()
    assert "snapshot 's' is gone: the host was restarted since" in caplog.text
    assert rig.disks["a"].cbw is None
    assert rig.read("a") == rig.instant()


def test_a_host_without_a_boot_id_keeps_none(rig: Managed) -> None:
    rig.boot_id = ""
    rig.restart()
    rig.manager._planner = rig.manager._planner.__class__(
        rig.records, rig.manager._planner.defaults, ""
    )
    rig.manager.create(["a"], name="s")
    rig.restart()
    assert rig.manager.list() == []
    assert rig.left() == set()


def test_a_snapshot_of_a_disk_that_is_not_served_any_more_is_gone(
    rig: Managed, caplog: pytest.LogCaptureFixture
) -> None:
    rig.manager.create(["a", "b"], name="both")
    rig.manager.create(["a"], name="only-a")
    before = rig.instant()
    rig.scribble(1)
    rig.kill()
    rig.names = ("a",)
    rig.start()
    assert states(rig) == {"only-a": "active"}
    assert "snapshot 'both' is gone: disk 'b' is not served any more" in caplog.text
    assert rig.read("a@only-a") == before
    rig.restart()
    assert rig.read("a@only-a") == before
    rig.manager.drop("only-a")
    assert rig.left() == set()


def test_p11_a_dropped_snapshot_that_an_older_one_needs_stays_over_restarts(rig: Managed) -> None:
    rig.manager.create(["a"], name="old")
    before = rig.instant()
    rig.scribble(1)
    rig.manager.create(["a"], name="new")
    rig.scribble(2)
    rig.manager.drop("new")
    for seed in (3, 4):
        rig.restart()
        assert states(rig) == {"old": "active"}
        rig.scribble(seed)
        assert rig.read("a@old") == before
    rig.manager.drop("old")
    assert rig.left() == set()


def test_files_of_a_drop_that_was_interrupted_are_removed_without_an_alarm(
    rig: Managed, caplog: pytest.LogCaptureFixture
) -> None:
    rig.manager.create(["a", "b"], name="s")
    rig.kill()
    records = Records(rig.records)
    [record] = records.load()
    records.drop(record)
    (rig.records / "a@s.qcow2").unlink()
    caplog.clear()
    rig.start()
    assert rig.left() == set()
    assert [entry for entry in caplog.records if entry.levelname == "ERROR"] == []


def test_a_start_goes_on_when_the_end_of_a_snapshot_cannot_be_recorded(
    rig: Managed, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.manager.create(["a", "b"], name="s")
    rig.kill()
    rig.names = ("a",)

    def fail(self: Path, target: Path) -> Path:
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        rig.start()
    assert rig.manager.list() == []
    assert rig.left() == set()
    rig.scribble(1)
    assert rig.read("a") == rig.instant()


# They are broken


def write_behind(rig: Managed, name: str = "a", seconds: float = 60) -> None:
    """Somebody else writes the image while the daemon is not there."""
    with rig.image(name).open("r+b") as file:
        file.write(b"behind our back")
    later = rig.image(name).stat().st_mtime + seconds
    os.utime(rig.image(name), (later, later))


@pytest.mark.parametrize("tracking", [True, False])
@pytest.mark.parametrize("end", ["kill", "stop"])
def test_an_image_that_was_changed_meanwhile_breaks_its_snapshots(
    tmp_path: Path, tracking: bool, end: str
) -> None:
    with managed(tmp_path, "a", "b", tracking=tracking) as rig:
        rig.manager.create(["a"], name="old")
        rig.manager.create(["a", "b"], name="new", consumer="c")
        rig.scribble(1)
        getattr(rig, end)()
        write_behind(rig)
        rig.start()
        assert states(rig) == {"old": "broken", "new": "broken"}
        is_broken(rig, "a@old", "was changed")
        is_broken(rig, "a@new", "was changed")
        assert rig.read("b@new") == rig.instant("b")
        with pytest.raises(SnapshotBroken):
            rig.manager.acknowledge("new", "c")
        fresh = rig.manager.create(["a"], name="fresh")
        now = rig.read("a")
        rig.scribble(2)
        assert fresh["state"] == "active"
        assert rig.read("a@fresh") == now
        for name in ("new", "fresh", "old"):
            rig.manager.drop(name)
        assert rig.left() == set()


@pytest.mark.parametrize("end", ["kill", "stop"])
def test_the_daemons_own_writes_do_not_count_as_somebody_elses(tmp_path: Path, end: str) -> None:
    with managed(tmp_path, tracking=False) as rig:
        rig.manager.create(["a"], name="s")
        before = rig.instant()
        rig.scribble(1)
        getattr(rig, end)()
        rig.start()
        assert rig.read("a@s") == before


@pytest.mark.parametrize("tracking", [True, False])
def test_an_image_that_was_replaced_breaks_its_snapshots(tmp_path: Path, tracking: bool) -> None:
    with managed(tmp_path, tracking=tracking) as rig:
        rig.manager.create(["a"], name="s")
        rig.kill()
        copy = tmp_path / "copy"
        copy.write_bytes(rig.image("a").read_bytes())
        copy.rename(rig.image("a"))
        rig.start()
        is_broken(rig, "a@s", "was replaced by another one")


def test_tracking_that_was_switched_off_or_on_meanwhile_vouches_for_nothing(
    tmp_path: Path,
) -> None:
    with managed(tmp_path, tracking=False) as rig:
        rig.manager.create(["a"], name="s")
        rig.kill()
        rig.tracking = True
        rig.start()
        is_broken(rig, "a@s", "was not tracked before")


def test_p10_a_size_that_was_changed_breaks_the_snapshots(tmp_path: Path) -> None:
    with managed(tmp_path) as rig:
        rig.manager.create(["a"], name="s")
        rig.kill()
        with rig.image("a").open("r+b") as file:
            file.truncate(SIZE * 2)
        rig.start()
        is_broken(rig, "a@s", "size of disk 'a' has changed")
        rig.manager.drop("s")
        assert rig.left() == set()


def cut(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def garble(path: Path) -> None:
    data = bytearray(path.read_bytes())
    dice = random.Random(1)
    for _ in range(2000):
        data[dice.randrange(len(data) // 2)] ^= 0xFF
    path.write_bytes(data)


@pytest.mark.parametrize("harm", [Path.unlink, cut, garble], ids=["lost", "cut", "garbled"])
def test_an_overlay_that_is_not_whole_breaks_its_snapshot_and_all_older_ones(
    rig: Managed, harm: Any, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("one", "two", "three"):
        rig.manager.create(["a"], name=name, consumer="c")
        rig.scribble(len(name))
    rig.write(bytes(4 * CLUSTER), 0)
    before = rig.read("a@three")
    rig.kill()
    harm(rig.records / "a@two.qcow2")
    rig.start()
    assert states(rig) == {"one": "broken", "two": "broken", "three": "active"}
    is_broken(rig, "a@one", "a@two.qcow2")
    is_broken(rig, "a@two", "a@two.qcow2")
    assert rig.read("a@three") == before
    rig.scribble(99)
    assert rig.read("a@three") == before
    with pytest.raises(SnapshotBroken):
        rig.manager.acknowledge("one")
    rig.restart()
    assert states(rig) == {"one": "broken", "two": "broken", "three": "active"}
    for name in ("three", "one", "two"):
        rig.manager.drop(name)
    assert rig.left() == set()
    assert "snapshot 'two' of disk 'a' is broken" in caplog.text


def test_an_overlay_that_is_lost_of_a_dropped_snapshot_breaks_the_older_one(rig: Managed) -> None:
    rig.manager.create(["a"], name="old")
    rig.manager.create(["a"], name="new")
    rig.scribble(1)
    rig.manager.drop("new")
    rig.kill()
    (rig.records / "a@new.qcow2").unlink()
    rig.start()
    is_broken(rig, "a@old", "there is no overlay")


@pytest.mark.parametrize("overlay_too", [False, True])
def test_a_record_that_is_lost_breaks_the_older_snapshots_that_need_its_overlay(
    rig: Managed, overlay_too: bool
) -> None:
    """Without its record nobody knows what it saved: the older one would read the live disk."""
    for name in ("old", "lost", "new"):
        rig.manager.create(["a"], name=name)
        rig.scribble(len(name))
    before = rig.read("a@new")
    rig.kill()
    (rig.records / "a@lost.map").unlink()
    (rig.records / "lost.snapshot.json").unlink()
    if overlay_too:
        (rig.records / "a@lost.qcow2").unlink()
    rig.start()
    assert states(rig) == {"old": "broken", "new": "active"}
    is_broken(rig, "a@old", "has no record")
    assert rig.read("a@new") == before


def test_the_newest_record_that_is_lost_breaks_the_older_snapshots_too(rig: Managed) -> None:
    for name in ("old", "lost"):
        rig.manager.create(["a"], name=name)
    rig.scribble(1)
    rig.kill()
    (rig.records / "lost.snapshot.json").write_text("{")
    rig.start()
    is_broken(rig, "a@old", "has no record")


def test_a_snapshot_that_broke_stays_broken_after_a_restart(
    rig: Managed, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.manager.create(["a"], name="s", consumer="c")
    cbw = rig.disks["a"].cbw
    assert cbw is not None
    cbw._break(OSError(28, "No space left on device"))
    rig.scribble(1)
    rig.restart()
    is_broken(rig, "a@s", "old data could not be saved when the guest wrote")
    with pytest.raises(SnapshotBroken):
        rig.manager.acknowledge("s")
    rig.manager.drop("s")
    assert rig.left() == set()


def test_a_record_with_another_cluster_size_is_a_broken_snapshot_and_not_a_failed_start(
    rig: Managed,
) -> None:
    rig.manager.create(["a"], name="old")
    rig.manager.create(["a"], name="new")
    rig.kill()
    edit_record(rig, "new", lambda record: record["parts"][0].update(cluster_size=4096))
    rig.start()
    assert states(rig) == {"old": "active", "new": "active"}  # the overlay itself says which
    rig.kill()
    edit_record(rig, "old", lambda record: record["parts"][0].update(cluster_size=4096))
    rig.start()
    assert states(rig)["old"] == "broken"


def test_broken_snapshots_of_an_earlier_generation_take_no_pin_away(rig: Managed) -> None:
    rig.manager.create(["a"], name="before", consumer="c")
    rig.kill()
    write_behind(rig)
    rig.start()
    again = rig.manager.create(["a"], name="again", consumer="c")["disks"][0]
    old = json.loads((rig.records / "before.snapshot.json").read_text())["parts"][0]
    assert old["epoch"] == again["epoch"]  # of another generation
    rig.manager.drop("before")
    tracking = rig.disks["a"].tracking
    assert tracking is not None
    assert set(tracking._pins) == {again["epoch"]}


def test_reads_of_an_export_that_is_gone_are_refused(rig: Managed) -> None:
    rig.manager.create(["a"], name="s")
    rig.manager.drop("s")
    rig.restart()
    with pytest.raises(NBDError, match="a@s"):
        rig.client("a@s")


# Controls


def test_control_without_the_look_at_the_links_a_lost_record_is_live_data(
    rig: Managed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery.Recovery, "_check_link", staticmethod(lambda *_: None))
    rig.manager.create(["a"], name="old")
    before = rig.instant()
    rig.manager.create(["a"], name="lost")
    rig.scribble(1)
    rig.kill()
    (rig.records / "lost.snapshot.json").unlink()
    rig.start()
    assert rig.read("a@old") != before

"""The snapshot manager over real disks and a real server: made, listed, acknowledged, dropped."""

import errno
import itertools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fleece.block.file import FileNode
from fleece.errors import (
    AlreadyExists,
    Busy,
    DrainTimeout,
    FleeceError,
    InvalidArgument,
    NotFound,
    SnapshotBroken,
    SnapshotError,
    TrackingError,
    UsageError,
)
from fleece.formats.qcow2.overlay import Overlay
from fleece.snapshots import instant, record
from fleece.snapshots.record import Records
from fleece.tracking import frozen
from fleece.tracking.frozen import FrozenMap
from nbdwire.errors import NBDError
from tests.support.managed import CLUSTER, GRANULE, SIZE, Clock, Managed, managed, patched
from tests.support.snapshots import ArrayNode
from tests.support.threads import wait_until


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Managed]:
    with managed(tmp_path, "a", "b") as rig:
        yield rig


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


# The life of one


def test_a_snapshot_of_two_disks_is_exported_as_they_were(rig: Managed) -> None:
    made = rig.manager.create(["a", "b"], name="s")
    before = {name: rig.instant(name) for name in "ab"}
    rig.scribble(1, "a")
    rig.scribble(2, "b")
    assert {name: rig.read(f"{name}@s") for name in "ab"} == before
    assert rig.read("a") == rig.instant("a") != before["a"]
    assert rig.manager.list()[0]["disks"][0]["overlay-bytes"] > 0
    assert [disk["export"] for disk in made["disks"]] == ["a@s", "b@s"]
    assert made["state"] == "active"
    assert made["acknowledged"] is False
    assert made["drain-microseconds"] > 0


def test_what_is_reported_has_the_agreed_members(rig: Managed) -> None:
    made = rig.manager.create(["a"], name="s", consumer="nightly", lease=60)
    assert list(made) == [
        *("name", "created", "state", "consumer", "lease-expires", "acknowledged"),
        *("drain-microseconds", "disks"),
    ]
    assert list(made["disks"][0]) == [
        *("disk", "export", "uris", "size", "mode", "reason", "bitmap", "context", "since-epoch"),
        *("dirty-bytes", "epoch", "overlay", "overlay-bytes", "cluster-size", "state", "error"),
    ]
    assert made["disks"][0]["uris"] == [str(rig.uri("a@s"))]


def test_dropping_frees_the_overlay_and_takes_the_filter_out(rig: Managed) -> None:
    plain = rig.disks["a"].disk.root
    rig.manager.create(["a", "b"], name="s")
    rig.write(b"new" * 50000, 0)
    with rig.client("a@s") as reader:
        answer = rig.manager.drop("s")
        with pytest.raises((NBDError, OSError)):
            reader.pread(1, 0)
    assert answer == {"name": "s", "freed-bytes": 3 * CLUSTER}
    assert rig.manager.list() == []
    assert rig.left() == set()
    assert rig.disks["a"].disk.root is plain
    with pytest.raises(NBDError):
        rig.client("a@s")


def test_snapshots_may_be_dropped_in_any_order(rig: Managed) -> None:
    instants = {}
    for number, name in enumerate(("one", "two", "three", "four")):
        rig.manager.create(["a"], name=name)
        instants[name] = rig.instant()
        rig.scribble(number)
    for name in ("three", "one", "four", "two"):
        rig.manager.drop(name)
        del instants[name]
        rig.scribble(len(instants) + 10)
        for other, data in instants.items():
            assert rig.read(f"a@{other}") == data
    assert rig.left() == set()


def test_what_an_older_snapshot_needs_stays_until_that_is_dropped(rig: Managed) -> None:
    rig.manager.create(["a"], name="old")
    rig.manager.create(["a"], name="new")
    before = rig.instant()
    rig.write(b"x" * SIZE, 0)
    assert rig.manager.drop("new")["freed-bytes"] == 0
    assert rig.read("a@old") == before
    with pytest.raises(AlreadyExists, match="'new' already"):
        rig.manager.create(["a"], name="new")
    assert rig.manager.drop("old")["freed-bytes"] > 0
    assert rig.left() == set()
    rig.manager.create(["a"], name="new")


# Names and arguments


@pytest.mark.parametrize("name", ["", "-x", ".x", "a b", "a/b", "a@b", "é", "x" * 101, "a\nb"])
def test_a_name_that_cannot_be_is_refused_and_nothing_is_made(rig: Managed, name: str) -> None:
    with pytest.raises(InvalidArgument, match="cannot name a snapshot"):
        rig.manager.create(["a"], name=name)
    assert rig.left() == set()


def test_without_a_name_each_snapshot_gets_one_of_its_own(rig: Managed) -> None:
    names = {rig.manager.create(["a"])["name"] for _ in range(4)}
    assert len(names) == 4


@pytest.mark.parametrize(
    ("disks", "options", "error", "words"),
    [
        ([], {}, UsageError, "at least one disk"),
        (["a", "a"], {}, UsageError, "twice"),
        (["a", "c"], {}, NotFound, "no disk named 'c' .disks: a, b"),
        (["a"], {"lease": 0}, InvalidArgument, "above 0"),
        (["a"], {"lease": float("nan")}, InvalidArgument, "above 0"),
        (["a"], {"cluster_size": 5000}, InvalidArgument, "power of two"),
        (["a"], {"cluster_size": 2048}, InvalidArgument, "power of two"),
        (["a"], {"policy": "hope"}, InvalidArgument, "break-snapshot or"),
        (["a"], {"consumer": "a/b"}, InvalidArgument, "cannot be the name"),
        (["a"], {"consumer": ""}, InvalidArgument, "1 to 200"),
    ],
)
def test_wrong_arguments_are_refused_and_nothing_is_made(
    rig: Managed, disks: list[str], options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        rig.manager.create(disks, **options)
    assert rig.left() == set()
    assert rig.disks["a"].cbw is None


def test_all_snapshots_of_a_disk_have_the_cluster_size_of_the_first(rig: Managed) -> None:
    rig.manager.create(["a"], name="s", cluster_size=4096)
    with pytest.raises(InvalidArgument, match="clusters of 4096 bytes"):
        rig.manager.create(["a"], cluster_size=65536)
    second = rig.manager.create(["a", "b"])
    assert [disk["cluster-size"] for disk in second["disks"]] == [4096, 65536]


def test_a_snapshot_that_is_not_there_is_named_with_those_that_are(rig: Managed) -> None:
    rig.manager.create(["a"], name="s")
    for operation in (rig.manager.drop, rig.manager.acknowledge):
        with pytest.raises(NotFound, match=r"no snapshot named 'x' \(snapshots: s\)"):
            operation("x")
    with pytest.raises(NotFound):
        rig.manager.extend("x", 5)


def test_disks_with_long_and_odd_names_can_have_snapshots(tmp_path: Path) -> None:
    with managed(tmp_path, "ü" * 38, "x" * 200, "a b'%2F", tracking=False) as rig:
        names = list(rig.names)
        rig.manager.create(names, name="n" * 100)
        before = {name: rig.instant(name) for name in names}
        for name in names:
            rig.scribble(1, name)
        for name in names:
            assert rig.read(f"{name}@{'n' * 100}") == before[name]
        rig.manager.drop("n" * 100)
        assert rig.left() == set()


def test_a_disk_of_no_bytes_has_snapshots_too(tmp_path: Path) -> None:
    with managed(tmp_path, size=0) as rig:
        made = rig.manager.create(["a"], name="s", consumer="c")
        assert made["disks"][0]["dirty-bytes"] == 0
        with rig.client("a@s") as client:
            assert client.size == 0
        rig.manager.acknowledge("s")
        rig.manager.drop("s")
        assert rig.left() == set()


# All or nothing


class Before:
    """An older snapshot, and what everything was before a creation that must fail."""

    def __init__(self, rig: Managed) -> None:
        self.rig = rig
        rig.manager.create(["a"], name="older")
        self.instant = rig.instant()
        rig.scribble(5)
        self.files = rig.left()
        self.exports = rig.server.exports
        self.roots = {name: served.disk.root for name, served in rig.disks.items()}

    def fails(self, error: type[Exception], words: str) -> None:
        with pytest.raises(error, match=words):
            self.rig.manager.create(["a", "b"], name="s", consumer="c")
        self.rig.scribble(6, "a")
        self.rig.scribble(6, "b")
        assert self.rig.read("a@older") == self.instant
        assert [snapshot["name"] for snapshot in self.rig.manager.list()] == ["older"]
        assert self.rig.server.exports == self.exports

    def nothing_is_left(self) -> None:
        assert self.rig.left() == self.files
        assert {n: served.disk.root for n, served in self.rig.disks.items()} == self.roots

    def only_what_the_older_one_needs_is_left(self) -> None:
        """The instant had been taken: the older snapshot may have had data saved there since."""
        assert self.rig.disks["b"].disk.root is self.roots["b"]
        assert {name for name in self.rig.left() if name.startswith("b@")} == set()
        self.rig.restart()
        assert self.rig.read("a@older") == self.instant
        assert [snapshot["name"] for snapshot in self.rig.manager.list()] == ["older"]
        self.rig.manager.drop("older")
        assert self.rig.left() == set()


def test_an_overlay_that_cannot_be_made_for_the_second_disk_undoes_the_first(
    rig: Managed, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Before(rig)
    full_disk(monkeypatch, Overlay, "create", at=2)
    before.fails(SnapshotError, "cannot make the overlay .*b@s.qcow2: No space left.*free some")
    before.nothing_is_left()


def test_a_record_that_cannot_be_saved_first_leaves_everything_as_it_was(
    rig: Managed, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Before(rig)
    full_disk(monkeypatch, record, "replace_file")
    before.fails(SnapshotError, "cannot record snapshot 's'.*No space left")
    before.nothing_is_left()


def test_a_request_that_does_not_end_makes_the_drain_give_up(
    rig: Managed, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Before(rig)
    monkeypatch.setattr(instant.take, "__defaults__", (0.05,))
    stuck = rig.disks["b"].disk.open_session()
    words = "disk 'b': a request in flight did not end"
    with stuck.gate, pytest.raises(DrainTimeout, match=words):
        rig.manager.create(["a", "b"], name="s")
    stuck.close()
    monkeypatch.undo()
    full_disk(monkeypatch, Overlay, "create")
    before.fails(SnapshotError, "No space")  # and it all still works
    before.nothing_is_left()


def test_a_checkpoint_that_fails_inside_the_drain_takes_the_filters_out_again(
    rig: Managed, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Before(rig)
    tracking = rig.disks["b"].tracking
    assert tracking is not None

    def fail() -> FrozenMap:
        raise TrackingError("no more checkpoints")

    monkeypatch.setattr(tracking, "checkpoint", fail)
    before.fails(TrackingError, "no more checkpoints")
    before.nothing_is_left()


@pytest.mark.parametrize("at", [1, 2])
def test_a_map_of_changes_that_cannot_be_saved_ends_the_new_snapshot(
    rig: Managed, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    before = Before(rig)
    full_disk(monkeypatch, frozen, "replace_file", at)
    before.fails(TrackingError, "cannot save the map of changes")
    before.only_what_the_older_one_needs_is_left()


def test_a_record_that_cannot_be_saved_after_the_instant_ends_the_new_snapshot(
    rig: Managed, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Before(rig)
    full_disk(monkeypatch, record, "replace_file", at=2)
    before.fails(SnapshotError, "cannot record snapshot 's'")
    monkeypatch.undo()
    before.only_what_the_older_one_needs_is_left()


def test_a_link_that_cannot_be_written_ends_the_new_snapshot(
    rig: Managed, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Before(rig)
    full_disk(monkeypatch, Overlay, "set_backing")
    before.fails(SnapshotError, "cannot keep snapshot 's': No space left")
    monkeypatch.undo()
    before.only_what_the_older_one_needs_is_left()


def test_an_export_name_that_is_taken_ends_the_new_snapshot_and_not_its_owner(
    rig: Managed,
) -> None:
    rig.server.add("b@s", rig.disks["b"].disk)
    before = Before(rig)
    before.fails(AlreadyExists, "cannot be exported: there is an export named 'b@s' already")
    assert rig.read("b@s") == rig.instant("b")
    before.only_what_the_older_one_needs_is_left()


def test_a_file_that_lies_where_the_overlay_would_is_not_touched(rig: Managed) -> None:
    before = Before(rig)
    other = rig.records / "b@s.qcow2"
    other.write_bytes(b"precious")
    before.fails(AlreadyExists, "there is a file .*b@s.qcow2 already; remove it or choose another")
    assert other.read_bytes() == b"precious"
    other.unlink()
    before.nothing_is_left()


# P12, DESIGN section 6: what the guest was told is done outlives the instant


def test_the_tables_of_a_qcow2_disk_are_flushed_in_the_instant(tmp_path: Path) -> None:
    with managed(tmp_path, fmt="qcow2") as rig:
        rig.scribble(1)
        rig.manager.create(["a"], name="s", consumer="c")
        before = rig.instant()
        rig.restart()
        assert rig.read("a@s") == before == rig.read("a")


def test_a_disk_that_cannot_be_flushed_has_no_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with managed(tmp_path, fmt="qcow2") as rig:
        rig.scribble(1)

        def fail(self: FileNode) -> None:
            raise OSError(errno.EIO, "Input/output error")

        with monkeypatch.context() as patch:
            patch.setattr(FileNode, "flush", fail)
            with pytest.raises(SnapshotError, match="disk 'a' cannot be flushed: Input/output"):
                rig.manager.create(["a"], name="s")
        assert rig.left() == set()
        assert rig.read("a") == rig.instant()


def test_a_flush_that_hangs_does_not_hold_the_guests_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with managed(tmp_path, fmt="qcow2") as rig:
        go_on = threading.Event()
        real = rig.disks["a"].disk.root.flush

        def hang() -> None:
            go_on.wait(20)
            real()

        monkeypatch.setattr(rig.disks["a"].disk.root, "flush", hang)
        monkeypatch.setattr(instant, "SETTLE_SECONDS", 0.05)
        with pytest.raises(DrainTimeout, match="could not be flushed within"):
            rig.manager.create(["a"], name="s")
        go_on.set()
        rig.scribble(2)
        assert rig.read("a") == rig.instant()
        assert rig.left() == set()


# Consumers


def test_a_consumer_that_never_came_is_told_to_read_all_and_then_only_what_changed(
    rig: Managed,
) -> None:
    first = rig.manager.create(["a"], name="one", consumer="nightly")["disks"][0]
    assert (first["mode"], first["dirty-bytes"], first["since-epoch"]) == ("full", SIZE, None)
    assert "has never acknowledged" in first["reason"]
    assert rig.dirty("a@one", "nightly")[0][:2] == (0, SIZE)
    old = rig.instant()
    rig.manager.acknowledge("one")
    rig.write(b"x", 3 * GRANULE - 1)
    second = rig.manager.create(["a"], name="two", consumer="nightly")["disks"][0]
    assert (second["mode"], second["dirty-bytes"]) == ("incremental", GRANULE)
    assert second["since-epoch"] == first["epoch"]
    assert second["reason"] is None
    assert second["context"] == "qemu:dirty-bitmap:nightly"
    assert rig.dirty("a@two", "nightly") == [(2 * GRANULE, GRANULE, 1)]
    assert patched(rig.dirty("a@two", "nightly"), old, rig.read("a@two")) == rig.instant()


def test_p15_a_backup_that_was_not_acknowledged_loses_nothing(rig: Managed) -> None:
    rig.manager.create(["a"], name="one", consumer="nightly")
    old = rig.instant()
    rig.manager.acknowledge("one")
    rig.scribble(1)
    rig.manager.create(["a"], name="failed", consumer="nightly")
    rig.manager.drop("failed")
    rig.scribble(2)
    rig.manager.create(["a"], name="two", consumer="nightly")
    assert patched(rig.dirty("a@two", "nightly"), old, rig.instant()) == rig.instant()


def test_a_second_consumer_does_not_disturb_the_first(rig: Managed) -> None:
    rig.manager.create(["a"], name="one", consumer="first")
    rig.manager.acknowledge("one")
    rig.write(b"1", 0)
    rig.manager.create(["a"], name="two", consumer="second")
    rig.manager.acknowledge("two")
    rig.write(b"2", 10 * GRANULE)
    three = rig.manager.create(["a"], name="three", consumer="first")["disks"][0]
    assert three["dirty-bytes"] == 2 * GRANULE
    with rig.client("a@three", "qemu:dirty-bitmap:first", "qemu:dirty-bitmap:second") as client:
        assert client.contexts == ("qemu:dirty-bitmap:first", "qemu:dirty-bitmap:second")
        status = client.status(0, SIZE)
    assert sum(e.length for e in status["qemu:dirty-bitmap:second"] if e.is_dirty) == GRANULE


def test_an_acknowledgement_counts_from_the_instant_and_not_from_when_it_comes(
    rig: Managed,
) -> None:
    rig.manager.create(["a"], name="one", consumer="c")
    rig.write(b"late", 0)
    rig.manager.acknowledge("one")
    assert rig.manager.create(["a"], consumer="c")["disks"][0]["dirty-bytes"] == GRANULE


def test_an_older_snapshot_acknowledged_late_does_not_move_the_cursor_back(rig: Managed) -> None:
    rig.manager.create(["a"], name="one", consumer="c")
    two = rig.manager.create(["a"], name="two", consumer="c")
    rig.manager.acknowledge("two")
    answer = rig.manager.acknowledge("one")
    assert answer["disks"] == [{"disk": "a", "epoch": two["disks"][0]["epoch"]}]
    assert rig.manager.list()[0]["acknowledged"] is True


def test_any_consumer_may_acknowledge_any_snapshot_by_its_name(rig: Managed) -> None:
    rig.manager.create(["a", "b"], name="s")
    with pytest.raises(UsageError, match=r"made for no consumer.*--consumer"):
        rig.manager.acknowledge("s")
    answer = rig.manager.acknowledge("s", "scanner")
    assert [disk["disk"] for disk in answer["disks"]] == ["a", "b"]
    with pytest.raises(InvalidArgument):
        rig.manager.acknowledge("s", "no/slash")
    rig.write(b"x", 0)
    next_one = rig.manager.create(["a", "b"], consumer="scanner")
    assert [disk["dirty-bytes"] for disk in next_one["disks"]] == [GRANULE, 0]


def test_a_disk_that_is_not_tracked_is_always_read_in_full(tmp_path: Path) -> None:
    with managed(tmp_path, tracking=False) as rig:
        made = rig.manager.create(["a"], name="s", consumer="c")["disks"][0]
        assert made["mode"] == "full"
        assert made["reason"] == "changes of disk 'a' are not tracked"
        assert made["bitmap"] is made["context"] is made["epoch"] is None
        with pytest.raises(SnapshotError, match="nothing to acknowledge"):
            rig.manager.acknowledge("s")


def test_checkpoints_of_living_snapshots_are_told_apart_however_many_come_after(
    tmp_path: Path,
) -> None:
    with managed(tmp_path, size=64 * GRANULE) as rig:
        rig.manager.create(["a"], name="held", consumer="c")
        rig.write(b"x", 5 * GRANULE)
        tracking = rig.disks["a"].tracking
        assert tracking is not None
        for _ in range(600):  # more than there are slots
            tracking.checkpoint()
        rig.manager.acknowledge("held")
        after = rig.manager.create(["a"], name="next", consumer="c")["disks"][0]
        assert after["dirty-bytes"] == GRANULE
        rig.manager.drop("held")
        assert set(tracking._pins) == {after["epoch"]}
        rig.manager.drop("next")
        assert not tracking._pins


# Broken snapshots


def lose(rig: Managed, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guest writes while nothing can be saved."""
    with monkeypatch.context() as patch:
        full_disk(patch, Overlay, "store")
        rig.write(b"guest" * 1000, 0)


def test_a_broken_snapshot_says_so_everywhere_and_cannot_be_acknowledged(
    rig: Managed, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.manager.create(["a", "b"], name="s", consumer="c")
    lose(rig, monkeypatch)
    [listed] = rig.manager.list()
    assert listed["state"] == "broken"
    assert [disk["state"] for disk in listed["disks"]] == ["broken", "active"]
    assert listed["disks"][0]["error"] == "No space left on device"
    assert rig.events == [
        (
            "X_FLEECE_SNAPSHOT_BROKEN",
            {"name": "s", "disk": "a", "error": "No space left on device"},
        )
    ]
    with pytest.raises(SnapshotBroken, match="may be wrong and cannot be acknowledged"):
        rig.manager.acknowledge("s")
    assert rig.disks["b"].tracking is not None
    assert rig.disks["b"].tracking.cursors() == []
    with rig.client("a@s") as client, pytest.raises(OSError, match="broken"):
        client.pread(10, SIZE - 10)
    assert rig.read("b@s") == rig.instant("b")
    assert rig.read("a") == rig.instant()
    fresh = rig.manager.create(["a"], name="fresh")
    now = rig.instant()
    rig.scribble(9)
    assert fresh["state"] == "active"
    assert rig.read("a@fresh") == now
    for name in ("s", "fresh"):
        rig.manager.drop(name)
    assert rig.left() == set()


def test_a_dropped_snapshot_whose_data_is_lost_breaks_the_older_one_without_being_announced(
    rig: Managed, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.manager.create(["a"], name="older")
    rig.manager.create(["a"], name="newer")
    rig.manager.drop("newer")
    lose(rig, monkeypatch)
    assert [data["name"] for _, data in rig.events] == ["older"]
    with rig.client("a@older") as client, pytest.raises(OSError, match="broken"):
        client.pread(1, 0)


def test_a_snapshot_that_filled_the_disk_can_be_dropped(
    rig: Managed, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.manager.create(["a"], name="s")
    full_disk(monkeypatch, record, "replace_file")
    rig.manager.drop("s")
    assert rig.left() == set()


def test_a_drop_that_cannot_be_recorded_changes_nothing(
    rig: Managed, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.manager.create(["a"], name="s")
    before = rig.instant()
    with monkeypatch.context() as patch:
        full_disk(patch, Path, "rename")
        with pytest.raises(SnapshotError, match="cannot drop snapshot 's'"):
            rig.manager.drop("s")
    rig.scribble(1)
    assert rig.read("a@s") == before
    rig.manager.drop("s")
    assert rig.left() == set()


def test_an_overlay_that_cannot_be_deleted_now_is_deleted_later(
    rig: Managed, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.manager.create(["a"], name="s")
    rig.write(b"x", 0)
    with monkeypatch.context() as patch:
        full_disk(patch, Path, "unlink")
        rig.manager.drop("s")
        assert "a@s.qcow2" in rig.left()
    wait_until(lambda: rig.left() == set())


def test_a_disk_that_does_not_come_to_rest_at_a_drop_is_freed_later(
    rig: Managed, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = rig.disks["a"].disk.root
    rig.manager.create(["a"], name="s")
    real = instant.sweep
    monkeypatch.setattr(instant, "sweep", lambda served, timeout: real(served, 0.05))
    stuck = rig.disks["a"].disk.open_session()
    with stuck.gate:
        rig.manager.drop("s")
        assert rig.manager.list() == []
        assert "a@s.qcow2" in rig.left()
    stuck.close()
    wait_until(lambda: rig.left() == set())
    assert rig.disks["a"].disk.root is plain


def test_p21_a_reader_that_is_stuck_keeps_its_descriptors_and_reads_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with managed(tmp_path) as rig:
        rig.manager.create(["a"], name="s")
        rig.write(b"x" * SIZE, 0)
        overlay = rig.disks["a"].cbw.levels[0].overlay  # type: ignore[union-attr]
        assert overlay is not None

        def hang(name: str) -> None:
            type(rig.server).remove(rig.server, name)
            raise TimeoutError(f"export {name!r}: requests of 1 clients do not end")

        monkeypatch.setattr(rig.server, "remove", hang)
        rig.manager.drop("s")
        assert rig.left() == set()
        assert overlay.fd >= 0
        overlay.close()


# Leases


def test_a_lease_that_runs_out_drops_the_snapshot(tmp_path: Path) -> None:
    clock = Clock()
    with managed(tmp_path, clock=clock) as rig:
        rig.manager.create(["a"], name="short", lease=60)
        rig.manager.create(["a"], name="long", lease=600)
        rig.manager.create(["a"], name="ever")
        clock.now += 59
        rig.manager._tidy()
        assert len(rig.manager.list()) == 3
        clock.now += 1
        rig.manager._wake.set()
        wait_until(lambda: len(rig.manager.list()) == 2)
        assert ("X_FLEECE_LEASE_EXPIRED", {"name": "short"}) in rig.events
        assert [snapshot["name"] for snapshot in rig.manager.list()] == ["long", "ever"]


def test_an_extended_lease_counts_from_now(tmp_path: Path) -> None:
    clock = Clock()
    with managed(tmp_path, clock=clock) as rig:
        rig.manager.create(["a"], name="s", lease=60)
        clock.now += 50
        assert rig.manager.extend("s", 60)["lease-expires"] == "2027-01-15T08:01:50.000000Z"
        clock.now += 59
        rig.manager._tidy()
        assert rig.manager.list()
        with pytest.raises(InvalidArgument):
            rig.manager.extend("s", -1)
        clock.now += 1
        rig.manager._tidy()
        assert rig.manager.list() == []
        assert rig.left() == set()


def test_an_extension_that_cannot_be_recorded_does_not_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    with managed(tmp_path, clock=clock) as rig:
        made = rig.manager.create(["a"], name="s", lease=60)
        with monkeypatch.context() as patch:
            full_disk(patch, record, "replace_file")
            with pytest.raises(SnapshotError, match="cannot record"):
                rig.manager.extend("s", 600)
        assert rig.manager.list()[0]["lease-expires"] == made["lease-expires"]


def test_a_lease_survives_a_restart_and_may_have_run_out_meanwhile(tmp_path: Path) -> None:
    clock = Clock()
    with managed(tmp_path, clock=clock) as rig:
        rig.manager.create(["a"], name="s", lease=60)
        rig.restart()
        assert len(rig.manager.list()) == 1
        rig.kill()
        clock.now += 61
        rig.start()
        wait_until(lambda: rig.left() == set())


def test_a_fault_while_tidying_up_does_not_end_the_leases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    with managed(tmp_path, clock=clock) as rig:
        rig.manager.create(["a"], name="s", lease=60)
        tried = threading.Event()

        def fail() -> None:
            tried.set()
            raise RuntimeError("out of luck")

        with monkeypatch.context() as patch:
            patch.setattr(rig.manager, "_tidy", fail)
            rig.manager._wake.set()
            assert tried.wait(20)
        clock.now += 60
        rig.manager._wake.set()
        wait_until(lambda: rig.left() == set())


# Several at once, and the end


def test_operations_of_many_threads_leave_nothing_behind(rig: Managed) -> None:
    problems: list[BaseException] = []

    def churn(number: int) -> None:
        try:
            for round_ in range(6):
                name = f"t{number}-{round_}"
                rig.manager.create(["a", "b"] if round_ % 2 else ["b"], name=name, consumer="c")
                rig.manager.acknowledge(name)
                rig.manager.list()
                rig.manager.drop(name)
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=churn, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    rig.scribble(1, count=60)
    for thread in threads:
        thread.join()
    assert problems == []
    assert rig.left() == set()
    assert rig.disks["a"].cbw is rig.disks["b"].cbw is None
    assert rig.read("a") == rig.instant()


def test_nothing_begins_after_the_end(tmp_path: Path) -> None:
    with managed(tmp_path) as rig:
        rig.manager.create(["a"], name="s", consumer="c")
        rig.stop()
        for operation in (
            lambda: rig.manager.create(["a"]),
            lambda: rig.manager.acknowledge("s"),
            lambda: rig.manager.extend("s", 5),
            lambda: rig.manager.drop("s"),
        ):
            with pytest.raises(Busy, match="the daemon is ending"):
                operation()
        assert len(rig.manager.list()) == 1


def test_stopping_never_misses_the_thread_of_the_leases(tmp_path: Path) -> None:
    with managed(tmp_path, size=GRANULE) as rig:
        for _ in range(30):
            rig.stop()
            rig.start()


def test_a_guest_that_writes_while_levels_are_let_go_breaks_nothing(rig: Managed) -> None:
    """A level that is retired while another thread breaks the levels: its file is left alone."""
    rig.manager.create(["a"], name="one")
    rig.manager.create(["a"], name="two")
    cbw = rig.disks["a"].cbw
    assert cbw is not None
    gone = cbw.levels[0]
    entered, go_on = threading.Event(), threading.Event()
    assert gone.overlay is not None
    real = gone.overlay.mark_broken

    def slow() -> None:
        entered.set()
        assert go_on.wait(20)
        assert gone.overlay is not None
        assert gone.overlay.fd >= 0, "its descriptor was closed, and may be somebody else's"
        real()

    gone.overlay.mark_broken = slow  # type: ignore[method-assign]
    breaker = threading.Thread(target=cbw._break, args=(OSError(errno.EIO, "bad"),))
    breaker.start()
    assert entered.wait(20)
    dropper = threading.Thread(target=rig.manager.drop, args=("one",))
    dropper.start()
    dropper.join(0.2)  # long enough to do wrong if nothing held it
    go_on.set()
    breaker.join()
    dropper.join()
    assert gone.overlay.fd == -1


def test_block_status_under_a_guest_that_writes_keeps_the_holes(tmp_path: Path) -> None:
    """P6: one pass over what was saved meanwhile, however often it changes."""
    with managed(tmp_path) as rig:
        rig.manager.create(["a"], name="s")
        view = next(iter(rig.manager._snapshots.values())).parts[0].view
        assert view is not None
        before = rig.instant()
        source = view._source
        real = source.extents
        calls = 0

        def racing(offset: int, length: int) -> Any:
            nonlocal calls
            calls += 1
            answer = real(offset, length)
            cluster = SIZE // CLUSTER - calls  # a guest that writes backwards from the end
            rig.disks["a"].disk.root.pwrite(memoryview(b"g" * 10), cluster * CLUSTER)
            return answer

        source.extents = racing  # type: ignore[method-assign]
        found = view.extents(0, SIZE)
        assert calls == 1
        assert found[0].offset == 0
        assert all(a.end == b.offset for a, b in itertools.pairwise(found))
        assert found[-1].end == SIZE
        assert any(extent.is_zero for extent in found)
        for extent in found:
            if extent.is_zero:
                assert not any(before[extent.offset : extent.end])


def test_errors_of_the_manager_are_one_line(rig: Managed) -> None:
    for disks in ([], ["nope"], ["a", "a"]):
        with pytest.raises(FleeceError) as caught:
            rig.manager.create(disks)
        assert "\n" not in str(caught.value)


def test_records_of_one_name_are_removed_in_whatever_phase_they_are(rig: Managed) -> None:
    rig.manager.create(["a"], name="s")
    [found] = Records(rig.records).load()
    Records(rig.records).drop(found)
    Records(rig.records).remove(found)
    assert Records(rig.records).load() == []


def test_the_source_of_a_snapshot_needs_no_file(tmp_path: Path) -> None:
    """`ArrayNode`: the manager asks nothing of a disk but the verbs."""
    with managed(tmp_path, tracking=False) as rig:
        served = rig.disks["a"]
        real = served.disk.root
        served.disk.root = ArrayNode(rig.instant())
        rig.manager.create(["a"], name="s")
        before = rig.instant()
        served.disk.root.pwrite(memoryview(b"x" * 100), 0)
        assert rig.read("a@s") == before
        rig.manager.drop("s")
        served.disk.root = real

"""The snapshot manager over real disks and a real server: made, listed, acknowledged."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fleece.errors import (
    AlreadyExists,
    InvalidArgument,
    NotFound,
    SnapshotError,
    UsageError,
)
from nbdwire.errors import NBDError
from tests.support.managed import CLUSTER, GRANULE, SIZE, Managed, managed, patched


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Managed]:
    with managed(tmp_path, "a", "b") as rig:
        yield rig


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

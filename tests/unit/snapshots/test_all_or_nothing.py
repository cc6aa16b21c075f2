"""Whatever fails while a snapshot is made: everything is as it was, older snapshots too."""

import errno
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fleece.block.file import FileNode
from fleece.errors import (
    AlreadyExists,
    DrainTimeout,
    SnapshotError,
    TrackingError,
)
from fleece.formats.qcow2.overlay import Overlay
from fleece.snapshots import instant, record
from fleece.tracking import frozen
from fleece.tracking.frozen import FrozenMap
from tests.support.managed import (
    Managed,
    full_disk,
    managed,
)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Managed]:
    with managed(tmp_path, "a", "b") as rig:
        yield rig


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

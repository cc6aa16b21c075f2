"""How snapshots end: broken, dropped, by their lease, and with the daemon."""

import errno
import itertools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fleece.errors import (
    Busy,
    FleeceError,
    InvalidArgument,
    SnapshotBroken,
    SnapshotError,
)
from fleece.formats.qcow2.overlay import Overlay
from fleece.snapshots import instant, record
from fleece.snapshots.record import Records
from tests.support.managed import (
    CLUSTER,
    GRANULE,
    SIZE,
    Clock,
    Managed,
    full_disk,
    managed,
)
from tests.support.snapshots import ArrayNode
from tests.support.threads import wait_until


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Managed]:
    with managed(tmp_path, "a", "b") as rig:
        yield rig


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

# SPDX-License-Identifier: Apache-2.0
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from fleece.block.node import Node
from fleece.errors import Busy, InvalidArgument, TrackingError
from fleece.tracking import heartbeat, sidecar, store
from fleece.tracking.heartbeat import SLACK_NS, Heartbeat
from fleece.tracking.identity import Identity, sectors_changed
from fleece.tracking.sidecar import HEADER_BYTES
from fleece.tracking.store import DiskTracking

SIZE = 1 << 20
GRANULE = 4096


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "vm1.raw"
    path.write_bytes(bytes(SIZE))
    return path


class Opener:
    """Opens the tracking of one disk again and again, and closes at the end what is open."""

    def __init__(self, directory: Path, image: Path) -> None:
        self.directory, self.image = directory, image
        self.opened: list[DiskTracking] = []

    def __call__(
        self, *, boot: str | None = "boot-1", size: int = SIZE, granularity: int = GRANULE
    ) -> DiskTracking:
        tracking = DiskTracking.open(
            self.directory, "vm1", size, self.image, granularity=granularity, boot_id=boot
        )
        self.opened.append(tracking)
        return tracking

    @property
    def path(self) -> Path:
        return self.directory / "vm1.epochs"


@pytest.fixture
def reopen(tmp_path: Path, image: Path) -> "Opener":  # type: ignore[misc]
    opener = Opener(tmp_path / "state", image)
    yield opener
    for tracking in opener.opened:
        tracking.close(clean=False)


def used(tracking: DiskTracking) -> str:
    """One checkpoint that 'nightly' has, then a write; returns the generation."""
    tracking.map.mark(0, 1)
    frozen = tracking.checkpoint()
    tracking.acknowledge("nightly", frozen.generation, frozen.epoch)
    tracking.map.mark(5 * GRANULE, 1)
    return tracking.generation


def test_a_disk_that_was_not_tracked_before_starts_a_generation_and_says_so(
    reopen: Opener,
) -> None:
    tracking = reopen()
    assert tracking.reason_new == "disk 'vm1' was not tracked before"
    assert (tracking.epoch, tracking.granularity, tracking.disk) == (1, GRANULE, "vm1")
    assert tracking.since("nightly") == (
        None,
        "consumer 'nightly' has never acknowledged a snapshot of disk 'vm1'",
    )


@pytest.mark.parametrize("clean", [True, False])
def test_after_an_orderly_end_and_after_a_kill_the_record_goes_on(
    reopen: Opener, clean: bool
) -> None:
    tracking = reopen()
    generation = used(tracking)
    tracking.close(clean=clean)
    tracking = reopen()
    assert (tracking.reason_new, tracking.generation, tracking.epoch) == (None, generation, 2)
    since, reason = tracking.since("nightly")
    assert (since, reason) == (1, None)
    assert tracking.checkpoint().changed(since)(0, SIZE) == [
        (0, 5 * GRANULE, 0),
        (5 * GRANULE, GRANULE, 1),
        (6 * GRANULE, SIZE - 6 * GRANULE, 0),
    ]


def grow(image: Path) -> None:
    with image.open("ab") as file:
        file.write(b"x")


def touch(image: Path) -> None:
    found = image.stat()
    os.utime(image, ns=(found.st_atime_ns, found.st_mtime_ns + 1))


def touch_much_later(image: Path) -> None:
    found = image.stat()
    os.utime(image, ns=(found.st_atime_ns, found.st_mtime_ns + 60 * 10**9))


def put_the_time_back(image: Path) -> None:
    found = image.stat()
    with image.open("r+b") as file:
        file.write(b"changed")
    os.utime(image, ns=(found.st_atime_ns, found.st_mtime_ns))


def swap(image: Path) -> None:
    other = image.with_suffix(".other")
    other.write_bytes(bytes(SIZE))
    other.replace(image)


def nothing(image: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("clean", "boot", "meanwhile", "reason"),
    [
        (True, "boot-1", nothing, None),
        (True, "boot-2", nothing, None),
        (True, "", nothing, None),
        (False, "boot-1", nothing, None),
        (False, "boot-2", nothing, "the host crashed or lost power"),
        (False, "", nothing, "the host crashed or lost power"),
        (True, "boot-1", grow, "its size differs"),
        (True, "boot-1", touch, "its modification time differs"),
        (True, "boot-2", touch, "its modification time differs"),
        (True, "boot-1", put_the_time_back, "its change time differs"),
        (True, "boot-1", swap, "was replaced by another one"),
        (True, "boot-2", swap, "was replaced by another one"),
        (False, "boot-1", swap, "was replaced by another one"),
        (False, "boot-1", touch, None),  # the killed process may have written that late
        (False, "boot-1", grow, None),
        (False, "boot-1", touch_much_later, "was changed after fleece was killed"),
    ],
)
def test_a_record_is_believed_only_if_the_image_cannot_have_changed_unseen(
    reopen: Opener, clean: bool, boot: str, meanwhile: Callable[[Path], None], reason: str | None
) -> None:
    tracking = reopen()
    generation = used(tracking)
    tracking.close(clean=clean)
    meanwhile(reopen.image)
    tracking = reopen(boot=boot)
    if reason is None:
        assert (tracking.reason_new, tracking.generation) == (None, generation)
        assert tracking.since("nightly") == (1, None)
    else:
        assert reason in (tracking.reason_new or "")
        assert tracking.generation != generation
        assert tracking.since("nightly") == (None, tracking.reason_new)


def test_the_reason_for_a_generation_is_told_to_a_consumer_that_comes_many_restarts_later(
    reopen: Opener,
) -> None:
    used(tracking := reopen())
    tracking.close(clean=False)
    reopen(boot="boot-2").close()
    tracking = reopen(boot="boot-3")
    assert tracking.reason_new is None
    assert "the host crashed" in (tracking.since("nightly")[1] or "")


def test_a_disk_that_was_opened_but_not_closed_is_not_clean_even_if_it_was_before(
    reopen: Opener,
) -> None:
    used(tracking := reopen())
    tracking.close()
    reopen().close(clean=False)
    assert "the host crashed" in (reopen(boot="boot-2").reason_new or "")


def test_a_changed_size_or_granularity_of_the_disk_begins_a_generation(reopen: Opener) -> None:
    used(tracking := reopen())
    tracking.close()
    tracking = reopen(size=SIZE * 2)
    assert tracking.reason_new == "the size of disk 'vm1' changed from 1048576 to 2097152 bytes"
    tracking.close()
    tracking = reopen(size=SIZE * 2, granularity=8192)
    assert tracking.reason_new == "the granularity of disk 'vm1' was changed from 4 KiB to 8 KiB"
    assert tracking.map.granules == 256


def test_a_record_that_went_away_is_missed_if_there_are_cursors(reopen: Opener) -> None:
    used(tracking := reopen())
    tracking.close()
    reopen.path.unlink()
    tracking = reopen()
    assert tracking.since("nightly") == (None, "the record of changes of disk 'vm1' is missing")


def test_an_old_copy_of_the_record_is_not_believed_although_the_image_is_the_same(
    reopen: Opener,
) -> None:
    used(tracking := reopen())
    tracking.close()
    old = reopen.path.read_bytes()
    tracking = reopen()
    frozen = tracking.checkpoint()
    tracking.acknowledge("nightly", frozen.generation, frozen.epoch)
    tracking.close()
    reopen.path.write_bytes(old)
    assert "is older than its cursors" in (reopen().reason_new or "")


def test_lost_cursors_are_given_as_the_reason(reopen: Opener) -> None:
    used(tracking := reopen())
    tracking.close()
    cursors = reopen.directory / "vm1.cursors"
    cursors.write_text("{")
    assert reopen().since("nightly") == (None, f"the file of cursors {cursors} is damaged")


def damage(where: int) -> Callable[[bytearray], None]:
    def change(data: bytearray) -> None:
        data[where] ^= 0xFF

    return change


def cut(length: int) -> Callable[[bytearray], None]:
    def change(data: bytearray) -> None:
        del data[length:]

    return change


@pytest.mark.parametrize(
    "change",
    [
        *(damage(where) for where in (0, 7, 8, 11, 12, 16, 40, 100, 12288, 12290, 12296)),
        *(cut(length) for length in (0, 1, 4096, 12288, HEADER_BYTES - 1, HEADER_BYTES, -1)),
        lambda data: data.extend(b"x"),
        lambda data: data.__setitem__(slice(0, 16384), os.urandom(16384)),
        lambda data: data.__setitem__(slice(0, len(data)), bytes(len(data))),
        lambda data: data.__setitem__(slice(0, len(data)), b"QFI\xfb" * (len(data) // 4)),
    ],
)
@pytest.mark.parametrize("clean", [True, False])
def test_a_damaged_cut_or_foreign_record_begins_a_generation(
    reopen: Opener, change: Callable[[bytearray], None], clean: bool
) -> None:
    generation = used(tracking := reopen())
    tracking.close(clean=clean)
    data = bytearray(reopen.path.read_bytes())
    change(data)
    reopen.path.write_bytes(data)
    tracking = reopen()
    assert "the record of changes of disk 'vm1' " in (tracking.reason_new or "")
    assert tracking.generation != generation
    assert tracking.since("nightly") == (None, tracking.reason_new)
    assert reopen.path.stat().st_size == HEADER_BYTES + SIZE // GRANULE


def test_a_valid_header_of_another_version_or_disk_begins_a_generation(reopen: Opener) -> None:
    tracking = reopen()
    tracking.close()
    reopen.path.rename(reopen.directory / "vm2.epochs")
    other = DiskTracking.open(
        reopen.directory, "vm2", SIZE, reopen.image, granularity=GRANULE, boot_id="boot-1"
    )
    assert other.reason_new == "the record of changes of disk 'vm2' is one of disk 'vm1'"
    other.close()
    about = sidecar.Description("vm1", "g", GRANULE, SIZE, "r")
    packed = about.pack().replace(b'"version": 1', b'"version": 9')
    text = packed[16:]
    header = sidecar._STATIC.pack(b"FLCEPOCH", len(text), sidecar.zlib.crc32(text)) + text
    with pytest.raises(sidecar.Damaged, match="another version"):
        sidecar.Description.parse(header)
    for granularity in (0, -4096, 4095):
        bad = sidecar.Description("vm1", "g", granularity, SIZE, "r").pack()
        with pytest.raises(sidecar.Damaged, match="damaged"):
            sidecar.Description.parse(bad)


def test_the_longest_reason_and_name_fit_the_header() -> None:
    about = sidecar.Description("\U0001f600" * 21, "g" * 36, GRANULE, SIZE, "\U0001f600" * 900)
    packed = about.pack()
    assert len(packed) <= sidecar._BOOT
    assert sidecar.Description.parse(packed).reason == "\U0001f600" * sidecar.MAX_REASON


def test_a_second_process_that_opens_the_record_is_refused(reopen: Opener) -> None:
    tracking = reopen()
    with pytest.raises(Busy, match="in use by another fleece"):
        reopen()
    with pytest.raises(Busy, match="in use by another fleece"):
        reopen(size=SIZE * 2)
    tracking.close()
    reopen()


def test_of_many_who_make_the_record_at_once_exactly_one_has_it(reopen: Opener) -> None:
    results: list[object] = []

    def work() -> None:
        try:
            results.append(reopen())
        except Busy as error:
            results.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    assert sum(isinstance(result, DiskTracking) for result in results) == 1


def test_without_the_second_look_under_the_lock_a_late_maker_would_replace_the_record(
    reopen: Opener,
) -> None:
    """The control of the test above: the lock of the temporary file is free again by then."""
    tracking = reopen()
    about = sidecar.Description("vm1", "g", GRANULE, SIZE, "r")
    identity = Identity.of(reopen.image)
    with pytest.raises(Busy):
        sidecar.Sidecar.create(
            reopen.path, about, boot_id="b", identity=identity, until=0, replaced=None
        )
    assert tracking._sidecar.lock.holds(reopen.path)


def test_a_full_disk_is_one_clear_error_and_nothing_is_left(
    reopen: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sidecar.os, "posix_fallocate", full)
    with pytest.raises(TrackingError, match=r"vm1.epochs cannot be opened: No space left"):
        reopen()
    assert list(reopen.directory.iterdir()) == []


def test_a_missing_image_and_a_place_that_cannot_be_written_are_one_clear_error(
    tmp_path: Path, image: Path
) -> None:
    with pytest.raises(TrackingError, match="No such file"):
        DiskTracking.open(tmp_path, "vm1", SIZE, tmp_path / "missing")
    with pytest.raises(TrackingError, match=r"File exists|Not a directory"):
        DiskTracking.open(image, "vm1", SIZE, image)


def test_the_record_is_allocated_in_full_when_it_is_made(reopen: Opener) -> None:
    reopen(size=1 << 34)
    found = reopen.path.stat()
    assert found.st_size == HEADER_BYTES + (1 << 34) // GRANULE
    assert found.st_blocks * 512 >= found.st_size


@pytest.mark.parametrize("name", ["a/b", "..", "ä b", "@"])
def test_any_name_of_a_disk_has_a_file_of_its_own(name: str, tmp_path: Path, image: Path) -> None:
    directory = tmp_path / "state"
    tracking = DiskTracking.open(directory, name, SIZE, image)
    tracking.acknowledge("c", "other", 1)
    tracking.close()
    assert len(list(directory.iterdir())) == 2
    tracking = DiskTracking.open(directory, name, SIZE, image)
    assert tracking.reason_new is None
    tracking.close()


def test_the_boot_id_of_this_host_is_used_unless_given(reopen: Opener) -> None:
    generation = used(tracking := reopen(boot=None))
    tracking.close(clean=False)
    assert reopen(boot=None).generation == generation


def test_each_consumer_counts_from_its_own_checkpoint(reopen: Opener) -> None:
    tracking = reopen()
    for granule, consumer in enumerate(("a", "b", "c")):
        tracking.map.mark(granule * GRANULE, 1)
        frozen = tracking.checkpoint()
        assert tracking.acknowledge(consumer, frozen.generation, frozen.epoch) == granule + 1
    last = tracking.checkpoint()
    assert [last.dirty_bytes(tracking.since(name)[0]) for name in "abc"] == [8192, 4096, 0]
    assert [cursor.consumer for cursor in tracking.cursors()] == ["a", "b", "c"]
    assert tracking.remove_cursor("b")
    assert not tracking.remove_cursor("b")
    assert tracking.since("b")[0] is None


def test_a_snapshot_that_is_never_acknowledged_loses_nothing(reopen: Opener) -> None:
    used(tracking := reopen())
    tracking.checkpoint()
    tracking.map.mark(9 * GRANULE, 1)
    assert tracking.checkpoint().dirty_bytes(tracking.since("nightly")[0]) == 2 * GRANULE


@pytest.mark.parametrize("epoch", [-1, 0, 2, 100])
def test_a_checkpoint_that_does_not_exist_cannot_be_acknowledged(
    reopen: Opener, epoch: int
) -> None:
    used(tracking := reopen())
    with pytest.raises(InvalidArgument, match="has no checkpoint"):
        tracking.acknowledge("nightly", tracking.generation, epoch)
    assert tracking.since("nightly") == (1, None)


def test_a_name_that_cannot_be_a_consumer_is_refused_when_asked_for(reopen: Opener) -> None:
    with pytest.raises(InvalidArgument):
        reopen().since("a/b")


def test_pinned_and_acknowledged_checkpoints_stay_exact_over_any_number_of_others(
    reopen: Opener,
) -> None:
    tracking = reopen()
    tracking.keep([100, 101])
    tracking.pin(101)
    tracking.unpin(101)
    tracking.unpin(999)
    for n in range(600):
        tracking.map.mark((n % 256) * GRANULE, 1)
        epoch = tracking.checkpoint().epoch
        if epoch == 50:
            tracking.acknowledge("weekly", tracking.generation, epoch)
    tracking.map.mark(0, SIZE)
    tracking.checkpoint()
    tracking.map.mark(3 * GRANULE, 1)
    final = tracking.checkpoint()
    assert tracking._kept() == {50, 100, 101}
    assert final.dirty_bytes(601) == GRANULE
    assert {50, 100, 101} <= set(tracking.map._told_apart({50, 100, 101}))
    tracking.unpin(100)
    tracking.unpin(101)
    assert tracking._kept() == {50}


def test_the_tracker_marks_in_the_record_of_its_disk(reopen: Opener) -> None:
    tracking = reopen()
    tracking.checkpoint()

    class Sink(Node):
        def pwrite(self, buf: memoryview, offset: int, fua: bool = False) -> None:
            pass

    tracker = tracking.tracker(Sink("sink", SIZE))
    tracker.pwrite(memoryview(b"abc"), 2 * GRANULE - 1)
    assert tracker.name == "vm1-tracker"
    assert tracking.checkpoint().dirty_bytes(1) == 2 * GRANULE


def test_an_image_that_is_gone_at_the_end_is_an_error_and_the_record_is_not_clean(
    reopen: Opener,
) -> None:
    tracking = reopen()
    content = reopen.image.read_bytes()
    reopen.image.unlink()
    with pytest.raises(TrackingError, match="cannot be closed in order: No such file"):
        tracking.close()
    tracking.close()
    reopen.image.write_bytes(content)
    assert reopen(boot="boot-2").reason_new is not None


def test_clean_is_said_only_after_the_cells_are_durable_and_taken_back_before_any_mark(
    reopen: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[tuple[str, int]] = []

    class Watched(sidecar.mmap.mmap):
        def flush(self, *args: int) -> None:
            whole = not args or args[1] == len(self)
            log.append(("all" if whole else "header", self[sidecar._WORDS]))
            super().flush(*args)

    monkeypatch.setattr(sidecar.mmap, "mmap", Watched)
    tracking = reopen()
    assert log == [("header", 0)]
    tracking.close()
    assert log[1:] == [("all", 0), ("header", 1)]
    reopen()
    assert log[3:] == [("header", 0)]


def test_the_heartbeat_says_until_when_the_image_may_have_been_touched(
    reopen: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracking = reopen()
    monkeypatch.setattr(heartbeat.time, "time_ns", lambda: 10**18)
    os.utime(reopen.image, ns=(0, 10**18 - 5))
    assert heartbeat.alive_until(reopen.image) == 10**18 + SLACK_NS
    os.utime(reopen.image, ns=(0, 2 * 10**18))
    assert heartbeat.alive_until(reopen.image) == 2 * 10**18 + SLACK_NS
    assert heartbeat.alive_until(reopen.image / "missing") == 10**18 + SLACK_NS
    tracking._beat()
    assert tracking._sidecar.alive_until == 2 * 10**18 + SLACK_NS


def test_the_heartbeat_beats_again_and_again_until_it_is_stopped() -> None:
    beats, third = [], threading.Event()

    def beat() -> None:
        beats.append(1)
        if len(beats) == 3:
            third.set()

    running = Heartbeat("t", beat, interval=0.001)
    assert third.wait(10)
    running.stop()
    count = len(beats)
    running.stop()
    assert len(beats) == count


def device(**changes: int) -> Identity:
    values = {"size": 0, "inode": 0, "device": 2049, "mtime_ns": 77, "ctime_ns": 0}
    return Identity(**(values | changes))


@pytest.mark.parametrize(
    ("now", "same_boot", "reason"),
    [
        (device(), True, None),
        (device(mtime_ns=78), True, "was written"),
        (device(mtime_ns=-1), True, "nothing tells"),
        (device(device=2050), True, "was replaced"),
        (device(), False, "the host was restarted"),
        (device(inode=5), False, "was replaced"),
    ],
)
def test_a_block_device_is_believed_only_while_the_kernel_counts_its_writes(
    now: Identity, same_boot: bool, reason: str | None
) -> None:
    found = device().changed(now, Path("/dev/sda1"), same_boot=same_boot)
    assert found is None if reason is None else reason in (found or "")


def test_the_kernels_count_of_writes_is_read_from_sysfs(tmp_path: Path) -> None:
    (tmp_path / "8:1").mkdir()
    number = os.makedev(8, 1)
    (tmp_path / "8:1" / "stat").write_text(" ".join(str(n) for n in range(100, 117)))
    assert sectors_changed(number, tmp_path) == 106 + 113
    (tmp_path / "8:1" / "stat").write_text("1 2 3")
    assert sectors_changed(number, tmp_path) == -1
    assert sectors_changed(os.makedev(8, 2), tmp_path) == -1


def test_an_identity_survives_being_stored_as_words_with_times_before_1970() -> None:
    identity = Identity(1, 2, 3, -5, (1 << 62) + 1)
    assert Identity.from_words(identity.words()) == identity
    assert all(0 <= word < 1 << 64 for word in identity.words())


def test_a_tracking_whose_start_fails_gives_its_record_back(
    reopen: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(store, "Heartbeat", refuse)
        with pytest.raises(RuntimeError):
            reopen()
    assert reopen().reason_new is None

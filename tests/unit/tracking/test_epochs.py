# SPDX-License-Identifier: Apache-2.0
import threading
from collections.abc import Callable
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleece.block.graph import Disk, drained
from fleece.block.node import Node
from fleece.errors import TrackingError
from fleece.tracking import epochs
from fleece.tracking.epochs import MAX_KEPT, SLOTS, STATE_WORDS, EpochMap, granules_of, start
from fleece.tracking.frozen import FrozenMap
from fleece.tracking.tracker import Tracker

GRANULE = 4096


def dirty_granules(frozen: FrozenMap, since: int | None) -> set[int]:
    view = frozen.changed(since)
    found: set[int] = set()
    position = 0
    while position < frozen.size:
        for extent in view(position, frozen.size - position):
            assert extent.offset == position
            position = extent.end
            if extent.is_dirty:
                first = extent.offset // frozen.granularity
                found.update(range(first, granules_of(extent.end, frozen.granularity)))
    assert position == frozen.size
    return found


class Model:
    """What a set of granules for each epoch says, beside an epoch map."""

    def __init__(self, granules: int) -> None:
        self.map = EpochMap.in_memory(granules * GRANULE, GRANULE)
        self.written: dict[int, set[int]] = {}

    def write(self, first: int, count: int) -> None:
        self.map.mark(first * GRANULE, count * GRANULE)
        self.written.setdefault(self.map.epoch, set()).update(range(first, first + count))

    def since(self, epoch: int) -> set[int]:
        return set().union(*(g for e, g in self.written.items() if e > epoch))


def test_a_new_map_is_in_epoch_one_and_nothing_changed_since_its_first_checkpoint() -> None:
    changes = EpochMap.in_memory(10 * GRANULE, GRANULE)
    assert changes.epoch == 1
    assert changes.advance() == 1
    assert changes.epoch == 2
    assert dirty_granules(changes.freeze(), 1) == set()
    assert dirty_granules(changes.freeze(), None) == set(range(10))


@pytest.mark.parametrize(
    ("offset", "length", "granules"),
    [
        (0, 1, {0}),
        (GRANULE - 1, 1, {0}),
        (GRANULE - 1, 2, {0, 1}),
        (GRANULE, GRANULE, {1}),
        (GRANULE, GRANULE + 1, {1, 2}),
        (5 * GRANULE, 100, {5}),
        (0, 5 * GRANULE + 100, {0, 1, 2, 3, 4, 5}),
    ],
)
def test_a_write_marks_every_granule_that_it_touches(
    offset: int, length: int, granules: set[int]
) -> None:
    changes = EpochMap.in_memory(5 * GRANULE + 100, GRANULE)
    changes.advance()
    changes.mark(offset, length)
    changes.advance()
    assert dirty_granules(changes.freeze(), 1) == granules


@pytest.mark.parametrize("granularity", [0, 1, 2048, 4097, 65537])
def test_a_granularity_that_is_no_power_of_two_from_4096_up_is_refused(granularity: int) -> None:
    with pytest.raises(TrackingError, match="granularity"):
        EpochMap.in_memory(1 << 20, granularity or 3)


def test_a_disk_of_no_size_has_no_granules() -> None:
    changes = EpochMap.in_memory(0, GRANULE)
    changes.advance()
    assert changes.granules == 0
    assert changes.freeze().dirty_bytes(None) == 0


operations = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, 39), st.integers(1, 8)),
        st.tuples(st.just("checkpoint"), st.just(0), st.just(0)),
    ),
    max_size=120,
)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(operations)
def test_without_a_collapse_the_answer_since_any_checkpoint_is_exact(
    steps: list[tuple[str, int, int]],
) -> None:
    model = Model(48)
    for kind, first, count in steps:
        if kind == "write":
            model.write(first, count)
        else:
            model.map.advance()
    last = model.map.advance()
    frozen = model.map.freeze()
    for since in range(last + 1):
        assert dirty_granules(frozen, since) == model.since(since)


@settings(derandomize=True, deadline=None, max_examples=10)
@given(st.integers(0, 1 << 32))
def test_over_hundreds_of_epochs_twenty_cursors_get_exactly_what_changed(
    seed: int,
) -> None:
    random = Random(seed)
    model = Model(300)
    cursors = {f"consumer{n}": 1 for n in range(20)}
    for _ in range(650):
        for _ in range(random.randrange(3)):
            model.write(random.randrange(290), random.randrange(1, 9))
        checkpoint = model.map.advance(cursors.values())
        if random.random() < 0.2:
            asking = random.choice(sorted(cursors))
            answer = dirty_granules(model.map.freeze(), cursors[asking])
            assert answer == model.since(cursors[asking])
            cursors[asking] = checkpoint
    frozen = model.map.freeze()
    for since in cursors.values():
        assert dirty_granules(frozen, since) == model.since(since)


@settings(derandomize=True, deadline=None, max_examples=6)
@given(st.integers(0, 1 << 32))
def test_a_checkpoint_that_nobody_kept_gets_more_than_what_changed_and_never_less(
    seed: int,
) -> None:
    random = Random(seed)
    model = Model(64)
    kept = {5, 400}
    for _ in range(620):
        model.write(random.randrange(60), random.randrange(1, 4))
        model.map.advance(kept)
    frozen = model.map.freeze()
    for since in range(1, 621, 7):
        assert dirty_granules(frozen, since) >= model.since(since)
    for since in kept:
        assert dirty_granules(frozen, since) == model.since(since)


def test_more_cursors_than_slots_lose_no_change_and_the_newest_stay_exact() -> None:
    model = Model(2000)
    for n in range(1000):
        model.write(n, 1)
        model.map.advance(range(1, n + 1))
    frozen = model.map.freeze()
    for since in range(1, 1001):
        assert dirty_granules(frozen, since) >= model.since(since)
    for since in range(1000 - MAX_KEPT // 2, 1001):
        assert dirty_granules(frozen, since) == model.since(since)


def test_keeping_epochs_that_are_yet_to_come_or_long_gone_does_no_harm() -> None:
    model = Model(8)
    for n in range(600):
        model.write(n % 8, 1)
        model.map.advance([0, -3, 3, 10**6])
    assert dirty_granules(model.map.freeze(), 599) == model.since(599)


def full_map(granules: int = 254) -> tuple[bytearray, bytearray]:
    """Cells and state of a map whose slots are all in use, granule n written in epoch n + 1."""
    cells, state = bytearray(granules), bytearray(8 * STATE_WORDS)
    start(memoryview(state).cast("Q"))
    changes = reopened(cells, state)
    for n in range(granules):
        changes.mark(n * GRANULE, 1)
        changes.advance()
    assert changes.epoch == SLOTS - 1
    return cells, state


def reopened(cells: bytearray, state: bytearray) -> EpochMap:
    return EpochMap(
        memoryview(cells),
        memoryview(state).cast("Q"),
        size=len(cells) * GRANULE,
        granularity=GRANULE,
        generation="g",
    )


class Killed(BaseException):
    pass


class TornState:
    """Words of which the store number ``at`` and all later ones never happen."""

    def __init__(self, words: memoryview, at: int) -> None:
        self.words, self.left = words, at

    def __getitem__(self, index: int | slice) -> object:
        return self.words[index]

    def __setitem__(self, index: int, value: int) -> None:
        if self.left == 0:
            raise Killed
        self.left -= 1
        self.words[index] = value

    def __len__(self) -> int:
        return len(self.words)


def advance_until(
    cells: bytearray, state: bytearray, at: int, rewrite: Callable[[memoryview, bytes], None]
) -> bool:
    """Advance, keeping checkpoints 50, 51 and 200, until killed; whether it was."""
    torn = TornState(memoryview(state).cast("Q"), at)
    changes = reopened(cells, state)
    changes._state = torn  # type: ignore[assignment]
    original, epochs.rewrite = epochs.rewrite, rewrite
    try:
        changes.advance([50, 51, 200])
    except Killed:
        return True
    finally:
        epochs.rewrite = original
    return False


def check_reopened(cells: bytearray, state: bytearray, kept: tuple[int, ...]) -> None:
    """After a kill: nothing is missed, now and after going on and collapsing again."""
    changes = reopened(cells, state)
    for _ in range(2):
        frozen = changes.freeze()
        for since in (0, 1, 49, 52, 100, 150, 199, 201, 253, 254):
            assert dirty_granules(frozen, since) >= set(range(since, len(cells)))
        for since in kept:
            assert dirty_granules(frozen, since) == set(range(since, len(cells)))
        for _ in range(256):
            changes.advance(kept)


def test_a_kill_between_any_two_stores_of_a_collapse_loses_nothing() -> None:
    cells, state = full_map()
    at = 0
    while True:
        torn_cells, torn_state = bytearray(cells), bytearray(state)
        killed = advance_until(torn_cells, torn_state, at, epochs.rewrite)
        check_reopened(torn_cells, torn_state, (50, 51, 200))
        if not killed:
            break
        at += 1
    assert at > 200


@pytest.mark.parametrize("reverse", [False, True])
def test_a_kill_in_the_middle_of_rewriting_the_cells_loses_nothing(reverse: bool) -> None:
    cells, state = full_map()
    for done in range(len(cells) + 1):
        torn_cells, torn_state = bytearray(cells), bytearray(state)

        def tear(view: memoryview, table: bytes, done: int = done) -> None:
            order = range(len(view) - 1, -1, -1) if reverse else range(len(view))
            for index in list(order)[:done]:
                view[index] = table[view[index]]
            raise Killed

        assert advance_until(torn_cells, torn_state, -1, tear)
        check_reopened(torn_cells, torn_state, (50, 51, 200))


def test_merging_epochs_into_an_earlier_one_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the two tests above."""
    genuine = EpochMap._heirs

    def backwards(changes: EpochMap, kept: list[int]) -> tuple[dict[int, int], int]:
        heirs, floor = genuine(changes, kept)
        return {slot: slot - 1 if heir else heir for slot, heir in heirs.items()}, floor

    monkeypatch.setattr(EpochMap, "_heirs", backwards)
    cells, state = full_map()
    assert not advance_until(cells, state, -1, epochs.rewrite)
    with pytest.raises(AssertionError):
        check_reopened(cells, state, (50, 51, 200))


def test_a_cell_with_a_slot_that_is_not_in_use_counts_as_changed() -> None:
    cells, state = bytearray(4), bytearray(8 * STATE_WORDS)
    start(memoryview(state).cast("Q"))
    changes = reopened(cells, state)
    changes.advance()
    cells[2] = 77
    assert dirty_granules(changes.freeze(), 1) == {2}


@pytest.mark.parametrize(
    "words",
    [
        {0: 0},
        {0: 256},
        {0: 1 << 63},
        {0: 2},
        {1: 7},
        {2: 0},
        {5: 1},
    ],
)
def test_a_table_that_contradicts_itself_is_refused(words: dict[int, int]) -> None:
    state = bytearray(8 * STATE_WORDS)
    view = memoryview(state).cast("Q")
    start(view)
    for index, value in words.items():
        view[index] = value
    with pytest.raises(TrackingError, match="contradicts itself"):
        reopened(bytearray(4), state)


def test_marks_of_many_threads_are_all_kept() -> None:
    changes = EpochMap.in_memory(4096 * GRANULE, GRANULE)
    changes.advance()

    def work(mine: int) -> None:
        for granule in range(mine, 4096, 8):
            changes.mark(granule * GRANULE, 1 if granule % 3 else 2)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    changes.advance()
    assert dirty_granules(changes.freeze(), 1) == set(range(4096))


class Sink(Node):
    """Takes every write and knows in which epoch it came."""

    def __init__(self, changes: EpochMap) -> None:
        super().__init__("sink", changes.size)
        self.changes = changes
        self.came: dict[int, set[int]] = {}

    def pwrite(self, buf: memoryview, offset: int, fua: bool = False) -> None:
        self.came.setdefault(self.changes.epoch, set()).add(offset // GRANULE)


def test_writers_on_a_disk_that_is_drained_for_each_checkpoint_lose_no_mark() -> None:
    changes = EpochMap.in_memory(512 * GRANULE, GRANULE)
    sink = Sink(changes)
    disk = Disk("d", Tracker("t", sink, changes))
    over = threading.Event()

    def work(seed: int) -> None:
        session, granule = disk.open_session(), seed
        while not over.is_set():
            granule = (granule * 69069 + 12345) % 512
            with session.gate:
                session.node.pwrite(memoryview(b"x"), granule * GRANULE)
        session.close()

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(700):
        with drained([disk]):
            changes.advance([300])
    over.set()
    for thread in threads:
        thread.join()
    last = changes.advance([300])
    frozen = changes.freeze()
    for since in (300, last - 2, last - 1):
        expected = set().union(*(g for e, g in sink.came.items() if e > since))
        assert dirty_granules(frozen, since) == expected


def test_a_mark_in_the_middle_of_a_collapse_would_be_lost_without_the_drain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The control of the test above: it is the drain that keeps the marks."""
    cells, state = full_map()
    changes = reopened(cells, state)
    genuine = epochs.translated

    def interrupted(old: bytes, table: bytes) -> bytes:
        new = genuine(old, table)
        changes.mark(7 * GRANULE, 1)
        return new

    monkeypatch.setattr(epochs, "translated", interrupted)
    last = changes.advance()
    assert 7 not in dirty_granules(changes.freeze(), last - 1)

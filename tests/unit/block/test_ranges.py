import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest

from fleece.block.ranges import RangeLock
from tests.support.threads import frequent_switches, in_thread, wait_for, wait_until


class NoLock:
    """The control: what the tests must not mistake for a lock."""

    def exclusive(self, start: int, stop: int) -> AbstractContextManager[None]:
        return nullcontext()

    shared = exclusive

    def __len__(self) -> int:
        return 0


Range = tuple[str, int, int]


def take(lock: Any, wanted: Range) -> AbstractContextManager[None]:
    kind, start, stop = wanted
    held: AbstractContextManager[None] = getattr(lock, kind)(start, stop)
    return held


def can_both_be_inside(lock: Any, first: Range, second: Range) -> bool:
    """Whether ``second`` gets in while ``first`` is in; it must in any case once that is out."""
    inside = threading.Event()

    def enter() -> None:
        with take(lock, second):
            inside.set()

    holder = take(lock, first)
    holder.__enter__()
    with in_thread(enter):
        wait_until(lambda: inside.is_set() or len(lock) == 2)
        both = inside.is_set()
        holder.__exit__(None, None, None)
        wait_for(inside)
    return both


CONFLICTS: list[tuple[Range, Range]] = [
    (("exclusive", 0, 10), ("exclusive", 9, 20)),
    (("exclusive", 5, 6), ("shared", 0, 10)),
    (("shared", 0, 10), ("exclusive", 3, 4)),
]


@pytest.mark.parametrize(("first", "second"), CONFLICTS)
def test_conflicting_ranges_exclude_each_other(first: Range, second: Range) -> None:
    lock = RangeLock()
    assert not can_both_be_inside(lock, first, second)
    assert len(lock) == 0


@pytest.mark.parametrize(("first", "second"), CONFLICTS)
def test_control_without_the_lock_both_are_inside(first: Range, second: Range) -> None:
    assert can_both_be_inside(NoLock(), first, second)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("exclusive", 0, 10), ("exclusive", 10, 20)),
        (("exclusive", 10, 20), ("shared", 0, 10)),
        (("shared", 0, 10), ("shared", 5, 15)),
    ],
)
def test_ranges_that_do_not_conflict_do_not_wait(first: Range, second: Range) -> None:
    lock = RangeLock()
    with take(lock, first), take(lock, second):
        assert len(lock) == 2
    assert len(lock) == 0


def test_readers_that_keep_coming_do_not_starve_a_writer() -> None:
    lock, order = RangeLock(), []

    def enter(kind: str, stop: int) -> None:
        with take(lock, (kind, 0, stop)):
            order.append(kind)

    with ThreadPoolExecutor(3) as pool:
        with lock.shared(0, 10):
            waiting = [pool.submit(enter, "exclusive", 10)]
            wait_until(lambda: len(lock) == 2)
            waiting.append(pool.submit(enter, "shared", 5))
            wait_until(lambda: len(lock) == 3)
            with lock.exclusive(10, 20):
                pass  # nothing to do with them
            assert order == [], "the later reader queues behind the writer"
        for future in waiting:
            future.result()
    assert order == ["exclusive", "shared"]


def violations(lock: Any) -> int:
    """Four threads read ranges of counters, wait, and write them back or look at them again.

    Gives how many increments vanished, plus how often a reader saw a counter change.
    """
    cells, threads, rounds = [0] * 32, 4, 250
    together = threading.Barrier(threads)

    def work(seed: int) -> tuple[int, int]:
        numbers, written, changed = random.Random(seed), 0, 0
        together.wait()
        for _ in range(rounds):
            start = numbers.randrange(31)
            stop = numbers.randrange(start + 1, 33)
            with lock.exclusive(start, stop):
                before = cells[start:stop]
                time.sleep(0)  # let another thread in, if it can
                cells[start:stop] = [value + 1 for value in before]
            written += stop - start
            with lock.shared(start, stop):
                before = cells[start:stop]
                time.sleep(0)
                changed += cells[start:stop] != before
        return written, changed

    with frequent_switches(), ThreadPoolExecutor(threads) as pool:
        results = list(pool.map(work, range(threads)))
    return sum(written + changed for written, changed in results) - sum(cells)


def test_no_update_is_lost_and_no_reader_sees_a_change_under_the_lock() -> None:
    assert violations(RangeLock()) == 0


def test_control_updates_are_lost_without_the_lock() -> None:
    assert violations(NoLock()) > 0


class Interrupted(Exception):
    pass


@contextmanager
def handler(function: Callable[..., None]) -> Iterator[None]:
    before = signal.signal(signal.SIGUSR1, function)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_who_gives_up_waiting_blocks_nobody() -> None:
    lock = RangeLock()
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with lock.exclusive(0, 10):
            entered.set()
            wait_for(leave)

    def interrupt() -> None:
        wait_until(lambda: len(lock) == 2)

        def again() -> bool:
            """One that arrives just before the wait begins does not end it."""
            if not raised:
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
            return bool(raised)

        wait_until(again)

    raised: list[bool] = []

    def on_signal(*_: object) -> None:
        if not raised:
            raised.append(True)
            raise Interrupted

    with handler(on_signal), in_thread(hold):
        wait_for(entered)
        with in_thread(interrupt), pytest.raises(Interrupted), lock.exclusive(5, 15):
            pytest.fail("the range is held")
        assert len(lock) == 1
        with lock.exclusive(10, 15):
            pass
        leave.set()
    with lock.exclusive(0, 20):
        assert len(lock) == 1


@pytest.mark.parametrize(("start", "stop"), [(3, 3), (4, 3)])
def test_an_empty_range_is_a_mistake_of_the_caller(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="not a range"):
        RangeLock().shared(start, stop)

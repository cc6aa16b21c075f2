# SPDX-License-Identifier: Apache-2.0
"""Threads that are used again."""

import threading
import time
from collections.abc import Iterator

import pytest

from nbdwire.crew import Crew, Task
from tests.support.threads import SECONDS, wait_until


@pytest.fixture
def crew() -> Iterator[Crew]:
    made = Crew(most_idle=1, idle_seconds=SECONDS)
    yield made
    made.stop()
    made.join(time.monotonic() + SECONDS)


def do(crew: Crew, work: object = None) -> tuple[Task, list[int]]:
    """Start something that tells its thread."""
    task, seen = Task(), list[int]()

    def body() -> None:
        seen.append(threading.get_ident())
        if isinstance(work, threading.Event):
            assert work.wait(SECONDS)

    crew.do(body, task, "some work")
    return task, seen


def test_a_thread_that_is_done_takes_the_next_work(crew: Crew) -> None:
    first, one = do(crew)
    assert first.wait(SECONDS)
    wait_until(lambda: len(crew._idle) == 1)
    second, other = do(crew)
    assert second.wait(SECONDS)
    assert one == other


def test_works_at_the_same_time_have_threads_of_their_own(crew: Crew) -> None:
    go = threading.Event()
    tasks = [do(crew, go) for _ in range(3)]
    wait_until(lambda: all(seen for _, seen in tasks))
    go.set()
    assert all(task.wait(SECONDS) for task, _ in tasks)
    assert len({seen[0] for _, seen in tasks}) == 3


def test_no_more_threads_wait_than_are_allowed(crew: Crew) -> None:
    before = threading.active_count()
    go = threading.Event()
    tasks = [do(crew, go) for _ in range(5)]
    go.set()
    assert all(task.wait(SECONDS) for task, _ in tasks)
    wait_until(lambda: threading.active_count() == before + 1)
    assert len(crew._idle) == 1


def test_a_thread_that_waited_in_vain_ends() -> None:
    before = threading.active_count()
    crew = Crew(idle_seconds=0.01)
    task, _ = do(crew)
    assert task.wait(SECONDS)
    wait_until(lambda: threading.active_count() == before)
    assert not crew._idle
    again, seen = do(crew)
    assert again.wait(SECONDS)
    assert seen


def test_work_that_comes_when_a_thread_gives_up_waiting_is_done() -> None:
    crew = Crew(idle_seconds=0.0001)
    for _ in range(500):
        task, seen = do(crew)
        assert task.wait(SECONDS)
        assert seen
    crew.stop()


def test_stop_ends_those_that_wait_and_join_those_that_work(crew: Crew) -> None:
    before = threading.active_count()
    go = threading.Event()
    working, _ = do(crew, go)
    idle, _ = do(crew)
    assert idle.wait(SECONDS)
    crew.stop()
    crew.join(time.monotonic())
    wait_until(lambda: threading.active_count() == before + 1)
    go.set()
    crew.join(time.monotonic() + SECONDS)
    assert threading.active_count() == before
    assert working.wait(0)


def test_a_thread_knows_its_own_work_and_only_while_it_lasts(crew: Crew) -> None:
    task, seen = Task(), list[bool]()
    crew.do(lambda: seen.append(task.is_mine()), task, "asks")
    assert task.wait(SECONDS)
    assert seen == [True]
    assert not task.is_mine()


def test_the_name_of_a_thread_is_that_of_its_work(crew: Crew) -> None:
    names: list[str] = []
    for name in ("one", "two"):
        task = Task()
        crew.do(lambda: names.append(threading.current_thread().name), task, name)
        assert task.wait(SECONDS)
    assert names == ["one", "two"]

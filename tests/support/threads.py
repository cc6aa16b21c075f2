"""Waiting for other threads without sleeping, and running them so that their errors are seen."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
SECONDS = 20.0


def wait_until(condition: Callable[[], object], seconds: float = SECONDS) -> None:
    """Give way to other threads until ``condition`` holds; AssertionError after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0)


def wait_for(event: threading.Event) -> None:
    assert event.wait(SECONDS), "waited in vain"


@contextmanager
def in_thread(function: Callable[[], T]) -> Iterator[Future[T]]:
    """Runs ``function`` beside the ``with`` block; its error is raised at the end of the block."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(function)
        yield future
        future.result(SECONDS)


@contextmanager
def frequent_switches() -> Iterator[None]:
    """Make threads change as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)

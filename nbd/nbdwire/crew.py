# SPDX-License-Identifier: Apache-2.0
"""Threads that have done their work wait a moment for more: to start one takes far longer.

A client that connects is served some 100 us earlier if a thread is there already.
"""

import threading
import time
from collections.abc import Callable
from typing import Final

MOST_IDLE: Final = 4
IDLE_SECONDS: Final = 1.0

Work = Callable[[], None]


class Task:
    """Work that a thread of a `Crew` does, as far as others need to know of it."""

    __slots__ = ("_over", "thread")

    def __init__(self) -> None:
        self.thread: int | None = None
        self._over = threading.Event()

    def is_mine(self) -> bool:
        """Whether the calling thread is the one that does it."""
        return self.thread == threading.get_ident() and not self._over.is_set()

    def wait(self, seconds: float) -> bool:
        """Until it is over, for so long at most; whether it is."""
        return self._over.wait(seconds)

    def end(self) -> None:
        """It is over, or never begins."""
        self._over.set()


class Crew:
    """Does each piece of work in a thread of its own, which another has used before perhaps.

    Up to ``most_idle`` threads wait for work, each for ``idle_seconds``; all others end.
    """

    def __init__(self, most_idle: int = MOST_IDLE, idle_seconds: float = IDLE_SECONDS) -> None:
        self._most_idle = most_idle
        self._idle_seconds = idle_seconds
        self._lock = threading.Lock()
        self._idle: list[_Hand] = []
        self._threads: set[threading.Thread] = set()
        self._over = False

    def do(self, work: Work, task: Task, name: str) -> None:
        """Begin ``work`` at once; RuntimeError if the system has no thread to spare.

        ``name`` is the thread's meanwhile. ``work`` must not raise.
        """
        with self._lock:
            hand = self._idle.pop() if self._idle else None
        if hand is None:
            hand = _Hand(self)
            hand.job = work, task, name
            threading.Thread(target=self._run, args=(hand,), name=name, daemon=True).start()
        else:
            hand.job = work, task, name
            hand.wake.release()

    def stop(self) -> None:
        """Idle threads end, and others when their work is done. Idempotent."""
        with self._lock:
            self._over = True
            idle, self._idle = self._idle, []
        for hand in idle:
            hand.wake.release()

    def join(self, until: float) -> None:
        """Wait until its threads have ended, or until then (`time.monotonic`)."""
        with self._lock:
            threads = self._threads - {threading.current_thread()}
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))

    # Called by the threads

    def _run(self, hand: "_Hand") -> None:
        thread = threading.current_thread()
        with self._lock:
            self._threads.add(thread)
        try:
            hand.run(thread)
        finally:
            with self._lock:
                self._threads.discard(thread)

    def _rest(self, hand: "_Hand") -> bool:
        """Whether there is more to do, after waiting for it."""
        with self._lock:
            if self._over or len(self._idle) >= self._most_idle:
                return False
            self._idle.append(hand)
        if not hand.wake.acquire(timeout=self._idle_seconds):
            with self._lock:
                if hand in self._idle:
                    self._idle.remove(hand)
                    return False
            hand.wake.acquire()  # it was chosen in this moment
        return hand.job is not None


class _Hand:
    """One thread."""

    __slots__ = ("_crew", "job", "wake")

    def __init__(self, crew: Crew) -> None:
        self._crew = crew
        self.job: tuple[Work, Task, str] | None = None
        self.wake = threading.Lock()
        self.wake.acquire()

    def run(self, thread: threading.Thread) -> None:
        """The body of the thread."""
        while self.job is not None:
            work, task, thread.name = self.job
            self.job = None
            task.thread = threading.get_ident()
            try:
                work()
            finally:
                task.end()
            del work, task  # nothing of a client is kept by a thread that waits
            if not self._crew._rest(self):
                return

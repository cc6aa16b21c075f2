# SPDX-License-Identifier: Apache-2.0
"""`RangeLock`: locks on ranges ``[start, stop)``, of bytes or of clusters, shared or exclusive.

First come, first served: a request waits for every earlier one that it conflicts with, held or
still waiting, and for no other. So nobody starves, and ranges that do not overlap never wait.
"""

import threading
from types import TracebackType


class RangeLock:
    """Not re-entrant: a thread that holds a range must not ask for one that overlaps it.

    Costs some 900 ns when nobody waits; with n ranges held, n comparisons more.
    """

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._entries: list[_Held] = []  # held and waiting, in the order of their arrival

    def exclusive(self, start: int, stop: int) -> "_Held":
        """``with lock.exclusive(a, b):`` nobody else is in a range that overlaps."""
        return _Held(self, start, stop, True)

    def shared(self, start: int, stop: int) -> "_Held":
        """``with lock.shared(a, b):`` nobody else holds an overlapping range exclusively."""
        return _Held(self, start, stop, False)

    def __len__(self) -> int:
        """How many ranges are held or waited for; for tests and metrics."""
        return len(self._entries)

    def _enter(self, entry: "_Held") -> None:
        try:
            wakeup = self._queue(entry)
            if wakeup is not None:
                wakeup.acquire()  # until the last blocker leaves
        except BaseException:  # a signal handler raised: nobody may wait for us for ever
            self._leave(entry)
            raise

    def _queue(self, entry: "_Held") -> "threading.Lock | None":
        """What to wait for, if anything."""
        with self._mutex:
            for earlier in self._entries:
                if entry.conflicts(earlier):
                    entry.blockers += 1
            self._entries.append(entry)
            if entry.blockers:
                entry.wakeup = threading.Lock()
                entry.wakeup.acquire()
            return entry.wakeup

    def _leave(self, entry: "_Held") -> None:
        with self._mutex:
            entries = self._entries
            if entry not in entries:
                return
            position = entries.index(entry)
            del entries[position]
            for later in entries[position:] if position < len(entries) else ():
                if later.conflicts(entry):
                    later.blockers -= 1
                    if not later.blockers and later.wakeup is not None:
                        later.wakeup.release()


class _Held:
    """One range of one user: a context manager, used once."""

    __slots__ = ("_owner", "blockers", "exclusive", "start", "stop", "wakeup")

    def __init__(self, owner: RangeLock, start: int, stop: int, exclusive: bool) -> None:
        if not start < stop:
            raise ValueError(f"[{start}, {stop}) is not a range")
        self._owner = owner
        self.start = start
        self.stop = stop
        self.exclusive = exclusive
        self.blockers = 0
        self.wakeup: threading.Lock | None = None

    def conflicts(self, other: "_Held") -> bool:
        """Whether the two may not be held at once."""
        return (
            self.start < other.stop
            and other.start < self.stop
            and (self.exclusive or other.exclusive)
        )

    def __enter__(self) -> None:
        self._owner._enter(self)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._owner._leave(self)

# SPDX-License-Identifier: Apache-2.0
"""Ends a connection whose server leaves a request without an answer for too long.

A time limit of the socket would not do: a server that dribbles bytes never reaches it. And a
look at the clock for each request would cost all of them. So a thread looks now and then how far
the cookies have come, which grow with every request: when the oldest request in flight is one that
was there a time limit ago, it is late.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final, Protocol

from nbdwire.errors import ConnectionClosed

_LOOKS: Final = 8  # in each time limit


class Watched(Protocol):
    """What `nbdwire.link.Link` shows of itself."""

    def in_flight(self) -> tuple[int, int | None]:
        """The newest cookie, and the oldest in flight."""
        ...

    def fail(self, error: BaseException) -> None:
        """The connection is over."""
        ...


class Watchdog:
    """Watches ``link`` until `stop`; a request may take ``seconds``, and an eighth more.

    ``clock`` is `time.monotonic`. ValueError: ``seconds`` is not above 0.
    """

    def __init__(
        self, link: Watched, seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if not seconds > 0:
            raise ValueError("a time limit must be above 0 seconds")
        self._link = link
        self._seconds = seconds
        self._clock = clock
        self._over = threading.Event()
        self._seen: deque[tuple[float, int]] = deque()  # when, and the newest cookie then

    def start(self) -> None:
        """In a thread of its own."""
        threading.Thread(target=self._watch, name="nbd-watchdog", daemon=True).start()

    def stop(self) -> None:
        """The connection is over. Any thread may call it, this one too."""
        self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(self._seconds / _LOOKS):
            if self.look():
                return

    def look(self) -> bool:
        """Whether a request was late; then the connection has been ended."""
        now = self._clock()
        newest, oldest = self._link.in_flight()
        late = 0
        while self._seen and self._seen[0][0] <= now - self._seconds:
            late = self._seen.popleft()[1]
        if oldest is not None and oldest <= late:
            limit = f"{self._seconds:g} seconds"
            self._link.fail(ConnectionClosed(f"the server has not answered within {limit}"))
            return True
        self._seen.append((now, newest))
        return False

# SPDX-License-Identifier: Apache-2.0
"""How a start after a kill knows whether the image was changed in between.

A daemon that is killed cannot note the image's times at its end. So it notes, each second, until
when it may at most have touched the image. An image with a later modification time was changed by
somebody else. The last few seconds before the kill cannot be told apart from those after it.
"""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

INTERVAL: Final = 1.0
SLACK_NS: Final = 5_000_000_000
"""A heartbeat may be this late: a busy host must not make anybody back up everything."""


def alive_until(image: Path) -> int:
    """Nanoseconds since 1970: a modification time after this, SLACK_NS from now, is not ours.

    The image's own time counts as well as our clock: a file server has a clock of its own, and ours
    can be set back.
    """
    try:
        return max(time.time_ns(), image.stat().st_mtime_ns) + SLACK_NS
    except OSError:
        return time.time_ns() + SLACK_NS


class Heartbeat:
    """Calls ``beat`` each ``interval`` seconds in a thread of its own, until `stop`."""

    def __init__(self, name: str, beat: Callable[[], None], interval: float = INTERVAL) -> None:
        self._beat = beat
        self._interval = interval
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"heartbeat {name}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopped.wait(self._interval):
            self._beat()

    def stop(self) -> None:
        """No beat happens after this. Idempotent."""
        self._stopped.set()
        self._thread.join()

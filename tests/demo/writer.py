# SPDX-License-Identifier: Apache-2.0
"""Writers that never stop: connections that update pages of the database file in place.

Each writer has one request in flight at a time and parts of the file that nobody else writes, so
what the disk holds of it at any instant is a prefix of its log. The parts of different writers
share clusters and granules, so the writers get in each other's way in the server.
"""

import random
import threading
import time
from collections.abc import Sequence

from nbdwire.client import Client, connect
from nbdwire.errors import NBDError, RequestError
from tests.demo.tools import DemoFailed, wait_until

SECTOR = 512
STRIPE = 300 << 10  # no multiple of any cluster size: neighbours share clusters
SIZES = (512, 4096, 4096, 8192, 8192, 16384, 65536, 200 << 10)
HOT_STRIPES = 4  # what a writer keeps busy at a time: databases have hot pages
MOVE_EVERY = 256  # writes, then other stripes are hot
PACE = 0.001  # seconds between two writes
RECONNECT_SECONDS = 20.0


class Write:
    """One entry of a log. ``seed`` is None for zeroes; times are `time.monotonic` seconds."""

    __slots__ = ("acknowledged", "issued", "length", "offset", "seed")

    def __init__(self, offset: int, length: int, seed: int | None) -> None:
        self.offset = offset
        self.length = length
        self.seed = seed
        self.issued = 0.0
        self.acknowledged = float("inf")

    def data(self) -> bytes:
        """The bytes that it leaves on the disk."""
        if self.seed is None:
            return bytes(self.length)
        return random.Random(self.seed).randbytes(self.length)


def stripes(extents: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Cut (offset, length) extents into pieces of at most STRIPE bytes."""
    pieces = []
    for offset, length in extents:
        for start in range(0, length, STRIPE):
            pieces.append((offset + start, min(STRIPE, length - start)))
    return pieces


class Writer(threading.Thread):
    """One connection to ``uri`` that writes into ``parts``. ``log`` only ever grows."""

    def __init__(self, number: int, uri: str, parts: Sequence[tuple[int, int]]) -> None:
        super().__init__(name=f"writer-{number}", daemon=True)
        self.log: list[Write] = []
        self.acknowledged = 0
        self.reconnects = 0
        self.failure: Exception | None = None
        self._uri = uri
        self._parts = list(parts)
        self._hot = self._parts[:HOT_STRIPES]
        self._dice = random.Random(number)
        self._client: Client | None = None
        self._halt = threading.Event()

    def run(self) -> None:
        """Write until `stop`; what goes wrong is kept in ``failure``."""
        try:
            while not self._halt.is_set():
                self._write(self._next())
                self._halt.wait(PACE)
            self._submit_flush()
        except Exception as problem:  # shown by Writers.check
            self.failure = problem
        finally:
            self._hang_up()

    def stop(self) -> None:
        """Let the write in flight end, then no more."""
        self._halt.set()

    def _next(self) -> Write:
        number = len(self.log)
        if number % MOVE_EVERY == 0:
            self._hot = self._dice.sample(self._parts, min(HOT_STRIPES, len(self._parts)))
        if number and self._dice.random() < 0.04 and self.log[-1].seed is not None:
            # A page is wiped: the last one written, so that no write leaves the disk as it was.
            return Write(self.log[-1].offset, self.log[-1].length, None)
        start, room = self._dice.choice(self._hot)
        length = min(self._dice.choice(SIZES), room)
        offset = start + self._dice.randrange(0, room - length + 1, SECTOR)
        return Write(offset, length, self._dice.getrandbits(64))

    def _write(self, write: Write) -> None:
        data = memoryview(write.data())
        write.issued = time.monotonic()
        self.log.append(write)
        self._submit(write, data)
        write.acknowledged = time.monotonic()
        self.acknowledged += 1

    def _submit(self, write: Write, data: memoryview) -> None:
        """Send the very same bytes until they are acknowledged, whatever becomes of the server."""
        deadline = time.monotonic() + RECONNECT_SECONDS
        while True:
            try:
                client = self._client or self._dial()
                if write.seed is None:
                    client.zero(write.offset, write.length)
                else:
                    client.pwrite(data, write.offset)
                if len(self.log) % 64 == 0:
                    client.flush()
                return
            except RequestError:
                raise
            except (NBDError, OSError):
                self._hang_up()
                if self._halt.is_set() or time.monotonic() > deadline:
                    raise
                self._halt.wait(0.01)

    def _submit_flush(self) -> None:
        if self._client is not None:
            self._client.flush()

    def _dial(self) -> Client:
        self._client = connect(self._uri)
        self.reconnects += 1
        return self._client

    def _hang_up(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None


class Writers:
    """All of them: ``logs`` in the order of their numbers."""

    def __init__(self, uri: str, extents: Sequence[tuple[int, int]], count: int) -> None:
        pieces = stripes(extents)
        self.writers = [Writer(i, uri, pieces[i::count]) for i in range(count)]

    @property
    def logs(self) -> list[list[Write]]:
        """One log per writer."""
        return [writer.log for writer in self.writers]

    @property
    def total(self) -> int:
        """How many writes are acknowledged."""
        return sum(self.acknowledged())

    def acknowledged(self) -> list[int]:
        """How many writes of each writer are acknowledged."""
        return [writer.acknowledged for writer in self.writers]

    def issued(self) -> list[int]:
        """How many writes of each writer were ever sent."""
        return [len(writer.log) for writer in self.writers]

    def start(self) -> None:
        """Begin."""
        for writer in self.writers:
            writer.start()

    def check(self) -> None:
        """`DemoFailed` if a writer had an error."""
        for writer in self.writers:
            if writer.failure is not None:
                raise DemoFailed(f"{writer.name} got an error: {writer.failure}")

    def wait_for(self, more: int) -> None:
        """Return when every writer has ``more`` more writes acknowledged than now."""
        goals = [done + more for done in self.acknowledged()]

        def reached() -> bool:
            self.check()
            return all(done >= goal for done, goal in zip(self.acknowledged(), goals, strict=True))

        wait_until(reached, f"{more} more writes of every writer", RECONNECT_SECONDS + 10)

    def stop(self) -> None:
        """End them after the write that each has in flight."""
        for writer in self.writers:
            writer.stop()
        for writer in self.writers:
            if writer.ident is not None:
                writer.join(RECONNECT_SECONDS + 10)

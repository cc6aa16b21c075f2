# SPDX-License-Identifier: Apache-2.0
"""Random requests, hundreds of them in flight, against a model that knows each byte."""

import errno
import random
import threading
from collections import deque
from collections.abc import Callable
from typing import Final

from nbdwire import constants as c
from nbdwire.client import Client
from nbdwire.pipeline import Pipeline, Ticket
from nbdwire.pool import Pool

GRAIN: Final = 512  # what is in flight is known in units of this
_WRITING: Final = 255

Check = Callable[[Ticket], None]


class Storm:
    """``model`` is what the disk must contain. Requests in flight at the same time do not overlap,
    unless both only look; so every one of them has exactly one right outcome.

    Completions come in other threads; they are checked in this one, in `_reap`. ``most`` is how
    many requests were in flight at once.
    """

    def __init__(
        self, disk: Client | Pool, model: bytearray, rng: random.Random, depth: int = 400
    ) -> None:
        assert len(model) == disk.size
        self.model = model
        self._disk = disk
        self._rng = rng
        self._depth = depth
        self._busy = bytearray(-(-len(model) // GRAIN))
        self._finished: deque[tuple[Ticket, int, int, bool, Check]] = deque()
        self._some = threading.Semaphore(0)
        self._flying = 0
        self.most = 0

    def run(self, requests: int) -> None:
        """So many requests, and all that they lead to."""
        with self._disk.pipeline(self._depth + 50) as pipeline:
            for _ in range(requests):
                while self._flying >= self._depth:
                    self._reap(wait=True)
                self._one(pipeline)
                if self._flying > self._depth // 2:
                    self._reap()
            while self._flying:
                self._reap(wait=True)
            pipeline.flush()

    def _place(self, look: bool) -> tuple[int, int] | None:
        """A range that nothing in flight is in the way of."""
        rng, size = self._rng, len(self.model)
        for _ in range(30):
            most = rng.choice([600, 600, 4096, 4096, 65_536, 200_000])
            length = rng.choice([most, rng.randint(1, most)])
            offset = rng.randrange(size - length + 1)
            if rng.random() < 0.5:
                offset = offset // 4096 * 4096
            start, stop = offset // GRAIN, -(-(offset + length) // GRAIN)
            part = self._busy[start:stop]
            if (_WRITING not in part and max(part) < _WRITING - 1) if look else not any(part):
                return offset, length
        return None

    def _one(self, pipeline: Pipeline) -> None:
        kind = self._rng.choices(
            ["read", "write", "zero", "trim", "status", "cache"], [40, 30, 12, 5, 10, 3]
        )[0]
        look = kind in ("read", "status", "cache")
        place = self._place(look)
        if place is None:
            self._reap(wait=True)
            return
        getattr(self, f"_{kind}")(pipeline, *place)

    def _read(self, pipeline: Pipeline, offset: int, length: int) -> None:
        view, expected = memoryview(bytearray(length)), bytes(self.model[offset : offset + length])

        def check(ticket: Ticket) -> None:
            assert ticket.error is None, ticket.error
            assert view == expected, f"read {length} at {offset}: not what was written"

        pipeline.pread_into(view, offset, self._then(offset, length, False, check))

    def _write(self, pipeline: Pipeline, offset: int, length: int) -> None:
        data = self._rng.randbytes(length)
        self.model[offset : offset + length] = data
        fua = self._rng.random() < 0.02
        pipeline.pwrite(data, offset, fua, self._then(offset, length, True, _succeeded))

    def _zero(self, pipeline: Pipeline, offset: int, length: int) -> None:
        flags = self._rng.choice([0, 0, c.CMD_FLAG_NO_HOLE, c.CMD_FLAG_FAST_ZERO])

        def check(ticket: Ticket) -> None:
            if flags & c.CMD_FLAG_FAST_ZERO and ticket.error is not None:
                assert getattr(ticket.error, "errno", 0) == errno.EOPNOTSUPP, ticket.error
                return  # then nothing has changed, as later reads will tell
            _succeeded(ticket)
            self.model[offset : offset + length] = bytes(length)

        pipeline.zero(offset, length, flags, self._then(offset, length, True, check))

    def _trim(self, pipeline: Pipeline, offset: int, length: int) -> None:
        """What it leaves is unspecified: the range stays taken until it has been written again."""

        def check(ticket: Ticket) -> None:
            _succeeded(ticket)
            self._write(pipeline, offset, length)

        pipeline.trim(offset, length, 0, self._then(offset, length, True, check))

    def _status(self, pipeline: Pipeline, offset: int, length: int) -> None:
        expected = bytes(self.model[offset : offset + length])

        def check(ticket: Ticket) -> None:
            _succeeded(ticket)
            for extent in ticket.statuses.get(c.CONTEXT_BASE_ALLOCATION, []):
                if extent.status & c.STATE_ZERO:
                    start = extent.offset - offset
                    assert not any(expected[start : start + extent.length]), f"no zeroes: {extent}"

        pipeline.status(offset, length, None, self._then(offset, length, False, check))

    def _cache(self, pipeline: Pipeline, offset: int, length: int) -> None:
        pipeline.cache(offset, length, self._then(offset, length, False, _succeeded))

    def _then(self, offset: int, length: int, change: bool, check: Check) -> Check:
        """Take the range; what the completion does, in its own thread."""
        self._take(offset, length, change, +1)
        self._flying += 1
        self.most = max(self.most, self._flying - len(self._finished))

        def done(ticket: Ticket) -> None:
            self._finished.append((ticket, offset, length, change, check))
            self._some.release()

        return done

    def _take(self, offset: int, length: int, change: bool, by: int) -> None:
        start, stop = offset // GRAIN, -(-(offset + length) // GRAIN)
        if change:
            self._busy[start:stop] = bytes([_WRITING if by > 0 else 0]) * (stop - start)
        else:
            self._busy[start:stop] = bytes(value + by for value in self._busy[start:stop])

    def _reap(self, wait: bool = False) -> None:
        """Check what is done and give its range back."""
        while self._flying and self._some.acquire(timeout=20 if wait else 0):
            ticket, offset, length, change, check = self._finished.popleft()
            self._flying -= 1
            self._take(offset, length, change, -1)
            check(ticket)
            wait = False
        assert not wait or not self._flying, "20 seconds without a reply"


def _succeeded(ticket: Ticket) -> None:
    assert ticket.error is None, ticket.error


def overlapping(disk: Client | Pool, rng: random.Random, blocks: int, requests: int) -> None:
    """Writes and zeroes in flight that do overlap: each block of 4 KiB ends as one of them."""
    block = 4096
    written: list[set[bytes]] = [{bytes(8)} for _ in range(blocks)]
    disk.zero(0, blocks * block)
    with disk.pipeline(400) as pipeline:
        for number in range(1, requests + 1):
            count = rng.choice([1, 1, 2, 5])
            first = rng.randrange(blocks - count + 1)
            tag = number.to_bytes(8, "big") if rng.random() < 0.9 else bytes(8)
            for index in range(first, first + count):
                written[index].add(tag)
            if any(tag):
                pipeline.pwrite(tag * (count * block // 8), first * block)
            else:
                pipeline.zero(first * block, count * block)
        pipeline.flush()
    content = disk.pread(blocks * block, 0)
    for index, tags in enumerate(written):
        found = content[index * block : (index + 1) * block]
        assert found == found[:8] * (block // 8), f"block {index} is torn"
        assert found[:8] in tags, f"block {index} has what nobody wrote there"

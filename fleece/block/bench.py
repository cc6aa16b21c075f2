# SPDX-License-Identifier: Apache-2.0
"""`Run`: so many requests to a node, so many of them at once; how long they take."""

import errno
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

from fleece.block.node import Node


@dataclass(frozen=True)
class Load:
    """``count`` requests of ``size`` bytes, ``depth`` at once, from ``offset`` in ``step`` bytes.

    ``write``: bytes of ``pattern``. ``flush_every``: a flush after so many, 0 for none, which waits
    for those in flight if ``drain``.
    """

    count: int = 75000
    depth: int = 64
    size: int = 4096
    step: int = 4096
    offset: int = 0
    write: bool = False
    pattern: int = 0
    flush_every: int = 0
    drain: bool = True


class Run:
    """One run of ``load`` on ``node``."""

    def __init__(self, node: Node, load: Load) -> None:
        self._node = node
        self._load = load
        self._lock = threading.Lock()
        self._error: OSError | None = None
        self._done = 0

    def seconds(self) -> float:
        """Do it; how long it took. OSError: the first one of a request."""
        offsets = list(self._offsets())
        start = time.perf_counter()
        every = self._load.flush_every if self._load.drain else 0
        for at in range(0, len(offsets), every or len(offsets) or 1):
            part = offsets[at : at + every] if every else offsets
            self._together(part)
            if every and len(part) == every:
                self._node.flush()
        return time.perf_counter() - start

    def _offsets(self) -> Iterator[int]:
        offset, size = self._load.offset, self._node.size
        for _ in range(self._load.count):
            yield offset
            offset = 0 if size <= self._load.step else (offset + self._load.step) % size

    def _together(self, offsets: list[int]) -> None:
        work = iter(offsets)
        threads = [
            threading.Thread(target=self._requests, args=(work,), name="bench", daemon=True)
            for _ in range(min(self._load.depth, len(offsets)) - 1)
        ]
        for thread in threads:
            thread.start()
        self._requests(work)
        for thread in threads:
            thread.join()
        if self._error is not None:
            raise self._error

    def _requests(self, work: Iterator[int]) -> None:
        data = bytearray([self._load.pattern]) * self._load.size
        buffer = memoryview(data)
        while self._error is None:
            with self._lock:
                offset = next(work, None)
            if offset is None:
                return
            try:
                self._request(buffer, offset)
            except OSError as error:
                self._error = self._error or error

    def _request(self, buffer: memoryview, offset: int) -> None:
        if offset + len(buffer) > self._node.size:
            raise OSError(errno.EIO, "the request goes beyond the end of the disk", self._node.name)
        if not self._load.write:
            self._node.pread_into(buffer, offset)
            return
        self._node.pwrite(buffer, offset)
        if self._load.flush_every and not self._load.drain:
            with self._lock:
                self._done += 1
                due = self._done % self._load.flush_every == 0
            if due:
                self._node.flush()

"""Exports that fail, wait and lie about where their bytes are, as a test wants them to."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fleece.block.file import FileNode
from fleece.block.memory import MemoryNode
from nbdwire.export import Run
from nbdwire.extents import Extent
from tests.support.threads import wait_for

VERBS = ("pread_into", "pread_cached", "pwrite", "zero", "trim", "flush", "extents", "map")


class Hooked(MemoryNode):
    """A memory node; ``before[verb]`` is called with the verb's arguments, and may raise."""

    def __init__(self, size: int, *, blocking: bool = False) -> None:
        super().__init__(size, "hooked")
        self.blocking = blocking
        self.before: dict[str, Callable[..., object]] = {}

    def fail(self, verb: str, problem: Exception) -> None:
        def hook(*_: object) -> None:
            raise problem

        self.before[verb] = hook

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name not in VERBS and name != "prefetch":
            return value
        hook = super().__getattribute__("before").get(name)
        if hook is None:
            return value

        def call(*args: Any) -> Any:
            hook(*args)
            return value(*args)

        return call


class Stuck:
    """A hook that tells when a verb is in, and keeps it there until it is let go."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.go_on = threading.Event()

    def __call__(self, *_: object) -> None:
        self.entered.set()
        wait_for(self.go_on)


@contextmanager
def hanging(node: Hooked, verb: str) -> Iterator[Stuck]:
    """The verb does not end within the block."""
    stuck = Stuck()
    node.before[verb] = stuck
    try:
        yield stuck
    finally:
        stuck.go_on.set()


class Mapped(FileNode):
    """A file whose `map` can be replaced, and of which some reads claim not to be cached."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, locking=False)
        self.answer: Callable[[int, int], list[Run]] | None = None
        self.cold = False
        self.prefetched: list[tuple[int, int]] = []
        self.opaque_reads = 0

    def map(self, offset: int, length: int) -> list[Run]:
        return super().map(offset, length) if self.answer is None else self.answer(offset, length)

    def pread_cached(self, buf: memoryview, offset: int) -> bool:
        return not self.cold and super().pread_cached(buf, offset)

    def pread_into(self, buf: memoryview, offset: int) -> None:
        self.opaque_reads += 1
        super().pread_into(buf, offset)

    def prefetch(self, offset: int, length: int) -> None:
        self.prefetched.append((offset, length))
        super().prefetch(offset, length)


def striped(count: int, length: int) -> Callable[[int, int], list[Extent]]:
    """Extents of ``length`` bytes with the status 0, 1, 0, 1 ...; ``count`` at a time."""

    def extents(offset: int, asked: int) -> list[Extent]:
        found, position, end = [], offset, offset + asked
        while position < end and len(found) < count:
            stop = min(end, (position // length + 1) * length)
            found.append(Extent(position, stop - position, position // length % 2))
            position = stop
        return found

    return extents

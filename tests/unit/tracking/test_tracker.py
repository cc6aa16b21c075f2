# SPDX-License-Identifier: Apache-2.0
import errno

import pytest

from fleece.block.node import Node
from fleece.tracking.epochs import EpochMap
from fleece.tracking.tracker import Tracker

GRANULE = 4096


class Recorder(Node):
    """Notes each verb with what was dirty when it came; fails writes with ``error`` if set."""

    def __init__(self, changes: EpochMap, error: int = 0) -> None:
        super().__init__("recorder", changes.size)
        self.changes, self.error = changes, error
        self.seen: list[tuple[str, int, int]] = []

    def note(self, verb: str, offset: int) -> None:
        self.seen.append((verb, offset, self.changes.freeze().dirty_bytes(1)))
        if self.error:
            raise OSError(self.error, "refused")

    def pwrite(self, buf: memoryview, offset: int, fua: bool = False) -> None:
        self.note(f"pwrite {bytes(buf)!r} {fua}", offset)

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        self.note(f"zero {length} {flags}", offset)

    def trim(self, offset: int, length: int, flags: int = 0) -> None:
        self.note(f"trim {length} {flags}", offset)

    def flush(self) -> None:
        self.note("flush", 0)

    def pread_into(self, buf: memoryview, offset: int) -> None:
        self.note("pread", offset)


def tracked(error: int = 0) -> tuple[Tracker, Recorder, EpochMap]:
    changes = EpochMap.in_memory(8 * GRANULE, GRANULE)
    changes.advance()
    recorder = Recorder(changes, error)
    return Tracker("t", recorder, changes), recorder, changes


def test_a_write_a_zero_and_a_trim_are_marked_before_they_are_passed_on_unchanged() -> None:
    tracker, recorder, _ = tracked()
    tracker.pwrite(memoryview(b"ab"), GRANULE - 1, True)
    tracker.zero(3 * GRANULE, 5, 2)
    tracker.trim(7 * GRANULE, GRANULE, 1)
    assert recorder.seen == [
        ("pwrite b'ab' True", GRANULE - 1, 2 * GRANULE),
        ("zero 5 2", 3 * GRANULE, 3 * GRANULE),
        ("trim 4096 1", 7 * GRANULE, 4 * GRANULE),
    ]


def test_reads_and_flushes_mark_nothing() -> None:
    tracker, recorder, changes = tracked()
    tracker.pread_into(memoryview(bytearray(9)), 0)
    tracker.flush()
    assert [verb for verb, _, _ in recorder.seen] == ["pread", "flush"]
    assert changes.freeze().dirty_bytes(1) == 0


def test_a_write_that_fails_stays_marked() -> None:
    tracker, _, changes = tracked(errno.EIO)
    with pytest.raises(OSError, match="refused"):
        tracker.pwrite(memoryview(b"a"), 0)
    assert changes.freeze().dirty_bytes(1) == GRANULE

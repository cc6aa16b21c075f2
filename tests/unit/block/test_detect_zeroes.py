"""The filters ``detect-zeroes``, ``discard=ignore`` and the window of raw."""

import errno
from contextlib import closing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleece.block.detect_zeroes import DetectZeroes, all_zero
from fleece.block.discard import IgnoreDiscard
from fleece.block.memory import MemoryNode
from fleece.block.node import Filter
from fleece.block.window import Window
from fleece.errors import UsageError
from nbdwire.constants import CMD_FLAG_FUA, CMD_FLAG_NO_HOLE, STATE_HOLE, STATE_ZERO
from tests.support.qcow2 import pread

SIZE = 1 << 20


class Noted(Filter):
    def __init__(self, size: int = SIZE) -> None:
        super().__init__("noted", MemoryNode(size))
        self.calls: list[tuple[str, int, int, int]] = []
        self.closed = 0

    def pwrite(self, buf: memoryview, offset: int, fua: bool = False) -> None:
        self.calls.append(("write", offset, len(buf), int(fua)))
        self.next.pwrite(buf, offset, fua)

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        self.calls.append(("zero", offset, length, flags))
        self.next.zero(offset, length, flags)

    def trim(self, offset: int, length: int, flags: int = 0) -> None:
        self.calls.append(("trim", offset, length, flags))
        self.next.trim(offset, length, flags)

    def flush(self) -> None:
        self.calls.append(("flush", 0, 0, 0))

    def close(self) -> None:
        self.closed += 1
        self.next.close()


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.integers(1, 200_000), st.integers(0, 200_000), st.booleans())
def test_all_zero_sees_every_byte(length: int, at: int, zero: bool) -> None:
    data = bytearray(length)
    data[at % length] = 0 if zero else 1
    assert all_zero(memoryview(data)) is zero


def test_zeroes_are_zeroed_and_data_is_written() -> None:
    for mode, flags in (("on", CMD_FLAG_NO_HOLE), ("unmap", 0)):
        below = Noted()
        node = DetectZeroes(below, mode)
        node.pwrite(memoryview(bytes(70_000)), 512)
        node.pwrite(memoryview(b"\0" * 69_999 + b"\1"), 512, fua=True)
        node.pwrite(memoryview(bytes(10)), 0, fua=True)
        assert below.calls == [
            ("zero", 512, 70_000, flags),
            ("write", 512, 70_000, 1),
            ("zero", 0, 10, flags | CMD_FLAG_FUA),
        ]
        assert pread(node, 70_001, 511) == b"\0" * 70_000 + b"\1"
        node.close()
        assert below.closed == 0
        DetectZeroes(below, mode, owns=True).close()
        assert below.closed == 1


def test_a_mode_that_detects_nothing_is_no_filter() -> None:
    with closing(MemoryNode(SIZE)) as node, pytest.raises(ValueError, match="on, unmap"):
        DetectZeroes(node, "off")


def test_ignored_discards_end_at_the_filter() -> None:
    below = Noted()
    node = IgnoreDiscard(below, owns=True)
    node.trim(0, 4096)
    assert below.calls == []
    node.trim(0, 4096, CMD_FLAG_FUA)
    node.zero(0, 4096)
    assert [call[0] for call in below.calls] == ["flush", "zero"]
    node.close()
    assert below.closed == 1


def test_a_window_shows_its_part_and_nothing_else() -> None:
    below = Noted()
    below.next.pwrite(memoryview(b"a" * SIZE), 0)
    below.next.zero(0x20000, 0x10000)
    window = Window(below, 0x10000, 0x30000)
    assert window.size == 0x30000
    window.pwrite(memoryview(b"bb"), 5)
    assert pread(below, 4, 0x10004) == b"abba"
    assert pread(window, 4, 4) == b"abba"
    assert [tuple(e) for e in window.extents(0, window.size)] == [
        (0, 0x10000, 0),
        (0x10000, 0x10000, STATE_HOLE | STATE_ZERO),
        (0x20000, 0x10000, 0),
    ]
    assert sum(run[2] for run in window.map(0, window.size)) == window.size
    window.trim(0, 10)
    window.zero(1, 2)
    window.flush()
    window.prefetch(0, 10)
    assert window.pread_cached(memoryview(bytearray(3)), 0)
    assert below.calls[-3:] == [
        ("trim", 0x10000, 10, 0),
        ("zero", 0x10001, 2, 0),
        ("flush", 0, 0, 0),
    ]
    window.close()
    assert below.closed == 1


def test_a_window_must_lie_inside() -> None:
    with closing(MemoryNode(SIZE)) as node:
        assert Window(node, SIZE - 512).size == 512
        for offset, size in ((0, SIZE + 1), (512, SIZE), (SIZE + 1, None), (SIZE + 1, 0)):
            with pytest.raises(UsageError, match="change offset"):
                Window(node, offset, size)


def test_errors_pass_through() -> None:
    class Failing(Noted):
        def pread_into(self, buf: memoryview, offset: int) -> None:
            raise OSError(errno.EIO, "no")

    window = Window(Failing(), 512)
    with pytest.raises(OSError, match="no"):
        window.pread_into(memoryview(bytearray(4)), 0)
    window.close()

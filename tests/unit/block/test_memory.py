import errno
from contextlib import closing

import pytest

from fleece.block import memory as memory_module
from fleece.block.memory import PAGE, MemoryNode
from fleece.block.null import NullNode
from nbdwire.constants import CMD_FLAG_NO_HOLE, STATE_HOLE, STATE_ZERO
from nbdwire.export import OPAQUE_RUN, ZERO_RUN
from nbdwire.extents import Extent

HOLE = STATE_HOLE | STATE_ZERO
TiB = 1 << 40


def pread(node: MemoryNode | NullNode, length: int, offset: int) -> bytes:
    buf = bytearray(b"\xee" * length)
    node.pread_into(memoryview(buf), offset)
    return bytes(buf)


def test_a_page_takes_memory_from_its_first_write_on() -> None:
    with closing(MemoryNode(TiB)) as node:
        node.pwrite(memoryview(b"x"), TiB - 1)
        assert len(node._pages) == 1
        assert pread(node, 2, TiB - 2) == b"\0x"
        node.zero(0, TiB)
        assert not node._pages


def test_zero_gives_whole_pages_back_and_clears_the_edges() -> None:
    with closing(MemoryNode(4 * PAGE)) as node:
        node.pwrite(memoryview(b"x" * 4 * PAGE), 0)
        node.zero(PAGE - 10, 2 * PAGE)
        assert sorted(node._pages) == [0, 2, 3]
        expected = b"x" * (PAGE - 10) + bytes(2 * PAGE) + b"x" * (PAGE + 10)
        assert pread(node, 4 * PAGE, 0) == expected


def test_no_hole_allocates() -> None:
    with closing(MemoryNode(4 * PAGE)) as node:
        node.zero(PAGE, PAGE, CMD_FLAG_NO_HOLE)
        assert node.extents(0, 4 * PAGE) == [
            Extent(0, PAGE, HOLE),
            Extent(PAGE, PAGE, 0),
            Extent(2 * PAGE, 2 * PAGE, HOLE),
        ]
        assert node.map(PAGE - 1, 2) == [(ZERO_RUN, 0, 1), (OPAQUE_RUN, 0, 1)]


def test_extents_of_a_huge_disk_end_early() -> None:
    with closing(MemoryNode(TiB)) as node:
        assert node.extents(1, TiB - 1) == [Extent(1, (256 << 20) - 1, HOLE)]


def test_no_memory_is_an_oserror(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(size: int) -> bytearray:
        raise MemoryError

    monkeypatch.setattr(memory_module, "bytearray", none_left, raising=False)
    with closing(MemoryNode(PAGE)) as node:
        with pytest.raises(OSError, match="memory") as caught:
            node.pwrite(memoryview(b"x"), 0)
        assert caught.value.errno == errno.ENOMEM


def test_the_null_node_forgets() -> None:
    with closing(NullNode(3 << 20)) as node:
        node.pwrite(memoryview(b"x" * 100), 0)
        assert pread(node, 3 << 20, 0) == bytes(3 << 20)
        assert node.map(5, 7) == [(ZERO_RUN, 0, 7)]
        assert node.extents(5, 7) == [Extent(5, 7, HOLE)]

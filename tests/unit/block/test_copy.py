import random
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from fleece.block.concat import Concat
from fleece.block.copy import DATA, SKIP, ZERO, Copy, Plan, Region, Regions, Writer, regions_of
from fleece.block.memory import MemoryNode
from fleece.block.node import Filter, Node
from fleece.errors import ImageError

KiB = 1024


def memory(data: bytes) -> MemoryNode:
    node = MemoryNode(len(data))
    node.pwrite(memoryview(data), 0)
    return node


def contents(node: Node) -> bytes:
    data = bytearray(node.size)
    node.pread_into(memoryview(data), 0)
    return bytes(data)


def sparse(size: int, seed: int) -> bytes:
    rng, data = random.Random(seed), bytearray(size)
    for _ in range(10):
        at, length = rng.randrange(size), rng.randrange(1, size // 8)
        data[at : at + length] = rng.randbytes(len(data[at : at + length]))
    return bytes(data)


def in_pieces(length: int, kinds: list[int]) -> Regions:
    """Regions of ``length`` bytes, of these kinds in turn."""

    def regions(offset: int, left: int) -> Iterator[Region]:
        index = offset // length
        stop = min(offset + left, (index + 1) * length)
        yield Region(offset, stop - offset, kinds[index % len(kinds)])

    return regions


class Broken(Filter):
    """Raises EIO for what touches one of ``bad`` bytes."""

    def __init__(self, child: Node, *bad: int) -> None:
        super().__init__("broken", child)
        self.bad = bad

    def _check(self, offset: int, length: int) -> None:
        if any(offset <= at < offset + length for at in self.bad):
            raise OSError(5, "Input/output error")

    def pread_into(self, buf: memoryview, offset: int) -> None:
        self._check(offset, len(buf))
        self.next.pread_into(buf, offset)

    def pwrite(self, buf: memoryview, offset: int, fua: bool = False) -> None:
        self._check(offset, len(buf))
        self.next.pwrite(buf, offset)


class Recorder:
    """A sink that keeps what it gets; a piece of ``block`` bytes."""

    def __init__(self, block: int = 512) -> None:
        self.block = block
        self.log: list[tuple[str, int, int]] = []

    def prepare(self, view: memoryview, offset: int) -> Any:
        return bytes(view)

    def store(self, prepared: Any, view: memoryview, offset: int) -> None:
        assert prepared == bytes(view)
        self.log.append(("data", offset, len(view)))

    def zero(self, offset: int, length: int) -> None:
        self.log.append(("zero", offset, length))


@pytest.mark.parametrize("workers", [1, 2, 8])
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("size", [1, 511, 4096, 1_000_001])
def test_the_target_is_the_source(workers: int, ordered: bool, size: int) -> None:
    data = sparse(max(size, 64), size)[:size]
    source, target = memory(data), memory(b"\xee" * size)
    plan = Plan(workers=workers, ordered=ordered, piece=16 * KiB)
    Copy(source, Writer(target), regions_of(source), size, plan).run()
    assert contents(target) == data


def test_zeroes_are_not_written_where_the_target_is_zero() -> None:
    data = sparse(512 * KiB, 5)
    target = MemoryNode(len(data))
    written = Broken(target, *[i for i in range(0, len(data), 4096) if not any(data[i : i + 4096])])
    source = memory(data)
    Copy(source, Writer(written, is_zero=True), regions_of(source), source.size).run()
    assert contents(target) == data


def test_everything_is_written_as_data_if_the_plan_says_so() -> None:
    sink = Recorder()
    plan = Plan(whole=True, piece=4096)
    Copy(MemoryNode(9000), sink, in_pieces(9000, [ZERO]), 9000, plan).run()
    assert sink.log == [("data", 0, 4096), ("data", 4096, 4096), ("data", 8192, 808)]


@pytest.mark.parametrize("workers", [1, 3, 16])
def test_in_order_means_in_order(workers: int) -> None:
    sink = Recorder()
    plan = Plan(workers=workers, piece=512)
    size = 512 * 300 + 7
    Copy(MemoryNode(size), sink, in_pieces(1536, [DATA, ZERO, SKIP]), size, plan).run()
    offsets = [offset for _, offset, _ in sink.log]
    assert offsets == sorted(offsets)
    total = sum(length for _, _, length in sink.log)
    kept = [i for i in range(0, size, 1536) if i // 1536 % 3 < 2]
    assert total == sum(min(1536, size - i) for i in kept)


@pytest.mark.parametrize("block", [512, 4096, 65536])
@pytest.mark.parametrize("length", [512, 1000, 5000, 70_000])
def test_data_is_rounded_outwards_to_blocks_and_the_rest_inwards(block: int, length: int) -> None:
    sink, size = Recorder(block), 500_000
    copy = Copy(
        MemoryNode(size), sink, in_pieces(length, [DATA, ZERO, DATA, SKIP]), size, Plan(piece=65536)
    )
    copy.run()
    covered = bytearray(size)
    for kind, offset, count in sink.log:
        assert offset % block == 0
        assert (offset + count) % block == 0 or offset + count == size
        assert not any(covered[offset : offset + count])
        covered[offset : offset + count] = (b"d" if kind == "data" else b"z") * count
    for index in range(0, -(-size // length), 2):
        assert set(covered[index * length : (index + 1) * length]) == {ord("d")}


@pytest.mark.parametrize("workers", [1, 5])
@pytest.mark.parametrize("ordered", [True, False])
def test_the_first_error_ends_the_copy_and_says_where(workers: int, ordered: bool) -> None:
    data = b"x" * 100_000
    plan = Plan(workers=workers, ordered=ordered, piece=8192)
    before = threading.active_count()
    for source, target, text in (
        (Broken(memory(data), 50_000), MemoryNode(len(data)), "reading at byte 49152: Input"),
        (memory(data), Broken(MemoryNode(len(data)), 99_999), "writing at byte 98304: Input"),
    ):
        copy = Copy(source, Writer(target), in_pieces(10**6, [DATA]), len(data), plan)
        with pytest.raises(ImageError, match=text):
            copy.run()
    assert threading.active_count() == before


def test_salvage_loses_the_broken_sectors_and_no_more() -> None:
    data = random.Random(1).randbytes(200_000)
    lost: list[tuple[int, int]] = []
    plan = Plan(salvage=lambda offset, length, _: lost.append((offset, length)), piece=65536)
    target = MemoryNode(len(data))
    source = Broken(memory(data), 1000, 66_000, 199_999)
    Copy(source, Writer(target), regions_of(source), len(data), plan).run()
    expected = bytearray(data)
    for start, stop in ((512, 1024), (65536, 66048), (199_680, 200_000)):
        expected[start:stop] = bytes(stop - start)
    assert contents(target) == expected
    assert sum(length for _, length in lost) == 512 + 512 + 320


def test_an_error_of_the_map_is_told_with_its_place() -> None:
    def regions(offset: int, length: int) -> Iterator[Region]:
        if offset >= 8192:
            raise OSError(5, "Input/output error")
        yield Region(offset, 8192, DATA)

    copy = Copy(MemoryNode(65536), Recorder(), regions, 65536)
    with pytest.raises(ImageError, match="asking where the data are at byte 8192"):
        copy.run()


def test_the_progress_ends_at_the_size() -> None:
    seen: list[tuple[int, int]] = []
    copy = Copy(
        MemoryNode(100_000),
        Recorder(),
        in_pieces(3000, [DATA, ZERO, SKIP]),
        100_000,
        Plan(piece=4096),
        lambda done, total: seen.append((done, total)),
    )
    copy.run()
    assert seen[-1] == (100_000, 100_000)
    assert seen == sorted(seen)


def test_the_rate_is_kept() -> None:
    import time

    plan, size = Plan(rate=2_000_000, piece=50_000, workers=3), 500_000
    start = time.monotonic()
    Copy(MemoryNode(size), Recorder(), in_pieces(size, [DATA]), size, plan).run()
    assert 0.15 < time.monotonic() - start < 2


def test_parts_behind_each_other_are_filled_up_to_sectors() -> None:
    first, second, third = b"a" * 1000, b"", b"c" * 512
    node = Concat([memory(part) if part else MemoryNode(0) for part in (first, second, third)])
    assert node.size == 1536
    assert contents(node) == first + bytes(24) + third
    extents, offset = [], 0
    while offset < node.size:
        found = node.extents(offset, node.size - offset)
        extents += found
        offset = found[-1].end
    assert extents[0].offset == 0
    assert extents[-1].end == 1536
    target = memory(b"\xee" * 1536)
    Copy(node, Writer(target), regions_of(node), 1536).run()
    assert contents(target) == contents(node)
    node.close()

"""What `nbdwire.export.Export` promises, on every implementation (tests/support/nodes.py)."""

import errno
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from itertools import pairwise
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fleece.block.memory import MemoryNode
from nbdwire.constants import (
    CMD_FLAG_FAST_ZERO,
    CMD_FLAG_FUA,
    CMD_FLAG_NO_HOLE,
    STATE_HOLE,
    STATE_ZERO,
)
from nbdwire.errors import ConnectionClosed
from nbdwire.export import OPAQUE_RUN, ZERO_RUN, Export, SupportsMap, SupportsPrefetch
from nbdwire.extents import Extent
from tests.support.nodes import CASES, NodeCase, live_disk

KiB = 1024
ROUGH_SIZE = 400 * KiB
STATES = (0, STATE_HOLE, STATE_ZERO, STATE_HOLE | STATE_ZERO)

STORING = [case for case in CASES if case.stores]
WITH_READ_ONLY = [case for case in CASES if case.has_read_only]


def size_for(case: NodeCase) -> int:
    """Unaligned where the implementation can be: nothing says that a disk ends at a sector."""
    return ROUGH_SIZE + 789 if case.unit == 1 else ROUGH_SIZE // case.unit * case.unit


def name_of(case: NodeCase) -> str:
    return case.name


@pytest.fixture(params=CASES, ids=name_of)
def node(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    with request.param.open(tmp_path, size_for(request.param), False) as opened:
        yield opened


@pytest.fixture(params=STORING, ids=name_of)
def storing(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    with request.param.open(tmp_path, size_for(request.param), False) as opened:
        yield opened


def pread(node: Any, length: int, offset: int) -> bytes:
    buf = bytearray(b"\xee" * length)
    node.pread_into(memoryview(buf), offset)
    return bytes(buf)


def pattern(seed: int, length: int) -> memoryview:
    unit = bytes((seed * 7 + i * 13) % 255 + 1 for i in range(251))
    return memoryview((unit * (length // 251 + 1))[:length])


def check_extents(node: Any, model: bytes | bytearray, offset: int, length: int) -> None:
    """They cover the range, without gap or overlap, and what is told to be zero is."""
    position = offset
    while position < offset + length:
        extents = node.extents(position, offset + length - position)
        assert extents, "at least one extent"
        for extent in extents:
            assert isinstance(extent, Extent)
            assert extent.status in STATES
            assert extent.offset == position
            assert extent.length > 0
            if extent.status & STATE_ZERO:
                assert not any(model[position : extent.end])
            position = extent.end
        assert position <= offset + length


def check_map(node: Any, model: bytes | bytearray, offset: int, length: int) -> None:
    """The file that a run names has these bytes where it says."""
    position = offset if isinstance(node, SupportsMap) else offset + length
    while position < offset + length:
        runs = node.map(position, offset + length - position)
        assert runs, "at least one run"
        for fd, host, count in runs:
            assert count > 0
            expected = model[position : position + count]
            if fd == ZERO_RUN:
                assert not any(expected)
            elif fd != OPAQUE_RUN:
                assert os.pread(fd, count, host) == expected
            position += count
        assert position <= offset + length


def check_cached(node: Any, model: bytes | bytearray, offset: int, length: int) -> None:
    if not isinstance(node, SupportsPrefetch):
        return
    node.prefetch(offset, length)
    buf = bytearray(length)
    if node.pread_cached(memoryview(buf), offset):
        assert buf == model[offset : offset + length]


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["write", "fua", "zero", "no-hole", "fast", "trim", "flush", "read"]),
        st.integers(0, 2**32),
        st.one_of(st.integers(1, 600), st.integers(1, 140 * KiB), st.just(64 * KiB)),
        st.sampled_from([1, 512, 4 * KiB, 64 * KiB]),
    ),
    min_size=1,
    max_size=12,
)


def apply(node: Any, model: bytearray, kind: str, offset: int, length: int, seed: int) -> None:
    """Do one operation to both."""
    part = slice(offset, offset + length)
    if kind in ("write", "fua", "trim"):
        if kind == "trim":
            node.trim(offset, length, seed & CMD_FLAG_FUA)
        data = pattern(seed, length)
        node.pwrite(data, offset, kind == "fua")
        model[part] = data
    elif kind == "flush":
        node.flush()
    elif kind == "read":
        assert pread(node, length, offset) == model[part]
        check_cached(node, model, offset, length)
    else:
        flags = {"zero": seed & CMD_FLAG_FUA, "no-hole": CMD_FLAG_NO_HOLE}.get(kind)
        if zeroed(node, offset, length, CMD_FLAG_FAST_ZERO if flags is None else flags):
            model[part] = bytes(length)


def zeroed(node: Any, offset: int, length: int, flags: int) -> bool:
    """Whether it was done. Only a fast zero may be refused, and only with EOPNOTSUPP."""
    try:
        node.zero(offset, length, flags)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP or not flags & CMD_FLAG_FAST_ZERO:
            raise
        return False
    return True


@pytest.mark.parametrize("case", STORING, ids=name_of)
def test_any_operations_leave_the_node_as_a_bytearray_would_be(
    case: NodeCase, tmp_path: Path
) -> None:
    size = size_for(case)

    @settings(
        derandomize=True, deadline=None, max_examples=60, suppress_health_check=list(HealthCheck)
    )
    @given(operations=OPERATIONS)
    @example(operations=[("write", size - 1, 600, 1), ("zero", size - 512, 512, 1)])
    @example(operations=[("write", 0, ROUGH_SIZE, 1), ("trim", 1, 140 * KiB, 1)])
    def check(operations: list[tuple[str, int, int, int]]) -> None:
        node.zero(0, size)
        model = bytearray(size)
        for seed, (kind, place, length, unit) in enumerate(operations):
            offset = place % size // unit * unit
            apply(node, model, kind, offset, min(length, size - offset), seed)
        assert pread(node, size, 0) == model
        for offset, length in ((0, size), (777, size // 2), (size - 1, 1)):
            check_extents(node, model, offset, length)
            check_map(node, model, offset, length)

    with case.open(tmp_path, size, False) as node:
        check()


def test_a_new_node_reads_as_zeroes_to_its_last_byte(node: Any) -> None:
    assert pread(node, node.size, 0) == bytes(node.size)
    check_extents(node, bytes(node.size), 0, node.size)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_the_size_is_what_was_asked_for(case: NodeCase, tmp_path: Path) -> None:
    with case.open(tmp_path, size_for(case), False) as node:
        assert node.size == size_for(case)


def test_a_trimmed_range_takes_new_data(storing: Any) -> None:
    storing.pwrite(pattern(1, 200 * KiB), 0)
    storing.trim(1000, 150 * KiB)
    data = pattern(2, 100 * KiB)
    storing.pwrite(data, 2000)
    assert pread(storing, 100 * KiB, 2000) == data
    assert pread(storing, 1000, 0) == pattern(1, 1000), "a trim touches its own range only"


def test_a_fast_zero_zeroes_all_or_changes_nothing(storing: Any) -> None:
    data = pattern(3, 200 * KiB)
    storing.pwrite(data, 0)
    done = zeroed(storing, 777, 150 * KiB, CMD_FLAG_FAST_ZERO)
    expected = bytearray(data)
    if done:
        expected[777 : 777 + 150 * KiB] = bytes(150 * KiB)
    assert pread(storing, 200 * KiB, 0) == expected


def test_the_buffer_of_a_write_is_the_callers_again_at_once(storing: Any) -> None:
    for fua in (False, True):
        buf = bytearray(b"before" * 1000)
        view = memoryview(buf)
        storing.pwrite(view, 5, fua)
        view[:] = bytes(len(view))
        view.release()
        buf.append(0)  # BufferError if anybody kept a view
        assert pread(storing, 6000, 5) == b"before" * 1000


def test_the_buffer_of_a_read_is_the_callers_again_at_once(node: Any) -> None:
    buf = bytearray(70 * KiB)
    view = memoryview(buf)
    node.pread_into(view, 3)
    if isinstance(node, SupportsPrefetch):
        node.pread_cached(view, 3)
    view.release()
    buf.append(0)


def test_extents_of_one_byte_do_not_reach_past_it(node: Any) -> None:
    for offset in (0, 1, node.size // 2, node.size - 1):
        (extent,) = node.extents(offset, 1)
        assert extent[:2] == (offset, 1)
        assert extent.status in STATES


def test_writers_of_interleaved_blocks_do_not_disturb_each_other(storing: Any) -> None:
    block, writers = 3001, 4
    count = storing.size // block
    together = Barrier(writers)

    def write(mine: int) -> None:
        together.wait()
        for index in range(mine, count, writers):
            storing.pwrite(pattern(index, block), index * block)

    with ThreadPoolExecutor(writers) as pool:
        list(pool.map(write, range(writers)))
    for index in range(count):
        assert pread(storing, block, index * block) == pattern(index, block)


def test_flush_may_be_called_at_any_time_by_many(storing: Any) -> None:
    with ThreadPoolExecutor(4) as pool:
        for index in range(8):
            pool.submit(storing.pwrite, pattern(index, 512), index * 512).result()
            assert list(pool.map(lambda _: storing.flush(), range(3))) == [None] * 3
    assert pread(storing, 512, 7 * 512) == pattern(7, 512)


@pytest.mark.parametrize("case", WITH_READ_ONLY, ids=name_of)
def test_a_read_only_node_refuses_every_change_with_eperm(case: NodeCase, tmp_path: Path) -> None:
    with case.open(tmp_path, size_for(case), True) as node:
        assert node.read_only
        for change in (
            lambda: node.pwrite(pattern(1, 512), 0),
            lambda: node.pwrite(pattern(1, 512), 0, True),
            lambda: node.zero(0, 512),
            lambda: node.zero(0, 512, CMD_FLAG_FAST_ZERO),
            lambda: node.trim(0, 512),
        ):
            with pytest.raises(OSError, match=r".") as caught:
                change()
            assert caught.value.errno == errno.EPERM
        node.flush()
        assert pread(node, node.size, 0) == bytes(node.size)


def test_close_may_be_called_twice(node: Any) -> None:
    node.close()
    node.close()


def test_it_is_an_export_and_tells_its_optional_verbs(node: Any) -> None:
    assert isinstance(node, Export)
    assert 0 < node.size < 1 << 63
    if isinstance(node, SupportsMap):
        check_map(node, bytes(node.size), 0, node.size)
    check_cached(node, bytes(node.size), 0, node.size)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_after_close_no_verb_touches_a_descriptor_that_is_somebody_elses_by_now(
    case: NodeCase, tmp_path: Path
) -> None:
    """Numbers of descriptors are used again. OSError, or ConnectionClosed of a client."""
    with case.open(tmp_path, size_for(case), False) as node, ExitStack() as stack:
        node.close()
        path = tmp_path / "other"
        path.write_bytes(b"other" * 10_000)
        files = [stack.enter_context(path.open("r+b", 0)) for _ in range(40)]
        buf = memoryview(bytearray(512))
        for verb in (
            lambda: node.pwrite(memoryview(b"x" * 512), 0),
            lambda: node.pwrite(memoryview(b"x" * 512), 0, True),
            lambda: node.zero(0, 4096),
            lambda: node.trim(0, 4096),
            lambda: node.pread_into(buf, 0),
            node.flush,
        ):
            with suppress(OSError, ConnectionClosed):
                verb()
        assert bytes(buf) != (b"other" * 1000)[:512]
        assert path.read_bytes() == b"other" * 10_000
        assert files[-1].read(5) == b"other"


def islands(node: Any, model: bytearray) -> None:
    """Data, zeroes of both kinds, and what was never written, in pieces of odd sizes."""
    for seed, offset in enumerate(range(3000, len(model) - 40_000, 37_000)):
        apply(node, model, "write", offset, 29_001 if seed % 3 else 4096, seed)
        if seed % 2:
            apply(node, model, "zero" if seed % 4 == 1 else "no-hole", offset + 5000, 9001, 0)


@pytest.fixture(params=STORING, ids=name_of)
def written(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Any, bytearray]]:
    """(node, what it must contain)"""
    with request.param.open(tmp_path, size_for(request.param), False) as node:
        model = bytearray(node.size)
        islands(node, model)
        yield node, model


def test_what_was_written_is_read_at_every_kind_of_place(written: tuple[Any, bytearray]) -> None:
    node, model = written
    for offset in (0, 1, 511, 512, 4095, 4096, 65_535, 65_536, 100_001):
        for length in (1, 2, 511, 512, 4096, 4097, 65_537, node.size - offset):
            assert pread(node, length, offset) == model[offset : offset + length]
            check_cached(node, model, offset, length)


def test_extents_and_map_are_truthful_from_every_kind_of_place(
    written: tuple[Any, bytearray],
) -> None:
    node, model = written
    for offset in (0, 1, 4095, 4096, 40_000, 65_537, node.size - 2):
        for length in (1, 4096, 70_001, node.size):
            length = min(length, node.size - offset)
            check_extents(node, model, offset, length)
            check_map(node, model, offset, length)


def test_extents_are_coalesced(written: tuple[Any, bytearray]) -> None:
    """nbd.md §11: a client that asks for one extent wants to hear how far it goes."""
    node, _ = written
    found = node.extents(0, node.size)
    assert all(a.status != b.status for a, b in pairwise(found))


def test_a_flush_and_fua_make_no_difference_to_what_is_read(
    written: tuple[Any, bytearray],
) -> None:
    node, model = written
    node.flush()
    apply(node, model, "fua", 7, 70_000, 5)
    node.zero(9000, 5000, CMD_FLAG_FUA)
    model[9000:14_000] = bytes(5000)
    assert pread(node, node.size, 0) == model
    node.flush()
    assert pread(node, node.size, 0) == model


def test_a_no_hole_zero_keeps_its_range_allocated(storing: Any, tmp_path: Path) -> None:
    """nbd.md §8: the next write into it needs no new room.

    Room is counted, not asked with `extents`: Linux calls allocated zeroes of a file a hole.
    """
    storing.pwrite(pattern(1, 200 * KiB), 0)
    storing.zero(0, 128 * KiB, CMD_FLAG_NO_HOLE)
    assert pread(storing, 200 * KiB, 0) == bytes(128 * KiB) + pattern(1, 200 * KiB)[128 * KiB :]
    storing.flush()
    for image in tmp_path.glob("disk.*"):
        assert image.stat().st_blocks * 512 >= 200 * KiB
    if isinstance(storing, MemoryNode):
        assert not any(extent.status & STATE_HOLE for extent in storing.extents(0, 128 * KiB))


def test_readers_and_writers_of_disjoint_ranges_do_not_disturb_each_other(
    written: tuple[Any, bytearray],
) -> None:
    """Readers own the first half, each writer an interleaved part of the second."""
    node, model = written
    half, block = node.size // 2, 1777
    writers, rounds = 3, 4

    def read(_: int) -> None:
        for offset in range(0, half - 9000, 8999):
            assert pread(node, 9000, offset) == model[offset : offset + 9000]
            check_cached(node, model, offset, 9000)

    def write(mine: int) -> None:
        for round_ in range(rounds):
            for offset in range(half + mine * block, node.size - block, writers * block):
                if (offset + round_) % 3:
                    node.pwrite(pattern(offset + round_, block), offset)
                else:
                    node.zero(offset, block)

    with ThreadPoolExecutor(writers + 3) as pool:
        jobs = [pool.submit(write, mine) for mine in range(writers)]
        jobs += [pool.submit(read, 0) for _ in range(3)]
        for job in jobs:
            job.result()
    for mine in range(writers):
        for offset in range(half + mine * block, node.size - block, writers * block):
            done = offset + rounds - 1
            model[offset : offset + block] = pattern(done, block) if done % 3 else bytes(block)
    assert pread(node, node.size, 0) == model


def test_readers_of_a_read_only_export_agree(tmp_path: Path) -> None:
    """And what they read is what the image has: a snapshot whose live disk goes on changing."""
    size = ROUGH_SIZE
    old = bytes(pattern(77, size))
    with live_disk(tmp_path, size) as rig:
        rig.write(old, 0)
        view = rig.snapshot()

        def write() -> None:
            for seed in range(60):
                rig.write(bytes(pattern(seed, 5000)), seed * 6007 % (size - 5000))

        def read() -> None:
            for offset in range(0, size - 20_000, 9973):
                assert pread(view, 20_000, offset) == old[offset : offset + 20_000]
                check_extents(view, old, offset, 20_000)
                check_map(view, old, offset, 20_000)

        with ThreadPoolExecutor(4) as pool:
            for job in [pool.submit(write), *(pool.submit(read) for _ in range(3))]:
                job.result()
        assert pread(view, size, 0) == old

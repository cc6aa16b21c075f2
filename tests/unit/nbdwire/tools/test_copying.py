"""The engine of ``copy`` between ends of a few lines, and the ends themselves."""

import errno
import os
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdwire.constants import STATE_HOLE, STATE_ZERO
from nbdwire.extents import Extent
from nbdwire.tools.copying import Copy, CopyFailed, Plan, is_zero, pieces
from nbdwire.tools.ends import FileEnd, StreamTarget, Then
from nbdwire.tools.files import FileExport
from nbdwire.tools.progress import quiet

MODEST = settings(derandomize=True, deadline=None, max_examples=150)
KiB = 1024


class FakeEnd:
    """Memory as source or target. Operations end in a pool of threads, in any order."""

    def __init__(self, data: bytearray, extents: list[Extent] | None = None) -> None:
        self.name = "fake"
        self.data = data
        self.size: int | None = len(data)
        self.block = 1
        self.feeders = 1
        self.is_zero = False
        self.found = extents or [Extent(0, len(data), 0)]
        self.fails: Callable[[str, int], Exception | None] = lambda verb, offset: None
        self.calls: list[tuple[str, int, int]] = []
        self.cancelled = self.drained = 0
        self.finished: tuple[int, bool] | None = None
        self._pool = ThreadPoolExecutor(4)

    def extents(self, offset: int, length: int) -> list[Extent]:
        problem = self.fails("extents", offset)
        if problem is not None:
            raise problem
        inside = [x for x in self.found if x.end > offset]
        first = inside[0]
        return [Extent(offset, first.end - offset, first.status), *inside[1:3]]

    def _later(
        self, verb: str, offset: int, length: int, do: Callable[[], None], then: Then
    ) -> None:
        self.calls.append((verb, offset, length))

        def run() -> None:
            problem = self.fails(verb, offset)
            if problem is None:
                do()
            then(problem)

        self._pool.submit(run)

    def read(self, view: memoryview, offset: int, then: Then) -> None:
        def do() -> None:
            view[:] = self.data[offset : offset + len(view)]

        self._later("read", offset, len(view), do, then)

    def write(self, view: memoryview, offset: int, then: Then) -> None:
        def do() -> None:
            self.data[offset : offset + len(view)] = view

        self._later("write", offset, len(view), do, then)

    def zero(self, offset: int, length: int, allocate: bool, then: Then) -> None:
        def do() -> None:
            self.data[offset : offset + length] = bytes(length)

        self._later("allocate" if allocate else "zero", offset, length, do, then)

    def cancel(self) -> None:
        self.cancelled += 1

    def drain(self) -> None:
        self.drained += 1

    def finish(self, size: int, flush: bool) -> None:
        self.finished = (size, flush)
        problem = self.fails("finish", 0)
        if problem is not None:
            raise problem

    def close(self, abort: bool) -> None:
        self._pool.shutdown()


SIZE = 600 * KiB + 17


def disk(seed: int = 1) -> tuple[bytearray, list[Extent]]:
    """Data and zeroes in turn, and extents that tell some of it."""
    rng = random.Random(seed)
    data, extents, position = bytearray(), [], 0
    while position < SIZE:
        length = min(rng.choice([100, 4096, 70_000, 130 * KiB]), SIZE - position)
        zero = len(extents) % 2 == 1
        unknown = len(extents) % 8 == 2  # zeroes that no extent tells of
        length = 16 * KiB if unknown and position + 16 * KiB < SIZE else length
        data += bytes(length) if zero or unknown else rng.randbytes(length)
        extents.append(Extent(position, length, STATE_ZERO | STATE_HOLE if zero else 0))
        position += length
    return data, extents


def copied(source: FakeEnd, target: FakeEnd, **plan: int | bool) -> Copy:
    options = {"buffers": 3, "request_size": 16 * KiB, "sparse": 4 * KiB, **plan}
    copy = Copy(source, target, Plan(**options), quiet)  # type: ignore[arg-type]
    try:
        copy.run()
    finally:
        source.close(False)
        target.close(False)
    return copy


@pytest.mark.parametrize("feeders", [1, 3])
@pytest.mark.parametrize("plan", [{}, {"allocate": True}, {"sparse": 0}, {"buffers": 1}])
def test_the_target_is_what_the_source_is(plan: dict[str, int | bool], feeders: int) -> None:
    data, extents = disk()
    source, target = FakeEnd(data, extents), FakeEnd(bytearray(b"\xff" * (SIZE + 5)))
    source.feeders = feeders
    copy = copied(source, target, **plan)
    assert target.data == data + b"\xff" * 5
    totals = copy.totals
    assert (totals.done, totals.skipped) == (SIZE, 0)
    assert target.finished == (SIZE, True)
    wanted, other = ("allocate", "zero") if plan.get("allocate") else ("zero", "allocate")
    verbs = [verb for verb, _, _ in target.calls]
    assert wanted in verbs
    assert other not in verbs
    assert max(length for verb, _, length in source.calls) <= 16 * KiB
    hidden = sum(x.length for x in extents if x.is_zero)
    assert totals.read == SIZE - hidden
    assert (totals.zeroed > hidden) == (plan.get("sparse") != 0)  # zeroes were found in data


def test_zeroes_are_not_sent_to_a_target_that_has_them() -> None:
    data, extents = disk()
    source, target = FakeEnd(data, extents), FakeEnd(bytearray(SIZE))
    target.is_zero = True
    copy = copied(source, target)
    assert target.data == data
    assert {verb for verb, _, _ in target.calls} == {"write"}
    assert copy.totals.skipped > 0 == copy.totals.zeroed


def test_a_target_with_large_blocks_gets_whole_ones() -> None:
    """nbd.md §10: what is not aligned to the minimum block may be refused."""
    data, extents = disk()
    end = SIZE - SIZE % 4096
    whole = FakeEnd(data[:end], [Extent(x.offset, min(x.length, end - x.offset), x.status)
                                 for x in extents if x.offset < end])  # fmt: skip
    target = FakeEnd(bytearray(b"\xff" * end))
    target.block = 4096
    copied(whole, target)
    assert target.data == data[:end]
    assert all(offset % 4096 == 0 == length % 4096 for _, offset, length in target.calls)


@pytest.mark.parametrize(
    ("verb", "message"),
    [
        ("read", "cannot read 16384 bytes at offset 16384 of fake: Input/output error"),
        ("write", "cannot write 16384 bytes at offset 16384 of fake: Input/output error"),
        ("zero", "cannot zero"),
        ("extents", "cannot ask fake where its data are: Input/output error"),
        ("finish", "cannot flush fake: Input/output error"),
    ],
)
def test_an_error_anywhere_ends_the_copy_and_says_where(verb: str, message: str) -> None:
    """CVE-2022-0485: no completion goes unchecked."""
    rng = random.Random(3)
    extents = [
        Extent(0, 64 * KiB, 0),
        Extent(64 * KiB, 64 * KiB, 3),
        Extent(128 * KiB, 64 * KiB, 0),
    ]
    data = bytearray(rng.randbytes(192 * KiB))
    source, target = FakeEnd(data, extents), FakeEnd(bytearray(192 * KiB))

    def fails(done: str, offset: int) -> Exception | None:
        wanted = done == verb and (verb not in ("read", "write") or offset == 16 * KiB)
        return OSError(errno.EIO, os.strerror(errno.EIO)) if wanted else None

    source.fails = target.fails = fails
    with pytest.raises(CopyFailed) as caught:
        copied(source, target)
    assert str(caught.value).startswith(message)
    assert (target.finished is not None) == (verb == "finish")
    assert target.cancelled == (verb != "finish")


@MODEST
@given(
    st.lists(st.tuples(st.integers(1, 40), st.booleans()), min_size=1, max_size=12),
    st.sampled_from([1, 4, 8]),
    st.sampled_from([8, 16]),
)
def test_pieces_cover_everything_once_and_only_zeroes_are_called_zero(
    parts: list[tuple[int, bool]], block: int, step: int
) -> None:
    extents, position, zero = [], 0, bytearray()
    for length, is_hole in parts:
        extents.append(Extent(position, length, STATE_ZERO if is_hole else 0))
        zero += bytes([is_hole]) * length
        position += length
    source = FakeEnd(bytearray(position), extents)
    source.close(False)
    at = 0
    for offset, length, is_hole in pieces(source, position, block, step):
        assert offset == at
        assert length > 0
        at += length
        assert at % block == 0 or at == position
        if is_hole:
            assert all(zero[offset:at])
        else:
            assert length <= step
    assert at == position


@MODEST
@given(st.integers(0, 200_000), st.integers(0, 200_000))
def test_a_single_byte_makes_it_not_zero(length: int, position: int) -> None:
    data = bytearray(length)
    assert is_zero(memoryview(data))
    if position < length:
        data[position] = 1
        assert not is_zero(memoryview(data))


# Standard output


def test_a_stream_is_written_in_order() -> None:
    read, write = os.pipe()
    done: list[Exception | None] = []
    try:
        target = StreamTarget(write)
        target.write(memoryview(b"late"), 8, done.append)
        target.zero(5, 3, False, done.append)
        assert done == []
        target.write(memoryview(b"early"), 0, done.append)
        assert done == [None] * 3
        assert os.read(read, 100) == b"early\0\0\0late"
    finally:
        os.close(read)
        os.close(write)


def test_what_waits_for_its_turn_is_given_up_when_the_copy_has_failed() -> None:
    done: list[Exception | None] = []
    target = StreamTarget(-1)
    target.write(memoryview(b"never"), 5, done.append)
    target.cancel()
    target.write(memoryview(b"never"), 10, done.append)
    assert [getattr(error, "errno", None) for error in done] == [errno.ECANCELED] * 2


def test_a_failed_read_of_a_stream_copy_does_not_hang() -> None:
    """The pieces behind the one that is missing must give their buffers back."""
    source = FakeEnd(bytearray(random.Random(1).randbytes(SIZE)))
    behind = threading.Event()

    def fails(verb: str, offset: int) -> Exception | None:
        if verb != "read" or offset:
            if verb == "read":
                behind.set()
            return None
        assert behind.wait(10)
        return OSError(errno.EIO, "bad sector")

    source.fails = fails
    target = StreamTarget(-1)
    with pytest.raises(CopyFailed, match="offset 0 of fake: bad sector"):
        Copy(source, target, Plan(buffers=3, request_size=4096), quiet).run()
    source.close(False)


# Files


def test_a_target_file_is_emptied_and_gets_the_size_of_the_source(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"old contents" * 1000)
    end = FileEnd.create(str(path), 5000, keep=False)
    assert (end.size, end.is_zero) == (5000, True)
    end.close(False)
    assert path.read_bytes() == bytes(5000)
    end = FileEnd.create(str(path), 100, keep=True)
    assert (end.size, end.is_zero) == (5000, False)
    end.close(False)


def test_a_hole_is_punched_and_an_allocated_zero_is_not(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"x" * (1 << 20))
    end, told = FileEnd("disk", FileExport.open(str(path))), []
    full = path.stat().st_blocks
    end.zero(0, 512 * KiB, True, told.append)
    assert path.stat().st_blocks == full
    end.zero(0, 256 * KiB, False, told.append)
    assert path.stat().st_blocks < full
    assert path.read_bytes() == bytes(512 * KiB) + b"x" * (512 * KiB)
    assert told == [None, None]
    assert [x.is_zero for x in end.extents(0, 1 << 20)] == [True, False]
    end.close(False)

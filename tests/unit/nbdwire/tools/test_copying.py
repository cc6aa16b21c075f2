"""The engine of ``copy`` between ends of a few lines, and the ends themselves."""

import errno
import os
import random
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdwire.constants import STATE_HOLE, STATE_ZERO
from nbdwire.extents import Extent
from nbdwire.tools.copying import Copy, Plan, is_zero, pieces
from nbdwire.tools.ends import CopyFailed, Done, FileEnd, StreamSource, StreamTarget, failed
from nbdwire.tools.files import FileExport
from nbdwire.tools.progress import quiet

if TYPE_CHECKING:
    from collections.abc import Callable

MODEST = settings(derandomize=True, deadline=None, max_examples=150)
KiB = 1024


class FakeEnd:
    """Memory as source or target, and its own reader and writer; depth 2, one lane or more."""

    def __init__(self, data: bytearray, extents: list[Extent] | None = None) -> None:
        self.name = "fake"
        self.data = data
        self.size: int | None = len(data)
        self.block = 1
        self.lanes = 1
        self.ordered = False
        self.maximum = 1 << 20
        self.is_zero = False
        self.found = extents or [Extent(0, len(data), 0)]
        self.fails: Callable[[str, int], Exception | None] = lambda verb, offset: None
        self.calls: list[tuple[str, int, int]] = []
        self.threads: set[int] = set()
        self.cancelled = self.drained = 0
        self.finished: tuple[int, bool] | None = None

    def reader(self, lane: int) -> "FakeReader":
        return FakeReader(self)

    def writer(self, lane: int, done: Done) -> "FakeWriter":
        return FakeWriter(self, done)

    def call(self, verb: str, offset: int, length: int) -> None:
        self.calls.append((verb, offset, length))
        self.threads.add(threading.get_ident())
        problem = self.fails(verb, offset)
        if problem is not None:
            raise failed(verb, length, offset, self.name, problem)

    def cancel(self) -> None:
        self.cancelled += 1

    def finish(self, size: int, flush: bool) -> None:
        self.finished = (size, flush)
        problem = self.fails("finish", 0)
        if problem is not None:
            raise problem

    def close(self) -> None:
        pass


class FakeReader:
    depth = 2

    def __init__(self, end: FakeEnd) -> None:
        self._end = end
        self._asked: list[tuple[int, int]] = []
        self._last = bytearray()

    def extents(self, offset: int, length: int) -> list[Extent]:
        problem = self._end.fails("extents", offset)
        if problem is not None:
            raise CopyFailed(f"cannot ask fake where its data are: {problem.args[1]}")
        inside = [x for x in self._end.found if x.end > offset]
        first = inside[0]
        return [Extent(offset, first.end - offset, first.status), *inside[1:3]]

    def ask(self, offset: int, length: int) -> None:
        self._asked.append((offset, length))
        assert len(self._asked) <= self.depth

    def take(self) -> memoryview:
        self._last[:] = b"\xee" * len(self._last)  # what was read before is not valid any more
        offset, length = self._asked.pop(0)
        self._end.call("read", offset, length)
        self._last = self._end.data[offset : offset + length]
        return memoryview(self._last)


class FakeWriter:
    """Acknowledges late: when it is drained."""

    def __init__(self, end: FakeEnd, done: Done) -> None:
        self._end = end
        self._done = done
        self._sent: list[tuple[int, bool]] = []

    def write(self, view: memoryview, offset: int) -> None:
        self._end.call("write", offset, len(view))
        self._end.data[offset : offset + len(view)] = view
        self._sent.append((len(view), False))

    def zero(self, offset: int, length: int, allocate: bool) -> None:
        self._end.call("allocate" if allocate else "zero", offset, length)
        self._end.data[offset : offset + length] = bytes(length)
        self._sent.append((length, True))

    def drain(self) -> None:
        self._end.drained += 1
        for length, zero in self._sent:
            self._done(length, zero)


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
    options = {"request_size": 16 * KiB, "sparse": 4 * KiB, **plan}
    copy = Copy(source, target, Plan(**options), quiet)  # type: ignore[arg-type]
    copy.run()
    return copy


@pytest.mark.parametrize("lanes", [1, 3])
@pytest.mark.parametrize("plan", [{}, {"allocate": True}, {"sparse": 0}])
def test_the_target_is_what_the_source_is(plan: dict[str, int | bool], lanes: int) -> None:
    data, extents = disk()
    source, target = FakeEnd(data, extents), FakeEnd(bytearray(b"\xff" * (SIZE + 5)))
    source.lanes = target.lanes = lanes
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
    assert target.drained == lanes
    assert source.threads == target.threads
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
    assert (target.cancelled, source.cancelled) == ((0, 0) if verb == "finish" else (1, 1))


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
    source = FakeEnd(bytearray(position), extents).reader(0)
    at = 0
    for offset, length, is_hole in pieces(source.extents, position, block, step):
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


def test_a_lane_that_fails_ends_the_others_and_their_errors_are_not_told() -> None:
    """The first error counts: what the giving up causes is not what went wrong."""
    data = bytearray(random.Random(4).randbytes(SIZE))
    source, target = FakeEnd(data), FakeEnd(bytearray(SIZE))
    source.lanes = target.lanes = 3
    given_up = threading.Event()
    cancel, source_cancel = given_up.set, source.cancel
    source.cancel = lambda: (source_cancel(), cancel())[0]  # type: ignore[method-assign,func-returns-value]

    def fails(verb: str, offset: int) -> Exception | None:
        if offset == 0:
            return OSError(errno.EIO, "bad sector")
        assert given_up.wait(10)
        return OSError(errno.ESHUTDOWN, "given up")

    source.fails = lambda verb, offset: fails(verb, offset) if verb == "read" else None
    with pytest.raises(CopyFailed, match="at offset 0 of fake: bad sector"):
        copied(source, target)
    assert target.finished is None


def test_a_fault_in_a_lane_is_not_swallowed() -> None:
    source, target = FakeEnd(bytearray(SIZE)), FakeEnd(bytearray(SIZE))
    source.lanes = target.lanes = 2
    whole = target.writer

    def writer(lane: int, done: Done) -> FakeWriter:
        assert 1 // (1 - lane)
        return whole(lane, done)

    target.writer = writer  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        copied(source, target)


# Standard input and output


def test_a_stream_is_written_in_order_and_counted() -> None:
    read, write = os.pipe()
    done: list[tuple[int, bool]] = []
    try:
        target = StreamTarget(write).writer(0, lambda length, zero: done.append((length, zero)))
        target.write(memoryview(b"early"), 0)
        target.zero(5, 3, False)
        target.write(memoryview(b"late"), 8)
        assert done == [(5, False), (3, True), (4, False)]
        with pytest.raises(CopyFailed, match="at 12, not at 99"):
            target.write(memoryview(b"x"), 99)
        assert os.read(read, 100) == b"early\0\0\0late"
    finally:
        os.close(read)
        os.close(write)


def test_an_export_is_written_to_a_stream_by_one_lane() -> None:
    data, extents = disk()
    source = FakeEnd(data, extents)
    source.lanes = 3
    read, write = os.pipe()
    found = bytearray()

    def drain() -> None:
        while part := os.read(read, 65536):
            found.extend(part)

    reader = threading.Thread(target=drain)
    reader.start()
    try:
        Copy(source, StreamTarget(write), Plan(request_size=4096), quiet).run()
    finally:
        os.close(write)
        reader.join()
        os.close(read)
    assert found == data


def test_a_stream_that_is_too_long_for_its_target_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "in"
    path.write_bytes(b"x" * 10_000)
    fd = os.open(path, os.O_RDONLY)
    try:
        small = FakeEnd(bytearray(9999))
        with pytest.raises(CopyFailed, match="fake has only 9999 bytes"):
            Copy(StreamSource(fd), small, Plan(request_size=4096), quiet).run()
        os.lseek(fd, 0, os.SEEK_SET)
        large = FakeEnd(bytearray(10_001))
        totals = Copy(StreamSource(fd), large, Plan(request_size=4096), quiet).run()
        assert (totals.read, large.finished) == (10_000, (10_000, True))
        assert large.data == b"x" * 10_000 + b"\0"
    finally:
        os.close(fd)


# Files


def test_a_target_file_is_emptied_and_gets_the_size_of_the_source(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"old contents" * 1000)
    end = FileEnd.create(str(path), 5000, keep=False)
    assert (end.size, end.is_zero) == (5000, True)
    end.close()
    assert path.read_bytes() == bytes(5000)
    end = FileEnd.create(str(path), 100, keep=True)
    assert (end.size, end.is_zero) == (5000, False)
    end.close()


def test_a_hole_is_punched_and_an_allocated_zero_is_not(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"x" * (1 << 20))
    end, told = FileEnd("disk", FileExport.open(str(path))), []
    writer = end.writer(0, lambda length, zero: told.append(length))
    full = path.stat().st_blocks
    writer.zero(0, 512 * KiB, True)
    assert path.stat().st_blocks == full
    writer.zero(0, 256 * KiB, False)
    assert path.stat().st_blocks < full
    assert path.read_bytes() == bytes(512 * KiB) + b"x" * (512 * KiB)
    assert told == [512 * KiB, 256 * KiB]
    assert [x.is_zero for x in end.reader(0).extents(0, 1 << 20)] == [True, False]
    end.close()

"""The worker loop on real files: cold pages, holes, fragments, broken storage, shrinking files."""

import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fleece.block.file import FileNode
from nbdwire import constants as c
from nbdwire import outgoing, worker
from nbdwire.export import OPAQUE_RUN, ZERO_RUN, Run
from tests.support import nbdraw as raw
from tests.support.blockdev import loop_device
from tests.support.faulty import Mapped
from tests.support.nbdraw import DATA, ERROR_OFFSET, FORMS, HOLE, NONE, Raw, connected
from tests.support.serving import noise, serving
from tests.support.threads import in_thread

SIZE = 8 << 20
CONTENT = noise(SIZE)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def node(image: Path) -> Iterator[Mapped]:
    node = Mapped(image)
    yield node
    node.close()


@pytest.fixture(params=sorted(FORMS))
def client(tmp_path: Path, node: Mapped, request: pytest.FixtureRequest) -> Iterator[Raw]:
    form = FORMS[request.param]
    with serving(tmp_path, node) as (_, where), connected(where, **form) as client:
        yield client


@pytest.fixture(params=["structured", "extended"])
def structured(tmp_path: Path, node: Mapped, request: pytest.FixtureRequest) -> Iterator[Raw]:
    """Replies in chunks, in both forms."""
    form = FORMS[request.param]
    with serving(tmp_path, node) as (_, where), connected(where, **form) as client:
        yield client


def drop_cache(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.mark.parametrize("length", [4096, 20_000, 100_000, 1 << 20])
def test_a_batch_of_cold_reads_is_exact_and_prefetched_at_once(
    client: Raw, node: Mapped, image: Path, length: int
) -> None:
    offsets = [(index * 1_234_567) % (SIZE - length) for index in range(24)]
    drop_cache(image)
    node.cold = True
    client.send(b"".join(client.make(raw.READ, offset, length) for offset in offsets))
    for offset in offsets:
        assert client.reply().assemble(offset, length) == CONTENT[offset : offset + length]
    if length <= worker.SMALL_READ:
        assert node.prefetched[: len(offsets)] == [(offset, length) for offset in offsets]
    assert set(node.prefetched) == {(offset, length) for offset in offsets}


def test_a_cache_that_is_really_cold_is_no_different(client: Raw, image: Path) -> None:
    for length in (4096, 300_000):
        offsets = [(index * 777_777) % (SIZE - length) for index in range(16)]
        drop_cache(image)
        client.send(b"".join(client.make(raw.READ, offset, length) for offset in offsets))
        for offset in offsets:
            assert client.reply().assemble(offset, length) == CONTENT[offset : offset + length]


def test_only_what_may_be_read_is_prefetched(structured: Raw, node: Mapped) -> None:
    """A length of 0 would mean "all of the rest" to the kernel."""
    node.cold = True
    wanted = [(0, 0), (5, 4096), (SIZE - 1, 2), (0, 0xFFFFFFFF), (9, 10)]
    write = structured.make(raw.WRITE, 100, 5, 0, b"hello")
    messages = [structured.make(raw.READ, offset, length) for offset, length in wanted]
    structured.send(messages[1] + write + b"".join(messages))
    errors = [structured.reply().error for _ in range(7)]
    assert errors == [0, 0, c.NBD_EINVAL, 0, c.NBD_EINVAL, c.NBD_EINVAL, 0]
    assert set(node.prefetched) == {(5, 4096), (9, 10)}


def test_prefetching_ahead_has_an_end(
    structured: Raw, node: Mapped, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "PREFETCH_MOST", 40_000)
    node.cold = True
    structured.send(b"".join(structured.make(raw.READ, i * 4096, 4096) for i in range(15)))
    assert all(structured.reply().error == 0 for _ in range(15))
    assert len(node.prefetched) == 10


def alternating(fd: int, piece: int) -> Any:
    def answer(offset: int, length: int) -> list[Run]:
        return [
            (ZERO_RUN if at // piece % 2 else fd, at, min(piece, offset + length - at))
            for at in range(offset, offset + length, piece)
        ]

    return answer


def masked(offset: int, length: int, piece: int) -> bytes:
    """What a read must give if every second piece is a hole."""
    data = bytearray(CONTENT[offset : offset + length])
    for at in range(piece, SIZE, 2 * piece):
        start, stop = max(at, offset) - offset, min(at + piece, offset + length) - offset
        if start < stop:
            data[start:stop] = bytes(stop - start)
    return bytes(data)


@pytest.mark.parametrize("runs", [2, 63, 64])
def test_a_fragmented_read_is_sent_run_by_run(client: Raw, node: Mapped, runs: int) -> None:
    piece = 4096
    node.answer = alternating(node.fileno(), piece)
    length = max(runs * piece, 2 * worker.SMALL_READ)
    piece = length // runs // 512 * 512
    node.answer = alternating(node.fileno(), piece)
    reply = client.ask(raw.READ, 0, runs * piece)
    assert reply.assemble(0, runs * piece) == masked(0, runs * piece, piece)
    if client.session.structured:
        assert reply.kinds == [DATA, HOLE] * (runs // 2) + [DATA] * (runs % 2)
    assert node.opaque_reads == 0


def test_a_read_of_more_runs_than_that_is_copied(client: Raw, node: Mapped) -> None:
    node.answer = alternating(node.fileno(), 4096)
    reply = client.ask(raw.READ, 0, 4096 * 65)
    assert reply.assemble(0, 4096 * 65) == CONTENT[: 4096 * 65]  # read, not mapped
    assert (len(reply.content), node.opaque_reads) == (int(client.session.structured), 1)


def test_a_map_in_small_parts_is_asked_again(client: Raw, node: Mapped) -> None:
    node.answer = lambda offset, length: [(node.fileno(), offset, min(length, 33_333))]
    assert client.read(777, 1 << 20) == CONTENT[777 : 777 + (1 << 20)]
    assert node.opaque_reads == 0


@pytest.mark.parametrize("answer", [[], [(OPAQUE_RUN, 0, 1 << 20)], [(ZERO_RUN, 0, 0)]])
def test_a_map_that_tells_nothing_makes_the_read_a_copy(
    client: Raw, node: Mapped, answer: list[Run]
) -> None:
    node.answer = lambda *_: answer
    assert client.read(1, 1 << 20) == CONTENT[1 : 1 + (1 << 20)]
    assert node.opaque_reads == 1


def test_an_opaque_run_behind_a_file_run_makes_all_of_it_a_copy(client: Raw, node: Mapped) -> None:
    node.answer = lambda offset, length: [
        (node.fileno(), offset, length // 2),
        (OPAQUE_RUN, 0, length - length // 2),
    ]
    assert client.read(3, 100_001) == CONTENT[3:100_004]
    assert node.opaque_reads == 1


def test_a_map_that_fails_is_the_error_of_that_read(client: Raw, node: Mapped) -> None:
    def broken(offset: int, length: int) -> list[Run]:
        raise OSError(errno.EIO, "injected")

    node.answer = broken
    assert client.ask(raw.READ, 0, 1 << 20).error == c.NBD_EIO
    client.in_step()


def test_a_file_that_shrank_reads_as_zeroes_behind_its_end(
    client: Raw, node: Mapped, image: Path
) -> None:
    at = 3_000_001
    os.truncate(image, at)
    expected = CONTENT[:at] + bytes(SIZE - at)
    for offset, length in [(0, SIZE), (at - 10, 20), (at - 100_000, 200_000), (at, 70_000)]:
        assert client.read(offset, length) == expected[offset : offset + length]


def test_a_file_that_shrinks_between_map_and_sendfile_does_not_shift_the_replies(
    client: Raw, node: Mapped, image: Path
) -> None:
    """The runs are those of the whole file: sendfile finds the end where the map had data."""
    node.answer = lambda offset, length: [(node.fileno(), offset, length)]
    os.truncate(image, 100_000)
    assert client.read(50_000, 1 << 20) == CONTENT[50_000:100_000] + bytes((1 << 20) - 50_000)
    client.in_step()


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP])
def test_where_a_file_system_has_no_sendfile_bytes_are_copied_and_it_is_asked_once(
    structured: Raw, node: Mapped, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    asked = []

    def sendfile(*arguments: int) -> int:
        asked.append(arguments)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(outgoing.os, "sendfile", sendfile)
    for offset, length in [(10, 200_000), (0, 1 << 20), (77_777, 50_000)]:
        reply = structured.ask(raw.READ, offset, length)
        assert reply.error == 0
        assert b"".join(chunk.data for chunk in reply.chunks) == CONTENT[offset : offset + length]
    assert len(asked) == 1
    structured.in_step()


@pytest.fixture
def failing_sendfile(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """``os.sendfile`` sends 70 000 bytes of the file, and then EIO for ever."""
    real, left = os.sendfile, [70_000]

    def sendfile(out: int, fd: int, offset: int, count: int) -> int:
        if left[0] <= 0:
            raise OSError(errno.EIO, "Input/output error")
        sent = real(out, fd, offset, min(count, left[0]))
        left[0] -= sent
        return sent

    monkeypatch.setattr(outgoing.os, "sendfile", sendfile)
    return left


def test_an_error_inside_a_cold_read_ends_the_chunk_with_zeroes_and_is_told(
    structured: Raw, node: Mapped, failing_sendfile: list[int]
) -> None:
    node.cold = True
    reply = structured.ask(raw.READ, 10, 200_000)
    assert reply.kinds == [DATA, ERROR_OFFSET]
    assert reply.error == c.NBD_EIO
    assert reply.chunks[0].data == CONTENT[10:70_010] + bytes(130_000)
    node.cold = False
    structured.in_step()


@pytest.mark.parametrize("flags", [0, raw.DF])
def test_an_error_behind_the_header_of_the_last_chunk_ends_the_connection(
    structured: Raw, node: Mapped, failing_sendfile: list[int], flags: int
) -> None:
    """It cannot be told any more, and bytes that nobody read must not pass for data."""
    node.cold = bool(flags)
    structured.send(structured.make(raw.READ, 0, 200_000, flags))
    with pytest.raises(EOFError, match="of 200008"):
        structured.reply()


def test_a_device_that_cannot_be_read_is_told_and_survived(tmp_path: Path, image: Path) -> None:
    """A loop device whose file has lost its second half: the kernel's own EIO."""
    with loop_device(image) as device:
        os.truncate(image, SIZE // 2)
        node = FileNode(device, read_only=True, locking=False)
        with serving(tmp_path, node) as (_, where), connected(where) as client:
            # Far enough behind the edge that read-ahead from the good half does not matter.
            start, length = SIZE // 2 - (1 << 20), 2 << 20
            reply = client.ask(raw.READ, start, length)
            assert reply.error == c.NBD_EIO
            good = reply.chunks[0].data if reply.content else b""
            assert good[: 512 << 10] == CONTENT[start : start + len(good[: 512 << 10])]
            assert client.ask(raw.READ, SIZE - 4096, 4096).error == c.NBD_EIO
            assert client.read(0, 1 << 20) == CONTENT[: 1 << 20]
        node.close()


def test_a_cold_reply_ends_with_done_in_a_chunk_of_its_own(structured: Raw, node: Mapped) -> None:
    node.cold = True
    reply = structured.ask(raw.READ, 0, 200_000)
    assert reply.kinds == [DATA, NONE]
    assert reply.assemble(0, 200_000) == CONTENT[:200_000]


def test_replies_keep_their_order_when_small_and_large_and_cold_mix(
    client: Raw, node: Mapped, image: Path
) -> None:
    sizes = [1, 70_000, 4096, worker.SMALL_READ, worker.SMALL_READ + 1, 500_000, 13] * 30
    drop_cache(image)
    asked = [((i * 99_991) % (SIZE - size), size) for i, size in enumerate(sizes)]
    message = b"".join(client.make(raw.READ, *pair) for pair in asked)
    with in_thread(lambda: client.send(message)):
        for offset, length in asked:
            assert client.reply().assemble(offset, length) == CONTENT[offset : offset + length]


def test_reads_over_tcp_are_exact_too(tmp_path: Path, node: Mapped) -> None:
    with serving(tmp_path, node, tcp=True) as (_, where), connected(where) as client:
        assert client.sock.family == socket.AF_INET
        asked = [(i * 31_337, 1 + i * 40_000) for i in range(40)]
        message = b"".join(client.make(raw.READ, *pair) for pair in asked)
        client.send(message)
        for offset, length in asked:
            assert client.reply().assemble(offset, length) == CONTENT[offset : offset + length]

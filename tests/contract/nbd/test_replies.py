"""The protocol's sections "Simple reply", "Structured reply", "Extended reply": our server."""

import errno
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from fleece.block.file import FileNode
from nbdwire.uri import NBDURI
from tests.support import haggling as h
from tests.support.faulty import Hooked
from tests.support.haggling import haggling, info, option
from tests.support.nbdraw import (
    CACHE,
    DATA,
    DF,
    ERROR,
    ERROR_OFFSET,
    FLUSH,
    FUA,
    HOLE,
    NO_HOLE,
    NONE,
    READ,
    STATUS,
    TRIM,
    WRITE,
    ZEROES,
    Raw,
    connected,
)
from tests.support.nbdraw import request as raw_request
from tests.support.serving import noise, serving

SIZE = 4 << 20
STRUCTURED_OR_EXTENDED = [{}, {"extended": True}]


class Sparse(FileNode):
    """A file with a `map`, served by either loop."""

    def __init__(self, path: Path, *, blocking: bool) -> None:
        super().__init__(path, locking=False)
        self.blocking = blocking


@pytest.fixture(params=[False, True], ids=["worker", "followers"])
def sparse(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[NBDURI, bytes]]:
    """1 MiB of data, 1 MiB of hole, 64 KiB of data, and a hole up to 4 MiB."""
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.write(noise(1 << 20))
        file.seek(2 << 20)
        file.write(noise(65536, 2))
        file.truncate(SIZE)
    with (
        closing(Sparse(path, blocking=request.param)) as node,
        serving(tmp_path, node) as (_, uri),
    ):
        yield uri, path.read_bytes()


def test_replies_have_the_form_that_was_negotiated(client: Raw, node: Hooked) -> None:
    """nbd.md §7: not negotiated: simple only; structured: READ in chunks; extended: never simple.

    `nbdraw.Raw.reply` takes no other.
    """
    assert client.write(0, noise(100)) == 0
    assert client.read(0, 100) == noise(100)
    assert client.read(0, 200_000) == noise(100) + bytes(199_900)
    for kind in (FLUSH, TRIM, CACHE, ZEROES):
        reply = client.ask(kind, 0, 0 if kind == FLUSH else 512)
        assert reply.error == 0
        assert reply.kinds == [NONE] if client.session.extended else reply.kinds == []


@pytest.mark.parametrize(
    ("offset", "length", "flags"),
    [(0, 0, 0), (SIZE, 1, 0), (0, 1, NO_HOLE), (0, 1, 0x8000), (1 << 63, 1, 0), (0, 33 << 20, 0)],
)
def test_early_errors_of_a_read_have_the_form_too(
    client: Raw, offset: int, length: int, flags: int
) -> None:
    """nbd.md §7: structured: READ in chunks also for early errors (nbd-server 3.27: not)."""
    reply = client.ask(READ, offset, length, flags)
    assert reply.error == errno.EINVAL
    assert reply.data == b"", "a failed simple READ has no payload"
    assert reply.kinds == ([ERROR] if client.session.structured else [])
    client.in_step()


@pytest.mark.parametrize("kind", [READ, WRITE, FLUSH, TRIM, ZEROES])
@pytest.mark.parametrize("length", [512, 100_000])
def test_errors_come_with_a_message_where_there_are_chunks(
    client: Raw, node: Hooked, kind: int, length: int
) -> None:
    """nbd.md §7, §12: errors SHOULD come as structured chunks with a message."""
    for verb in ("pread_into", "pwrite", "flush", "trim", "zero", "map"):
        node.fail(verb, OSError(errno.EIO, "the cable was pulled"))
    payload = bytes(length) if kind == WRITE else b""
    reply = client.ask(kind, 0, 0 if kind == FLUSH else length, 0, payload)
    assert reply.error == errno.EIO
    if client.session.structured:
        assert reply.message == "the cable was pulled"
        assert set(reply.kinds) <= {ERROR, ERROR_OFFSET, DATA}
    node.before.clear()
    client.in_step()


def test_a_long_message_is_cut_at_the_limit(client: Raw, node: Hooked) -> None:
    """nbd.md §7: the message of an ERROR chunk has at most 4096 bytes."""
    node.fail("flush", OSError(errno.EIO, "ö\0" * 9000))
    reply = client.ask(FLUSH)
    assert reply.error == errno.EIO
    assert len(reply.message.encode()) <= 4096
    assert "\0" not in reply.message


@pytest.mark.parametrize("form", STRUCTURED_OR_EXTENDED)
@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, SIZE), (1, SIZE - 2), (1 << 20, 1 << 20), ((1 << 20) - 7, 14), (0, 1), (SIZE - 1, 1)],
)
def test_a_read_covers_its_range_exactly_once(
    sparse: tuple[NBDURI, bytes], form: dict[str, bool], offset: int, length: int
) -> None:
    """nbd.md §7: success covers the whole request once; DONE last; holes longer than 0."""
    where, content = sparse
    with connected(where, **form) as client:
        reply = client.ask(READ, offset, length)
        assert reply.error == 0
        assert reply.assemble(offset, length) == content[offset : offset + length]
        assert [chunk.done for chunk in reply.chunks] == [False] * (len(reply.chunks) - 1) + [True]


@pytest.mark.parametrize("form", STRUCTURED_OR_EXTENDED)
def test_holes_are_few_and_large(sparse: tuple[NBDURI, bytes], form: dict[str, bool]) -> None:
    """nbd.md §7: prefer few chunks, multiples of 512."""
    where, _ = sparse
    with connected(where, **form) as client:
        reply = client.ask(READ, 0, SIZE)
        assert HOLE in reply.kinds
        assert len(reply.content) <= 4
        assert all(
            start % 512 == size % 512 == 0 for start, size in (x.span for x in reply.content)
        )


@pytest.mark.parametrize("form", STRUCTURED_OR_EXTENDED)
@pytest.mark.parametrize("length", [1, 65536, 1 << 20, SIZE])
def test_df_means_one_chunk_of_content(
    sparse: tuple[NBDURI, bytes], form: dict[str, bool], length: int
) -> None:
    """nbd.md §7: DF: at most one content chunk, DATA if mixed; MUST work up to 65536 bytes."""
    where, content = sparse
    offset = max(0, (1 << 20) - length // 2)
    with connected(where, **form) as client:
        reply = client.ask(READ, offset, length, DF)
        assert reply.error == 0
        assert [chunk.kind for chunk in reply.content] == [DATA]
        assert reply.assemble(offset, length) == content[offset : offset + length]


def test_the_chunk_of_a_read_is_no_larger_than_the_maximum(tmp_path: Path) -> None:
    """nbd.md §7: chunks no larger than the advertised maximum payload and its overhead."""
    with serving(tmp_path, Hooked(4096)) as (server, uri):
        server.add("small", Hooked(SIZE), maximum_payload=4096)
        with connected(uri, "small", contexts=("base:allocation",)) as client:
            assert client.read(0, 4096) == bytes(4096)
            assert client.ask(READ, 0, 4097).error == errno.EINVAL
            assert len(client.ask(STATUS, 0, SIZE).chunks[0].payload) <= 4096 + 8


def test_an_error_inside_a_read_is_told_behind_whole_chunks(client: Raw, node: Hooked) -> None:
    """nbd.md §7: on an error the chunk that has begun is finished, then an error chunk comes."""
    assert client.write(0, noise(1 << 20)) == 0
    calls: list[int] = []

    def fails(*_: object) -> None:
        calls.append(1)
        raise OSError(errno.EIO, "bad sector")

    node.before["pread_into"] = fails
    for length in (10, 40_000, 1 << 20):
        reply = client.ask(READ, 0, length)
        assert reply.error == errno.EIO
    node.before.clear()
    assert len(calls) == 3
    client.in_step()


def test_every_extended_chunk_repeats_the_requests_offset(tmp_path: Path) -> None:
    """nbd.md §7: extended chunk: offset = the request's, of errors and status as well."""
    with (
        serving(tmp_path, Hooked(SIZE)) as (_, uri),
        connected(uri, extended=True, contexts=("base:allocation",)) as client,
    ):
        for kind, flags in ((READ, 0), (READ, 0x8000), (ZEROES, 0), (STATUS, 0), (TRIM, FUA)):
            client.ask(kind, 123_456, 4096, flags)  # `nbdraw` compares the offsets


def test_df_is_a_flag_that_must_have_been_offered(tmp_path: Path) -> None:
    """nbd.md §5, §6: DF only if SEND_DF: without chunks it is EINVAL."""
    with (
        serving(tmp_path, Hooked(SIZE)) as (_, uri),
        connected(uri, structured=False) as client,
    ):
        assert client.ask(READ, 0, 10, DF).error == errno.EINVAL


def test_structured_replies_begin_with_go_and_not_before(tmp_path: Path) -> None:
    """nbd.md §7: the form of replies is that of the last negotiation before GO."""
    with serving(tmp_path, Hooked(SIZE)) as (_, uri), haggling(uri) as client:
        assert client.outcome(option(h.STRUCTURED, b"x")) == h.INVALID
        assert client.outcome(info(h.GO)) == h.ACK
        client.send(raw_request(READ, 0, 4, cookie=3))
        assert client.take(20)[:4] == (0x67446698).to_bytes(4)

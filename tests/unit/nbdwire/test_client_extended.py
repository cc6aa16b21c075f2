"""The client with extended headers (nbd.md §7, §8): 64 bits, and servers that abuse them."""

import errno
from collections.abc import Callable

import pytest

from nbdwire import codec
from nbdwire import constants as c
from nbdwire.client import Client
from nbdwire.errors import ProtocolError, RequestError
from nbdwire.extents import Extent
from nbdwire.negotiate_client import ClientSession
from tests.support.scripted import (
    ALL,
    BASE,
    CONTEXTS,
    DIRTY,
    EXTENDED,
    Request,
    answering,
    kinds,
    serving,
)

HUGE = 1 << 60
HUGE_SESSION = ClientSession("disk", HUGE, ALL, structured=True, extended=True, contexts=CONTEXTS)
OFFSET = 100  # of the reads below


def chunk(
    cookie: int, kind: int, payload: bytes = b"", *, done: bool = False, at: int = OFFSET
) -> bytes:
    head = codec.EXTENDED_CHUNK.pack(c.EXTENDED_REPLY_MAGIC, done, kind, cookie, at, len(payload))
    return head + payload


def data(cookie: int, offset: int, content: bytes, *, done: bool = False) -> bytes:
    return chunk(cookie, c.REPLY_OFFSET_DATA, codec.OFFSET.pack(offset) + content, done=done)


def hole(cookie: int, offset: int, size: int, *, done: bool = False) -> bytes:
    return chunk(cookie, c.REPLY_OFFSET_HOLE, codec.HOLE.pack(offset, size), done=done)


def status(
    cookie: int, context: int, *extents: tuple[int, int], done: bool = False, at: int = 0
) -> bytes:
    payload = codec.BLOCK_STATUS_EXT.pack(context, len(extents))
    payload += b"".join(codec.EXTENT_EXT.pack(*x) for x in extents)
    return chunk(cookie, c.REPLY_BLOCK_STATUS_EXT, payload, done=done, at=at)


def success(request: Request, _payload: bytes = b"") -> bytes:
    return chunk(request[2], c.REPLY_NONE, done=True, at=request[3])


def announced(cookie: int, kind: int, length: int) -> bytes:
    """The head of a chunk whose payload never comes."""
    return codec.EXTENDED_CHUNK.pack(c.EXTENDED_REPLY_MAGIC, 0, kind, cookie, OFFSET, length)


def test_only_writes_carry_a_payload_and_say_so() -> None:
    """nbd.md §8: WRITE must set PAYLOAD_LEN."""
    with serving(success, EXTENDED) as (client, peer):
        client.pwrite(b"abc", 5, fua=True)
        client.flush()
        client.trim(1, 2)
    assert kinds(peer) == [
        (c.CMD_WRITE, c.CMD_FLAG_PAYLOAD_LEN | c.CMD_FLAG_FUA, 5, 3),
        (c.CMD_FLUSH, 0, 0, 0),
        (c.CMD_TRIM, 0, 1, 2),
        (c.CMD_DISC, 0, 0, 0),
    ]


def test_lengths_above_32_bits_are_one_request() -> None:
    """nbd.md §8: effect lengths have 64 bits."""

    def answer(request: Request, _payload: bytes) -> bytes:
        if request[1] != c.CMD_BLOCK_STATUS:
            return success(request)
        both = status(request[2], 1, (HUGE // 2, 3), (HUGE // 2, 0))
        return both + status(request[2], 2, (1 << 63, 1 << 40), done=True)

    with serving(answer, HUGE_SESSION) as (client, peer):
        client.zero(0, HUGE)
        client.trim(512, HUGE - 512)
        assert client.status(0, HUGE) == {
            BASE: [Extent(0, HUGE // 2, 3), Extent(HUGE // 2, HUGE // 2, 0)],
            DIRTY: [Extent(0, HUGE, 1 << 40)],
        }
    assert kinds(peer) == [
        (c.CMD_WRITE_ZEROES, 0, 0, HUGE),
        (c.CMD_TRIM, 0, 512, HUGE - 512),
        (c.CMD_BLOCK_STATUS, 0, 0, HUGE),
        (c.CMD_DISC, 0, 0, 0),
    ]


def test_one_context_of_several_is_asked_for_with_a_payload() -> None:
    """nbd.md §8: BLOCK_STATUS with payload names the length and the ids that are wanted."""
    seen: list[bytes] = []

    def answer(request: Request, payload: bytes) -> bytes:
        seen.append(payload)
        return status(request[2], 2, (4096, 1), done=True)

    flags = ALL | c.TFLAG_BLOCK_STATUS_PAYLOAD
    session = ClientSession("d", 8192, flags, structured=True, extended=True, contexts=CONTEXTS)
    with serving(answer, session) as (client, peer):
        assert client.extents(0, 4096, DIRTY) == [Extent(0, 4096, 1)]
    assert seen == [codec.status_filter(4096, [2])]
    assert kinds(peer)[0] == (c.CMD_BLOCK_STATUS, c.CMD_FLAG_PAYLOAD_LEN, 0, len(seen[0]))


def test_data_and_holes_fill_a_read() -> None:
    def reply(n: int) -> list[bytes]:
        return [data(n, 104, b"cd"), hole(n, 106, 2), data(n, 100, b"abxy"), chunk(n, 0, done=True)]

    with answering(reply, EXTENDED) as client:
        assert client.pread(8, OFFSET) == b"abxycd\0\0"


def test_an_error_chunk_has_its_words() -> None:
    payload = codec.error_payload(c.NBD_EIO, "bad sector")
    with answering(lambda n: [chunk(n, c.REPLY_ERROR, payload, done=True)], EXTENDED) as client:
        for _ in range(2):
            with pytest.raises(RequestError, match="bad sector") as caught:
                client.pread(8, OFFSET)
            assert caught.value.errno == errno.EIO


HOSTILE: dict[str, Callable[[int], list[bytes]]] = {
    "a simple reply": lambda n: [codec.simple_reply(n), bytes(100)],
    "a structured chunk": lambda n: [codec.none_chunk(n), bytes(40)],
    "another cookie": lambda n: [data(n + 1, 100, bytes(100), done=True)],
    "another offset in the header": lambda n: [chunk(n, c.REPLY_NONE, done=True, at=99)],
    "data before the request": lambda n: [data(n, 99, bytes(10))],
    "data behind the request": lambda n: [data(n, 195, bytes(6))],
    "data of 2^63 bytes": lambda n: [announced(n, c.REPLY_OFFSET_DATA, 1 << 63)],
    "overlap": lambda n: [data(n, 100, bytes(50)), hole(n, 149, 51)],
    "a missing chunk": lambda n: [data(n, 100, bytes(99)), chunk(n, c.REPLY_NONE, done=True)],
    "none with a payload": lambda n: [chunk(n, c.REPLY_NONE, b"x", done=True)],
    "none that is not the last": lambda n: [chunk(n, c.REPLY_NONE)],
    "an error of 2^64 bytes": lambda n: [announced(n, c.REPLY_ERROR, (1 << 64) - 1)],
    "errors without end": lambda n: [chunk(n, c.REPLY_ERROR, codec.error_payload(5, ""))] * 2000,
    "block status": lambda n: [status(n, 1, (100, 0), done=True, at=OFFSET)],
    "unknown type": lambda n: [chunk(n, 77, bytes(20))],
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_answer_to_a_read_ends_the_connection(name: str) -> None:
    """nbd.md §7; CVE-2017-2630 is the table's example: a client bounds replies too."""
    with answering(HOSTILE[name], EXTENDED) as client:

        def read_twice() -> bytes:
            return client.pread(100, OFFSET) + client.pread(100, OFFSET)

        with pytest.raises(ProtocolError) as caught:
            read_twice()
        assert "\n" not in str(caught.value)


def compact_status(n: int) -> list[bytes]:
    payload = codec.U32.pack(1) + codec.EXTENT.pack(100, 0)
    return [chunk(n, c.REPLY_BLOCK_STATUS, payload, done=True, at=0)]


def miscounted(n: int) -> list[bytes]:
    payload = codec.BLOCK_STATUS_EXT.pack(1, 2) + codec.EXTENT_EXT.pack(100, 0)
    return [chunk(n, c.REPLY_BLOCK_STATUS_EXT, payload, done=True, at=0)]


def too_many(n: int) -> list[bytes]:
    length = 8 + 16 * ((1 << 20) + 1)
    return [codec.EXTENDED_CHUNK.pack(c.EXTENDED_REPLY_MAGIC, 0, 6, n, 0, length)]


HOSTILE_STATUS: dict[str, Callable[[int], list[bytes]]] = {
    "compact descriptors": compact_status,
    "a wrong count": miscounted,
    "too many extents": too_many,
    "no extent": lambda n: [status(n, 1)],
    "an extent of no length": lambda n: [status(n, 1, (0, 0), (100, 0))],
    "half an extent": lambda n: [chunk(n, c.REPLY_BLOCK_STATUS_EXT, bytes(31), at=0)],
    "a context is missing": lambda n: [status(n, 1, (100, 0), done=True)],
    "a context twice": lambda n: [status(n, 1, (100, 0)), status(n, 1, (100, 0))],
    "a context that nobody asked for": lambda n: [status(n, 3, (100, 0))],
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", HOSTILE_STATUS)
def test_a_hostile_block_status_ends_the_connection(name: str) -> None:
    """nbd.md §7, §8, §11; CVE-2023-5871."""
    with answering(HOSTILE_STATUS[name], EXTENDED) as client, pytest.raises(ProtocolError):
        client.extents(0, 1000)


def test_a_million_extents_are_a_bounded_list() -> None:
    """nbd.md §11: the protocol allows 2^20 in a chunk; what is kept of them is bounded."""
    many = codec.EXTENT_EXT.pack(1, 0) + codec.EXTENT_EXT.pack(1, 1)
    payload = codec.BLOCK_STATUS_EXT.pack(1, 1 << 20) + many * (1 << 19)
    session = ClientSession(
        "disk", HUGE, ALL, structured=True, extended=True, contexts=((1, BASE),)
    )

    def reply(n: int) -> list[bytes]:
        return [chunk(n, c.REPLY_BLOCK_STATUS_EXT, payload, done=True, at=0)]

    with answering(reply, session) as client:
        for _ in range(2):  # what was not kept has been read all the same
            found = client.extents(0, HUGE)
            assert len(found) == c.MAX_EXTENTS
            assert found[-1].end == c.MAX_EXTENTS


def test_a_client_is_told_the_size_that_it_may_use() -> None:
    def refused(client: Client) -> int | None:
        with pytest.raises(RequestError) as caught:
            client.zero(HUGE - 1, 2)
        return caught.value.errno

    with serving(success, HUGE_SESSION) as (client, _):
        assert refused(client) == errno.EINVAL

"""Extended headers (the protocol's experimental extension): our server."""

import errno
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from fleece.block.null import NullNode
from nbdwire.server import Server
from nbdwire.uri import NBDURI
from tests.support.faulty import Hooked
from tests.support.nbdraw import (
    BLOCK_STATUS_EXT,
    CACHE,
    FLUSH,
    FUA,
    PAYLOAD_LEN,
    READ,
    REQ_ONE,
    STATUS,
    TRIM,
    WRITE,
    ZEROES,
    Raw,
    connected,
)
from tests.support.serving import noise

SIZE = 4 << 20
MOST = 32 << 20


@pytest.fixture
def form() -> dict[str, bool]:
    return {"extended": True}


@pytest.fixture
def bare(where: NBDURI) -> Iterator[Raw]:
    """Without contexts, so without the payload filter."""
    with connected(where, extended=True) as client:
        yield client


def status_payload(length: int, *ids: int) -> bytes:
    return struct.pack(f">Q{len(ids)}I", length, *ids)


def filtered(client: Raw, payload: bytes, offset: int = 0, flags: int = 0) -> int | list[int]:
    """The error, or the ids that are answered."""
    reply = client.ask(STATUS, offset, len(payload), flags | PAYLOAD_LEN, payload)
    return reply.error or sorted(reply.statuses())


def test_a_write_must_say_that_it_has_a_payload(client: Raw) -> None:
    """nbd.md §8: WRITE must set PAYLOAD_LEN; without it there is no payload, and EINVAL."""
    client.send(client.form(WRITE, 0, 4096, flags=PAYLOAD_LEN, cookie=1))  # the flag is cleared
    assert client.reply().error == errno.EINVAL
    assert client.write(0, noise(4096)) == 0
    assert client.read(0, 4096) == noise(4096)


@pytest.mark.parametrize("kind", [READ, FLUSH, TRIM, CACHE, ZEROES, 8, 77])
@pytest.mark.parametrize("length", [1, 4096, 1 << 20])
def test_a_payload_where_none_belongs_is_consumed(client: Raw, kind: int, length: int) -> None:
    """nbd.md §8: a payload on a command that knows none: consume it, EINVAL, stay in sync."""
    payload = client.form(FLUSH, cookie=99) * (length // 32 + 1)  # looks like requests
    reply = client.ask(kind, 0, length, PAYLOAD_LEN, payload[:length])
    assert reply.error == errno.EINVAL
    client.in_step()


@pytest.mark.parametrize("kind", [READ, WRITE, TRIM, ZEROES, STATUS])
@pytest.mark.parametrize("length", [MOST + 1, 1 << 40, (1 << 64) - 1])
def test_a_payload_above_the_maximum_ends_the_connection(
    client: Raw, kind: int, length: int
) -> None:
    """nbd.md §8: payload above the maximum: hard disconnect, before it is read or allocated."""
    flags = 0 if kind == WRITE else PAYLOAD_LEN
    assert client.is_dropped_for(client.form(kind, 0, length, flags=flags))


@pytest.mark.parametrize("kind", [TRIM, ZEROES, CACHE, STATUS])
def test_effect_lengths_have_64_bits(tmp_path: Path, kind: int) -> None:
    """nbd.md §8, §10: PAYLOAD_LEN clear: effect length, 64 bit, above the maximum payload too."""
    size = (1 << 63) - 4096
    with Server() as server:
        server.add("vast", NullNode(1 << 40))
        server.add("most", NullNode(size))
        uri = server.listen(NBDURI(socket=str(tmp_path / "vast.sock")))
        with connected(uri, "vast", extended=True, contexts=["base:allocation"]) as client:
            assert client.ask(kind, 0, 1 << 40).error == 0
            assert client.ask(kind, 512, (1 << 40) - 512).error == 0
        with connected(uri, "most", extended=True, contexts=["base:allocation"]) as client:
            assert client.ask(kind, size, 1).error != 0
            assert client.ask(STATUS, 0, size).statuses() == {1: [(size, 3)]}


def test_the_filter_answers_for_the_ids_it_names(client: Raw) -> None:
    """nbd.md §8: BLOCK_STATUS with payload (8 + 4k): answer only those ids."""
    assert client.session.flags & 1 << 12
    for ids in ([1], [2], [3], [1, 2], [3, 1], [3, 2, 1]):
        assert filtered(client, status_payload(SIZE, *ids)) == sorted(ids)
        assert filtered(client, status_payload(512, *ids), 512, REQ_ONE | FUA) == sorted(ids)
    client.in_step()


BAD_FILTERS = {
    "unknown id": status_payload(SIZE, 9),
    "one of two unknown": status_payload(SIZE, 1, 9),
    "the id 0": status_payload(SIZE, 0),
    "duplicate id": status_payload(SIZE, 1, 1),
    "no ids": status_payload(SIZE),
    "too short": b"\0\0\0\1",
    "one byte": b"x",
    "not 8 + 4k": status_payload(SIZE, 1) + b"\0",
    "more ids than there are": status_payload(SIZE, 1, 2, 3, 1),
    "a thousand ids": status_payload(SIZE, *range(1000)),
    "no effect length": status_payload(0, 1),
    "an effect length past the end": status_payload(SIZE + 1, 1),
    "an effect length of 2^64": status_payload((1 << 64) - 1, 1),
}


@pytest.mark.parametrize("name", BAD_FILTERS)
def test_a_bad_filter_is_consumed_and_invalid(client: Raw, name: str) -> None:
    """nbd.md §8: unknown or duplicate id, bad length: consume, EINVAL."""
    assert filtered(client, BAD_FILTERS[name]) == errno.EINVAL
    client.in_step()


def test_a_filter_that_was_not_offered_is_invalid(bare: Raw) -> None:
    """nbd.md §8: without BLOCK_STATUS_PAYLOAD: a payload is consumed, EINVAL."""
    assert not bare.session.flags & 1 << 12
    assert filtered(bare, status_payload(SIZE, 1)) == errno.EINVAL
    bare.in_step()


def test_status_comes_with_64_bits_always(client: Raw) -> None:
    """nbd.md §7: BLOCK_STATUS_EXT only and always with ext headers."""
    for length in (1, 512, SIZE):
        assert set(client.ask(STATUS, 0, length).kinds) == {BLOCK_STATUS_EXT}


def test_a_payload_may_be_split_anywhere(client: Raw, node: Hooked) -> None:
    """nbd.md §8, §2: requests with payloads may come byte by byte."""
    text = client.make(WRITE, 0, 20, 0, noise(20))
    text += client.make(STATUS, 0, 12, PAYLOAD_LEN, status_payload(SIZE, 2))
    text += client.make(TRIM, 0, 5, PAYLOAD_LEN, b"extra")
    for start in range(len(text)):
        client.send(text[start : start + 1])
    replies = [client.reply() for _ in range(3)]
    assert sorted(reply.error for reply in replies) == [0, 0, errno.EINVAL]
    client.in_step()

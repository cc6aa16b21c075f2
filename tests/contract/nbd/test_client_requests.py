"""The protocol's transmission phase, from the client's side, with a server that is scripted."""

import errno
import struct
from collections.abc import Callable
from dataclasses import replace

import pytest

from nbdwire.errors import NBDError, ProtocolError, RequestError
from nbdwire.extents import Extent
from nbdwire.negotiate_client import ClientSession
from tests.support.nbdraw import (
    CACHE,
    DISC,
    FLUSH,
    FUA,
    PAYLOAD_LEN,
    READ,
    STATUS,
    TRIM,
    WRITE,
    ZEROES,
)
from tests.support.scripted import (
    BASE,
    CONTEXTS,
    DIRTY,
    EXTENDED,
    PLAIN,
    SIZE,
    STRUCTURED,
    Request,
    kinds,
    serving,
)

SESSIONS = {"simple": PLAIN, "structured": STRUCTURED, "extended": EXTENDED}
CHUNKED = {"structured": STRUCTURED, "extended": EXTENDED}
READ_ONLY, FLAG_FUA = 1 << 1, 1 << 3


@pytest.fixture(params=sorted(SESSIONS))
def session(request: pytest.FixtureRequest) -> ClientSession:
    return SESSIONS[request.param]


@pytest.fixture(params=sorted(CHUNKED))
def chunked(request: pytest.FixtureRequest) -> ClientSession:
    return CHUNKED[request.param]


def simple(request: Request, error: int = 0) -> bytes:
    return struct.pack(">IIQ", 0x67446698, error, request[2])


def chunk(
    session: ClientSession, request: Request, kind: int, payload: bytes = b"", done: bool = True
) -> bytes:
    _, _, cookie, offset, _ = request
    if session.extended:
        head = struct.pack(">IHHQQQ", 0x6E8A278C, done, kind, cookie, offset, len(payload))
    else:
        head = struct.pack(">IHHQI", 0x668E33EF, done, kind, cookie, len(payload))
    return head + payload


def success(session: ClientSession) -> Callable[[Request, bytes], bytes]:
    """Answers everything; reads are zeroes, and all status is 0."""

    def answer(request: Request, _: bytes) -> bytes:
        _, kind, _, offset, length = request
        if kind == READ:
            if not session.structured:
                return simple(request) + bytes(length)
            return chunk(session, request, 1, struct.pack(">Q", offset) + bytes(length))
        if kind == STATUS:
            parts = [status(session, request, n, [(length, 0)], False) for n, _ in CONTEXTS]
            return b"".join(parts) + chunk(session, request, 0)
        return chunk(session, request, 0) if session.extended else simple(request)

    return answer


def status(
    session: ClientSession,
    request: Request,
    number: int,
    extents: list[tuple[int, int]],
    done: bool = True,
) -> bytes:
    if session.extended:
        payload = struct.pack(">II", number, len(extents))
        payload += b"".join(struct.pack(">QQ", *extent) for extent in extents)
        return chunk(session, request, 6, payload, done)
    payload = struct.pack(">I", number) + b"".join(struct.pack(">II", *x) for x in extents)
    return chunk(session, request, 5, payload, done)


def test_every_verb_is_its_command(session: ClientSession) -> None:
    """nbd.md §6: type, flags, offset, length; PAYLOAD_LEN on WRITE with extended headers."""
    payload = PAYLOAD_LEN if session.extended else 0
    with serving(success(session), session) as (client, peer):
        client.pread(512, 1024)
        client.pwrite(b"x" * 512, 0)
        client.pwrite(b"x" * 512, 0, fua=True)
        client.flush()
        client.trim(0, 4096)
        client.cache(0, 4096)
        client.zero(0, 4096)
    assert kinds(peer) == [
        (READ, 0, 1024, 512),
        (WRITE, payload, 0, 512),
        (WRITE, payload | FUA, 0, 512),
        (FLUSH, 0, 0, 0),
        (TRIM, 0, 0, 4096),
        (CACHE, 0, 0, 4096),
        (ZEROES, 0, 0, 4096),
        (DISC, 0, 0, 0),
    ]


def test_the_end_is_disc_and_no_reply_is_waited_for(session: ClientSession) -> None:
    """nbd.md §6: DISC: no reply."""
    with serving(success(session), session) as (client, peer):
        client.flush()
    assert [kind for kind, _, _, _ in kinds(peer)][-1] == DISC


def test_cookies_in_flight_differ(session: ClientSession) -> None:
    """nbd.md §6: cookies are 64-bit values of the client's, unique in flight."""
    with serving(success(session), session) as (client, peer):
        for _ in range(20):
            client.flush()
            client.pread(1, 0)
    cookies = [request[2] for request in peer.requests[:-1]]
    assert len(set(cookies)) == len(cookies)


@pytest.mark.parametrize("most", [4096, 65536, 1 << 18])
def test_no_payload_is_above_the_maximum(session: ClientSession, most: int) -> None:
    """nbd.md §10: reads and writes are cut at the maximum payload that was told."""
    small = replace(session, maximum_payload=most)
    with serving(success(small), small) as (client, peer):
        client.pread(SIZE, 0)
        client.pwrite(bytes(SIZE), 0)
    lengths = [length for kind, _, _, length in kinds(peer) if kind in (READ, WRITE)]
    assert max(lengths) == most
    assert sum(lengths) == 2 * SIZE


def test_nothing_is_sent_that_was_not_offered(session: ClientSession) -> None:
    """nbd.md §5, §6: no FUA without SEND_FUA, no write to a read-only export."""
    bare = replace(session, flags=1)
    with serving(success(bare), bare) as (client, peer):
        client.pwrite(b"x", 0)
        for call in (client.flush, lambda: client.trim(0, 1), lambda: client.cache(0, 1)):
            with pytest.raises(RequestError):
                call()
    assert {flags & FUA for _, flags, _, _ in kinds(peer)} == {0}
    fixed = replace(session, flags=session.flags | READ_ONLY)
    with serving(success(fixed), fixed) as (client, peer):
        for change in (
            lambda: client.pwrite(b"x", 0),
            lambda: client.zero(0, 1),
            lambda: client.trim(0, 1),
        ):
            with pytest.raises(RequestError) as caught:
                change()
            assert caught.value.errno == errno.EPERM
    assert [kind for kind, _, _, _ in kinds(peer)] == [DISC]


@pytest.mark.parametrize("number", [1, 5, 12, 22, 28, 75, 95, 108, 4, 999, 0xFFFF_FFFF])
def test_an_error_is_that_requests_and_unknown_ones_are_einval(
    session: ClientSession, number: int
) -> None:
    """nbd.md §12: eight numbers; others are EINVAL; the connection goes on."""
    known = {95: errno.EOPNOTSUPP, 108: errno.ESHUTDOWN}
    legal = {1, 5, 12, 22, 28, 75}
    good = success(session)

    def answer(request: Request, payload: bytes) -> bytes:
        if request[1] != TRIM:
            return good(request, payload)
        if not session.structured:
            return simple(request, number)
        return chunk(session, request, 0x8001, struct.pack(">IH", number, 3) + b"why")

    with serving(answer, session) as (client, _):
        with pytest.raises(RequestError) as caught:
            client.trim(0, 512)
        assert caught.value.errno == known.get(number, number if number in legal else errno.EINVAL)
        assert client.pread(10, 0) == bytes(10)


def test_a_status_that_runs_past_the_request_is_cut(chunked: ClientSession) -> None:
    """nbd.md §11: the last extent may run past the requested length."""

    def answer(request: Request, _: bytes) -> bytes:
        first = status(chunked, request, 1, [(100, 0), (1 << 20, 3)], False)
        return first + status(chunked, request, 2, [(1 << 20, 1)])

    with serving(answer, chunked) as (client, _):
        assert client.extents(512, 1000, BASE) == [Extent(512, 100, 0), Extent(612, 900, 3)]


def test_fewer_extents_than_asked_for_are_fine(chunked: ClientSession) -> None:
    """nbd.md §11: at least one extent; fewer than asked is fine: nothing is made up behind."""

    def answer(request: Request, _: bytes) -> bytes:
        return status(chunked, request, 1, [(10, 2)], False) + status(
            chunked, request, 2, [(10, 1)]
        )

    with serving(answer, chunked) as (client, _):
        assert client.extents(0, 4096, DIRTY)[0] == Extent(0, 10, 1)


Bad = Callable[[ClientSession, Request], bytes]
HOSTILE: dict[str, Bad] = {
    "a foreign magic": lambda _s, r: struct.pack(">IIQ", 0x12345678, 0, r[2]) + bytes(64),
    "another cookie": lambda s, r: success(s)((r[0], r[1], r[2] ^ 1, r[3], r[4]), b""),
    "half a read": lambda s, r: chunk(s, r, 1, struct.pack(">Q", r[3]) + bytes(r[4] - 1)),
    "more than was asked": lambda s, r: chunk(s, r, 1, struct.pack(">Q", r[3]) + bytes(r[4] + 1)),
    "data before the range": lambda s, r: chunk(s, r, 1, struct.pack(">Q", r[3] - 1) + bytes(r[4])),
    "a hole of nothing": lambda s, r: chunk(s, r, 2, struct.pack(">QI", r[3], 0)),
    "a hole behind the range": lambda s, r: chunk(s, r, 2, struct.pack(">QI", r[3], r[4] + 1)),
    "everything twice": lambda s, r: chunk(s, r, 2, struct.pack(">QI", r[3], r[4]), False) * 2,
    "only NONE": lambda s, r: chunk(s, r, 0),
    "NONE with a payload": lambda s, r: chunk(s, r, 0, b"x"),
    "an error without a number": lambda s, r: chunk(s, r, 0x8001, struct.pack(">IH", 0, 0)),
    "a message behind the chunk": lambda s, r: chunk(s, r, 0x8001, struct.pack(">IH", 5, 99)),
    "an error elsewhere": lambda s, r: chunk(s, r, 0x8002, struct.pack(">IHQ", 5, 0, r[3] + r[4])),
    "status of a read": lambda s, r: status(s, r, 1, [(r[4], 0)]),
    "an unknown chunk": lambda s, r: chunk(s, r, 99, bytes(20)),
    "a simple reply": lambda _s, r: simple(r) + bytes(r[4]),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_an_answer_that_is_none_ends_the_connection(chunked: ClientSession, name: str) -> None:
    """nbd.md §7: the table of chunks: each is checked against the request."""
    with serving(lambda r, _: HOSTILE[name](chunked, r), chunked) as (client, _):
        buffer = bytearray(b"\xaa" * 300)

        def read_and_go_on() -> None:
            client.pread_into(memoryview(buffer)[100:200], 512)
            client.flush()

        with pytest.raises(ProtocolError) as caught:
            read_and_go_on()
        assert "\n" not in str(caught.value)
        assert buffer[:100] == buffer[200:] == b"\xaa" * 100
        with pytest.raises(NBDError):
            client.flush()


@pytest.mark.parametrize(("session", "kind"), [(STRUCTURED, 6), (EXTENDED, 5)])
def test_a_chunk_of_the_wrong_status_form_ends_the_connection(
    session: ClientSession, kind: int
) -> None:
    """nbd.md §7: BLOCK_STATUS_EXT only and always with extended headers."""
    payload = struct.pack(">II", 1, 1) + bytes(16)
    with (
        serving(lambda request, _: chunk(session, request, kind, payload), session) as (client, _),
        pytest.raises(ProtocolError),
    ):
        client.extents(0, 512, BASE)


def test_an_extended_reply_must_repeat_the_offset() -> None:
    """nbd.md §7: extended chunk: offset = the request's."""

    def answer(request: Request, _: bytes) -> bytes:
        flags, kind, cookie, offset, length = request
        return chunk(EXTENDED, (flags, kind, cookie, offset + 512, length), 0)

    with serving(answer, EXTENDED) as (client, _), pytest.raises(ProtocolError):
        client.trim(0, 512)

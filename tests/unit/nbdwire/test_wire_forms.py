"""What one side serialises the other side parses: every structure of the three forms.

nbd.md §7, §8. The server packs with `wire` and `codec`; the client reads with `ReplyReader`.
"""

import itertools
import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdwire import codec, status
from nbdwire import constants as c
from nbdwire.client import Client
from nbdwire.errors import RequestError, from_wire
from nbdwire.extents import Extent
from nbdwire.negotiate_client import ClientSession
from nbdwire.wire import EXTENDED, SIMPLE, STRUCTURED, Wire, choose
from tests.support.scripted import CONTEXTS, SIZE, serving
from tests.support.scripted import EXTENDED as EXTENDED_SESSION
from tests.support.scripted import PLAIN as PLAIN_SESSION
from tests.support.scripted import STRUCTURED as STRUCTURED_SESSION

MODEST = settings(derandomize=True, deadline=None, max_examples=60)
FORMS: dict[str, tuple[Wire, ClientSession]] = {
    "simple": (SIMPLE, PLAIN_SESSION),
    "structured": (STRUCTURED, STRUCTURED_SESSION),
    "extended": (EXTENDED, EXTENDED_SESSION),
}
CHUNKED = ["structured", "extended"]
u16, u32, u64 = (st.integers(0, (1 << bits) - 1) for bits in (16, 32, 64))
WIRE_ERRORS = [1, 5, 12, 22, 28, 75, 95, 108]


def ask(client: Client, kind: int) -> bytes:
    """A request of 4096 bytes from 512; what was read."""
    if kind == c.CMD_READ:
        return client.pread(4096, 512)
    client.trim(512, 4096)
    return b""


@MODEST
@given(u16, u16, u64, u64, u32)
def test_requests_unpack_to_what_was_packed(
    flags: int, kind: int, cookie: int, offset: int, length: int
) -> None:
    """nbd.md §6, §8: compact 28 bytes, extended 32, the same fields in the same order."""
    for form in (SIMPLE, STRUCTURED, EXTENDED):
        fields = form.request_magic, flags, kind, cookie, offset, length
        data = form.request.pack(*fields)
        assert len(data) == (32 if form.extended else 28)
        assert form.request.unpack(data) == fields
        assert data == struct.pack(">IHHQQQ" if form.extended else ">IHHQQI", *fields)


def test_the_form_is_chosen_by_what_was_negotiated() -> None:
    """nbd.md §8: extended headers take precedence."""
    assert choose(False, False) is SIMPLE
    assert choose(True, False) is STRUCTURED
    assert choose(False, True) is choose(True, True) is EXTENDED


@pytest.mark.parametrize("form", FORMS)
def test_a_success_is_read_as_one(form: str) -> None:
    """nbd.md §7: simple, or NONE with DONE."""
    wire, session = FORMS[form]
    with serving(lambda x, _: wire.done(x[2], x[3]), session) as (client, _):
        ask(client, c.CMD_TRIM)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("number", WIRE_ERRORS)
@pytest.mark.parametrize("text", ["", "no", "ö" * 3000, "a\0b"])
def test_an_error_is_read_with_its_number_and_text(form: str, number: int, text: str) -> None:
    """nbd.md §7, §12: ERROR and ERROR_OFFSET, with a message where there are chunks."""
    wire, session = FORMS[form]
    places = iter((None, 512, 4607))

    def reply(request: tuple[int, int, int, int, int], _: bytes) -> bytes:
        return wire.error(request[2], request[3], number, text, next(places))

    with serving(reply, session) as (client, _):
        for _ in range(3):
            with pytest.raises(RequestError) as caught:
                ask(client, c.CMD_READ)
            assert caught.value.errno == from_wire(number)
            if wire.chunked and text:
                assert codec.clip_string(text).decode() in str(caught.value)


pieces = st.lists(st.integers(1, 4095), unique=True, max_size=6).map(
    lambda cuts: [0, *sorted(cuts), 4096]
)


@pytest.mark.parametrize("form", CHUNKED)
@settings(derandomize=True, deadline=None, max_examples=25)
@given(borders=pieces, holes=st.integers(0, 127), shuffle=st.randoms())
def test_data_and_holes_in_any_order_are_the_bytes(
    form: str, borders: list[int], holes: int, shuffle: random.Random
) -> None:
    """nbd.md §7: OFFSET_DATA and OFFSET_HOLE, any order; the last is DONE."""
    content = random.Random(1).randbytes(4096)
    wire, session = FORMS[form]
    runs = list(itertools.pairwise(borders))
    kinds = [bool(holes >> index & 1) for index in range(len(runs))]
    expected = b"".join(
        bytes(stop - start) if hole else content[start:stop]
        for (start, stop), hole in zip(runs, kinds, strict=True)
    )
    order = list(range(len(runs)))
    shuffle.shuffle(order)

    def reply(request: tuple[int, int, int, int, int], _: bytes) -> bytes:
        _, _, cookie, offset, _ = request
        parts = []
        for index in order:
            start, stop = runs[index]
            done = c.REPLY_FLAG_DONE if index == order[-1] else 0
            at = offset + start
            if kinds[index]:
                parts.append(wire.hole(cookie, offset, at, stop - start, done))
            else:
                parts.append(wire.data(cookie, offset, at, stop - start, done))
                parts.append(content[start:stop])
        return b"".join(parts)

    with serving(reply, session) as (client, _):
        assert client.pread(4096, 512) == expected


@pytest.mark.parametrize("form", FORMS)
def test_data_in_one_piece_is_the_bytes(form: str) -> None:
    """nbd.md §7: the data follow the head of their form."""
    wire, session = FORMS[form]
    content = bytes(range(256)) * 16
    head = wire.data(1, 512, 512, 4096)
    assert len(head) == wire.data_head
    with serving(lambda x, _: wire.data(x[2], x[3], x[3], x[4]) + content, session) as (client, _):
        assert client.pread(4096, 512) == content


@pytest.mark.parametrize("form", CHUNKED)
@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 5000), min_size=1, max_size=40),
    statuses=st.lists(st.integers(0, (1 << 32) - 1), min_size=40, max_size=40),
)
def test_block_status_is_read_as_it_was_sent(
    form: str, lengths: list[int], statuses: list[int]
) -> None:
    """nbd.md §7: BLOCK_STATUS with 32 bits, BLOCK_STATUS_EXT with 64."""
    wire, session = FORMS[form]
    top = 32 if wire.extended else 0
    extents, position = [], 4096
    for length, flags in zip(lengths, statuses, strict=False):
        extents.append(Extent(position, length, flags << top))
        position += length
    total = position - 4096
    expected = status.collect(extents, len(extents))

    def reply(request: tuple[int, int, int, int, int], _: bytes) -> bytes:
        _, _, cookie, offset, _ = request
        chunks = [wire.status(cookie, offset, CONTEXTS[0][0], extents, 0)]
        chunks.append(wire.status(cookie, offset, CONTEXTS[1][0], extents))
        return b"".join(chunks)

    assert total < SIZE
    with serving(reply, session) as (client, _):
        assert client.extents(4096, total, CONTEXTS[1][1]) == expected


def test_what_has_more_bits_than_the_form_is_not_sent() -> None:
    """nbd.md §8, §11: a status or length of 64 bits needs extended headers."""
    for extent in (Extent(0, 1 << 32, 0), Extent(0, 1, 1 << 32)):
        with pytest.raises(OverflowError):
            STRUCTURED.status(1, 0, 1, [extent])
        assert EXTENDED.status(1, 0, 1, [extent])


@MODEST
@given(u64, st.lists(u32, min_size=1, max_size=8, unique=True))
def test_a_filter_is_parsed_as_it_was_packed(length: int, numbers: list[int]) -> None:
    """nbd.md §8: BLOCK_STATUS payload: effect length, then the ids."""
    known = [status.Context(number, f"x:{number}", lambda _o, _l: []) for number in numbers]
    found, contexts = status.parse_filter(codec.status_filter(length, numbers), known)
    assert (found, [context.number for context in contexts]) == (length, numbers)


strings = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40)


@MODEST
@given(strings, st.lists(u16, max_size=20), st.lists(strings, max_size=10))
def test_option_data_parses_back(name: str, infos: list[int], queries: list[str]) -> None:
    """nbd.md §3: INFO, GO, LIST_META and SET_META: lengths, names, numbers, nothing behind."""
    fields = codec.Fields(codec.info_request(name, tuple(infos)))
    assert fields.sized_string() == name
    assert [fields.u16() for _ in range(fields.u16())] == infos
    fields.end()
    fields = codec.Fields(codec.context_request(name, tuple(queries)))
    assert fields.sized_string() == name
    assert [fields.sized_string() for _ in range(fields.u32())] == queries
    fields.end()

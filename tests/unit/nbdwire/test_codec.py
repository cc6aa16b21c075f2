from struct import Struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdwire import codec
from nbdwire import constants as c
from nbdwire.errors import ProtocolError

MODEST = settings(derandomize=True, deadline=None, max_examples=100)


@pytest.mark.parametrize(
    ("structure", "size"),
    [
        (codec.GREETING, 18),
        (codec.OPTION, 16),
        (codec.OPTION_REPLY, 20),
        (codec.EXPORT_NAME_REPLY, 10),
        (codec.INFO_EXPORT, 12),
        (codec.INFO_BLOCK_SIZE, 14),
        (codec.REQUEST, 28),
        (codec.SIMPLE_REPLY, 16),
        (codec.CHUNK, 20),
        (codec.CHUNK_OFFSET_DATA, 28),
        (codec.HOLE_CHUNK, 32),
        (codec.CHUNK_BLOCK_STATUS, 24),
    ],
)
def test_structures_have_the_sizes_of_the_specification(structure: Struct, size: int) -> None:
    assert structure.size == size


def test_a_request_looks_as_in_the_specification() -> None:
    data = codec.REQUEST.pack(c.REQUEST_MAGIC, c.CMD_FLAG_FUA, c.CMD_WRITE, 7, 0x1000, 0x200)
    assert data.hex(" ", 4) == "25609513 00010001 00000000 00000007 00000000 00001000 00000200"


def test_an_error_chunk_carries_its_message() -> None:
    data = codec.error_chunk(5, c.NBD_ENOSPC, "full")
    assert data.hex() == "668e33ef0001800100000000000000050000000a0000001c0004" + (b"full".hex())


def test_the_last_chunk_of_a_reply_is_empty_and_done() -> None:
    assert codec.none_chunk(9).hex() == "668e33ef00010000000000000000000900000000"


def test_a_hole_chunk_tells_offset_and_size() -> None:
    data = codec.hole_chunk(1, 0x2000, 0x1000, 0)
    assert data.hex() == ("668e33ef0000000200000000000000010000000c000000000000200000001000")


def test_a_simple_reply_tells_error_and_cookie() -> None:
    assert codec.simple_reply(3, c.NBD_EIO).hex() == "67446698000000050000000000000003"


def test_an_option_error_is_cut_to_the_protocols_limit() -> None:
    data = codec.option_error(c.OPT_GO, c.REP_ERR_UNKNOWN, "ü" * 4096)
    assert len(data) == codec.OPTION_REPLY.size + c.MAX_STRING
    assert data[codec.OPTION_REPLY.size :].decode() == "ü" * 2048


@MODEST
@given(st.text(), st.integers(0, 64))
def test_a_clipped_string_is_legal_and_a_prefix(text: str, limit: int) -> None:
    data = codec.clip_string(text, limit)
    assert len(data) <= limit
    assert 0 not in data
    assert text.replace("\0", "").startswith(codec.parse_string(data))


@pytest.mark.parametrize("data", [b"a\0b", b"\xff", b"x" * 4097])
def test_an_illegal_string_is_refused_without_being_repeated(data: bytes) -> None:
    with pytest.raises(ProtocolError) as caught:
        codec.parse_string(data)
    assert len(str(caught.value)) < 100
    assert "xx" not in str(caught.value)


@MODEST
@given(st.binary(max_size=40))
def test_fields_take_exactly_what_is_there(data: bytes) -> None:
    fields = codec.Fields(data)
    try:
        taken = [fields.u32(), fields.u16(), fields.u64()]
    except ProtocolError:
        assert len(data) < 14
        return
    assert taken == [
        int.from_bytes(data[:4]),
        int.from_bytes(data[4:6]),
        int.from_bytes(data[6:14]),
    ]
    assert fields.left == len(data) - 14
    if fields.left:
        with pytest.raises(ProtocolError, match="too many"):
            fields.end()
    assert fields.rest() == data[14:]
    fields.end()


def test_a_length_behind_the_end_is_refused() -> None:
    with pytest.raises(ProtocolError, match="runs past"):
        codec.Fields(b"\0\0\0\x05abcd").sized_string()


def test_context_queries_are_packed_with_their_lengths() -> None:
    data = codec.context_request("e", ("base:allocation",))
    assert data == b"\0\0\0\1e\0\0\0\1\0\0\0\x0fbase:allocation"


def test_info_requests_are_packed_with_their_number() -> None:
    assert codec.info_request("ab", (c.INFO_BLOCK_SIZE,)) == b"\0\0\0\2ab\0\1\0\3"

"""The server's half of the handshake, as transcripts of bytes."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdwire import codec
from nbdwire import constants as c
from nbdwire.errors import ProtocolError, UnknownExport
from nbdwire.negotiate import MAX_OPTIONS, ExportInfo, Negotiated, server_handshake
from tests.support.transcript import EndOfInput, parse_transcript, run

MODEST = settings(derandomize=True, deadline=None, max_examples=200)
FIXED = 3  # FIXED_NEWSTYLE and NO_ZEROES
FLAGS = c.TFLAG_HAS_FLAGS | c.TFLAG_SEND_FLUSH | c.TFLAG_SEND_DF

disk = ExportInfo(
    "disk",
    0x100000,
    FLAGS,
    description="a disk",
    contexts=("base:allocation", "qemu:dirty-bitmap:a", "qemu:dirty-bitmap:b"),
)
other = ExportInfo("other", 512, FLAGS, contexts=("base:allocation",))


@dataclass
class Shelf:
    """A catalogue; "" is ``disk``. It remembers what it was asked for."""

    exports: dict[str, ExportInfo] = field(default_factory=lambda: {"disk": disk, "other": other})
    asked: list[str] = field(default_factory=list)

    def listing(self) -> list[tuple[str, str]]:
        return [(x.name, x.description) for x in self.exports.values()]

    def lookup(self, name: str) -> ExportInfo | None:
        self.asked.append(name)
        return self.exports.get(name or "disk")


def flags(value: int = FIXED) -> bytes:
    return codec.CLIENT_FLAGS.pack(value)


def option(number: int, data: bytes = b"") -> bytes:
    return codec.option_request(number, data)


def go(name: str = "disk", *infos: int, number: int = c.OPT_GO) -> bytes:
    return option(number, codec.info_request(name, infos))


def contexts(name: str, *queries: str, number: int = c.OPT_SET_META_CONTEXT) -> bytes:
    return option(number, codec.context_request(name, queries))


STRUCTURED = option(c.OPT_STRUCTURED_REPLY)


def negotiate(*parts: bytes) -> Negotiated | None:
    return run(server_handshake(Shelf()), flags() + b"".join(parts))[0]


def replies(*parts: bytes) -> list[tuple[int, int, bytes]]:
    """(option, reply, data) of every reply to these options; the client aborts behind them."""
    _, output, rest = run(
        server_handshake(Shelf()), flags() + b"".join(parts) + option(c.OPT_ABORT)
    )
    assert not rest
    found, fields = [], codec.Fields(output[codec.GREETING.size :])
    while fields.left:
        assert fields.u64() == c.OPTION_REPLY_MAGIC
        head = fields.u32(), fields.u32()
        found.append((*head, fields.take(fields.u32())))
    assert found.pop() == (c.OPT_ABORT, c.REP_ACK, b"")
    return found


TRANSCRIPT_GO = """
S: 'NBDMAGIC' 'IHAVEOPT' 0003                           # greeting
C: 00000003
C: 'IHAVEOPT' 00000008 00000000                         # STRUCTURED_REPLY
S: 0003e889045565a9 00000008 00000001 00000000
C: 'IHAVEOPT' 0000000a 0000001f                         # SET_META_CONTEXT
C: 00000004 'disk' 00000001 0000000f 'base:allocation'
S: 0003e889045565a9 0000000a 00000004 00000013 00000001 'base:allocation'
S: 0003e889045565a9 0000000a 00000001 00000000
C: 'IHAVEOPT' 00000007 0000000c 00000004 'disk' 0001 0003   # GO, asks for BLOCK_SIZE
S: 0003e889045565a9 00000007 00000003 0000000c 0000 0000000000100000 0085
S: 0003e889045565a9 00000007 00000003 0000000e 0003 00000001 00001000 02000000
S: 0003e889045565a9 00000007 00000001 00000000
"""

TRANSCRIPT_EXPORT_NAME = """
S: 'NBDMAGIC' 'IHAVEOPT' 0003
C: 00000001                                             # wants the 124 zeroes
C: 'IHAVEOPT' 00000001 00000004 'disk'
S: 0000000000100000 0005 00*124
"""

TRANSCRIPT_ABORT = """
S: 'NBDMAGIC' 'IHAVEOPT' 0003
C: 00000003
C: 'IHAVEOPT' 00000003 00000000                         # LIST
S: 0003e889045565a9 00000003 00000002 0000000e 00000004 'disk' 61 20 'disk'
S: 0003e889045565a9 00000003 00000002 00000009 00000005 'other'
S: 0003e889045565a9 00000003 00000001 00000000
C: 'IHAVEOPT' 00000002 00000003 'bye'                   # ABORT; its data does not matter
S: 0003e889045565a9 00000002 00000001 00000000
"""


def test_a_client_that_uses_everything_enters_transmission_with_go() -> None:
    client, server = parse_transcript(TRANSCRIPT_GO)
    result, output, rest = run(server_handshake(Shelf()), client)
    assert output.hex() == server.hex()
    assert result == Negotiated(disk, True, ((1, "base:allocation"),), FLAGS)
    assert rest == b""


def test_an_old_client_enters_transmission_with_export_name() -> None:
    client, server = parse_transcript(TRANSCRIPT_EXPORT_NAME)
    result, output, _ = run(server_handshake(Shelf()), client)
    assert output.hex() == server.hex()
    assert result == Negotiated(disk, False, (), FLAGS & ~c.TFLAG_SEND_DF)


def test_a_client_that_only_lists_leaves_with_abort() -> None:
    client, server = parse_transcript(TRANSCRIPT_ABORT)
    result, output, _ = run(server_handshake(Shelf()), client)
    assert output.hex() == server.hex()
    assert result is None


def test_what_follows_go_is_left_for_the_transmission_phase() -> None:
    client, _ = parse_transcript(TRANSCRIPT_GO)
    assert run(server_handshake(Shelf()), client + b"request")[2] == b"request"


def test_export_name_leaves_the_zeroes_out_if_the_client_agreed_to() -> None:
    _, output, _ = run(server_handshake(Shelf()), flags() + option(c.OPT_EXPORT_NAME, b"disk"))
    assert output[codec.GREETING.size :] == codec.EXPORT_NAME_REPLY.pack(0x100000, 5)


@pytest.mark.parametrize("bad", [4, 0x80000000, 0x10003])
def test_handshake_flags_that_were_not_offered_end_the_connection(bad: int) -> None:
    with pytest.raises(ProtocolError, match="flags"):
        run(server_handshake(Shelf()), flags(bad))


def test_a_wrong_magic_ends_the_connection() -> None:
    with pytest.raises(ProtocolError, match="should begin"):
        negotiate(b"GET / HTTP/1.1\r\n")


@pytest.mark.parametrize("length", [c.MAX_OPTION_DATA + 1, 64 << 20, 0xFFFFFFFF])
def test_too_much_option_data_is_refused_before_any_of_it_is_read(length: int) -> None:
    with pytest.raises(ProtocolError, match=f"announces {length} bytes"):
        negotiate(codec.OPTION.pack(c.IHAVEOPT, c.OPT_GO, length))


def test_without_fixed_newstyle_only_export_name_is_legal() -> None:
    with pytest.raises(ProtocolError, match="without fixed newstyle"):
        run(server_handshake(Shelf()), flags(0) + go())
    old = flags(0) + option(c.OPT_EXPORT_NAME, b"disk")
    assert run(server_handshake(Shelf()), old)[0] is not None


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (b"nope", "no such export"),
        (b"disk\0x", "NUL"),
        (b"\xff", "UTF-8"),
        (b"x" * 4097, "longer than 4096"),
    ],
)
def test_export_name_can_only_refuse_by_closing(name: bytes, reason: str) -> None:
    handshake = server_handshake(Shelf())
    with pytest.raises((ProtocolError, UnknownExport), match=reason):
        run(handshake, flags() + option(c.OPT_EXPORT_NAME, name))


def test_the_empty_name_is_the_default_export_and_gets_its_canonical_name() -> None:
    assert replies(go("", c.INFO_NAME, number=c.OPT_INFO))[1] == (
        c.OPT_INFO,
        c.REP_INFO,
        b"\0\1disk",
    )


def test_info_answers_like_go_and_stays_in_haggling() -> None:
    infos = [c.INFO_NAME, c.INFO_DESCRIPTION, c.INFO_BLOCK_SIZE]
    told = replies(go("disk", *infos, number=c.OPT_INFO))
    _, output, _ = run(server_handshake(Shelf()), flags() + go("disk", *infos))
    as_go = b"".join(codec.option_reply(c.OPT_GO, reply, data) for _, reply, data in told)
    assert output[codec.GREETING.size :] == as_go
    assert [data[:2] for _, reply, data in told if reply == c.REP_INFO] == [
        b"\0\0",
        b"\0\1",
        b"\0\2",
        b"\0\3",
    ]


def test_an_info_that_is_wanted_many_times_is_told_once_and_unknown_ones_are_ignored() -> None:
    wanted = [c.INFO_BLOCK_SIZE] * 2000 + [77, 0xFFFF, c.INFO_EXPORT]
    told = replies(go("disk", *wanted, number=c.OPT_INFO))
    assert [data[:2] for _, reply, data in told if reply == c.REP_INFO] == [b"\0\0", b"\0\3"]


def test_block_sizes_are_told_only_to_those_who_ask() -> None:
    told = replies(go("disk", number=c.OPT_INFO))
    assert [reply for _, reply, _ in told] == [c.REP_INFO, c.REP_ACK]


def test_a_failed_go_leaves_the_haggling_alive() -> None:
    assert [x[1] for x in replies(go("nope"), option(99), go("other", number=c.OPT_INFO))] == [
        c.REP_ERR_UNKNOWN,
        c.REP_ERR_UNSUP,
        c.REP_INFO,
        c.REP_ACK,
    ]


@pytest.mark.parametrize("number", [c.OPT_PEEK_EXPORT, 99, 0xFFFFFFFF])
@pytest.mark.parametrize("data", [b"", b"x" * c.MAX_OPTION_DATA], ids=["empty", "full"])
def test_unknown_options_are_unsupported_and_their_data_is_skipped(
    number: int, data: bytes
) -> None:
    told = replies(option(number, data), option(c.OPT_STRUCTURED_REPLY))
    assert [x[:2] for x in told] == [
        (number, c.REP_ERR_UNSUP),
        (c.OPT_STRUCTURED_REPLY, c.REP_ACK),
    ]


@pytest.mark.parametrize("number", [c.OPT_LIST, c.OPT_STRUCTURED_REPLY])
def test_options_without_data_refuse_data(number: int) -> None:
    assert replies(option(number, b"x"))[0][1] == c.REP_ERR_INVALID


def test_a_refused_structured_reply_is_not_negotiated() -> None:
    result = negotiate(option(c.OPT_STRUCTURED_REPLY, b"x"), go())
    assert result is not None
    assert not result.structured


def test_df_is_offered_with_structured_replies_only() -> None:
    assert replies(go(number=c.OPT_INFO))[0][2][-2:] == b"\0\5"
    assert replies(STRUCTURED, go(number=c.OPT_INFO))[1][2][-2:] == b"\0\x85"


def test_flags_of_extensions_that_were_not_negotiated_are_masked() -> None:
    info = ExportInfo("e", 1, c.TFLAG_BLOCK_STATUS_PAYLOAD | c.TFLAG_SEND_RESIZE)
    result, _, _ = run(server_handshake(Shelf({"e": info})), flags() + STRUCTURED + go("e"))
    assert result is not None
    assert result.flags == c.TFLAG_HAS_FLAGS


@pytest.mark.parametrize("number", [c.OPT_INFO, c.OPT_GO])
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0\0\4dis",
        b"\0\0\0\4disk",
        b"\0\0\0\4disk\0",
        b"\0\0\0\4disk\0\2\0\0",
        b"\0\0\0\4disk\0\0\0",
        b"\xff\xff\xff\xffdisk\0\0",
        b"\0\0\x10\1" + b"x" * 4097 + b"\0\0",
        b"\0\0\0\6disk\0x\0\0",
        b"\0\0\0\1\xff\0\0",
    ],
)
def test_broken_info_and_go_data_is_invalid_and_stays_in_step(number: int, data: bytes) -> None:
    told = replies(option(number, data), option(c.OPT_STRUCTURED_REPLY))
    assert [x[1] for x in told] == [c.REP_ERR_INVALID, c.REP_ACK]
    assert b"disk" not in told[0][2]


def test_a_long_unknown_name_is_unknown_and_its_error_stays_short() -> None:
    told = replies(go("x" * 4096))
    assert told[0][1] == c.REP_ERR_UNKNOWN
    assert len(told[0][2]) < 256
    assert b"xx" not in told[0][2]


def selected(*parts: bytes) -> list[tuple[int, str]]:
    result = negotiate(STRUCTURED, *parts)
    assert result is not None
    return list(result.contexts)


def test_contexts_are_selected_by_their_exact_name_once() -> None:
    chosen = contexts(
        "disk", "qemu:dirty-bitmap:b", "qemu:dirty-bitmap:b", "BASE:allocation", "x:y", ""
    )
    assert selected(chosen, go()) == [(1, "qemu:dirty-bitmap:b")]


def test_wildcards_select_nothing() -> None:
    assert selected(contexts("disk", "base:", "qemu:", "qemu:dirty-bitmap:"), go()) == []


def test_contexts_of_another_export_do_not_count() -> None:
    assert selected(contexts("other", "base:allocation"), go("disk")) == []


def test_contexts_count_if_go_calls_the_same_export_by_another_name() -> None:
    assert selected(contexts("", "base:allocation"), go("disk")) == [(1, "base:allocation")]


def test_contexts_count_for_export_name_too() -> None:
    chosen = contexts("disk", "base:allocation")
    assert selected(chosen, option(c.OPT_EXPORT_NAME, b"disk")) == [(1, "base:allocation")]
    assert selected(chosen, option(c.OPT_EXPORT_NAME, b"other")) == []


@pytest.mark.parametrize(
    "second",
    [
        contexts("disk"),
        contexts("nope", "base:allocation"),
        option(c.OPT_SET_META_CONTEXT, b"rubbish"),
        contexts("other", "base:allocation"),
    ],
    ids=["none", "unknown export", "broken", "other export"],
)
def test_a_second_selection_replaces_the_first_even_if_it_fails(second: bytes) -> None:
    assert selected(contexts("disk", "base:allocation"), second, go("disk")) == []


def test_listing_contexts_does_not_change_the_selection() -> None:
    listed = contexts("disk", number=c.OPT_LIST_META_CONTEXT)
    assert selected(contexts("disk", "base:allocation"), listed, go("disk")) == [
        (1, "base:allocation")
    ]


def test_contexts_want_structured_replies_first() -> None:
    assert replies(contexts("disk", "base:allocation"))[0][1] == c.REP_ERR_INVALID


def test_the_ids_are_those_that_were_told() -> None:
    names = ["qemu:dirty-bitmap:b", "base:allocation"]
    told = replies(STRUCTURED, contexts("disk", *names))[1:-1]
    assert [(int.from_bytes(x[:4]), x[4:].decode()) for _, _, x in told] == selected(
        contexts("disk", *names), go()
    )
    assert selected(contexts("disk", *names), go()) == [
        (1, "base:allocation"),
        (2, "qemu:dirty-bitmap:b"),
    ]


@pytest.mark.parametrize(
    ("queries", "found"),
    [
        ([], ["base:allocation", "qemu:dirty-bitmap:a", "qemu:dirty-bitmap:b"]),
        (["base:"], ["base:allocation"]),
        (["qemu:"], ["qemu:dirty-bitmap:a", "qemu:dirty-bitmap:b"]),
        (["qemu:dirty-bitmap:"], ["qemu:dirty-bitmap:a", "qemu:dirty-bitmap:b"]),
        (["qemu:dirty-bitmap:a", "qemu:"], ["qemu:dirty-bitmap:a", "qemu:dirty-bitmap:b"]),
        (["qemu:dirty"], []),
        (["base"], []),
        ([""], []),
        ([":"], []),
        (["nope:"], []),
    ],
)
def test_contexts_are_listed_by_name_or_wildcard(queries: list[str], found: list[str]) -> None:
    told = replies(contexts("disk", *queries, number=c.OPT_LIST_META_CONTEXT))
    assert told.pop()[1] == c.REP_ACK
    assert [(reply, data[4:].decode()) for _, reply, data in told] == [
        (c.REP_META_CONTEXT, name) for name in found
    ]


@pytest.mark.parametrize("number", [c.OPT_LIST_META_CONTEXT, c.OPT_SET_META_CONTEXT])
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0\0\4disk",
        b"\0\0\0\4disk\0\0\0\1",
        b"\0\0\0\4disk\xff\xff\xff\xff",
        b"\0\0\0\4disk\0\0\0\1\0\0\0\5base",
        b"\0\0\0\4disk\0\0\0\0x",
        b"\0\0\0\4disk\0\0\0\1\0\0\x10\1" + b"x" * 4097,
        b"\0\0\0\4disk\0\0\0\1\0\0\0\1\xff",
    ],
)
def test_broken_context_queries_are_invalid_and_stay_in_step(number: int, data: bytes) -> None:
    told = replies(STRUCTURED, option(number, data), option(c.OPT_STRUCTURED_REPLY))
    assert [x[1] for x in told] == [c.REP_ACK, c.REP_ERR_INVALID, c.REP_ACK]


def test_contexts_of_an_unknown_export_are_unknown() -> None:
    for number in (c.OPT_LIST_META_CONTEXT, c.OPT_SET_META_CONTEXT):
        told = replies(STRUCTURED, contexts("nope", number=number))
        assert told[1][1] == c.REP_ERR_UNKNOWN


def test_an_export_that_lost_a_context_meanwhile_keeps_the_ids_of_the_others() -> None:
    shelf = Shelf()
    handshake = server_handshake(shelf)
    chosen = contexts("disk", "base:allocation", "qemu:dirty-bitmap:b")
    less = ExportInfo("disk", 1, FLAGS, contexts=("qemu:dirty-bitmap:b",))

    class Changing(Shelf):
        def lookup(self, name: str) -> ExportInfo | None:
            found = super().lookup(name)
            self.exports["disk"] = less
            return found

    handshake = server_handshake(Changing())
    result, _, _ = run(handshake, flags() + STRUCTURED + chosen + go())
    assert result is not None
    assert result.contexts == ((2, "qemu:dirty-bitmap:b"),)


def test_nobody_haggles_for_ever() -> None:
    with pytest.raises(ProtocolError, match="without choosing"):
        negotiate(option(c.OPT_LIST) * (MAX_OPTIONS + 1))


def test_the_catalogue_is_asked_for_decoded_names_only() -> None:
    shelf = Shelf()
    bad = option(c.OPT_GO, b"\0\0\0\1\xff\0\0") + option(c.OPT_INFO, b"\0\0\0\2a\0\0\0")
    run(server_handshake(shelf), flags() + bad + go("nöpe") + go("disk"))
    assert shelf.asked == ["nöpe", "disk"]


names = st.sampled_from(["", "disk", "other", "nope", "x" * 4096])
queries = st.lists(
    st.sampled_from(["base:allocation", "base:", "qemu:", "qemu:dirty-bitmap:a", "", "zz"]),
    max_size=4,
)
well_formed = st.one_of(
    st.builds(
        lambda name, infos, n: go(name, *infos, number=n),
        names,
        st.lists(st.integers(0, 5), max_size=4),
        st.sampled_from([c.OPT_INFO, c.OPT_GO]),
    ),
    st.builds(
        lambda name, wanted, n: contexts(name, *wanted, number=n),
        names,
        queries,
        st.sampled_from([c.OPT_LIST_META_CONTEXT, c.OPT_SET_META_CONTEXT]),
    ),
    st.builds(option, st.integers(0, 13), st.binary(max_size=30)),
    st.sampled_from([option(c.OPT_STRUCTURED_REPLY), option(c.OPT_LIST)]),
)
damaged = st.builds(
    lambda data, at, byte: data[: at % len(data)] + bytes([byte]) + data[at % len(data) + 1 :],
    well_formed,
    st.integers(0, 10_000),
    st.integers(0, 255),
)


@MODEST
@given(st.lists(well_formed | damaged, max_size=12), st.integers(0, 3))
def test_options_in_any_order_end_in_a_result_or_a_protocol_error(
    options: list[bytes], client_flags: int
) -> None:
    incoming = flags(client_flags) + b"".join(options)
    try:
        result, output, _ = run(server_handshake(Shelf()), incoming)
    except (ProtocolError, UnknownExport) as error:
        assert "\n" not in str(error)  # noqa: PT017
        return
    except EndOfInput as end:
        output, result = end.output, None
    if result is not None:
        assert result.export in (disk, other)
        assert {name for _, name in result.contexts} <= set(result.export.contexts)
        assert result.structured or not result.contexts
    assert len(output) < 100_000


@MODEST
@given(st.lists(well_formed, max_size=6))
def test_refusals_never_repeat_a_name_and_stay_within_the_limit(options: list[bytes]) -> None:
    try:
        _, output, _ = run(server_handshake(Shelf()), flags() + b"".join(options))
    except (ProtocolError, UnknownExport):
        return
    except EndOfInput as end:
        output = end.output
    assert b"x" * 8 not in output


def test_starttls_is_refused_where_tls_is_off_and_its_data_is_invalid() -> None:
    """nbd.md §9, NOTLS: never TLS_REQD."""
    told = replies(option(c.OPT_STARTTLS), option(c.OPT_STARTTLS, b"x"), option(c.OPT_LIST))
    assert [x[:2] for x in told[:2]] == [
        (c.OPT_STARTTLS, c.REP_ERR_POLICY),
        (c.OPT_STARTTLS, c.REP_ERR_INVALID),
    ]
    assert told[-1][1] == c.REP_ACK


def test_extended_headers_take_precedence_over_structured_replies() -> None:
    """nbd.md §8: they need no structured replies, and refuse them afterwards."""
    result = negotiate(option(c.OPT_EXTENDED_HEADERS), option(c.OPT_STRUCTURED_REPLY), go())
    assert result is not None
    assert result.extended
    told = replies(option(c.OPT_EXTENDED_HEADERS), option(c.OPT_STRUCTURED_REPLY))
    assert [x[1] for x in told] == [c.REP_ACK, c.REP_ERR_EXT_HEADER_REQD]


def test_export_name_behind_extended_headers_is_illegal() -> None:
    """nbd.md §8: GO must be used; the connection ends."""
    with pytest.raises(ProtocolError):
        run(
            server_handshake(Shelf()),
            flags() + option(c.OPT_EXTENDED_HEADERS) + option(c.OPT_EXPORT_NAME, b"disk"),
        )

"""The client's half of the handshake, as transcripts of bytes."""

from collections.abc import Callable
from typing import TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdwire import codec
from nbdwire import constants as c
from nbdwire.errors import (
    NBDError,
    NegotiationError,
    PolicyRefused,
    ProtocolError,
    ShuttingDown,
    TLSRequired,
    UnknownExport,
)
from nbdwire.handshake import UPGRADE, Handshake
from nbdwire.negotiate import ExportInfo, server_handshake
from nbdwire.negotiate_client import (
    ClientSession,
    client_describe,
    client_handshake,
    client_list,
    client_list_contexts,
    printable,
)
from tests.support.transcript import EndOfInput, parse_transcript, run

T = TypeVar("T")
MODEST = settings(derandomize=True, deadline=None, max_examples=200)
CONTEXT = "base:allocation"

TRANSCRIPT_GO = """
S: 'NBDMAGIC' 'IHAVEOPT' 0003
C: 00000003
C: 'IHAVEOPT' 0000000b 00000000                         # EXTENDED_HEADERS: unsupported
S: 0003e889045565a9 0000000b 80000001 00000000
C: 'IHAVEOPT' 00000008 00000000                         # STRUCTURED_REPLY
S: 0003e889045565a9 00000008 00000001 00000000
C: 'IHAVEOPT' 0000000a 0000001b                         # SET_META_CONTEXT, export ""
C: 00000000 00000001 0000000f 'base:allocation'
S: 0003e889045565a9 0000000a 00000004 00000013 00000007 'base:allocation'
S: 0003e889045565a9 0000000a 00000001 00000000
C: 'IHAVEOPT' 00000007 0000000c 00000000 0003 0001 0002 0003
S: 0003e889045565a9 00000007 00000003 0000000c 0000 0000000000100000 0085
S: 0003e889045565a9 00000007 00000003 00000006 0001 'disk'
S: 0003e889045565a9 00000007 00000003 00000005 0002 'nix'
S: 0003e889045565a9 00000007 00000003 0000000e 0003 00000200 00001000 00100000
S: 0003e889045565a9 00000007 00000003 00000003 0063 00  # an info of the future
S: 0003e889045565a9 00000007 00000001 00000000
"""

TRANSCRIPT_OLD = """
S: 'NBDMAGIC' 'IHAVEOPT' 0001
C: 00000001
C: 'IHAVEOPT' 0000000b 00000000                         # EXTENDED_HEADERS: unsupported
S: 0003e889045565a9 0000000b 80000001 00000000
C: 'IHAVEOPT' 00000008 00000000
S: 0003e889045565a9 00000008 80000001 00000000          # structured replies: unsupported
C: 'IHAVEOPT' 00000007 00000010 00000004 'disk' 0003 0001 0002 0003
S: 0003e889045565a9 00000007 80000001 00000000          # GO: unsupported
C: 'IHAVEOPT' 00000001 00000004 'disk'
S: 0000000000100000 0001 00*124
"""

TRANSCRIPT_NOT_FIXED = """
S: 'NBDMAGIC' 'IHAVEOPT' 0000
C: 00000000
C: 'IHAVEOPT' 00000001 00000004 'disk'
S: 0000000000100000 0003 00*124
"""

TRANSCRIPT_LIST = """
S: 'NBDMAGIC' 'IHAVEOPT' 0003
C: 00000003
C: 'IHAVEOPT' 00000003 00000000
S: 0003e889045565a9 00000003 00000002 0000000b 00000004 'disk' 'nix'
S: 0003e889045565a9 00000003 00000002 00000004 00000000
S: 0003e889045565a9 00000003 00000001 00000000
C: 'IHAVEOPT' 00000002 00000000
"""

TRANSCRIPT_LIST_CONTEXTS = """
S: 'NBDMAGIC' 'IHAVEOPT' 0003
C: 00000003
C: 'IHAVEOPT' 00000008 00000000
S: 0003e889045565a9 00000008 00000001 00000000
C: 'IHAVEOPT' 00000009 00000015 00000004 'disk' 00000001 00000005 'base:'
S: 0003e889045565a9 00000009 00000004 00000013 00000000 'base:allocation'
S: 0003e889045565a9 00000009 00000001 00000000
C: 'IHAVEOPT' 00000002 00000000
"""


def test_everything_that_is_offered_is_taken() -> None:
    client, server = parse_transcript(TRANSCRIPT_GO)
    result, output, _ = run(client_handshake("", [CONTEXT]), server)
    assert output.hex() == client.hex()
    assert result == ClientSession(
        "disk", 0x100000, 0x85, "nix", 512, 4096, 1 << 20, True, ((7, CONTEXT),)
    )


def test_a_server_without_go_is_entered_by_export_name() -> None:
    client, server = parse_transcript(TRANSCRIPT_OLD)
    result, output, rest = run(client_handshake("disk", [CONTEXT]), server)
    assert output.hex() == client.hex()
    assert result == ClientSession("disk", 0x100000, 1)
    assert rest == b""


def test_a_server_without_fixed_newstyle_is_entered_by_export_name() -> None:
    client, server = parse_transcript(TRANSCRIPT_NOT_FIXED)
    result, output, rest = run(client_handshake("disk", [CONTEXT]), server)
    assert output.hex() == client.hex()
    assert result == ClientSession("disk", 0x100000, 3)
    assert rest == b""


def test_a_list_has_names_and_descriptions() -> None:
    client, server = parse_transcript(TRANSCRIPT_LIST)
    result, output, _ = run(client_list(), server)
    assert output.hex() == client.hex()
    assert result == [("disk", "nix"), ("", "")]


def test_the_contexts_of_an_export_are_listed() -> None:
    client, server = parse_transcript(TRANSCRIPT_LIST_CONTEXTS)
    result, output, _ = run(client_list_contexts("disk", ["base:"]), server)
    assert output.hex() == client.hex()
    assert result == [CONTEXT]


GREETING = codec.GREETING.pack(c.NBDMAGIC, c.IHAVEOPT, 3)
EXPORT_INFO = codec.INFO_EXPORT.pack(c.INFO_EXPORT, 512, 1)


def reply(option: int, kind: int, data: bytes = b"") -> bytes:
    return codec.option_reply(option, kind, data)


NOT_EXTENDED = reply(11, c.REP_ERR_UNSUP)


def go(*replies: bytes) -> ClientSession:
    """The result of a plain GO that the server answers with ``replies``."""
    server = GREETING + b"".join(replies)
    return run(client_handshake("disk", structured=False), server)[0]


def test_structured_replies_are_not_asked_for_if_they_are_not_wanted() -> None:
    session = go(reply(7, c.REP_INFO, EXPORT_INFO), reply(7, c.REP_ACK))
    assert session == ClientSession("disk", 512, 1)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (c.REP_ERR_UNKNOWN, UnknownExport),
        (c.REP_ERR_POLICY, PolicyRefused),
        (c.REP_ERR_TLS_REQD, TLSRequired),
        (c.REP_ERR_INVALID, NegotiationError),
        (c.REP_ERR_SHUTDOWN, ShuttingDown),
        (c.REP_FLAG_ERROR | 0x777, NegotiationError),
    ],
)
def test_a_refusal_says_what_and_why_and_the_client_says_goodbye(
    error: int, kind: type[NegotiationError]
) -> None:
    handshake = client_handshake("disk", structured=False)
    sent = bytearray()
    wanted: int | bytes = next(handshake)
    answers = [GREETING, reply(7, error, b"go away\n\x1b[31m")]
    source = b"".join(answers)
    with pytest.raises(kind) as caught:  # noqa: PT012
        while True:
            if isinstance(wanted, bytes):
                sent += wanted
                wanted = handshake.send(b"")
            else:
                data, source = source[:wanted], source[wanted:]
                wanted = handshake.send(data)
    assert caught.value.reply == error
    assert caught.value.option == c.OPT_GO
    assert caught.value.message == "go away\ufffd\ufffd[31m"
    assert "GO for export 'disk'" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert bytes(sent).endswith(codec.option_request(c.OPT_ABORT))


def test_contexts_that_are_refused_are_left_out() -> None:
    server = [
        GREETING,
        NOT_EXTENDED,
        reply(8, c.REP_ACK),
        reply(10, c.REP_ERR_UNSUP),
        reply(7, c.REP_INFO, EXPORT_INFO),
        reply(7, c.REP_ACK),
    ]
    session = run(client_handshake("disk", [CONTEXT]), b"".join(server))[0]
    assert session.structured
    assert session.contexts == ()


def test_tls_is_not_a_thing_to_go_on_without() -> None:
    with pytest.raises(TLSRequired):
        run(client_handshake("disk"), GREETING + reply(11, c.REP_ERR_TLS_REQD))


@pytest.mark.parametrize(
    ("server", "complaint"),
    [
        (b"SSH-2.0-OpenSSH_9.2", "does not speak NBD"),
        (b"NBDMAGIC" + bytes.fromhex("0000420281861253") + bytes(2), "oldstyle"),
        (b"NBDMAGIC" + b"something!", "greeting"),
        (GREETING + bytes(20), "reply should begin"),
        (GREETING + reply(6, c.REP_ACK), "instead of 7"),
        (GREETING + codec.OPTION_REPLY.pack(c.OPTION_REPLY_MAGIC, 7, 3, 65537), "65537 bytes"),
        (GREETING + codec.OPTION_REPLY.pack(c.OPTION_REPLY_MAGIC, 7, 3, 0xFFFFFFFF), "bytes"),
        (GREETING + reply(7, c.REP_ACK), "without telling its size"),
        (GREETING + reply(7, c.REP_SERVER, bytes(4)) + reply(7, c.REP_ACK), "instead of 3"),
        (GREETING + reply(7, 3, EXPORT_INFO[:-1]) + reply(7, 1), "runs past"),
        (GREETING + reply(7, 3, EXPORT_INFO + b"x") + reply(7, 1), "too many"),
        (GREETING + reply(7, 3, b"") + reply(7, 1), "runs past"),
        (
            GREETING + reply(7, 3, codec.INFO_EXPORT.pack(0, 1 << 63, 1)) + reply(7, 1),
            "impossible size",
        ),
        (GREETING + reply(7, 3, codec.INFO_EXPORT.pack(0, 512, 0)) + reply(7, 1), "flags"),
        (GREETING + reply(7, 3, b"\0\1\xff") + reply(7, 1), "UTF-8"),
        (GREETING + reply(7, 99, bytes(65536)) * 300, "without end"),
        (GREETING + reply(7, c.REP_INFO, EXPORT_INFO) * 200_000, "without end"),
    ],
)
def test_a_server_that_breaks_the_rules_is_given_up(server: bytes, complaint: str) -> None:
    with pytest.raises(ProtocolError, match=complaint):
        run(client_handshake("disk", structured=False), server)


def context(number: int, name: str) -> bytes:
    return reply(10, c.REP_META_CONTEXT, codec.U32.pack(number) + name.encode())


@pytest.mark.parametrize(
    ("contexts", "complaint"),
    [
        ([context(1, CONTEXT), context(2, CONTEXT)], "twice"),
        ([context(1, CONTEXT), context(1, "x:y")], "twice"),
        ([context(1, "z:z")], "not asked for"),
        ([reply(10, c.REP_META_CONTEXT, b"\0\0")], "runs past"),
    ],
)
def test_a_server_that_selects_other_contexts_is_given_up(
    contexts: list[bytes], complaint: str
) -> None:
    server = (
        GREETING + NOT_EXTENDED + reply(8, c.REP_ACK) + b"".join(contexts) + reply(10, c.REP_ACK)
    )
    with pytest.raises(ProtocolError, match=complaint):
        run(client_handshake("disk", [CONTEXT, "x:y"]), server)


@pytest.mark.parametrize("sizes", [(0, 4096, 1 << 20), (3, 4096, 1 << 20), (512, 256, 4096)])
def test_impossible_block_sizes_are_ignored(sizes: tuple[int, int, int]) -> None:
    info = codec.INFO_BLOCK_SIZE.pack(c.INFO_BLOCK_SIZE, *sizes)
    session = go(reply(7, c.REP_INFO, info), reply(7, c.REP_INFO, EXPORT_INFO), reply(7, c.REP_ACK))
    assert (session.minimum_block, session.preferred_block) == (1, 4096)
    assert session.maximum_payload == c.MAX_PAYLOAD


def test_a_message_is_made_harmless() -> None:
    assert printable(b"no\x1b[2J\xff" + "ü".encode()) == "no\ufffd[2J\ufffdü"
    assert len(printable(b"x" * 10_000)) == c.MAX_STRING


@MODEST
@given(st.binary(max_size=200), st.integers(0, 3))
def test_any_bytes_of_a_server_end_in_a_result_or_an_nbderror(data: bytes, flags: int) -> None:
    greeting = codec.GREETING.pack(c.NBDMAGIC, c.IHAVEOPT, flags)
    for handshake in (client_handshake("disk", [CONTEXT]), client_list()):
        try:
            run(handshake, greeting + data)
        except (NBDError, EndOfInput) as error:
            assert "\n" not in str(error)  # noqa: PT017


class Shelf:
    def __init__(self, info: ExportInfo) -> None:
        self._info = info

    def listing(self) -> list[tuple[str, str]]:
        return [(self._info.name, self._info.description)]

    def lookup(self, name: str) -> ExportInfo | None:
        return self._info if name == self._info.name else None


texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)


@MODEST
@given(
    name=texts,
    size=st.integers(0, 2**63 - 1),
    description=texts,
    minimum=st.sampled_from([1, 512, 65536]),
    offered=st.lists(texts, max_size=4, unique=True),
    wanted=st.lists(texts, max_size=4, unique=True),
    structured=st.booleans(),
)
def test_both_halves_agree(
    name: str,
    size: int,
    description: str,
    minimum: int,
    offered: list[str],
    wanted: list[str],
    structured: bool,
) -> None:
    info = ExportInfo(
        name, size, c.TFLAG_SEND_FLUSH, description, minimum, 65536, 1 << 20, tuple(offered)
    )
    client = client_handshake(name, wanted, structured)
    server = server_handshake(Shelf(info))
    to_client, to_server = bytearray(), bytearray()
    results: dict[str, object] = {}
    sides = {"client": (client, to_client, to_server), "server": (server, to_server, to_client)}
    pending: dict[str, int | bytes] = {side: next(gen) for side, (gen, _, _) in sides.items()}
    while pending:
        for side in list(pending):
            generator, inbox, outbox = sides[side]
            step = pending[side]
            if isinstance(step, int) and len(inbox) < step:
                continue
            answer = b""
            if isinstance(step, int):
                answer = bytes(inbox[:step])
                del inbox[:step]
            else:
                outbox += step
            try:
                pending[side] = generator.send(answer)
            except StopIteration as stop:
                results[side] = stop.value
                del pending[side]
    session, negotiated = results["client"], results["server"]
    assert isinstance(session, ClientSession)
    assert (session.name, session.size, session.description) == (name, size, description)
    assert session.minimum_block == minimum
    assert session.maximum_payload == 1 << 20
    assert session.structured == structured
    assert session.contexts == getattr(negotiated, "contexts", None)
    assert {x for _, x in session.contexts} == (set(offered) & set(wanted) if structured else set())
    assert session.flags == getattr(negotiated, "flags", None)


# TLS, extended headers, several exports

TRANSCRIPT_TLS = """
S: 'NBDMAGIC' 'IHAVEOPT' 0003
C: 00000003
C: 'IHAVEOPT' 00000005 00000000                         # STARTTLS, before anything else
S: 0003e889045565a9 00000005 00000001 00000000
C: ff*4                                                 # (here the stream becomes TLS)
C: 'IHAVEOPT' 0000000b 00000000                         # EXTENDED_HEADERS
S: 0003e889045565a9 0000000b 00000001 00000000
C: 'IHAVEOPT' 0000000a 0000001f 00000004 'disk' 00000001 0000000f 'base:allocation'
S: 0003e889045565a9 0000000a 00000004 00000013 00000007 'base:allocation'
S: 0003e889045565a9 0000000a 00000001 00000000
C: 'IHAVEOPT' 00000007 00000010 00000004 'disk' 0003 0001 0002 0003
S: 0003e889045565a9 00000007 00000003 0000000c 0000 0000000000100000 1085
S: 0003e889045565a9 00000007 00000001 00000000
"""


def run_with_tls(handshake: Handshake[T], incoming: bytes) -> tuple[T, bytes]:
    """As `run`; the moment of the upgrade shows as ff ff ff ff in what was sent."""
    output, position = bytearray(), 0
    answer = b""
    try:
        wanted = next(handshake)
        while True:
            answer = b""
            if wanted is UPGRADE:
                output += b"\xff" * 4
            elif isinstance(wanted, bytes):
                output += wanted
            else:
                assert isinstance(wanted, int)
                if len(incoming) < position + wanted:
                    handshake.close()
                    raise EndOfInput(bytes(output))
                answer = incoming[position : position + wanted]
                position += wanted
            wanted = handshake.send(answer)
    except StopIteration as stop:
        return stop.value, bytes(output)


def test_tls_comes_first_and_extended_headers_before_structured_replies() -> None:
    """nbd.md §8, §9, §15: the order in which a client asks."""
    client, server = parse_transcript(TRANSCRIPT_TLS)
    result, output = run_with_tls(client_handshake("disk", [CONTEXT], tls=True), server)
    assert output.hex() == client.hex()
    assert result == ClientSession(
        "disk", 0x100000, 0x1085, structured=True, extended=True, tls=True,
        contexts=((7, CONTEXT),),
    )  # fmt: skip


@pytest.mark.parametrize("error", [c.REP_ERR_UNSUP, c.REP_ERR_POLICY, c.REP_ERR_INVALID])
@pytest.mark.parametrize("make", [
    lambda: client_handshake("disk", tls=True),
    lambda: client_list(tls=True),
    lambda: client_list_contexts("disk", tls=True),
    lambda: client_describe("disk", tls=True),
])  # fmt: skip
def test_nothing_is_said_in_plain_text_to_a_server_that_refuses_tls(
    make: Callable[[], Handshake[object]], error: int
) -> None:
    """nbd.md §9, §14: nbds MUST fail without TLS."""
    handshake, sent = make(), bytearray()
    incoming = GREETING + reply(c.OPT_STARTTLS, error, b"no")
    wanted = next(handshake)
    with pytest.raises(NegotiationError, match=r"STARTTLS.*it says: no"):  # noqa: PT012
        while True:
            answer = b""
            if isinstance(wanted, int):
                answer, incoming = incoming[:wanted], incoming[wanted:]
            elif isinstance(wanted, bytes):
                sent += wanted
            wanted = handshake.send(answer)
    options = bytes(sent)[4:]
    assert options.startswith(codec.option_request(c.OPT_STARTTLS))
    assert options.removeprefix(codec.option_request(c.OPT_STARTTLS)) in (
        b"",
        codec.option_request(c.OPT_ABORT),
    )


@pytest.mark.parametrize("make", [client_handshake, client_list_contexts, client_describe])
def test_a_server_too_old_for_tls_is_not_spoken_to_when_tls_is_wanted(
    make: Callable[..., Handshake[object]],
) -> None:
    """CVE-2019-14842: an old server must not be accepted under TLS "require"."""
    greeting = codec.GREETING.pack(c.NBDMAGIC, c.IHAVEOPT, c.FLAG_NO_ZEROES)
    with pytest.raises(NegotiationError, match="too old for TLS"):
        run(make("disk", tls=True), greeting)


def test_an_export_that_is_refused_does_not_end_the_handshake() -> None:
    """nbd.md §3: a failed GO leaves haggling alive; contexts are set anew for the next export."""
    server = [
        GREETING,
        NOT_EXTENDED,
        reply(8, c.REP_ACK),
        context(1, CONTEXT) + reply(10, c.REP_ACK),
        reply(7, c.REP_ERR_UNKNOWN),
        reply(10, c.REP_ACK),
        reply(7, c.REP_INFO, EXPORT_INFO) + reply(7, c.REP_ACK),
    ]
    session, output, _ = run(client_handshake(["new", "old"], [CONTEXT]), b"".join(server))
    assert (session.name, session.contexts) == ("old", ())
    assert output.index(b"\0\0\0\3new") < output.index(b"\0\0\0\3old")


def test_if_every_export_is_refused_the_last_refusal_is_told() -> None:
    server = GREETING + reply(7, c.REP_ERR_UNKNOWN) + reply(7, c.REP_ERR_POLICY)
    with pytest.raises(PolicyRefused, match="'b'"):
        run(client_handshake(["a", "b"], structured=False), server)


def test_with_extended_headers_there_is_no_way_back_to_export_name() -> None:
    """nbd.md §8: GO must be supported; EXPORT_NAME afterwards is illegal."""
    server = GREETING + reply(11, c.REP_ACK) + reply(7, c.REP_ERR_UNSUP)
    with pytest.raises(NegotiationError, match="GO"):
        run(client_handshake("disk"), server)


@pytest.mark.parametrize(
    ("negotiated", "told", "kept"),
    [
        (b"", c.TFLAG_SEND_DF, 0),
        (b"", c.TFLAG_BLOCK_STATUS_PAYLOAD, 0),
        (b"", c.TFLAG_SEND_FAST_ZERO, 0),
        (b"", c.TFLAG_SEND_FAST_ZERO | c.TFLAG_SEND_WRITE_ZEROES,
         c.TFLAG_SEND_FAST_ZERO | c.TFLAG_SEND_WRITE_ZEROES),
        (reply(11, c.REP_ACK), c.TFLAG_SEND_DF | c.TFLAG_BLOCK_STATUS_PAYLOAD,
         c.TFLAG_SEND_DF | c.TFLAG_BLOCK_STATUS_PAYLOAD),
    ],
)  # fmt: skip
def test_flags_of_what_was_not_negotiated_are_not_believed(
    negotiated: bytes, told: int, kept: int
) -> None:
    """nbd.md §5."""
    info = codec.INFO_EXPORT.pack(c.INFO_EXPORT, 512, c.TFLAG_HAS_FLAGS | told)
    server = GREETING + negotiated + reply(7, c.REP_INFO, info) + reply(7, c.REP_ACK)
    session = run(client_handshake("disk", structured=bool(negotiated)), server)[0]
    assert session.flags == c.TFLAG_HAS_FLAGS | kept


def test_an_export_is_described_without_being_entered() -> None:
    """nbd.md §3: INFO stays in haggling."""
    server = [
        GREETING,
        reply(11, c.REP_ACK),
        reply(6, c.REP_INFO, EXPORT_INFO) + reply(6, c.REP_ACK),
        reply(9, c.REP_META_CONTEXT, bytes(4) + CONTEXT.encode()) + reply(9, c.REP_ACK),
    ]
    (session, contexts), output, _ = run(client_describe("disk"), b"".join(server))
    assert (session.name, session.size, contexts) == ("disk", 512, (CONTEXT,))
    assert output.endswith(codec.option_request(c.OPT_ABORT))


def test_a_flood_of_exports_is_given_up_before_it_fills_the_memory() -> None:
    """CVE-2017-2630: a client bounds the replies to LIST."""
    entry = reply(3, c.REP_SERVER, codec.sized(b"x" * 4000))
    with pytest.raises(ProtocolError, match="without end"):
        run(client_list(), GREETING + entry * 5000)
    with pytest.raises(ProtocolError, match="longer than 4096"):
        run(client_list(), GREETING + reply(3, 2, codec.sized(b"x" * 5000)) + reply(3, 1))


@pytest.mark.parametrize("text", [TRANSCRIPT_GO, TRANSCRIPT_OLD, TRANSCRIPT_LIST])
def test_a_server_that_dies_at_any_byte_of_the_handshake_is_noticed(text: str) -> None:
    """CVE-2021-20286: the death of the server during GO or INFO must not be a surprise."""
    _, server = parse_transcript(text)
    for length in range(len(server)):
        handshake = client_list() if text == TRANSCRIPT_LIST else client_handshake("", [CONTEXT])
        with pytest.raises((EndOfInput, NBDError)):
            run(handshake, server[:length])

"""The protocol's handshake, from the client's side: what ours says, and what it believes."""

import contextlib
import struct
from typing import Any

import pytest

from nbdwire.errors import (
    NBDError,
    NegotiationError,
    PolicyRefused,
    ProtocolError,
    ShuttingDown,
    TLSRequired,
    UnknownExport,
)
from nbdwire.handshake import Handshake
from nbdwire.negotiate_client import ClientSession, client_handshake, client_list
from tests.support import haggling as h
from tests.support.haggling import BASE
from tests.support.transcript import run

GREETING = b"NBDMAGICIHAVEOPT\0\3"
SIZE = 1 << 20


def reply(number: int, kind: int, data: bytes = b"") -> bytes:
    return struct.pack(">QIII", 0x0003E889045565A9, number, kind, len(data)) + data


def told(kind: int, data: bytes = b"") -> bytes:
    """An INFO reply to GO."""
    return reply(h.GO, h.REP_INFO, struct.pack(">H", kind) + data)


EXPORT = told(0, struct.pack(">QH", SIZE, 1))
NO_EXT = reply(h.EXTENDED, h.UNSUP)
NO_CHUNKS = reply(h.STRUCTURED, h.UNSUP)
CHUNKS = reply(h.STRUCTURED, h.ACK)
PLAIN = NO_EXT + NO_CHUNKS
END = reply(h.GO, h.ACK)


def enter(server: bytes, *contexts: str, greeting: bytes = GREETING) -> ClientSession:
    return run(client_handshake("disk", contexts), greeting + server)[0]


def sent(handshake: Handshake[Any], server: bytes) -> bytes:
    return run(handshake, server)[1]


@pytest.mark.parametrize(("server", "client"), [(3, 3), (1, 1), (0xFFFF, 3), (0x8001, 1)])
def test_the_client_flags_answer_what_was_offered(server: int, client: int) -> None:
    """nbd.md §2: client SHOULD set C_FIXED_NEWSTYLE, and nothing that was not offered."""
    greeting = GREETING[:16] + struct.pack(">H", server)
    output = sent(client_handshake("disk", structured=False), greeting + EXPORT + END)
    assert output[:4] == struct.pack(">I", client)


@pytest.mark.parametrize(
    "greeting",
    [
        b"NBDMAGIC" + bytes.fromhex("00420281861253") + bytes(200),
        b"NBDMAGIC" + bytes.fromhex("0000420281861253") + bytes(200),
        b"SSH-2.0-OpenSSH_9.2 Debian",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
    ],
)
def test_whoever_does_not_speak_newstyle_is_left(greeting: bytes) -> None:
    """nbd.md §2: oldstyle is dead; anything else is no NBD."""
    with pytest.raises(ProtocolError):
        run(client_handshake("disk"), greeting)


def test_an_option_is_sent_when_the_last_one_was_answered() -> None:
    """nbd.md §2: the client waits for the final reply before the next option."""
    server = GREETING + NO_EXT + CHUNKS + reply(h.SET_META, h.META, b"\0\0\0\5" + BASE.encode())
    server += reply(h.SET_META, h.ACK) + EXPORT + END
    handshake = client_handshake("disk", [BASE])
    position, waiting, options = 0, False, 0
    wanted = next(handshake)
    with contextlib.suppress(StopIteration):
        while True:
            if isinstance(wanted, bytes):
                assert not waiting, "an option before the last one was answered"
                waiting = wanted.startswith(b"IHAVEOPT")
                options += waiting
                wanted = handshake.send(b"")
                continue
            assert isinstance(wanted, int)
            data = server[position : position + wanted]
            position += wanted
            if waiting and len(data) == 20:
                kind = int.from_bytes(data[12:16])
                waiting = not (kind == h.ACK or h.is_error(kind))
            wanted = handshake.send(data)
    assert (position, options) == (len(server), 4)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (h.POLICY, PolicyRefused),
        (h.INVALID, NegotiationError),
        (h.PLATFORM, NegotiationError),
        (h.TLS_REQD, TLSRequired),
        (h.UNKNOWN, UnknownExport),
        (h.SHUTDOWN, ShuttingDown),
        (h.SIZE_REQD, NegotiationError),
        (h.TOO_BIG, NegotiationError),
        (h.EXT_REQD, NegotiationError),
        (1 << 31 | 999, NegotiationError),
    ],
)
def test_every_refusal_names_the_option_the_export_and_the_message(
    code: int, kind: type[NBDError]
) -> None:
    """nbd.md §4: errors have bit 31, and MAY carry a message; unknown ones are errors too."""
    text = b"no, not\nthat"
    with pytest.raises(kind) as caught:
        enter(PLAIN + reply(h.GO, code, text))
    found = str(caught.value)
    assert "GO" in found
    assert "'disk'" in found
    assert "no, not" in found
    assert "\n" not in found
    assert isinstance(caught.value, NegotiationError)
    assert (caught.value.option, caught.value.reply) == (h.GO, code)


@pytest.mark.parametrize("text", [b"\xff\xfe", b"a\0b", b"x" * 4097, b"x" * 65536, b"\x1b[2J"])
def test_a_message_that_is_none_does_no_harm(text: bytes) -> None:
    """nbd.md §4: a message is <= 4096 bytes of UTF-8 without NUL, whatever comes."""
    with pytest.raises(NegotiationError) as caught:
        enter(PLAIN + reply(h.GO, h.UNKNOWN, text))
    assert caught.value.message.isprintable()
    assert len(caught.value.message) <= 4096


def test_the_client_says_goodbye_when_it_is_refused() -> None:
    """nbd.md §2, §3: ABORT is the soft end."""
    handshake = client_handshake("disk", structured=False)
    server, said = GREETING + reply(h.GO, h.UNKNOWN), []

    def play() -> None:
        wanted, position = next(handshake), 0
        while True:
            if isinstance(wanted, int):
                position += wanted
                wanted = handshake.send(server[position - wanted : position])
            else:
                said.append(wanted)
                wanted = handshake.send(b"")

    with pytest.raises(UnknownExport):
        play()
    assert said[-1] == h.option(h.ABORT)


def test_block_sizes_are_always_asked_for() -> None:
    """nbd.md §4, §10: so that no server has to say ERR_BLOCK_SIZE_REQD."""
    output = sent(client_handshake("disk"), GREETING + PLAIN + EXPORT + END)
    assert output.endswith(h.info(h.GO, "disk", h.NAME, h.DESCRIPTION, h.BLOCK_SIZE))


def test_infos_of_the_future_are_ignored() -> None:
    """nbd.md §3, §4: unknown infos are ignored, wherever they stand."""
    session = enter(PLAIN + told(77, b"x" * 100) + EXPORT + told(0xFFFF) + END)
    assert session.size == SIZE


BROKEN = {
    "no EXPORT": PLAIN + told(h.NAME, b"disk") + END,
    "nothing": PLAIN + END,
    "EXPORT too short": PLAIN + told(0, bytes(9)) + END,
    "EXPORT too long": PLAIN + told(0, struct.pack(">QHB", SIZE, 1, 0)) + END,
    "EXPORT without HAS_FLAGS": PLAIN + told(0, struct.pack(">QH", SIZE, 2)) + END,
    "EXPORT of 2^63 bytes": PLAIN + told(0, struct.pack(">QH", 1 << 63, 1)) + END,
    "an INFO without a type": PLAIN + EXPORT + reply(h.GO, h.REP_INFO, b"\0") + END,
    "BLOCK_SIZE too short": PLAIN + EXPORT + told(h.BLOCK_SIZE, bytes(11)) + END,
    "BLOCK_SIZE too long": PLAIN + EXPORT + told(h.BLOCK_SIZE, bytes(13)) + END,
    "NAME with a NUL": PLAIN + EXPORT + told(h.NAME, b"a\0b") + END,
    "NAME not UTF-8": PLAIN + EXPORT + told(h.NAME, b"\xff") + END,
    "NAME too long": PLAIN + EXPORT + told(h.NAME, b"x" * 4097) + END,
    "DESCRIPTION too long": PLAIN + EXPORT + told(h.DESCRIPTION, b"x" * 4097) + END,
    "a SERVER reply to GO": PLAIN + EXPORT + reply(h.GO, h.SERVER, b"\0\0\0\0") + END,
    "another option's reply": PLAIN + reply(h.INFO, h.ACK),
    "a reply of 4 GiB": PLAIN + reply(h.GO, h.REP_INFO)[:-4] + b"\xff\xff\xff\xff",
    "no reply": PLAIN + b"NBDMAGICIHAVEOPT" + bytes(8),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_server_that_breaks_the_table_is_left(name: str) -> None:
    """nbd.md §4: lengths of the infos, EXPORT before ACK, the echo of the option, strings."""
    with pytest.raises(ProtocolError) as caught:
        enter(BROKEN[name])
    assert "\n" not in str(caught.value)


CONTEXT_REPLIES = {
    "not asked for": [(1, b"qemu:dirty-bitmap:x")],
    "the same id": [(1, BASE.encode()), (1, b"x:y")],
    "the same name": [(1, BASE.encode()), (2, BASE.encode())],
    "no name": [(1, b"")],
    "not UTF-8": [(1, b"\xff")],
}


@pytest.mark.parametrize("name", CONTEXT_REPLIES)
def test_a_selection_that_makes_no_sense_is_not_believed(name: str) -> None:
    """nbd.md §3, §11: one reply per selected context, unique ids, exact names."""
    told = b"".join(
        reply(h.SET_META, h.META, struct.pack(">I", number) + context)
        for number, context in CONTEXT_REPLIES[name]
    )
    with pytest.raises(ProtocolError):
        enter(NO_EXT + CHUNKS + told + reply(h.SET_META, h.ACK), BASE, "x:y")


@pytest.mark.parametrize("code", [h.UNSUP, h.INVALID, h.UNKNOWN, h.TOO_BIG, h.POLICY])
def test_contexts_that_are_refused_are_gone_without(code: int) -> None:
    """nbd.md §11: a failed SET selects nothing; GO tells whether the export is there."""
    session = enter(NO_EXT + CHUNKS + reply(h.SET_META, code) + EXPORT + END, BASE)
    assert session.contexts == ()
    assert session.structured


@pytest.mark.parametrize(
    "name", ["x" * 4097, "ö" * 2049, "disk\0", "\ud800"], ids=["long", "wide", "nul", "surrogate"]
)
def test_what_is_no_string_is_not_sent(name: str) -> None:
    """nbd.md §1: names and queries MUST be <= 4096 bytes, UTF-8, without NUL: ours too."""
    for handshake, server in (
        (client_handshake(name), GREETING + PLAIN),
        (client_handshake(name), GREETING[:16] + b"\0\0"),
        (client_handshake("disk", [name]), GREETING + NO_EXT + CHUNKS),
    ):
        with pytest.raises(NegotiationError, match="cannot be asked for"):
            run(handshake, server)


def test_flags_that_promise_what_was_not_negotiated_are_not_believed() -> None:
    """nbd.md §5: DF only with chunks, FAST_ZERO only with WRITE_ZEROES, filter only extended."""
    everything = 0xFFFF
    alone = told(0, struct.pack(">QH", SIZE, 1 | 1 << 11))
    assert not enter(PLAIN + told(0, struct.pack(">QH", SIZE, everything)) + END).flags & 1 << 7
    assert not enter(PLAIN + alone + END).flags & 1 << 11
    chunked = enter(NO_EXT + CHUNKS + told(0, struct.pack(">QH", SIZE, everything)) + END)
    assert chunked.flags & 1 << 7
    assert not chunked.flags & 1 << 12


def test_a_list_of_names_that_are_none_is_not_believed() -> None:
    """nbd.md §4: SERVER: name length, name, description."""
    for data in (b"", b"\0\0\0", b"\0\0\0\5disk", b"\0\0\0\1\xff", b"\0\0\x10\1" + b"x" * 4097):
        with pytest.raises(ProtocolError):
            run(client_list(), GREETING + reply(h.LIST, h.SERVER, data) + reply(h.LIST, h.ACK))


def test_export_name_is_the_way_into_an_old_server() -> None:
    """nbd.md §3: GO unsupported: EXPORT_NAME; its 124 zeroes unless both dropped them."""
    for flags, zeroes in ((3, b""), (1, bytes(124))):
        server = PLAIN + reply(h.GO, h.UNSUP) + struct.pack(">QH", SIZE, 1) + zeroes
        greeting = GREETING[:16] + struct.pack(">H", flags)
        assert enter(server, greeting=greeting).size == SIZE

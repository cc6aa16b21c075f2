"""The protocol's sections "Values", "Newstyle negotiation" and "Termination": our server."""

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fleece.block.memory import MemoryNode
from nbdwire.server import Server
from nbdwire.uri import NBDURI
from tests.support import haggling as h
from tests.support.haggling import haggling, info, meta, option
from tests.support.serving import serving


@pytest.fixture
def where(tmp_path: Path) -> Iterator[NBDURI]:
    with serving(tmp_path, MemoryNode(1 << 20)) as (_, uri):
        yield uri


@contextmanager
def named(tmp_path: Path, name: str, description: str = "") -> Iterator[NBDURI]:
    with Server() as server:
        server.add(name, MemoryNode(4096), description=description)
        yield server.listen(NBDURI(socket=str(tmp_path / "named.sock")))


@pytest.mark.parametrize("length", [1, 23, 24, 255, 256, 257, 4095, 4096])
@pytest.mark.parametrize("letter", ["x", "ö"])
def test_a_name_may_be_as_long_as_the_protocol_allows(
    tmp_path: Path, length: int, letter: str
) -> None:
    """nbd.md §1: a string is UTF-8 and has at most 4096 bytes, whatever its characters."""
    name = letter * (length // len(letter.encode())) or "x"
    with named(tmp_path, name) as uri, haggling(uri) as client:
        listed = client.ask(option(h.LIST))
        assert listed[0][2][4:].decode() == name
        assert client.outcome(info(h.GO, name)) == h.ACK


def test_a_long_description_is_cut_at_the_limit_and_stays_utf_8(tmp_path: Path) -> None:
    """nbd.md §1: no string is longer than 4096 bytes, or has a NUL in it."""
    with named(tmp_path, "disk", "\0a" + "ö" * 5000) as uri, haggling(uri) as client:
        told = client.ask(info(h.INFO, "disk", h.DESCRIPTION))[1][2][2:]
        listed = client.ask(option(h.LIST))[0][2][8:]
    assert told == listed
    assert len(told) <= 4096
    assert told.decode() == "a" + "ö" * 2047


@pytest.mark.parametrize("name", ["x" * 4097, "ö" * 2049, "a\0b"])
def test_an_export_whose_name_is_no_string_is_refused(name: str) -> None:
    """nbd.md §1: names MUST NOT have a NUL, and MUST be at most 4096 bytes."""
    with Server() as server, pytest.raises(ValueError, match="4096 bytes and no NUL"):
        server.add(name, MemoryNode(4096))


@pytest.mark.parametrize("name", ["x:" + "y" * 4095, "x:a\0b", "nocolon"])
def test_a_context_whose_name_is_none_is_refused(name: str) -> None:
    """nbd.md §1, §11: a context's name is a string with a namespace."""
    with Server() as server, pytest.raises(ValueError, match="metadata context"):
        server.add("disk", MemoryNode(4096), contexts={name: lambda _o, _l: []})


def test_the_servers_sockets_do_not_wait_for_more_to_send(tmp_path: Path) -> None:
    """nbd.md §1: both ends SHOULD set TCP_NODELAY."""
    with serving(tmp_path, MemoryNode(4096), tcp=True) as (server, uri), haggling(uri):
        (connection,) = server._everybody()  # the socket of a server cannot be had otherwise
        sock = connection._sock
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_the_greeting_is_fixed_newstyle_with_no_zeroes(where: NBDURI) -> None:
    """nbd.md §2: NBDMAGIC, IHAVEOPT, flags FIXED_NEWSTYLE | NO_ZEROES and no other bit."""
    with haggling(where, None) as client:
        assert client.greeting == b"NBDMAGICIHAVEOPT\0\3"


@pytest.mark.parametrize("bit", range(2, 32))
def test_a_client_flag_that_was_not_offered_drops_the_connection(where: NBDURI, bit: int) -> None:
    """nbd.md §2: an unknown client flag MUST drop the connection; no option is answered."""
    with haggling(where, None) as client:
        client.send(struct.pack(">I", h.FIXED | h.NO_ZEROES | 1 << bit) + option(h.LIST))
        assert client.closed() == b""


@pytest.mark.parametrize("flags", [0, h.NO_ZEROES])
def test_without_fixed_newstyle_export_name_alone_is_legal(where: NBDURI, flags: int) -> None:
    """nbd.md §2: a client without C_FIXED_NEWSTYLE sends EXPORT_NAME only."""
    with haggling(where, flags) as client:
        client.send(option(h.EXPORT_NAME, b"disk"))
        assert client.take(8) == (1 << 20).to_bytes(8)
    with haggling(where, None) as client:
        client.send(struct.pack(">I", flags) + option(h.LIST))
        assert client.closed() == b""


@pytest.mark.parametrize("flags", [h.FIXED, h.FIXED | h.NO_ZEROES])
def test_the_124_zeroes_come_unless_both_sides_dropped_them(where: NBDURI, flags: int) -> None:
    """nbd.md §2: NO_ZEROES from both: they MUST be dropped; else they are there, all zero."""
    with haggling(where, flags) as client:
        client.send(option(h.EXPORT_NAME, b"disk"))
        assert client.take(8) == (1 << 20).to_bytes(8)
        client.take(2)
        if not flags & h.NO_ZEROES:
            assert client.take(124) == bytes(124)
        client.send(struct.pack(">IHHQQI", 0x25609513, 0, 0, 7, 0, 4))
        assert client.take(16) == struct.pack(">IIQ", 0x67446698, 0, 7)


SESSION = [
    option(h.LIST),
    option(99, b"what"),
    option(h.EXTENDED),
    option(h.STRUCTURED),
    meta(h.LIST_META, "disk"),
    meta(h.SET_META, "disk", h.BASE),
    info(h.INFO, "disk", h.NAME, h.BLOCK_SIZE),
    info(h.GO, "disk", h.NAME, h.BLOCK_SIZE),
]
TYPES = [h.ACK, h.UNSUP, h.ACK, h.EXT_REQD, h.ACK, h.ACK, h.ACK, h.ACK]


@pytest.mark.parametrize("size", [1, 3, 1 << 16])
def test_messages_may_come_in_segments_of_any_size(tmp_path: Path, size: int) -> None:
    """nbd.md §2: flags and options may share a segment, or come byte by byte."""
    with (
        serving(tmp_path, MemoryNode(1 << 20), tcp=True) as (_, uri),
        haggling(uri, None) as client,
    ):
        text = struct.pack(">I", 3) + b"".join(SESSION)
        for start in range(0, len(text), size):
            client.send(text[start : start + size])
        for message, expected in zip(SESSION, TYPES, strict=True):
            number = int.from_bytes(message[8:12])
            assert client.replies(number)[-1][1] == expected


def test_a_repeated_state_change_is_answered_and_changes_nothing(where: NBDURI) -> None:
    """nbd.md §2: repeated options that change state get ACK or ERR_INVALID."""
    with haggling(where) as client:
        assert [client.outcome(option(h.STRUCTURED)) for _ in range(3)] == [h.ACK] * 3
        assert [client.outcome(option(h.EXTENDED)) for _ in range(3)] == [h.ACK] * 3


def test_list_works_any_number_of_times(where: NBDURI) -> None:
    """nbd.md §2: LIST is stateless and must work twice."""
    with haggling(where) as client:
        first = client.ask(option(h.LIST))
        assert [client.ask(option(h.LIST)) for _ in range(5)] == [first] * 5


def test_haggling_goes_on_after_every_kind_of_error(where: NBDURI) -> None:
    """nbd.md §2: the server hangs up for nothing that an error reply can say."""
    refused = [
        (option(99), h.UNSUP),
        (option(h.PEEK), h.UNSUP),
        (option(h.STARTTLS), h.POLICY),
        (option(h.LIST, b"x"), h.INVALID),
        (info(h.GO, "nope"), h.UNKNOWN),
        (meta(h.SET_META, "disk", h.BASE), h.INVALID),
    ]
    with haggling(where) as client:
        for message, expected in refused * 3:
            assert client.outcome(message) == expected
            client.in_step()


def test_a_client_may_leave_without_a_word_at_any_option(where: NBDURI) -> None:
    """nbd.md §2: closing TCP is a legal end for the client; the server lives on."""
    text = struct.pack(">I", 3) + b"".join(SESSION)
    for cut in range(0, len(text), 7):
        with haggling(where, None) as client:
            client.send(text[:cut])
    with haggling(where) as client:
        client.in_step()


def test_options_are_refused_while_the_server_shuts_down(tmp_path: Path) -> None:
    """nbd.md §2: shutting down, the server errors options with ERR_SHUTDOWN."""
    with (
        serving(tmp_path, MemoryNode(4096)) as (server, uri),
        haggling(uri) as client,
        haggling(uri) as other,
    ):
        client.in_step()
        other.in_step()
        for connection in server._everybody():
            connection.stopping.set()  # as `stop` does, which hangs up a moment later
        for message in (option(h.LIST), info(h.GO), option(99), option(h.STRUCTURED)):
            assert client.outcome(message) == h.SHUTDOWN
        assert client.outcome(option(h.ABORT)) == h.ACK
        other.send(option(h.EXPORT_NAME, b"disk"))
        assert other.closed() == b""


def test_a_client_that_waits_is_told_nothing_and_costs_nobody(where: NBDURI) -> None:
    """nbd.md §2: the client speaks first; another one is served at the same time."""
    with haggling(where) as silent:
        done = threading.Event()
        with haggling(where) as client:
            client.in_step()
            done.set()
        assert done.is_set()
        silent.in_step()

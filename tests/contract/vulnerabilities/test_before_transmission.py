# SPDX-License-Identifier: Apache-2.0
"""The attacks on handshakes that brought other servers down (nbd.md, table of vulnerabilities)."""

import random
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from itertools import permutations
from pathlib import Path

import pytest

from fleece.block.memory import MemoryNode
from nbdwire import constants as c
from nbdwire.access import parse
from nbdwire.negotiate_client import ClientSession, client_handshake
from nbdwire.server import Server
from nbdwire.tls import ClientTLS, ServerTLS
from nbdwire.transport import run_handshake
from nbdwire.uri import NBDURI
from tests.support import certificates
from tests.support import nbdraw as raw
from tests.support.hostile import (
    CLIENT_FLAGS,
    INVALID,
    TOO_BIG,
    UNKNOWN,
    Attacker,
    about,
    attacking,
    memory_below,
    option,
    sized,
    unharmed,
    vanish,
)
from tests.support.nbdraw import Raw, connected, open_socket
from tests.support.serving import serving
from tests.support.threads import wait_until

MIB = 1 << 20
SIZE = 64 * MIB
NAMING = [c.OPT_INFO, c.OPT_GO]
META = [c.OPT_LIST_META_CONTEXT, c.OPT_SET_META_CONTEXT]


@pytest.fixture
def where(tmp_path: Path) -> Iterator[NBDURI]:
    """A server that must live on after the test, with a client that must notice nothing."""
    with unharmed(tmp_path, MemoryNode(SIZE)) as (_, where):
        yield where


@pytest.mark.parametrize("flags", [0, 1, 3])
def test_cve_2011_1925_and_2013_7441_a_failed_negotiation_ends_that_connection_only(
    where: NBDURI, flags: int
) -> None:
    """nbd-server: failed negotiation, or an unknown export, ended the process that listens."""
    for _ in range(20):
        for name in (b"nosuch", b"", b"\xff", b"x" * 5000):
            with attacking(where, flags) as client:
                assert client.refused_for(option(c.OPT_EXPORT_NAME, name)) == b""
        with attacking(where, flags) as client:
            assert client.refused_for(b"IHAVEOP!" + bytes(8)) == b""
    with open_socket(where) as sock:
        assert raw.Raw(sock, ClientSession("", 0, 0)).is_dropped_for(b"\xff\xff\xff\xff")


def test_cve_2013_6410_addresses_are_compared_as_numbers_and_denied_by_default(
    tmp_path: Path,
) -> None:
    """nbd-server: 127.0.0.1 in the list let 127.0.0.10 in: the text begins alike."""
    with Server() as server:
        server.add("disk", MemoryNode(MIB))
        where = server.listen("nbd://127.0.0.1:0", access=[parse("net:127.0.0.1")])
        for source, welcome in (("127.0.0.1", True), ("127.0.0.10", False), ("127.0.0.2", False)):
            with socket.create_connection(("127.0.0.1", where.port), 20, (source, 0)) as sock:
                client = Attacker(sock)
                said = client.last(c.OPT_GO, about(b"disk"))
                assert (said == c.REP_ACK) == welcome, source
                if not welcome:
                    assert said in (c.REP_ERR_POLICY, UNKNOWN)


@pytest.mark.parametrize("number", [*NAMING, *META])
def test_cve_2022_26495_a_name_of_4_gib_minus_one_is_no_allocation_of_zero(
    where: NBDURI, number: int
) -> None:
    """nbd-server < 3.24: malloc(0xffffffff + 1) was malloc(0), and then the name was read."""
    with memory_below(2 * MIB), attacking(where) as client:
        for length in (0xFFFFFFFF, 0xFFFFFFFE, 0x80000000, 0x7FFFFFFF, 65536):
            for data in (b"", b"disk", bytes(4000)):
                body = sized(data, length) + b"\0\0\0\0\0\0"
                assert client.last(number, body) in (INVALID, TOO_BIG)
        client.still_in_step()


def test_cve_2022_26495_the_same_for_export_name(where: NBDURI) -> None:
    for length in (0xFFFFFFFF, 0x80000000):
        with memory_below(2 * MIB), attacking(where) as client:
            sent = option(c.OPT_EXPORT_NAME, bytes(10_000), length)
            assert client.refused_for(sent) == b""


@pytest.mark.parametrize("number", NAMING)
def test_cve_2022_26496_a_long_name_does_not_overrun_a_fixed_buffer(
    where: NBDURI, number: int
) -> None:
    """nbd-server < 3.24: the name was copied to 1024 bytes of stack, whatever its length."""
    with attacking(where) as client:
        for length in (1023, 1024, 1025, 4095, 4096):
            assert client.last(number, about(b"x" * length)) == UNKNOWN
        for length in (4097, 8192, 60_000):
            assert client.last(number, about(b"x" * length)) in (INVALID, TOO_BIG, UNKNOWN)
        client.still_in_step()


def test_cve_2017_15118_names_of_256_to_4096_bytes_are_served_in_every_option(
    tmp_path: Path,
) -> None:
    """QEMU: a buffer of 256 bytes, and the protocol allows 4096."""
    for length in (255, 256, 257, 4096):
        name = "é" * (length // 2) + "x" * (length % 2)
        with Server(default=name) as server:
            server.add(name, MemoryNode(MIB))
            at = server.listen(NBDURI(socket=str(tmp_path / "long")))
            with attacking(at) as client:
                assert client.last(c.OPT_LIST) == c.REP_ACK
                query = sized(name.encode()) + b"\0\0\0\1" + sized(b"base:allocation")
                for number in META:
                    client.last(c.OPT_STRUCTURED_REPLY)
                    assert client.last(number, query) == c.REP_ACK
                assert client.last(c.OPT_INFO, about(name.encode())) == c.REP_ACK
            with connected(at, name) as served:
                served.in_step()
            with open_socket(at) as sock:
                Attacker(sock).sock.sendall(option(c.OPT_EXPORT_NAME, name.encode()))
                assert len(sock.recv(10, socket.MSG_WAITALL)) == 10


@pytest.mark.parametrize("number", [*range(12), 0xFFFFFFFF])
def test_cve_2017_15119_gigabytes_of_option_data_are_not_read_and_dropped(
    where: NBDURI, number: int
) -> None:
    """QEMU: it read all 4 GiB of an option that it did not want. Ours hangs up at the header."""
    sent, piece = 0, bytes(MIB)
    with memory_below(4 * MIB), attacking(where) as client:
        with suppress(BrokenPipeError, ConnectionResetError):
            client.sock.sendall(option(number, b"", 0xFFFFFFFF))
            while sent < 1 << 30:
                client.sock.sendall(piece)
                sent += len(piece)
        assert sent < 16 * MIB, "what fits into the sockets' buffers, no more"


@pytest.mark.parametrize("number", [*NAMING, *META])
def test_cve_2020_10761_the_refusal_of_the_longest_name_is_short(
    where: NBDURI, number: int
) -> None:
    """QEMU: the message quoted the name of 4096 bytes, and messages are limited to 4096."""
    for char in (b"x", b"\x01", "é".encode(), b"'"):
        name = char * (4096 // len(char))
        body = about(name) if number in NAMING else sized(name) + b"\0\0\0\0"
        with attacking(where) as client:
            client.last(c.OPT_STRUCTURED_REPLY)
            ((_, kind, text),) = client.ask(option(number, body))
            assert kind == UNKNOWN
            assert len(text) <= 4096
            text.decode()
            client.still_in_step()


def speech() -> bytes:
    """One of each option."""
    meta = sized(b"disk") + b"\0\0\0\1" + sized(b"base:allocation")
    return CLIENT_FLAGS + b"".join(
        [
            option(c.OPT_LIST),
            option(c.OPT_STRUCTURED_REPLY),
            option(c.OPT_EXTENDED_HEADERS),
            option(c.OPT_STARTTLS),
            *(option(number, meta) for number in META),
            option(c.OPT_INFO, about(b"disk")),
            option(c.OPT_GO, about(b"disk")),
        ]
    )


def test_cve_2017_7539_a_client_may_break_off_at_every_byte_of_the_negotiation(
    where: NBDURI,
) -> None:
    """QEMU: an assertion failed when the client went away in the middle of an option."""
    text = speech()
    for cut in range(len(text) + 1):
        sock = open_socket(where)
        with suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(text[:cut])
        (vanish if cut % 2 else socket.socket.close)(sock)


def test_cve_2017_9524_junk_in_place_of_options_ends_that_connection_only(where: NBDURI) -> None:
    """QEMU: a client that sent junk instead of options made the server crash."""
    rng = random.Random(9524)
    for _ in range(200):
        text = bytearray(speech())
        for _ in range(rng.randrange(1, 8)):
            text[rng.randrange(4, len(text))] = rng.randrange(256)
        with open_socket(where) as sock, suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(text + rng.randbytes(rng.randrange(100)))
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(65536):
                pass


def test_cve_2024_7409_those_who_do_not_negotiate_have_a_limit_and_a_deadline(
    tmp_path: Path,
) -> None:
    """QEMU: unlimited clients before the handshake. Ours: the oldest makes room, all in time."""
    limits = {"max_handshakes": 20, "handshake_seconds": 1.0}
    with unharmed(tmp_path, MemoryNode(MIB), **limits) as (server, where), ExitStack() as stack:
        silent = [stack.enter_context(open_socket(where)) for _ in range(100)]
        began = time.monotonic()
        with connected(where) as client:
            client.in_step()
        assert time.monotonic() - began < 1
        wait_until(lambda: server.clients() <= 1 + limits["max_handshakes"])
        wait_until(lambda: server.clients() == 1)  # the bystander
        assert all(raw.Raw(s, ClientSession("", 0, 0)).hung_up() for s in silent)


def test_cve_2024_7409_a_server_stops_with_clients_in_every_state(tmp_path: Path) -> None:
    """QEMU: use after free when the server went away before its clients."""
    text = speech()
    for _ in range(3):
        with serving(tmp_path, MemoryNode(MIB)) as (server, where), ExitStack() as stack:
            for cut in (0, 2, 4, 10, 20, 40, len(text)):
                sock = stack.enter_context(open_socket(where))
                sock.sendall(text[:cut])
            clients = [stack.enter_context(connected(where)) for _ in range(3)]
            clients[0].send(clients[0].make(raw.WRITE, 0, MIB) + bytes(1000))
            began = time.monotonic()
            server.stop()
            assert time.monotonic() - began < 5
            assert server.clients() == 0
            assert clients[1].hung_up()


def test_cve_2019_14850_a_backend_is_opened_when_its_name_is_given_not_before(
    tmp_path: Path,
) -> None:
    """nbdkit: every TCP connection opened the backend, before anything was negotiated."""
    opened: list[str] = []

    def on_export(name: str) -> MemoryNode:
        opened.append(name)
        return MemoryNode(MIB)

    with unharmed(tmp_path, MemoryNode(MIB), on_export=on_export) as (_, where):
        for _ in range(50):
            with open_socket(where) as sock:
                sock.recv(18, socket.MSG_WAITALL)
            with attacking(where) as client:
                for number in (c.OPT_STRUCTURED_REPLY, c.OPT_LIST, c.OPT_STARTTLS, 99):
                    client.last(number)
                client.last(c.OPT_GO, b"\0\0")
        assert opened == []
        with connected(where, "made") as served:
            served.in_step()
        assert opened == ["made"]


CHUNK = b"\x66\x8e\x33\xef"
ODD = {
    "go": option(c.OPT_GO, about(b"disk")),
    "info": option(c.OPT_INFO, about(b"disk")),
    "structured": option(c.OPT_STRUCTURED_REPLY),
    "extended": option(c.OPT_EXTENDED_HEADERS),
    "meta": option(c.OPT_SET_META_CONTEXT, sized(b"disk") + b"\0\0\0\1" + sized(b"base:")),
    "list": option(c.OPT_LIST),
    "tls": option(c.OPT_STARTTLS),
    "abort": option(c.OPT_ABORT),
    "read": raw.request(raw.READ, 0, 512),
}


def test_cve_2019_14851_options_and_requests_in_every_odd_order(where: NBDURI) -> None:
    """nbdkit: after the fix of the one above, an odd order of options met an assertion."""
    orders = [order for count in (1, 2, 3) for order in permutations(ODD, count)]
    for order in orders:
        with open_socket(where) as sock, suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(CLIENT_FLAGS + b"".join(ODD[name] for name in order))
            sock.shutdown(socket.SHUT_WR)
            said = b""
            while part := sock.recv(65536):
                said += part
            assert said.startswith(b"NBDMAGIC")
            if order[-2:] == ("go", "read") and not {"abort", "read"} & set(order[:-2]):
                wide = "extended" in order  # then this is no request, and not answered
                assert (said[-528:-524] == b"\x67\x44\x66\x98" or CHUNK in said) != wide


@pytest.mark.parametrize("feature", [c.OPT_STRUCTURED_REPLY, c.OPT_EXTENDED_HEADERS])
def test_cve_2021_3716_what_was_negotiated_before_starttls_does_not_survive_it(
    tmp_path: Path, feature: int
) -> None:
    """nbdkit: somebody in the middle asked for structured replies before the client's STARTTLS."""
    pki = certificates.create(tmp_path / "pki")
    tls = ServerTLS("allowed", certificates=pki.both, verify_peer=False)
    trust = ClientTLS(certificates=pki.both, hostname="localhost")
    with unharmed(tmp_path, MemoryNode(MIB), tls=tls) as (_, where), open_socket(where) as sock:
        client = Attacker(sock)
        assert client.last(feature) == c.REP_ACK
        meta = sized(b"disk") + b"\0\0\0\1" + sized(b"base:allocation")
        assert client.last(c.OPT_SET_META_CONTEXT, meta) == c.REP_ACK
        assert client.last(c.OPT_STARTTLS) == c.REP_ACK
        stream = trust.upgrade(sock)
        stream.sendall(memoryview(option(c.OPT_GO, about(b"disk"))))
        head = memoryview(bytearray(20))
        stream.recv_into(head, 20, socket.MSG_WAITALL)
        while bytes(head[12:16]) != b"\0\0\0\1":
            body = memoryview(bytearray(int.from_bytes(head[16:], "big")))
            stream.recv_into(body, len(body), socket.MSG_WAITALL)
            stream.recv_into(head, 20, socket.MSG_WAITALL)
        stream.sendall(memoryview(raw.request(raw.READ, 0, 4, cookie=7)))
        found = memoryview(bytearray(20))
        stream.recv_into(found, 20, socket.MSG_WAITALL)
        assert found == bytes.fromhex("67446698 00000000 0000000000000007 00000000")
        stream.sendall(memoryview(raw.request(raw.STATUS, 0, 4, cookie=8)))
        stream.recv_into(found[:16], 16, socket.MSG_WAITALL)
        assert found[:16] == bytes.fromhex("67446698 00000016 0000000000000008")
        stream.close()


def test_cve_2021_3716_an_option_injected_behind_starttls_is_not_carried_out(
    tmp_path: Path,
) -> None:
    """nbdkit 1.34 was hardened against it: plain text that waits when TLS begins."""
    pki = certificates.create(tmp_path / "pki")
    tls = ServerTLS("allowed", certificates=pki.both, verify_peer=False)
    with unharmed(tmp_path, MemoryNode(MIB), tls=tls) as (_, where):
        for injected in ("list", "structured", "go", "abort"):
            with attacking(where) as client:
                said = client.refused_for(option(c.OPT_STARTTLS) + ODD[injected])
                assert said[:20] == option_ack(c.OPT_STARTTLS)
                assert b"disk" not in said[20:]
                assert b"\x00\x03\xe8\x89" not in said[20:], "no reply but that of TLS"


def option_ack(number: int) -> bytes:
    return b"\x00\x03\xe8\x89\x04\x55\x65\xa9" + number.to_bytes(4, "big") + b"\0\0\0\1" + bytes(4)


def test_the_control_an_ordinary_handshake_passes_all_of_it(where: NBDURI) -> None:
    with open_socket(where) as sock:
        session = run_handshake(sock, client_handshake("disk", ["base:allocation"]), None)
        assert session.size == SIZE
        assert session.extended
        Raw(sock, session).in_step()

"""Handshakes that turn to TLS half way, and what somebody may have put in between (nbd.md §9)."""

import socket
import ssl
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from nbdwire import constants as c
from nbdwire import transport
from nbdwire.errors import ConnectionClosed, ProtocolError, TLSError, TLSRequired
from nbdwire.handshake import UPGRADE, Handshake
from nbdwire.negotiate import ExportInfo, Negotiated, server_handshake
from nbdwire.negotiate_client import ClientSession, client_handshake, client_list
from nbdwire.tls import ClientTLS, ServerTLS, TLSStream
from nbdwire.transport import establish, run_handshake
from tests.support.certificates import Pki, create
from tests.support.threads import in_thread
from tests.support.tls import SECONDS, outcome, sockets, soon

FLAGS = struct.pack(">I", c.FLAG_FIXED_NEWSTYLE | c.FLAG_NO_ZEROES)
GREETING = 18


class OneExport:
    """A catalogue that remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def listing(self) -> list[tuple[str, str]]:
        self.asked.append("listing")
        return [("disk", "")]

    def lookup(self, name: str) -> ExportInfo | None:
        self.asked.append(name)
        return ExportInfo("disk", 4096, c.TFLAG_HAS_FLAGS) if name == "disk" else None


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return create(tmp_path_factory.mktemp("pki") / "pki")


@pytest.fixture
def server(pki: Pki) -> ServerTLS:
    return ServerTLS(certificates=pki.both)


@pytest.fixture
def client(pki: Pki) -> ClientTLS:
    return ClientTLS(certificates=pki.both, hostname="localhost")


def option(number: int, data: bytes = b"") -> bytes:
    return struct.pack(">QII", c.IHAVEOPT, number, len(data)) + data


def answer(number: int, kind: int, data: bytes = b"") -> bytes:
    return struct.pack(">QIII", c.OPTION_REPLY_MAGIC, number, kind, len(data)) + data


def go(name: bytes) -> bytes:
    return option(c.OPT_GO, struct.pack(">I", len(name)) + name + bytes(2))


ACK = answer(c.OPT_STARTTLS, c.REP_ACK)


def both(
    mine: Handshake[Any], theirs: Handshake[Any], server: ServerTLS, client: ClientTLS
) -> tuple[Any, Any]:
    """What `establish` gives, or raises, on either side; the streams are closed."""
    with sockets() as (ours, peer), ThreadPoolExecutor(1) as pool:

        def one(sock: socket.socket, handshake: Handshake[Any], upgrade: Any) -> Any:
            found = outcome(lambda: establish(sock, handshake, soon(), upgrade))
            if isinstance(found, Exception):
                sock.shutdown(socket.SHUT_RDWR)
            return found

        other = pool.submit(one, peer, theirs, client.upgrade)
        found = one(ours, mine, server.upgrade)
        results = (found, other.result(SECONDS))
        for result in results:
            if not isinstance(result, Exception):
                assert sock_timeout(result[1]) is None, "no time limit is left over"
                result[1].close()
        return results


def serve(sock: socket.socket, catalogue: OneExport, server: ServerTLS) -> object:
    """The server's side; it hangs up if it fails."""
    handshake = server_handshake(catalogue, tls="required")
    found = outcome(lambda: establish(sock, handshake, soon(), server.upgrade))
    if isinstance(found, Exception):
        sock.shutdown(socket.SHUT_RDWR)
    return found


def sock_timeout(stream: Any) -> float | None:
    sock = getattr(stream, "_sock", stream)
    assert isinstance(sock, socket.socket)
    return sock.gettimeout()


@pytest.mark.parametrize("mode", ["allowed", "required"])
def test_a_handshake_turns_to_tls_and_goes_on(
    server: ServerTLS, client: ClientTLS, mode: Any
) -> None:
    catalogue = OneExport()
    mine, theirs = both(
        server_handshake(catalogue, tls=mode), client_handshake("disk", tls=True), server, client
    )
    negotiated, stream = mine
    assert isinstance(negotiated, Negotiated)
    assert negotiated.tls
    assert isinstance(stream, TLSStream)
    session, stream = theirs
    assert isinstance(session, ClientSession)
    assert session.size == 4096
    assert isinstance(stream, TLSStream)


def test_a_handshake_that_stays_plain_keeps_its_socket(
    server: ServerTLS, client: ClientTLS
) -> None:
    mine, theirs = both(
        server_handshake(OneExport(), tls="allowed"), client_handshake("disk"), server, client
    )
    assert isinstance(mine[1], socket.socket)
    assert isinstance(theirs[1], socket.socket)
    assert not mine[0].tls


def test_a_client_without_tls_learns_that_it_needs_it(server: ServerTLS, client: ClientTLS) -> None:
    catalogue = OneExport()
    _, theirs = both(
        server_handshake(catalogue, tls="required"), client_handshake("disk"), server, client
    )
    assert isinstance(theirs, TLSRequired)
    assert catalogue.asked == []


def test_a_client_that_aborts_inside_tls_ends_softly(server: ServerTLS, client: ClientTLS) -> None:
    mine, theirs = both(
        server_handshake(OneExport(), tls="required"), client_list(tls=True), server, client
    )
    assert mine[0] is None
    assert isinstance(mine[1], TLSStream)
    assert theirs[0] == [("disk", "")]


# Injection (CVE-2021-3716)


@pytest.mark.parametrize(
    "injected",
    [option(c.OPT_LIST), go(b"disk"), option(c.OPT_STRUCTURED_REPLY) + go(b"disk"), b"\0"],
)
@pytest.mark.parametrize("whole", [True, False])
def test_options_injected_behind_starttls_are_never_carried_out(
    server: ServerTLS, client: ClientTLS, injected: bytes, whole: bool
) -> None:
    """In the same segment, or after the acknowledgement: TLS begins with them, and fails."""
    catalogue = OneExport()
    with sockets() as (ours, theirs):
        with in_thread(lambda: serve(ours, catalogue, server)) as serving:
            theirs.sendall(FLAGS + option(c.OPT_STARTTLS) + (injected if whole else b""))
            received = _take(theirs, GREETING + len(ACK))
            assert received[GREETING:] == ACK
            if not whole:
                theirs.sendall(injected)
            refused = outcome(lambda: client.upgrade(theirs, soon()))
            theirs.shutdown(socket.SHUT_WR)
        assert isinstance(refused, (TLSError, ConnectionClosed)), refused
    assert isinstance(serving.result(), TLSError)
    assert catalogue.asked == []


def test_what_was_injected_would_be_carried_out_by_a_driver_that_reads_ahead(
    monkeypatch: pytest.MonkeyPatch, server: ServerTLS, client: ClientTLS
) -> None:
    """The control: this is what exact reads protect from."""
    kept: dict[int, bytearray] = {}

    def reading_ahead(stream: Any, length: int, deadline: float | None) -> bytes:
        ahead = kept.setdefault(0, bytearray())
        view = memoryview(bytearray(1 << 16))
        while len(ahead) < length:
            got = stream.recv_into(view)
            if not got:
                raise ConnectionClosed("the end")
            ahead += view[:got]
        taken = bytes(ahead[:length])
        del ahead[:length]
        return taken

    monkeypatch.setattr(transport, "_recv_by", reading_ahead)
    catalogue = OneExport()
    with sockets() as (ours, theirs):
        with in_thread(lambda: serve(ours, catalogue, server)) as serving:
            theirs.sendall(FLAGS + option(c.OPT_STARTTLS) + option(c.OPT_LIST))
            _take(theirs, GREETING + len(ACK))
            client.upgrade(theirs, soon()).close()
        assert isinstance(serving.result(), Exception)
    assert catalogue.asked == ["listing"]


@pytest.mark.parametrize("injected", [answer(c.OPT_GO, c.REP_ACK), b"\x15\x03\x03\x00\x02\x01\x00"])
def test_replies_injected_behind_the_acknowledgement_are_never_believed(
    client: ClientTLS, injected: bytes
) -> None:
    with sockets() as (ours, theirs):
        greeting = struct.pack(">QQH", c.NBDMAGIC, c.IHAVEOPT, c.FLAG_FIXED_NEWSTYLE)
        theirs.sendall(greeting + ACK + injected)
        theirs.shutdown(socket.SHUT_WR)
        found = outcome(
            lambda: establish(ours, client_handshake("disk", tls=True), soon(), client.upgrade)
        )
    assert isinstance(found, (TLSError, ConnectionClosed))


def _take(sock: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        part = sock.recv(length - len(data))
        assert part, f"the server hung up after {data!r}"
        data += part
    return data


# One deadline (nbd.md §13)


def test_the_deadline_is_for_options_and_tls_together(server: ServerTLS) -> None:
    with sockets() as (ours, theirs):
        limit = time.monotonic() + 0.4
        handshake = server_handshake(OneExport(), tls="required")
        with in_thread(
            lambda: outcome(lambda: establish(ours, handshake, limit, server.upgrade))
        ) as serving:
            theirs.sendall(FLAGS)
            _take(theirs, GREETING)
            theirs.sendall(option(c.OPT_STARTTLS))
            _take(theirs, len(ACK))
            theirs.sendall(b"\x16\x03\x01\x02\x00")  # and no more
        result = serving.result()
        assert isinstance(result, ConnectionClosed)
        assert "in time" in str(result)
        assert time.monotonic() < limit + 1


def test_the_deadline_is_for_the_options_inside_tls_too(
    server: ServerTLS, client: ClientTLS
) -> None:
    with sockets() as (ours, theirs):
        limit = time.monotonic() + 0.4
        handshake = server_handshake(OneExport(), tls="required")
        with in_thread(
            lambda: outcome(lambda: establish(ours, handshake, limit, server.upgrade))
        ) as serving:
            theirs.sendall(FLAGS + option(c.OPT_STARTTLS))
            _take(theirs, GREETING + len(ACK))
            stream = client.upgrade(theirs, soon())
            stream.sendall(option(c.OPT_LIST)[:7])
            # The server gives up, in good order: the end, with close_notify before it.
            assert stream.recv_into(memoryview(bytearray(1))) == 0
            stream.goodbye()
            with pytest.raises(ssl.SSLZeroReturnError):
                stream._read(1, memoryview(bytearray(1)))
        assert isinstance(serving.result(), ConnectionClosed)


def test_a_peer_that_breaks_the_protocol_inside_tls_gets_a_goodbye(
    server: ServerTLS, client: ClientTLS
) -> None:
    def nonsense() -> Handshake[None]:
        yield GREETING
        yield FLAGS + option(c.OPT_STARTTLS)
        yield len(ACK)
        yield UPGRADE
        yield b"no option at all"
        yield 1

    mine, theirs = both(server_handshake(OneExport(), tls="required"), nonsense(), server, client)
    assert isinstance(mine, ProtocolError)
    assert isinstance(theirs, ConnectionClosed)


# Misuse


def to_tls(times: int) -> Handshake[str]:
    for _ in range(times):
        yield UPGRADE
    return "done"


def test_a_handshake_that_turns_to_tls_needs_somebody_who_can_do_it() -> None:
    with sockets() as (ours, _):
        with pytest.raises(ValueError, match="gave no way"):
            run_handshake(ours, to_tls(1), None)
        with pytest.raises(ValueError, match="gave no way"):
            establish(ours, to_tls(1), None)


def test_a_handshake_turns_to_tls_once(server: ServerTLS, client: ClientTLS) -> None:
    mine, theirs = both(to_tls(2), to_tls(1), server, client)
    assert isinstance(mine, ValueError)
    assert theirs[0] == "done"

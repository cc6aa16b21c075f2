"""The server's side of TLS: per server, listener and export; rules about whom TLS proved.

nbd.md §9. TLS itself is tested in test_tls.py.
"""

import logging
import socket
import time
from pathlib import Path
from typing import NoReturn

import pytest

from fleece.block.memory import MemoryNode
from nbdwire import constants as c
from nbdwire.access import parse
from nbdwire.client import Client, connect, list_exports
from nbdwire.errors import ConnectionClosed, NBDError, PolicyRefused, TLSRequired
from nbdwire.negotiate_client import client_handshake, client_list
from nbdwire.opening import open_stream
from nbdwire.server import Server
from nbdwire.tls import ClientTLS, ServerTLS
from nbdwire.transport import establish
from nbdwire.uri import NBDURI
from tests.support import certificates, nbdraw
from tests.support.certificates import CLIENT_SUBJECT, Pki
from tests.support.threads import in_thread, wait_until

SIZE = 1 << 20


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return certificates.create(tmp_path_factory.mktemp("pki"))


def server_tls(pki: Pki, mode: str = "required", *, verify_peer: bool = False) -> ServerTLS:
    return ServerTLS(mode, certificates=pki.both, verify_peer=verify_peer)  # type: ignore[arg-type]


def secure(where: NBDURI, export: str, certificates: Path) -> Client:
    tls = ClientTLS(certificates=certificates, hostname="localhost").upgrade
    return connect(where.with_export(export), tls=tls, timeout=20)


def plain(where: NBDURI, export: str = "disk") -> Client:
    bare = NBDURI(host=where.host, port=where.port, socket=where.socket, export=export)
    return connect(bare, timeout=20)


def works(client: Client) -> None:
    with client:
        client.pwrite(memoryview(b"x" * 4096), 0)
        assert client.pread(4096, 0) == b"x" * 4096


def test_a_server_with_tls_serves_its_clients_with_it_and_says_so(
    tmp_path: Path, pki: Pki, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "nbdwire")
    with Server(NBDURI(socket=str(tmp_path / "s")), tls=server_tls(pki)) as server:
        server.add("disk", MemoryNode(SIZE))
        (where,) = server.listeners
        assert str(where).startswith("nbds+unix://")
        works(secure(where, "disk", pki.both))
        with pytest.raises(TLSRequired):
            plain(where)
    assert sum("did not turn to TLS, which is required" in m for m in caplog.messages) == 1
    (opened,) = [message for message in caplog.messages if message.startswith("open")]
    assert "tls=TLSv1." in opened
    assert "export='disk' headers=extended contexts=base:allocation" in opened


def refusal(caplog: pytest.LogCaptureFixture) -> str:
    """The only line about a refused client."""
    (line,) = [message for message in caplog.messages if message.startswith("refused")]
    return line


def test_a_client_that_does_not_trust_the_server_is_logged_with_its_reason(
    tmp_path: Path, pki: Pki, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "nbdwire")
    with Server(NBDURI(socket=str(tmp_path / "s")), tls=server_tls(pki)) as server:
        server.add("disk", MemoryNode(SIZE))
        with pytest.raises(NBDError):
            secure(server.listeners[0], "disk", pki.wrong_authority)
    assert "it does not trust the authority that signed this side's certificate" in refusal(caplog)
    assert "did not turn to TLS" not in refusal(caplog)


def test_a_client_that_leaves_during_the_tls_handshake_has_turned_to_tls(
    tmp_path: Path, pki: Pki, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "nbdwire")

    def leaves(sock: socket.socket) -> NoReturn:
        sock.close()
        raise ConnectionClosed("gone")

    with Server(NBDURI(socket=str(tmp_path / "s")), tls=server_tls(pki)) as server:
        server.add("disk", MemoryNode(SIZE))
        where = server.listeners[0]
        with pytest.raises(ConnectionClosed):
            open_stream(where, client_list(tls=True), 20.0, leaves)
    assert "no TLS: the client hung up during the TLS handshake" in refusal(caplog)
    assert "certificate" in refusal(caplog)


@pytest.mark.parametrize("blocking", [False, True])
def test_large_transfers_over_tls(tmp_path: Path, pki: Pki, blocking: bool) -> None:
    node = MemoryNode(16 << 20)
    node.blocking = blocking
    with Server(NBDURI(socket=str(tmp_path / "s")), tls=server_tls(pki)) as server:
        server.add("disk", node)
        data = bytes(range(256)) * (4 << 12)
        with secure(server.listeners[0], "disk", pki.both) as client:
            for offset in (0, 5 << 20, 11 << 20):
                client.pwrite(memoryview(data), offset, fua=True)
                assert client.pread(len(data), offset) == data


def test_one_listener_has_tls_and_the_other_has_none(tmp_path: Path, pki: Pki) -> None:
    with Server(tls=server_tls(pki, "allowed")) as server:
        server.add("disk", MemoryNode(SIZE))
        local = server.listen(NBDURI(socket=str(tmp_path / "s")), tls=False)
        public = server.listen(NBDURI(host="127.0.0.1", port=0, tls=True))
        assert (local.tls, public.tls) == (False, True)
        works(plain(local))
        works(secure(public, "disk", pki.both))
        with pytest.raises(NBDError, match="switched off"):
            secure(local, "disk", pki.both)
        with pytest.raises(TLSRequired):
            plain(public)


def test_an_export_may_need_tls_where_others_do_not(tmp_path: Path, pki: Pki) -> None:
    """SELECTIVETLS: nbd.md §9."""
    where = NBDURI(socket=str(tmp_path / "s"))
    with Server(where, tls=server_tls(pki, "allowed")) as server:
        server.add("disk", MemoryNode(SIZE))
        server.add("secret", MemoryNode(SIZE), tls_required=True)
        works(plain(where, "disk"))
        works(secure(where, "disk", pki.both))
        works(secure(where, "secret", pki.both))
        with pytest.raises(TLSRequired):
            plain(where, "secret")


def test_a_rule_about_a_certificate_lets_its_owner_in_and_nobody_else(
    tmp_path: Path, pki: Pki, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "nbdwire")
    where = NBDURI(socket=str(tmp_path / "s"))
    with Server(where, tls=server_tls(pki, "allowed", verify_peer=True)) as server:
        server.add("subject", MemoryNode(SIZE), access=parse(f"subject:{CLIENT_SUBJECT}"))
        server.add("san", MemoryNode(SIZE), access=parse("san:DNS:BACKUP1.example"))
        server.add("other", MemoryNode(SIZE), access=parse("subject:CN=other"))
        for export in ("subject", "san"):
            works(secure(where, export, pki.both))
            with pytest.raises(TLSRequired):
                plain(where, export)
        with pytest.raises(PolicyRefused, match="no rule allows you"):
            secure(where, "other", pki.both)
    refused = [m for m in caplog.messages if m.startswith("refused") and "'other'" in m]
    assert len(refused) == 1
    assert CLIENT_SUBJECT in refused[0]


def test_a_listener_for_certificates_makes_nothing_before_it_has_seen_one(
    tmp_path: Path, pki: Pki, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "nbdwire")
    names: list[str] = []

    def make(name: str) -> MemoryNode:
        names.append(name)
        return MemoryNode(SIZE)

    where = NBDURI(socket=str(tmp_path / "s"))
    with Server(on_export=make, tls=server_tls(pki, "allowed", verify_peer=True)) as server:
        server.listen(where, access=parse(f"subject:{CLIENT_SUBJECT}"))
        with pytest.raises(TLSRequired):
            plain(where, "vm")
        with pytest.raises(PolicyRefused):
            list_exports(where)
        assert names == []
        works(secure(where, "vm", pki.both))
        assert names == ["vm"]
    assert any("only with it" in message for message in caplog.messages)


def test_a_listing_is_of_what_tls_opens(tmp_path: Path, pki: Pki) -> None:
    where = NBDURI(socket=str(tmp_path / "s"))
    with Server(where, tls=server_tls(pki, "allowed", verify_peer=True)) as server:
        server.add("disk", MemoryNode(SIZE))
        server.add("mine", MemoryNode(SIZE), access=parse("san:DNS:backup1.example"))
        server.add("theirs", MemoryNode(SIZE), access=parse("san:DNS:backup2.example"))
        assert [name for name, _ in list_exports(where)] == ["disk"]
        tls = ClientTLS(certificates=pki.both, hostname="localhost").upgrade
        assert [name for name, _ in list_exports(where, tls=tls)] == ["disk", "mine"]


def test_the_deadline_of_the_handshake_includes_tls(tmp_path: Path, pki: Pki) -> None:
    """nbd.md §13: one deadline over the whole of it."""
    where = NBDURI(socket=str(tmp_path / "s"))
    with Server(where, tls=server_tls(pki), handshake_seconds=0.3) as server:
        with nbdraw.open_socket(where) as sock:
            began = time.monotonic()
            start = b"\0\0\0\3IHAVEOPT" + c.OPT_STARTTLS.to_bytes(4, "big") + bytes(4)
            sock.sendall(start)
            received = b""
            while part := sock.recv(1000):
                received += part
            assert time.monotonic() - began < 5
            assert received.endswith(b"\0\0\0\1\0\0\0\0"), "the ACK, and silence"
        wait_until(lambda: server.clients() == 0)


def test_the_server_stops_while_a_client_is_in_the_middle_of_tls(tmp_path: Path, pki: Pki) -> None:
    where = NBDURI(socket=str(tmp_path / "s"))
    with Server(where, tls=server_tls(pki)) as server, nbdraw.open_socket(where) as sock:
        sock.sendall(b"\0\0\0\3IHAVEOPT" + c.OPT_STARTTLS.to_bytes(4, "big") + bytes(4))
        received = b""
        while len(received) < 18 + 20:
            received += sock.recv(100)
        began = time.monotonic()
        server.stop()
        assert time.monotonic() - began < 2


@pytest.mark.parametrize("blocking", [False, True])
def test_the_server_stops_under_a_tls_client_that_does_not_read(
    tmp_path: Path, pki: Pki, blocking: bool
) -> None:
    node = MemoryNode(64 << 20)
    node.blocking = blocking
    where = NBDURI(socket=str(tmp_path / "s"))
    with Server(where, tls=server_tls(pki)) as server, nbdraw.open_socket(where) as sock:
        server.add("disk", node)
        node.pwrite(memoryview(b"x" * (16 << 20)), 0)
        tls = ClientTLS(certificates=pki.both, hostname="localhost").upgrade
        handshake = client_handshake("disk", extended=False, tls=True)
        _, stream = establish(sock, handshake, None, tls)
        for index in range(10):
            stream.sendall(nbdraw.request(nbdraw.READ, 0, 16 << 20, cookie=index))
        wait_until(lambda: sum(conn.activity() or 0 for conn in server._everybody()))
        began = time.monotonic()
        server.stop(timeout=0.6)
        assert time.monotonic() - began < 1.5
        stream.close()


def test_a_tls_client_is_told_that_the_server_stops(
    tmp_path: Path, pki: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbdwire.server.LINGER_SECONDS", 2.0)
    where = NBDURI(socket=str(tmp_path / "s"))
    with Server(where, tls=server_tls(pki)) as server:
        server.add("disk", MemoryNode(SIZE))
        with secure(where, "disk", pki.both) as client, in_thread(lambda: server.stop(20)):
            wait_until(lambda: all(conn.stopping.is_set() for conn in server._everybody()))
            with pytest.raises(OSError, match="shutting down"):
                client.pread(512, 0)
            client.close()

"""Kernel TLS where there is none: refused when configured, and never plain text instead."""

import contextlib
import errno
import os
import socket
import ssl
from collections.abc import Iterator

import pytest

from nbdwire import ktls
from nbdwire.errors import TLSError
from nbdwire.tls import ClientTLS, ServerTLS, TLSStream
from tests.support.certificates import Pki, create
from tests.support.tls import SECONDS, outcome, records, shake, soon, streams


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return create(tmp_path_factory.mktemp("pki") / "pki")


@pytest.fixture
def tcp() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        theirs = socket.create_connection(listener.getsockname(), SECONDS)
        ours, _ = listener.accept()
    ours.settimeout(SECONDS)
    with ours, theirs:
        yield ours, theirs


@contextlib.contextmanager
def promised(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if all of it were there; the kernel will not take over."""
    monkeypatch.setattr(ktls, "_try_kernel", lambda: "")
    monkeypatch.setattr(ssl, "OP_ENABLE_KTLS", ssl.Options(0), raising=False)
    assert ktls.unavailable() == ""
    yield


def test_it_says_what_is_missing(pki: Pki, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(ssl, "OP_ENABLE_KTLS", raising=False)
    assert "Python 3.12" in ktls.unavailable()
    with pytest.raises(TLSError, match=r"kernel TLS cannot be used: Python 3\.12"):
        ServerTLS(certificates=pki.both, kernel=True)
    monkeypatch.setattr(ssl, "OP_ENABLE_KTLS", ssl.Options(0), raising=False)
    monkeypatch.setattr(ktls, "_try_kernel", lambda: "No such file or directory")
    with pytest.raises(TLSError, match="the kernel says No such file or directory"):
        ServerTLS(certificates=pki.both, kernel=True)


def test_the_kernel_is_asked_whether_it_takes_a_key() -> None:
    """What it answers differs from machine to machine; it is an answer."""
    said = ktls._try_kernel()
    assert said == "" or said in {os.strerror(number) for number in errno.errorcode}
    plain = socket.socketpair()
    assert not any(map(ktls.has_taken_over, plain))
    for sock in plain:
        sock.close()


def test_a_kernel_that_does_not_take_over_gets_no_plain_text_to_send(
    pki: Pki, tcp: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    with promised(monkeypatch):
        server = ServerTLS(certificates=pki.both, kernel=True)
    assert not ktls.has_taken_over(tcp[0])
    client = ClientTLS(certificates=pki.both, hostname="localhost")
    mine, theirs = shake(server, client, tcp)
    assert isinstance(mine, TLSError)
    assert "did not take over" in str(mine)
    if isinstance(theirs, TLSStream):
        assert theirs.recv_into(memoryview(bytearray(1))) == 0
        theirs.close()


def test_before_and_after_tls_nothing_is_sent(
    pki: Pki, tcp: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pki.both / "server-cert.pem", pki.both / "server-key.pem")
    with promised(monkeypatch):
        ktls.prepare(context)
    stream = ktls.KernelTLSStream(tcp[0], context)
    assert (stream.secure, stream.can_sendfile) == (True, True)
    for send in (lambda: stream.sendall(b"secret"), lambda: stream.sendmsg([b"secret"])):
        with pytest.raises(TLSError, match="has not begun"):
            send()
    with pytest.raises(TimeoutError):
        stream.handshake(soon() - 2 * SECONDS)
    stream.close()
    assert stream.fileno() == -1
    received = b""
    while data := tcp[1].recv(100):
        received += data
    assert all(kind == 21 for kind, _ in records(received)), "nothing, or an alert"


def test_unix_sockets_are_encrypted_here_as_ever(pki: Pki, monkeypatch: pytest.MonkeyPatch) -> None:
    with promised(monkeypatch):
        server = ServerTLS(certificates=pki.both, kernel=True)
    client = ClientTLS(certificates=pki.both, hostname="localhost")
    with streams(server, client) as (ours, _):
        assert isinstance(ours, TLSStream)


def test_a_refused_client_leaves_no_descriptor_behind(
    pki: Pki, tcp: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    with promised(monkeypatch):
        server = ServerTLS(certificates=pki.both, kernel=True)
    tcp[1].sendall(b"IHAVEOPT" + bytes(8))
    found = outcome(lambda: server.upgrade(tcp[0], soon()))
    assert isinstance(found, TLSError)
    assert "what came is not TLS" in str(found)
    tcp[0].close()
    # With a second descriptor left open the peer would wait for the end in vain.
    with contextlib.suppress(ConnectionResetError):
        while tcp[1].recv(100):
            pass

"""TLS without a server around it: configuration, who is trusted, and the handshake (nbd.md §9)."""

import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nbdwire import psk
from nbdwire.errors import ConnectionClosed, TLSError
from nbdwire.tls import ClientTLS, Files, Identity, ServerTLS, TLSStream, client_context
from nbdwire.tlsstream import identity_of
from nbdwire.uri import parse
from tests.support.certificates import CLIENT_NAMES, CLIENT_SUBJECT, Authority, Pki, create
from tests.support.threads import in_thread
from tests.support.tls import outcome, shake, sockets, soon, streams
from tests.support.tools import require


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return create(tmp_path_factory.mktemp("pki") / "pki")


def client(directory: Path, hostname: str | None = "localhost", **options: Any) -> ClientTLS:
    return ClientTLS(certificates=directory, hostname=hostname, **options)


def refused(server: ServerTLS, peer: ClientTLS) -> tuple[str, str]:
    """What the two ends say of a handshake that must fail."""
    with sockets() as ends:
        mine, theirs = shake(server, peer, ends)
        if isinstance(theirs, TLSStream):
            # With TLS 1.3 a client is done first; it learns by its first receive.
            late = outcome(lambda: theirs.recv_into(memoryview(bytearray(1))))
            theirs = late if isinstance(late, Exception) else TLSError("hung up")
        assert isinstance(mine, (TLSError, ConnectionClosed)), mine
        assert isinstance(theirs, (TLSError, ConnectionClosed)), theirs
        for text in (str(mine), str(theirs)):
            assert "\n" not in text
            assert "_ssl.c" not in text
        return str(mine), str(theirs)


# Configuration


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mode": "sometimes"}, "mode"),
        ({}, "either certificates or a psk_file"),
        ({"certificates": "/x", "psk_file": "/y"}, "either certificates or a psk_file"),
        ({"certificates": "/nowhere"}, "server-cert.pem"),
        ({"certificates": Files(certificate="/nowhere/a", key="/nowhere/b")}, "No such file"),
        ({"certificates": Files(ca="/nowhere/a")}, "needs a certificate"),
    ],
)
def test_a_server_that_cannot_do_tls_says_so_when_it_is_configured(
    options: dict[str, Any], said: str
) -> None:
    with pytest.raises(TLSError, match=said):
        ServerTLS(**options)


def test_mode_off_needs_no_files_and_upgrades_nobody() -> None:
    server = ServerTLS("off")
    server.reload()
    with sockets() as (ours, _), pytest.raises(TLSError, match="switched off"):
        server.upgrade(ours, soon())


def test_verifying_clients_needs_the_authority(pki: Pki, tmp_path: Path) -> None:
    shutil.copytree(pki.both, tmp_path / "d")
    (tmp_path / "d" / "ca-cert.pem").unlink()
    ServerTLS(certificates=tmp_path / "d")
    with pytest.raises(TLSError, match=r"ca-cert\.pem"):
        ServerTLS(certificates=tmp_path / "d", verify_peer=True)
    ServerTLS(certificates=tmp_path / "d", verify_peer=True, ca=pki.both / "ca-cert.pem")


@pytest.mark.parametrize("gone", ["server-key.pem", "server-cert.pem"])
def test_half_a_certificate_is_refused(pki: Pki, tmp_path: Path, gone: str) -> None:
    shutil.copytree(pki.both, tmp_path / "d")
    (tmp_path / "d" / gone).unlink()
    with pytest.raises(TLSError, match=r"both server-cert\.pem and server-key\.pem"):
        ServerTLS(certificates=tmp_path / "d")


def test_a_key_of_another_certificate_is_refused(pki: Pki) -> None:
    files = replace(Files.of_server(pki.both), key=str(pki.wrong_authority / "server-key.pem"))
    with pytest.raises(TLSError, match="key values mismatch"):
        ServerTLS(certificates=files)


def test_an_encrypted_key_is_refused_and_nobody_is_asked_for_its_pass_phrase(
    pki: Pki, tmp_path: Path
) -> None:
    shutil.copytree(pki.both, tmp_path / "d")
    key = tmp_path / "d" / "server-key.pem"
    command = ["pkcs8", "-topk8", "-in", pki.both / "server-key.pem", "-passout", "pass:x"]
    subprocess.run([require("openssl"), *command, "-out", key], check=True)
    with pytest.raises(TLSError, match="is encrypted"):
        ServerTLS(certificates=tmp_path / "d")


def test_a_client_needs_the_authority_in_the_directory_it_names(tmp_path: Path) -> None:
    with pytest.raises(TLSError, match=r"ca-cert\.pem"):
        client(tmp_path)
    (tmp_path / "ca-cert.pem").write_text("no certificate\n")
    with pytest.raises(TLSError, match="cannot use"):
        client(tmp_path)


# Both agree


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_tls_1_2_and_1_3_carry_data_both_ways(pki: Pki, version: ssl.TLSVersion) -> None:
    peer = client(pki.both)
    peer._context.maximum_version = version
    with streams(ServerTLS(certificates=pki.both), peer) as (ours, theirs):
        name = version.name.replace("_", ".")
        assert ours.description == theirs.description
        assert ours.description.startswith(f"{name} ")
        assert len(ours.description.split()) == 2
        ours.sendall(b"from the server")
        theirs.sendall(b"from the client")
        for end, text in ((ours, b"from the client"), (theirs, b"from the server")):
            view = memoryview(bytearray(100))
            assert end.recv_into(view) == len(text)
            assert view[: len(text)] == text


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1")
def test_tls_older_than_1_2_is_refused(pki: Pki, version: ssl.TLSVersion) -> None:
    """nbd.md §9: older versions SHOULD NOT be on by default."""
    server, peer = ServerTLS(certificates=pki.both), client(pki.both)
    assert server._current is not None
    assert server._current[0].minimum_version == ssl.TLSVersion.TLSv1_2
    peer._context.minimum_version = peer._context.maximum_version = version
    peer._context.set_ciphers("ALL:@SECLEVEL=0")
    said, _ = refused(server, peer)
    assert said == "no TLS with the client: it speaks nothing newer than TLS 1.1"


def test_anonymous_tls_is_refused(pki: Pki) -> None:
    peer = client(pki.both, None, verify_peer=False)
    peer._context.maximum_version = ssl.TLSVersion.TLSv1_2
    peer._context.set_ciphers("aNULL:@SECLEVEL=0")
    said, _ = refused(ServerTLS(certificates=pki.both), peer)
    assert said == "no TLS with the client: there is no cipher that both sides know"


# Whom the client trusts


@pytest.mark.parametrize("hostname", ["localhost", "127.0.0.1", "::1", None])
def test_the_servers_name_or_address_is_verified(pki: Pki, hostname: str | None) -> None:
    with streams(ServerTLS(certificates=pki.both), client(pki.both, hostname)) as (_, theirs):
        assert theirs.identity.subject == "CN=nbd server"
        assert "DNS:localhost" in theirs.identity.names
        assert "IP:127.0.0.1" in theirs.identity.names


@pytest.mark.parametrize(
    ("directory", "hostname", "said"),
    [
        ("both", "elsewhere.example", "Hostname mismatch, certificate is not valid for"),
        ("both", "192.0.2.1", "IP address mismatch, certificate is not valid for '192.0.2.1'"),
        ("wrong_name", "localhost", "Hostname mismatch, certificate is not valid for 'localhost'"),
        ("wrong_authority", None, "(no authority that is trusted here has signed it)"),
        ("expired", "localhost", "certificate has expired"),
    ],
)
def test_a_server_that_is_not_who_it_should_be_is_refused_in_one_line(
    pki: Pki, directory: str, hostname: str | None, said: str
) -> None:
    files = Files.of_server(getattr(pki, directory))
    _, theirs = refused(ServerTLS(certificates=files), client(pki.both, hostname))
    assert theirs.startswith("no TLS with the server: its certificate is refused: ")
    assert said in theirs


def test_a_client_may_trust_anybody(pki: Pki) -> None:
    server = ServerTLS(certificates=pki.wrong_authority)
    with streams(server, client(pki.both, "localhost", verify_peer=False)) as (_, theirs):
        assert theirs.identity == Identity()


def test_a_name_that_cannot_be_verified_is_refused(pki: Pki) -> None:
    with sockets() as (ours, _), pytest.raises(TLSError, match="cannot be verified"):
        client(pki.both, ".localhost").upgrade(ours, soon())


# Whom the server trusts


def test_a_client_certificate_is_verified_and_tells_who_it_is(pki: Pki) -> None:
    server = ServerTLS(certificates=pki.both, verify_peer=True)
    with streams(server, client(pki.both)) as (ours, _):
        assert ours.identity == Identity(CLIENT_SUBJECT, tuple(CLIENT_NAMES.split(",")))
        assert str(ours.identity) == CLIENT_SUBJECT


def test_a_certificate_that_was_not_verified_tells_nothing(pki: Pki) -> None:
    with streams(ServerTLS(certificates=pki.both), client(pki.both)) as (ours, _):
        assert ours.identity == Identity()
        assert str(ours.identity) == "nobody"


@pytest.mark.parametrize(
    ("directory", "mine", "theirs"),
    [
        ("no_client", "it has shown no certificate", "certificate required"),
        ("wrong_authority", "(no authority that is trusted here has signed it)", "unknown ca"),
        ("expired", "certificate has expired", "certificate expired"),
    ],
)
def test_a_client_whose_certificate_is_no_good_is_refused(
    pki: Pki, directory: str, mine: str, theirs: str
) -> None:
    server = ServerTLS(certificates=pki.both, verify_peer=True)
    files = Files.of_client(getattr(pki, directory))
    peer = ClientTLS(certificates=replace(files, ca=str(pki.both / "ca-cert.pem")))
    said, heard = refused(server, peer)
    assert mine in said
    assert theirs in heard


def test_a_server_certificate_does_not_make_a_client(pki: Pki) -> None:
    files = Files.of_server(pki.no_client)
    said, _ = refused(
        ServerTLS(certificates=pki.both, verify_peer=True), ClientTLS(certificates=files)
    )
    assert "unsuitable certificate purpose" in said.replace("unsupported", "unsuitable")


def test_a_revoked_client_is_refused(pki: Pki, tmp_path: Path) -> None:
    authority = Authority.create(tmp_path / "ca")
    both = authority.sign(tmp_path / "both", "server", "/CN=server", "DNS:localhost")
    authority.sign(both, "client", "/CN=client", "DNS:client")
    with streams(ServerTLS(certificates=both, verify_peer=True), client(both)):
        pass
    authority.revoke(both, "client")
    files = replace(Files.of_client(both), crl="")
    said, _ = refused(ServerTLS(certificates=both, verify_peer=True), ClientTLS(certificates=files))
    assert said.endswith("its certificate is refused: certificate revoked")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("plain", "CN=plain"),
        ("a,O=root", r"CN=a\,O\=root"),
        ("a+b", r"CN=a\+b"),
        ('"\\<>;', r"CN=\"\\\<\>\;"),
        (" x ", r"CN=\ x\ "),
        ("#x", r"CN=\#x"),
        ("a\nb", r"CN=a\0Ab"),
    ],
)
def test_a_name_in_a_subject_cannot_pass_for_more_than_it_is(value: str, text: str) -> None:
    assert identity_of({"subject": ((("commonName", value),),)}).subject == text


def test_several_names_in_one_part_and_unknown_kinds_are_told() -> None:
    subject = ((("commonName", "a"), ("userId", "u")), (("1.2.3", "x"),))
    names = (("email", "a@example"), ("IP Address", "::1"), ("DirName", ((("x", "y"),),)))
    found = identity_of({"subject": subject, "subjectAltName": names})
    assert found.subject == "CN=a+UID=u,1.2.3=x"
    assert found.names == ("email:a@example", "IP:::1")


# New certificates


def install(source: Path, target: Path) -> None:
    for path in source.iterdir():
        if path.is_file():
            shutil.copy(path, target / path.name)


def test_new_certificates_are_for_new_clients_and_disturb_no_old_one(
    pki: Pki, tmp_path: Path
) -> None:
    install(pki.both, tmp_path)
    server, peer = ServerTLS(certificates=tmp_path), client(pki.both)
    with streams(server, peer) as (ours, theirs):
        install(pki.no_client, tmp_path)
        server.reload()
        with streams(server, peer) as (_, later):
            assert later.identity.subject == "CN=other"
        ours.sendall(b"still here")
        assert theirs.recv_into(memoryview(bytearray(20))) == 10
        assert theirs.identity.subject == "CN=nbd server"


@pytest.mark.parametrize("name", ["server-cert.pem", "server-key.pem", "ca-cert.pem"])
@pytest.mark.parametrize("damage", ["", "-----BEGIN CERTIFICATE-----\nAAAA\n", None])
def test_broken_new_certificates_leave_the_old_ones_in_use(
    pki: Pki, tmp_path: Path, name: str, damage: str | None
) -> None:
    install(pki.both, tmp_path)
    server = ServerTLS(certificates=tmp_path, verify_peer=True)
    if damage is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(damage)
    with pytest.raises(TLSError) as caught:
        server.reload()
    assert "\n" not in str(caught.value)
    with streams(server, client(pki.both)) as (_, theirs):
        assert theirs.identity.subject == "CN=nbd server"


def test_a_new_list_of_revoked_clients_counts_from_the_reload_on(
    tmp_path: Path,
) -> None:
    authority = Authority.create(tmp_path / "ca")
    both = authority.sign(tmp_path / "both", "server", "/CN=server", "DNS:localhost")
    authority.sign(both, "client", "/CN=client", "DNS:client")
    server, peer = ServerTLS(certificates=both, verify_peer=True), client(both)
    authority.revoke(both, "client")
    with streams(server, peer) as (ours, theirs):
        server.reload()
        assert "certificate revoked" in refused(server, peer)[0]
        ours.sendall(b"x")
        assert theirs.recv_into(memoryview(bytearray(1))) == 1


# Peers that do not play along (nbd.md §13)


@pytest.mark.parametrize("dribble", [False, True])
def test_a_client_that_never_finishes_the_tls_handshake_meets_the_deadline(
    pki: Pki, dribble: bool
) -> None:
    """nbd.md §13: one deadline over the whole handshake, TLS included."""
    hello = _client_hello(pki)
    with sockets() as (ours, theirs):
        limit = time.monotonic() + 0.4

        def upgrade() -> TLSStream:
            return ServerTLS(certificates=pki.both).upgrade(ours, limit)

        with in_thread(lambda: outcome(upgrade)) as server:
            for byte in hello[:20]:
                theirs.sendall(bytes([byte]))
                if dribble:  # there is always a byte within the time that is left
                    wait([server], timeout=0.05)
        assert isinstance(server.result(), TimeoutError)
        assert time.monotonic() < limit + 1


def _client_hello(pki: Pki) -> bytes:
    out = ssl.MemoryBIO()
    tls = client(pki.both)._context.wrap_bio(ssl.MemoryBIO(), out, server_hostname="localhost")
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    return out.read()


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (b"IHAVEOPT" + bytes(12), "what came is not TLS"),
        (b"GET / HTTP/1.0\r\n\r\n", "what came is not TLS"),
        (b"\x16\x03\x01\xff\xff" + bytes(16), ""),
        (b"\x16\x03\x01\x00\x10" + bytes(16), ""),
        (b"\x17\x03\x03\x00\x10" + bytes(16), ""),
        (b"\x16\x03\x01\x40\x00\x01\xff\xff\xff" + bytes(16380), ""),
    ],
)
def test_what_is_no_tls_is_refused_in_one_line(pki: Pki, sent: bytes, said: str) -> None:
    with sockets() as (ours, theirs):
        theirs.sendall(sent)
        with pytest.raises(TLSError, match=f"^no TLS with the client: {said}") as caught:
            ServerTLS(certificates=pki.both).upgrade(ours, soon())
        assert "\n" not in str(caught.value)


def test_a_client_that_leaves_during_the_tls_handshake_is_said_to(pki: Pki) -> None:
    with sockets() as (ours, theirs):
        theirs.sendall(_client_hello(pki)[:50])
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(ConnectionClosed, match="hung up during the TLS handshake"):
            ServerTLS(certificates=pki.both).upgrade(ours, soon())


# URIs (nbd.md §14)


def test_a_uri_tells_a_client_what_to_trust(pki: Pki) -> None:
    server = ServerTLS(certificates=pki.both, verify_peer=True)
    for text in (
        f"nbds://localhost/?tls-certificates={pki.both}",
        f"nbds://127.0.0.1:1234/?tls-certificates={pki.both}&tls-type=x509",
        f"nbds:///?tls-certificates={pki.both}",
        f"nbds://wrong.example/?tls-certificates={pki.both}&tls-hostname=localhost",
        f"nbds://wrong.example/?tls-certificates={pki.both}&tls-verify-peer=0",
        f"nbds://wrong.example/?tls-certificates={pki.both}&tls-verify-peer=false",
        f"nbds+unix:///?socket=/x&tls-certificates={pki.both}",
    ):
        with streams(server, ClientTLS.from_uri(parse(text))) as (ours, _):
            assert ours.identity.subject == CLIENT_SUBJECT
    with sockets() as (ours, theirs), in_thread(lambda: server.upgrade(ours, soon())):
        stream = client_context(parse(f"nbds:///?tls-certificates={pki.both}"))(theirs)
        assert stream.fileno() == theirs.fileno()


@pytest.mark.parametrize(
    "uri",
    ["nbds://wrong.example/?", "nbds+unix:///?socket=/x&tls-hostname=wrong.example&"],
)
def test_the_host_of_a_uri_is_verified(pki: Pki, uri: str) -> None:
    peer = ClientTLS.from_uri(parse(f"{uri}tls-certificates={pki.both}"))
    _, theirs = refused(ServerTLS(certificates=pki.both), peer)
    assert "Hostname mismatch" in theirs


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("tls-type=anon", "anonymous TLS"),
        ("tls-type=psk", "tls-psk-file"),
        ("tls-certificates=/nowhere", r"ca-cert\.pem"),
    ],
)
def test_a_uri_that_makes_no_sense_is_refused(query: str, said: str) -> None:
    with pytest.raises(TLSError, match=said):
        client_context(parse(f"nbds://localhost/?{query}"))


def test_without_a_directory_the_usual_one_is_used(
    pki: Pki, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = tmp_path / ".pki" / "libnbd"
    usual.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    install(pki.both, usual)
    server = ServerTLS(certificates=pki.both, verify_peer=True)
    with streams(server, ClientTLS.from_uri(parse("nbds://localhost/"))) as (ours, _):
        assert ours.identity.subject == CLIENT_SUBJECT


def test_without_any_certificates_the_systems_authorities_are_trusted(
    pki: Pki, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbdwire.tls._USUAL", (str(tmp_path),))
    _, theirs = refused(ServerTLS(certificates=pki.both), ClientTLS.from_uri(parse("nbds:///")))
    assert "its certificate is refused" in theirs
    monkeypatch.setenv("SSL_CERT_FILE", str(pki.both / "ca-cert.pem"))
    with streams(ServerTLS(certificates=pki.both), ClientTLS.from_uri(parse("nbds:///"))):
        pass


# Pre-shared keys


class FakeContext:
    """What `ssl.SSLContext` is from Python 3.13, as far as keys go."""

    def __init__(self) -> None:
        self.ciphers = ""
        self.server: Callable[[str | None], bytes] = lambda name: b""
        self.client: Callable[[str | None], tuple[str | None, bytes]] = lambda hint: (None, b"")

    def set_ciphers(self, text: str) -> None:
        self.ciphers = text

    def set_psk_server_callback(
        self, callback: Callable[[str | None], bytes], identity_hint: str | None = None
    ) -> None:
        self.server = callback

    def set_psk_client_callback(
        self, callback: Callable[[str | None], tuple[str | None, bytes]]
    ) -> None:
        self.client = callback


@pytest.fixture
def with_psk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psk, "require_python", lambda: None)


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(f"# made for a test\nalice:{'a1' * 32}\n\nbob:{'B2' * 32}\n")
    return path


needs_psk = pytest.mark.skipif(
    not hasattr(ssl.SSLContext, "set_psk_server_callback"), reason="Python has PSK from 3.13"
)


@pytest.mark.skipif(
    hasattr(ssl.SSLContext, "set_psk_server_callback"), reason="this Python has PSK"
)
def test_keys_on_an_old_python_are_refused_when_configured(keys: Path) -> None:
    """nbd.md §9: 3.11/3.12 refuse PSK at configuration time."""
    said = r"^TLS with pre-shared keys needs Python 3\.13 with OpenSSL; use certificates instead$"
    with pytest.raises(TLSError, match=said):
        ServerTLS(psk_file=keys)
    with pytest.raises(TLSError, match=said):
        ClientTLS.from_uri(parse(f"nbds://alice@localhost/?tls-psk-file={keys}"))


@pytest.mark.usefixtures("with_psk")
def test_a_server_knows_whose_key_a_handshake_used(keys: Path) -> None:
    context: Any = FakeContext()
    found = psk.Keys(psk.read_keys(keys))
    found.install(context)
    assert "PSK" in context.ciphers
    found.begin()
    assert found.name == ""
    assert context.server("bob") == b"\xb2" * 32
    assert found.name == "bob"
    with in_thread(lambda: (context.server("alice"), found.name)) as other:
        pass
    assert other.result() == (b"\xa1" * 32, "alice")
    assert found.name == "bob", "each thread has its own handshake"
    for unknown in ("mallory", "", None, "Bob"):
        assert context.server(unknown) == b""
        assert found.name == ""


@pytest.mark.usefixtures("with_psk")
def test_a_client_shows_its_name_and_key(keys: Path) -> None:
    context: Any = FakeContext()
    psk.install_client(context, "bob", psk.client_key(keys, "bob"))
    assert context.client("any hint") == ("bob", b"\xb2" * 32)
    with pytest.raises(TLSError, match="no key for 'mallory'"):
        psk.client_key(keys, "mallory")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "holds no key"),
        (b"# nothing\n", "holds no key"),
        (b"alice\n", "line 1 is not NAME:KEY"),
        (b"alice:\n", "line 1 is not NAME:KEY"),
        (b"\nalice:abc\n", "line 2 is not NAME:KEY"),
        (b"alice:zz\n", "line 1 is not NAME:KEY"),
        (b":aa\n", "line 1 is not NAME:KEY"),
        (b"a:aa\na:bb\n", "line 2: 'a'"),
        (b"n" * 129 + b":aa\n", "too long"),
        (b"a:" + b"aa" * 257, "its key is"),
        (b"\xff:aa\n", "not text"),
        (b"#" * ((1 << 20) + 1), "larger than"),
    ],
)
def test_a_bad_file_of_keys_is_refused_and_no_key_is_shown(
    tmp_path: Path, content: bytes, said: str
) -> None:
    path = tmp_path / "keys"
    path.write_bytes(content)
    with pytest.raises(TLSError, match=said) as caught:
        psk.read_keys(path)
    assert "aa" not in str(caught.value).replace(str(path), "")
    with pytest.raises(TLSError, match="No such file"):
        psk.read_keys(tmp_path / "none")


@needs_psk
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_key_opens_a_connection(keys: Path, version: ssl.TLSVersion) -> None:
    peer = ClientTLS.from_uri(parse(f"nbds://bob@localhost/?tls-psk-file={keys}"))
    peer._context.maximum_version = version
    with streams(ServerTLS(psk_file=keys), peer) as (ours, theirs):
        assert ours.identity == Identity(psk="bob")
        assert str(ours.identity) == "psk:bob"
        theirs.sendall(b"hello")
        assert ours.recv_into(memoryview(bytearray(9))) == 5


@needs_psk
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("line", [f"mallory:{'a1' * 32}", f"alice:{'cc' * 32}"])
def test_an_unknown_name_and_a_wrong_key_are_refused(
    keys: Path, tmp_path: Path, line: str, version: ssl.TLSVersion
) -> None:
    (tmp_path / "theirs").write_text(line)
    peer = ClientTLS(psk_file=tmp_path / "theirs", user=line.partition(":")[0])
    peer._context.maximum_version = version
    said, _ = refused(ServerTLS(psk_file=keys), peer)
    known = line.startswith("alice")
    assert said.endswith(
        "(it claims to be 'alice')" if known else "(it gave no name that has a key here)"
    )


@needs_psk
def test_keys_and_certificates_do_not_stand_in_for_each_other(pki: Pki, keys: Path) -> None:
    with_key = ClientTLS(psk_file=keys, user="alice")
    refused(ServerTLS(certificates=pki.both), with_key)
    with_key._context.minimum_version = ssl.TLSVersion.TLSv1_3
    refused(ServerTLS(certificates=pki.both), with_key)
    refused(ServerTLS(psk_file=keys), client(pki.both))
    refused(ServerTLS(psk_file=keys), client(pki.both, None, verify_peer=False))

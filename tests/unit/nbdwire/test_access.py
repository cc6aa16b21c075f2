"""Who may: rules about addresses, users, groups, certificates and keys (nbd.md, CVE-2013-6410)."""

import os
import socket
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

import pytest

from fleece.block.memory import MemoryNode
from nbdwire.access import Peer, Rule, needs_tls, parse, peer_of, plain_address, refusal
from nbdwire.errors import PolicyRefused, UnknownExport
from nbdwire.negotiate_client import client_list
from nbdwire.server import Server
from nbdwire.transport import run_handshake
from nbdwire.uri import NBDURI
from tests.support.nbdraw import connected, open_socket
from tests.support.serving import serving

SIZE = 4096
LOCAL = Peer("unix:pid=7,uid=1000", pid=7, uid=1000, gids=(100, 27))


def at(address: str) -> Peer:
    return Peer(f"{address}:4711", address=plain_address(address))


def allowed(peer: Peer, *rules: str) -> bool:
    return refusal([parse(rule) for rule in rules], peer) is None


def names(where: NBDURI) -> list[str]:
    with open_socket(where) as sock:
        return [name for name, _ in run_handshake(sock, client_list(), None)]


# Rules


def test_an_address_is_compared_as_a_number_and_never_as_text() -> None:
    """CVE-2013-6410: "10.1.1.1" must not admit 10.1.1.10, nor "10.1" 10.100.0.1."""
    assert allowed(at("10.1.1.1"), "net:10.1.1.1")
    assert not allowed(at("10.1.1.10"), "net:10.1.1.1")
    assert not allowed(at("10.1.1.1"), "net:10.1.1.10")
    assert not allowed(at("110.1.1.1"), "net:10.1.1.1")
    assert allowed(at("10.1.255.255"), "net:10.1.0.0/16")
    assert not allowed(at("10.10.0.1"), "net:10.1.0.0/16")


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("::ffff:192.0.2.7", "192.0.2.0/24"),
        ("fe80::1%eth0", "fe80::/10"),
        ("2001:DB8::0001", "2001:db8::1"),
    ],
)
def test_one_address_has_many_spellings(address: str, network: str) -> None:
    assert allowed(at(address), f"net:{network}")


def test_an_address_is_in_no_network_of_the_other_family() -> None:
    assert not allowed(at("::1"), "net:0.0.0.0/0")
    assert not allowed(at("127.0.0.1"), "net:::/0")
    assert not allowed(LOCAL, "net:0.0.0.0/0", "net:::/0")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "net:",
        "net",
        "10.0.0.1",
        "net:10.0.0.1/8",
        "net:10.0.0",
        "net:localhost",
        "uid:root",
        "uid:-1",
        "gid:1,",
        "cid:x",
        "shoe:43",
    ],
)
def test_a_rule_that_makes_no_sense_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ValueError, match="access rule") as caught:
        parse(text)
    assert repr(text) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_users_and_groups_of_unix_peers() -> None:
    assert allowed(LOCAL, "uid:1000")
    assert allowed(LOCAL, "uid:1,1000")
    assert not allowed(LOCAL, "uid:100")
    assert allowed(LOCAL, "gid:27")  # a supplementary group
    assert not allowed(LOCAL, "gid:1000")
    assert not allowed(at("127.0.0.1"), "uid:0", "gid:0")


def test_any_rule_of_several_suffices_and_no_rule_at_all_admits_nobody() -> None:
    assert allowed(LOCAL, "net:::1", "uid:1000")
    assert not allowed(LOCAL, "net:::1", "uid:1001")
    assert refusal([], LOCAL) == "no rule allows unix:pid=7,uid=1000"
    assert refusal(None, LOCAL) is None


def test_all_criteria_of_one_rule_must_hold() -> None:
    rule = Rule(uids=frozenset([1000]), gids=frozenset([27]))
    assert rule.allows(LOCAL)
    assert not Rule(uids=frozenset([1000]), gids=frozenset([28])).allows(LOCAL)
    assert not Rule(uids=frozenset([1000]), psk=frozenset(["a"])).allows(LOCAL)


def test_a_subject_is_the_whole_distinguished_name() -> None:
    peer = Peer("x", tls="TLSv1.3", subject="O=Acme,CN=backup")
    assert allowed(peer, "subject:O=Acme,CN=backup")
    for other in ("CN=backup", "O=Acme,CN=backup2", "O=Acme,CN=back", "o=acme,cn=backup"):
        assert not allowed(peer, f"subject:{other}")
    assert not allowed(Peer("x"), "subject:O=Acme,CN=backup")


def test_alternative_names_have_a_kind_and_host_names_no_case() -> None:
    peer = Peer("x", tls="TLSv1.3", names=("DNS:Backup.example", "URI:urn:A", "IP:192.0.2.7"))
    assert allowed(peer, "san:dns:backup.EXAMPLE") is False  # the kind is as TLS writes it
    assert allowed(peer, "san:DNS:backup.EXAMPLE")
    assert allowed(peer, "san:URI:urn:A")
    assert not allowed(peer, "san:URI:urn:a")
    assert not allowed(peer, "san:DNS:192.0.2.7")
    assert not allowed(peer, "san:DNS:example")


def test_a_key_is_known_by_its_identity() -> None:
    assert allowed(Peer("x", tls="TLSv1.3", psk="nightly"), "psk:weekly,nightly")
    assert not allowed(Peer("x", tls="TLSv1.3", psk="night"), "psk:nightly")


def test_a_peer_that_may_yet_prove_who_it_is_needs_tls() -> None:
    rules = [parse("psk:nightly"), parse("uid:0")]
    assert needs_tls(rules, LOCAL)
    assert not needs_tls(rules, Peer("x", uid=0))
    assert not needs_tls(rules, Peer("x", tls="TLSv1.3", psk="other"))
    assert not needs_tls([parse("uid:0")], LOCAL)
    assert not needs_tls(None, LOCAL)


# Peers


def test_the_peer_of_a_unix_socket_has_a_process_a_user_and_groups() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        peer = peer_of(ours, "")
    assert (peer.pid, peer.uid) == (os.getpid(), os.getuid())
    assert {os.getgid(), *os.getgroups()} == set(peer.gids)
    assert str(peer) == f"unix:pid={os.getpid()},uid={os.getuid()}"


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_the_peer_of_a_tcp_socket_has_an_address(host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with (
        socket.create_server((host, 0), family=family) as server,
        socket.create_connection(server.getsockname()[:2]) as client,
    ):
        accepted, address = server.accept()
        with accepted:
            peer = peer_of(accepted, address)
        port = client.getsockname()[1]
    assert peer.address == ip_address(host)
    assert str(peer) == (f"[{host}]:{port}" if ":" in host else f"{host}:{port}")


def test_what_tls_proved_is_part_of_the_peer() -> None:
    @dataclass
    class Identity:
        subject: str = "CN=a"
        names: tuple[str, ...] = ("DNS:a",)
        psk: str = ""

    @dataclass
    class Stream:
        identity: Identity
        description: str = "TLSv1.3 TLS_AES_256_GCM_SHA384"

    peer = LOCAL.with_tls(Stream(Identity()))
    assert (peer.uid, peer.subject, peer.names) == (1000, "CN=a", ("DNS:a",))
    assert peer.tls.startswith("TLSv1.3")
    assert LOCAL.with_tls(object()).tls  # whatever the stream tells, it is TLS


# At a server


def test_an_export_is_for_those_its_rules_allow(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "nbdwire")
    with serving(tmp_path, MemoryNode(SIZE)) as (server, where):
        server.add("mine", MemoryNode(SIZE), access=parse(f"uid:{os.getuid()}"))
        server.add("theirs", MemoryNode(SIZE), access=[parse("uid:4294967294")])
        with connected(where, "mine") as client:
            client.in_step()
        with (
            pytest.raises(PolicyRefused, match="no rule allows you to use"),
            connected(where, "theirs"),
        ):
            pass
        assert names(where) == ["disk", "mine"]
    refused = [line for line in caplog.messages if line.startswith("refused")]
    assert len(refused) == 1
    assert f"uid={os.getuid()} to use the export 'theirs'" in refused[0]


def test_where_exports_are_hidden_a_forbidden_one_does_not_exist(tmp_path: Path) -> None:
    with serving(tmp_path, MemoryNode(SIZE), hide_exports=True) as (server, where):
        server.add("theirs", MemoryNode(SIZE), access=parse("net:192.0.2.1"))
        with pytest.raises(UnknownExport), connected(where, "theirs"):
            pass
        with pytest.raises(PolicyRefused, match="does not tell"):
            names(where)
        with connected(where) as client:
            client.in_step()


def test_a_listener_is_for_those_its_rules_allow_and_another_one_is_not_concerned(
    tmp_path: Path,
) -> None:
    with serving(tmp_path, MemoryNode(SIZE)) as (server, where):
        barred = server.listen("nbd://127.0.0.1:0", access=parse("net:192.0.2.0/24"))
        open_to_us = server.listen("nbd://127.0.0.1:0", access=parse("net:127.0.0.0/8"))
        for refused in (lambda: names(barred), lambda: connected(barred).__enter__()):
            with pytest.raises(PolicyRefused, match="no rule allows you"):
                refused()
        for good in (where, open_to_us):
            assert names(good) == ["disk"]
            with connected(good) as client:
                client.in_step()


def test_a_listener_offers_the_exports_it_is_told_to(tmp_path: Path) -> None:
    with serving(tmp_path, MemoryNode(SIZE)) as (server, everywhere):
        server.add("other", MemoryNode(2 * SIZE))
        here = server.listen("nbd://127.0.0.1:0", exports=["other"], default="other")
        assert names(here) == ["other"]
        assert names(everywhere) == ["disk", "other"]
        with connected(here, "") as client:
            assert client.session.size == 2 * SIZE
        for name in ("disk", "no"):
            with pytest.raises(UnknownExport), connected(here, name):
                pass


def test_a_default_that_a_listener_does_not_offer_is_unknown_there() -> None:
    with Server(default="disk") as server:
        server.add("disk", MemoryNode(SIZE))
        here = server.listen("nbd://127.0.0.1:0", exports=["other"])
        with pytest.raises(UnknownExport), connected(here, ""):
            pass

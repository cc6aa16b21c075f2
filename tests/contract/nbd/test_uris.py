"""The format of NBD URIs: what is parsed, and that ``nbds`` is never without TLS."""

import pytest

from fleece.block.memory import MemoryNode
from nbdwire.client import connect
from nbdwire.errors import NBDError, URIError
from nbdwire.server import Server
from nbdwire.uri import NBDURI, parse

PLACES = [
    ("nbd://host", "host", 10809),
    ("nbd://host:1234/", "host", 1234),
    ("nbd://192.0.2.1/x", "192.0.2.1", 10809),
    ("nbd://[2001:db8::1]/x", "2001:db8::1", 10809),
    ("nbd://[::1]:10810/x", "::1", 10810),
    ("nbd://user@host:1/x", "host", 1),
    ("nbd://ho%73t/x", "host", 10809),
]
EXPORTS = [
    ("nbd://h", ""),
    ("nbd://h/", ""),
    ("nbd://h/disk", "disk"),
    ("nbd://h//disk", "/disk"),
    ("nbd://h/a/b", "a/b"),
    ("nbd://h/%C3%B6%20%2F%3F%23", "ö /?#"),
    ("nbd://h/a+b", "a+b"),
    ("nbd+unix:///vm%40s1?socket=/s", "vm@s1"),
]
SCHEMES = {
    "nbd://h/": (False, False, False),
    "nbds://h/": (True, False, False),
    "nbd+unix:///?socket=/s": (False, True, False),
    "nbds+unix:///?socket=/s": (True, True, False),
    "nbd+vsock://3/": (False, False, True),
    "nbds+vsock://3/": (True, False, True),
}


@pytest.mark.parametrize(("text", "host", "port"), PLACES)
def test_the_authority_is_user_host_and_port(text: str, host: str, port: int) -> None:
    """nbd.md §14: [user@]host[:10809], IPv6 in brackets."""
    uri = parse(text)
    assert (uri.host, uri.port) == (host, port)
    assert parse(str(uri)) == uri


@pytest.mark.parametrize(("text", "export"), EXPORTS)
def test_the_export_is_the_path_without_its_first_slash(text: str, export: str) -> None:
    """nbd.md §14: path minus the first /, percent-decoded."""
    assert parse(text).export == export
    assert parse(str(parse(text))).export == export


@pytest.mark.parametrize("text", SCHEMES)
def test_the_schemes(text: str) -> None:
    """nbd.md §14: nbd, nbds, nbd+unix, nbds+unix, and libnbd's vsock."""
    uri = parse(text)
    assert (uri.tls, bool(uri.socket), uri.vsock) == SCHEMES[text]
    assert uri.scheme == text.partition(":")[0]


def test_a_socket_that_begins_with_a_nul_is_abstract() -> None:
    """nbd.md §14: ?socket=%00NAME = abstract."""
    assert parse("nbd+unix:///x?socket=%00fleece").socket == "\0fleece"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tls-type", "anon"),
        ("tls-type", "x509"),
        ("tls-type", "psk"),
        ("tls-hostname", "vm.example"),
        ("tls-verify-peer", "0"),
        ("tls-verify-peer", "1"),
        ("tls-certificates", "/etc/pki"),
        ("tls-psk-file", "/etc/psk"),
    ],
)
def test_the_parameters_of_the_specification_and_of_libnbd(name: str, value: str) -> None:
    """nbd.md §14: tls-type, tls-hostname, tls-verify-peer; libnbd's tls-certificates, -psk-file."""
    uri = parse(f"nbds://bob@h/x?{name}={value}")
    assert uri.param(name) == value
    assert uri.user == "bob"
    assert parse(str(uri)) == uri


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_nbds_fails_with_a_server_that_has_no_tls(
    tmp_path_factory: pytest.TempPathFactory, kind: str
) -> None:
    """nbd.md §14: nbds* MUST fail without TLS: no word in plain text after the refusal."""
    path = str(tmp_path_factory.mktemp("s") / "s")
    where = NBDURI(socket=path) if kind == "unix" else NBDURI(host="127.0.0.1", port=0)
    with Server() as server:
        server.add("disk", MemoryNode(512))
        bound = server.listen(where)
        secure = NBDURI(bound.host, bound.port, bound.socket, "disk", tls=True)
        params = (("tls-verify-peer", "0"),)
        with pytest.raises(NBDError, match="TLS"):
            connect(NBDURI(secure.host, secure.port, secure.socket, "disk", True, params))


@pytest.mark.parametrize("text", ["ssh://h/x", "nbd+ssh://h/x", "nbd:h:1", "nbd//h", "nbdss://h/"])
def test_what_is_no_nbd_uri_is_refused_in_one_line(text: str) -> None:
    """nbd.md §14: other schemes are not ours (libnbd's nbd+ssh needs a program)."""
    with pytest.raises(URIError) as caught:
        parse(text)
    assert "\n" not in str(caught.value)

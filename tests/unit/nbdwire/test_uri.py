import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdwire.errors import URIError
from nbdwire.uri import NBDURI, format_uri, parse

MODEST = settings(derandomize=True, deadline=None, max_examples=300)

legal = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12)
hosts = st.sampled_from(["", "localhost", "10.0.0.1", "::1", "fe80::1%eth0", "exämple.org"])
paths = st.builds("{}{}".format, st.sampled_from(["/", "\0", "x"]), legal)
pairs = st.tuples(legal.filter(lambda key: key not in ("", "socket")), legal)
params = st.lists(pairs, max_size=3).map(tuple)
tcp = st.builds(NBDURI, hosts, st.integers(0, 65535), st.just(""), legal, st.booleans(), params)
unix = st.builds(NBDURI, socket=paths, export=legal, tls=st.booleans(), params=params, user=legal)
vsock = st.builds(
    NBDURI, st.just("3"), st.integers(0, 2**32 - 1), export=legal, vsock=st.just(True)
)


@MODEST
@given(tcp | unix | vsock)
def test_what_is_formatted_parses_back(uri: NBDURI) -> None:
    assert parse(format_uri(uri)) == uri


@MODEST
@given(st.text(st.sampled_from("nbds+unix:/?#[]@%41&=;a.\0ü"), max_size=40).map("nbd:".__add__))
def test_any_text_is_an_uri_or_an_urierror(text: str) -> None:
    try:
        uri = parse(text)
    except URIError:
        return
    assert parse(str(uri)) == uri


@pytest.mark.parametrize(
    ("text", "uri"),
    [
        ("nbd://example.org", NBDURI("example.org")),
        ("nbd://example.org/", NBDURI("example.org")),
        ("nbd:///disk", NBDURI(export="disk")),
        ("nbd://h:10810/a%2Fb%20c", NBDURI("h", 10810, export="a/b c")),
        ("nbd://h//disk", NBDURI("h", export="/disk")),
        ("nbd://h:/x", NBDURI("h", export="x")),
        ("nbd://[::1]:1/x", NBDURI("::1", 1, export="x")),
        (
            "nbd+unix:///vm1%40s1?socket=/run/fleece/nbd.sock",
            NBDURI(socket="/run/fleece/nbd.sock", export="vm1@s1"),
        ),
        ("nbd+unix:///?socket=%00abstract", NBDURI(socket="\0abstract")),
        ("nbd+unix:///?socket=a+b", NBDURI(socket="a+b")),
        (
            "nbds://alice@h/x?tls-type=psk&tls-psk-file=/k",
            NBDURI(
                "h",
                export="x",
                tls=True,
                params=(("tls-type", "psk"), ("tls-psk-file", "/k")),
                user="alice",
            ),
        ),
        ("nbds+unix:///?socket=/s", NBDURI(socket="/s", tls=True)),
        ("nbd+vsock:///x", NBDURI("2", export="x", vsock=True)),
    ],
)
def test_uris_mean_what_the_specification_says(text: str, uri: NBDURI) -> None:
    assert parse(text) == uri


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "no NBD URI"),
        ("disk.img", "no NBD URI"),
        ("nbd:localhost:10809", "no NBD URI"),
        ("http://h/x", "no NBD URI"),
        ("NBD://h/x#fragment", "no NBD URI"),
        ("nbd://h/x#fragment", "no NBD URI"),
        ("nbd+unix:///x", "socket is missing"),
        ("nbd+unix:///x?socket=", "socket is missing"),
        ("nbd+unix://host/x?socket=/s", "has no host"),
        ("nbd+unix:///x?socket=/s&socket=/t", "more than one socket"),
        ("nbd://h/x?socket=/s", "take a socket"),
        ("nbd://h:99999/x", "no port number"),
        ("nbd://h:1:2/x", "no host and port"),
        ("nbd://::1/x", "brackets"),
        ("nbd://h/%zz", "percent"),
        ("nbd://h/%", "percent"),
        ("nbd://h/%ff", "UTF-8"),
        ("nbd://h/a%00b", "NUL"),
        ("nbd+unix:///?socket=/a%00b", "NUL"),
        ("nbd://h/" + "x" * 4097, "longer than 4096"),
        ("nbd+vsock://host/x", "context id"),
    ],
)
def test_what_is_no_uri_is_refused_with_the_reason(text: str, complaint: str) -> None:
    with pytest.raises(URIError, match=complaint):
        parse(text)


def test_another_export_of_the_same_server() -> None:
    uri = parse("nbd+unix:///a?socket=/s")
    assert str(uri.with_export("vm1@s1")) == "nbd+unix:///vm1%40s1?socket=/s"


def test_a_socket_path_need_not_be_utf8() -> None:
    uri = parse("nbd+unix:///?socket=/run/%ff")
    assert parse(str(uri)) == uri
    assert str(uri).endswith("/run/%FF")


@pytest.mark.parametrize(
    ("text", "params"),
    [
        ("nbds://me@host/disk?tls-type=psk&tls-psk-file=/k%20eys", {"tls-psk-file": "/k eys"}),
        ("nbds://host/?tls-certificates=/pki&tls-hostname=vm", {"tls-hostname": "vm"}),
        ("nbds+unix:///?socket=/s&tls-verify-peer=0", {"tls-verify-peer": "0"}),
        ("nbd://host/?whatever=x&whatever=y", {"tls-type": None}),
    ],
)
def test_the_parameters_of_tls_can_be_asked_for(text: str, params: dict[str, str | None]) -> None:
    """nbd.md §14."""
    uri = parse(text)
    assert {name: uri.param(name) for name in params} == params
    assert parse(str(uri)) == uri


@pytest.mark.parametrize(
    ("query", "complaint"),
    [
        ("tls-verify-peer=no", "tls-verify-peer is 'no'"),
        ("tls-verify-peer=", "has no value"),
        ("tls-type=ssl", "anon, x509, psk"),
        ("tls-hostname=a&tls-hostname=b", "twice"),
        ("tls-certificates", "has no value"),
    ],
)
def test_a_mistake_in_what_decides_about_security_is_told(query: str, complaint: str) -> None:
    with pytest.raises(URIError, match=complaint):
        parse(f"nbds://host/?{query}")

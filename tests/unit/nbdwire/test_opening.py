"""Servers that end in the middle of the handshake, seen through a real socket."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from nbdwire import codec
from nbdwire import constants as c
from nbdwire.client import connect, describe, list_contexts, list_exports
from nbdwire.errors import ConnectionClosed, NegotiationError, ProtocolError
from nbdwire.uri import NBDURI

GREETING = codec.GREETING.pack(c.NBDMAGIC, c.IHAVEOPT, 3)
INFO = codec.INFO_EXPORT.pack(c.INFO_EXPORT, 512, c.TFLAG_HAS_FLAGS)


def reply(option: int, kind: int, data: bytes = b"") -> bytes:
    return codec.option_reply(option, kind, data)


SESSION = (
    GREETING
    + reply(c.OPT_EXTENDED_HEADERS, c.REP_ERR_UNSUP, b"what?")
    + reply(c.OPT_STRUCTURED_REPLY, c.REP_ACK)
    + reply(c.OPT_SET_META_CONTEXT, c.REP_ACK)
    + reply(c.OPT_GO, c.REP_INFO, INFO)
    + reply(c.OPT_GO, c.REP_ACK)
)


@contextmanager
def saying(path: Path, speeches: list[bytes]) -> Iterator[NBDURI]:
    """A server that says one speech to each client, whatever that says, and hangs up."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def speak() -> None:
            for speech in speeches:
                client, _ = listener.accept()
                with client, suppress(OSError):  # the client may hang up first
                    client.sendall(speech)
                    client.shutdown(socket.SHUT_WR)
                    while client.recv(65536):
                        pass

        thread = threading.Thread(target=speak)
        thread.start()
        yield NBDURI(socket=str(path), export="disk")
        thread.join(10)
        assert not thread.is_alive()


def test_a_server_that_dies_at_any_byte_of_the_handshake_is_told(tmp_path: Path) -> None:
    """CVE-2021-20286: nothing but ConnectionClosed comes of it."""
    speeches = [SESSION[:length] for length in range(len(SESSION))]
    with saying(tmp_path / "s", [*speeches, SESSION]) as uri:
        for _ in speeches:
            with pytest.raises(ConnectionClosed) as caught:
                connect(uri)
            assert "\n" not in str(caught.value)
        connect(uri).close()


@pytest.mark.parametrize("ask", [connect, list_exports, list_contexts, describe])
def test_a_server_that_answers_without_end_is_given_up(
    tmp_path: Path, ask: Callable[[NBDURI], object]
) -> None:
    """CVE-2017-2630: replies to any option are bounded."""
    option = {
        connect: c.OPT_GO,
        list_exports: c.OPT_LIST,
        list_contexts: c.OPT_LIST_META_CONTEXT,
        describe: c.OPT_INFO,
    }[ask]
    refused = reply(c.OPT_EXTENDED_HEADERS, c.REP_ERR_UNSUP)
    structured = reply(c.OPT_STRUCTURED_REPLY, c.REP_ERR_UNSUP)
    head = {connect: refused + structured, describe: refused + structured,
            list_contexts: structured, list_exports: b""}[ask]  # fmt: skip
    flood = reply(option, c.REP_INFO, bytes(60_000)) * 300
    with (
        saying(tmp_path / "s", [GREETING + head + flood]) as uri,
        pytest.raises(ProtocolError, match="without end"),
    ):
        ask(uri)


def test_a_size_of_half_of_all_numbers_is_refused(tmp_path: Path) -> None:
    """CVE-2023-5215: 2^63 bytes and more."""
    info = codec.INFO_EXPORT.pack(c.INFO_EXPORT, 1 << 63, c.TFLAG_HAS_FLAGS)
    speech = SESSION.replace(INFO, info)
    with (
        saying(tmp_path / "s", [speech]) as uri,
        pytest.raises(ProtocolError, match="impossible size"),
    ):
        connect(uri)


def test_an_error_names_the_option_the_export_and_what_the_server_says(tmp_path: Path) -> None:
    refusal = reply(c.OPT_GO, c.REP_ERR_UNKNOWN, b"no\ndisk")
    speech = GREETING + reply(11, c.REP_ERR_UNSUP) + reply(8, c.REP_ERR_UNSUP) + refusal
    with saying(tmp_path / "s", [speech]) as uri, pytest.raises(NegotiationError) as caught:
        connect(uri)
    assert str(caught.value) == (
        "the server refuses GO for export 'disk': it has no such export (it says: no\ufffddisk)"
    )

"""Whole sessions of the handshake as bytes: both sides play them, whole and byte by byte.

``C:`` and ``S:`` as in tests/support/transcript.py; ``TLS`` is where the stream turns to TLS.
"""

import socket
import threading
import time
from typing import Any

import pytest

from nbdwire.errors import NBDError, TLSRequired
from nbdwire.handshake import UPGRADE, Handshake
from nbdwire.negotiate import ExportInfo, TLSMode, server_handshake
from nbdwire.negotiate_client import client_handshake
from nbdwire.transport import establish
from tests.support.transcript import parse_bytes

BASE = "base:allocation"
WIDE = "x-wide:clock"
EXPORTS = {
    "disk": ExportInfo("disk", 0x100000, 0x05, contexts=(BASE, WIDE), wide_contexts=(WIDE,)),
    "secret": ExportInfo("secret", 0x200, 0x03, contexts=(BASE,), tls_required=True),
}

EXTENDED = """
S: 'NBDMAGIC' 'IHAVEOPT' 0003
C: 00000003
C: 'IHAVEOPT' 0000000b 00000000                          # EXTENDED_HEADERS
S: 0003e889045565a9 0000000b 00000001 00000000
C: 'IHAVEOPT' 0000000a 0000002b                          # SET_META_CONTEXT
C: 00000004 'disk' 00000002 0000000c 'x-wide:clock' 0000000b 'x-dirty:old'
S: 0003e889045565a9 0000000a 00000004 00000010 00000001 'x-wide:clock'
S: 0003e889045565a9 0000000a 00000001 00000000
C: 'IHAVEOPT' 00000007 00000010                          # GO
C: 00000004 'disk' 0003 0001 0002 0003
S: 0003e889045565a9 00000007 00000003 0000000c 0000 0000000000100000 1005
S: 0003e889045565a9 00000007 00000003 00000006 0001 'disk'
S: 0003e889045565a9 00000007 00000003 00000002 0002
S: 0003e889045565a9 00000007 00000003 0000000e 0003 00000001 00001000 02000000
S: 0003e889045565a9 00000007 00000001 00000000
"""

EXTENDED_ONLY = """
S: 'NBDMAGIC' 'IHAVEOPT' 0003
C: 00000003
C: 'IHAVEOPT' 00000008 00000000                          # STRUCTURED_REPLY
S: 0003e889045565a9 00000008 00000001 00000000
C: 'IHAVEOPT' 0000000a 0000001c                          # a wide context needs extended headers
C: 00000004 'disk' 00000001 0000000c 'x-wide:clock'
S: 0003e889045565a9 0000000a 8000000a ...
C: 'IHAVEOPT' 0000000b 00000001 00                       # EXTENDED_HEADERS with data
S: 0003e889045565a9 0000000b 80000003 ...
C: 'IHAVEOPT' 0000000b 00000000
S: 0003e889045565a9 0000000b 00000001 00000000
C: 'IHAVEOPT' 00000008 00000000
S: 0003e889045565a9 00000008 8000000a ...
C: 'IHAVEOPT' 00000006 0000000a 00000004 'disk' 0000     # INFO: no filter without contexts
S: 0003e889045565a9 00000006 00000003 0000000c 0000 0000000000100000 0005
S: 0003e889045565a9 00000006 00000001 00000000
C: 'IHAVEOPT' 00000002 00000000
S: 0003e889045565a9 00000002 00000001 00000000
"""

TLS_OFF = """
S: 'NBDMAGIC' 'IHAVEOPT' 0003
C: 00000003
C: 'IHAVEOPT' 00000005 00000001 00
S: 0003e889045565a9 00000005 80000003 ...
C: 'IHAVEOPT' 00000005 00000000
S: 0003e889045565a9 00000005 80000002 ...                # ERR_POLICY, never ERR_TLS_REQD
C: 'IHAVEOPT' 00000007 0000000c 00000006 'secret' 0000
S: 0003e889045565a9 00000007 80000006 ...                # ERR_UNKNOWN
C: 'IHAVEOPT' 00000002 00000000
S: 0003e889045565a9 00000002 00000001 00000000
"""

TLS_REQUIRED = """
S: 'NBDMAGIC' 'IHAVEOPT' 0003
C: 00000003
C: 'IHAVEOPT' 00000003 00000000                          # LIST
S: 0003e889045565a9 00000003 80000005 ...                # ERR_TLS_REQD
C: 'IHAVEOPT' 00000008 00000000                          # STRUCTURED_REPLY
S: 0003e889045565a9 00000008 80000005 ...
C: 'IHAVEOPT' 00000063 00000002 'no'                     # unknown options too
S: 0003e889045565a9 00000063 80000005 ...
C: 'IHAVEOPT' 00000005 00000000                          # STARTTLS
S: 0003e889045565a9 00000005 00000001 00000000
TLS
C: 'IHAVEOPT' 00000063 00000002 'no'
S: 0003e889045565a9 00000063 80000001 ...                # ERR_UNSUP now
C: 'IHAVEOPT' 00000005 00000000                          # STARTTLS again
S: 0003e889045565a9 00000005 80000003 ...                # ERR_INVALID
C: 'IHAVEOPT' 00000007 0000000c 00000006 'secret' 0000
S: 0003e889045565a9 00000007 00000003 0000000c 0000 0000000000000200 0003
S: 0003e889045565a9 00000007 00000001 00000000
"""

TLS_REQUIRED_ABORT = """
S: 'NBDMAGIC' 'IHAVEOPT' 0003
C: 00000003
C: 'IHAVEOPT' 00000002 00000000                          # ABORT needs no TLS
S: 0003e889045565a9 00000002 00000001 00000000
"""

TLS_PER_EXPORT = """
S: 'NBDMAGIC' 'IHAVEOPT' 0003
C: 00000003
C: 'IHAVEOPT' 00000006 0000000c 00000006 'secret' 0000   # INFO
S: 0003e889045565a9 00000006 80000005 ...                # ERR_TLS_REQD
C: 'IHAVEOPT' 00000007 0000000a 00000004 'nope' 0000     # an unknown one says the same
S: 0003e889045565a9 00000007 80000005 ...
C: 'IHAVEOPT' 00000009 0000000e 00000006 'secret' 00000000
S: 0003e889045565a9 00000009 80000006 ...                # LIST_META: ERR_UNKNOWN
C: 'IHAVEOPT' 00000005 00000000
S: 0003e889045565a9 00000005 00000001 00000000
TLS
C: 'IHAVEOPT' 00000007 0000000a 00000004 'nope' 0000
S: 0003e889045565a9 00000007 80000006 ...                # never ERR_TLS_REQD inside TLS
C: 'IHAVEOPT' 00000007 0000000c 00000006 'secret' 0000
S: 0003e889045565a9 00000007 00000003 0000000c 0000 0000000000000200 0003
S: 0003e889045565a9 00000007 00000001 00000000
"""

TLS_WIPES = """
S: 'NBDMAGIC' 'IHAVEOPT' 0003
C: 00000003
C: 'IHAVEOPT' 0000000b 00000000                          # EXTENDED_HEADERS, in plain text
S: 0003e889045565a9 0000000b 00000001 00000000
C: 'IHAVEOPT' 0000000a 0000001f
C: 00000004 'disk' 00000001 0000000f 'base:allocation'
S: 0003e889045565a9 0000000a 00000004 00000013 00000001 'base:allocation'
S: 0003e889045565a9 0000000a 00000001 00000000
C: 'IHAVEOPT' 00000005 00000000
S: 0003e889045565a9 00000005 00000001 00000000
TLS
C: 'IHAVEOPT' 0000000a 0000001f                          # SET_META: nothing is negotiated
C: 00000004 'disk' 00000001 0000000f 'base:allocation'
S: 0003e889045565a9 0000000a 80000003 ...
C: 'IHAVEOPT' 00000001 00000004 'disk'                   # and EXPORT_NAME is legal again
S: 0000000000100000 0005
"""

CLIENT_TLS = """
S: 'NBDMAGIC' 'IHAVEOPT' 0003
C: 00000003
C: 'IHAVEOPT' 00000005 00000000                          # STARTTLS comes first
S: 0003e889045565a9 00000005 00000001 00000000
TLS
C: 'IHAVEOPT' 0000000b 00000000
S: 0003e889045565a9 0000000b 00000001 00000000
C: 'IHAVEOPT' 00000007 00000012 00000006 'secret' 0003 0001 0002 0003
S: 0003e889045565a9 00000007 00000003 0000000c 0000 0000000000000200 0003
S: 0003e889045565a9 00000007 00000003 00000008 0001 'secret'
S: 0003e889045565a9 00000007 00000003 00000002 0002
S: 0003e889045565a9 00000007 00000003 0000000e 0003 00000001 00001000 02000000
S: 0003e889045565a9 00000007 00000001 00000000
"""

SESSIONS: list[tuple[str, str, TLSMode]] = [
    ("extended", EXTENDED, "off"),
    ("extended only", EXTENDED_ONLY, "off"),
    ("tls off", TLS_OFF, "off"),
    ("tls required", TLS_REQUIRED, "required"),
    ("tls required, abort", TLS_REQUIRED_ABORT, "required"),
    ("tls per export", TLS_PER_EXPORT, "allowed"),
    ("tls wipes", TLS_WIPES, "allowed"),
    ("tls wipes, required", TLS_REQUIRED, "required"),
    ("a client with tls", CLIENT_TLS, "required"),
    ("a client with tls, allowed", CLIENT_TLS, "allowed"),
]
IDS = [name for name, _, _ in SESSIONS]

Step = tuple[str, bytes, bool]
"""(C, S or TLS; the bytes; whether an error's text follows whose words do not matter)"""


class Shelf:
    def listing(self) -> list[tuple[str, str]]:
        return [(name, "") for name in EXPORTS]

    def lookup(self, name: str) -> ExportInfo | None:
        return EXPORTS.get(name)


def steps(text: str) -> list[Step]:
    found = []
    for line in text.strip().splitlines():
        side, _, rest = line.partition("#")[0].strip().partition(":")
        found.append((side, parse_bytes(rest.replace("...", "")), rest.strip().endswith("...")))
    return found


class Script:
    """Compares what a server says with the lines of a session."""

    def __init__(self, session: list[Step]) -> None:
        self.lines = [step for step in session if step[0] != "C"]
        self.pending = b""

    def said(self, data: bytes) -> None:
        self.pending += data
        while self.pending and self.lines and self.lines[0][0] == "S":
            _, expected, worded = self.lines[0]
            length = len(expected)
            if worded:
                length += 4 + int.from_bytes(self.pending[length : length + 4])
            if len(self.pending) < length:
                return
            assert self.pending[: len(expected)].hex() == expected.hex()
            self.pending = self.pending[length:]
            self.lines.pop(0)

    def upgraded(self) -> None:
        assert self.pending == b""
        assert self.lines.pop(0)[0] == "TLS"


def play(handshake: Handshake[Any], incoming: bytes, script: Script) -> object:
    """Run a server on what the client says; the script checks what comes when."""
    position, answer = 0, None
    try:
        while True:
            wanted = next(handshake) if answer is None else handshake.send(answer)
            answer = b""
            if isinstance(wanted, int):
                answer = incoming[position : position + wanted]
                position += wanted
            elif wanted is UPGRADE:
                script.upgraded()
            else:
                assert isinstance(wanted, bytes)
                script.said(wanted)
    except StopIteration as stop:
        assert position == len(incoming), "the session has more than was wanted"
        return stop.value


@pytest.mark.parametrize(("name", "text", "mode"), SESSIONS, ids=IDS)
def test_a_server_says_what_the_transcript_says(name: str, text: str, mode: TLSMode) -> None:
    """nbd.md §8, §9: extended headers and the states of TLS, byte for byte."""
    session = steps(text)
    script = Script(session)
    incoming = b"".join(data for side, data, _ in session if side == "C")
    result = play(server_handshake(Shelf(), tls=mode), incoming, script)
    assert script.lines == []
    assert script.pending == b""
    assert (result is None) == (text.rstrip().splitlines()[-2].startswith("C: 'IHAVEOPT' 00000002"))


@pytest.mark.parametrize(("name", "text", "mode"), SESSIONS, ids=IDS)
def test_a_server_takes_the_same_byte_by_byte(name: str, text: str, mode: TLSMode) -> None:
    """nbd.md §2: every message may come in 1-byte segments, around STARTTLS as elsewhere."""
    session = steps(text)
    script = Script([step for step in session if step[0] == "S"])
    ours, theirs = socket.socketpair()
    turned = threading.Event()

    def client() -> None:
        for side, data, _ in session:
            if side == "TLS":
                assert turned.wait(10)  # a client says nothing between the ACK and TLS
            for byte in data if side == "C" else b"":
                theirs.sendall(bytes([byte]))

    def upgrade(sock: socket.socket) -> socket.socket:
        turned.set()
        return sock

    thread = threading.Thread(target=client, daemon=True)
    thread.start()
    with ours, theirs:
        handshake = server_handshake(Shelf(), tls=mode)
        establish(ours, handshake, time.monotonic() + 10, upgrade)
        thread.join(10)
        ours.shutdown(socket.SHUT_WR)
        while data := theirs.recv(7):
            script.said(data)
    assert script.lines == []
    assert turned.is_set() == ("TLS" in text.splitlines())


def test_a_client_asks_what_the_transcript_says() -> None:
    """nbd.md §8, §9: STARTTLS, then extended headers, then GO with every info."""
    for text, export, contexts, tls in (
        (CLIENT_TLS, "secret", (), True),
        (EXTENDED, "disk", (WIDE, "x-dirty:old"), False),
    ):
        lines = steps(text)
        expected = b"".join(data for side, data, _ in lines if side == "C")
        incoming = b"".join(data for side, data, _ in lines if side == "S")
        handshake = client_handshake(export, contexts, tls=tls)
        said, position, upgrades, answer = b"", 0, 0, None
        try:
            while True:
                wanted = next(handshake) if answer is None else handshake.send(answer)
                answer = b""
                if isinstance(wanted, int):
                    answer, position = incoming[position : position + wanted], position + wanted
                elif wanted is UPGRADE:
                    upgrades += 1
                else:
                    said += wanted  # type: ignore[operator]
        except StopIteration as stop:
            session = stop.value
        assert said.hex() == expected.hex()
        assert (session.extended, session.tls, upgrades) == (True, tls, int(tls))
        assert [name for _, name in session.contexts] == list(contexts[:1])


def test_export_name_without_tls_closes_where_it_is_required() -> None:
    """nbd.md §9: FORCEDTLS: EXPORT_NAME -> close; SELECTIVETLS: of a TLS-only export."""
    for mode, name in (("required", b"disk"), ("allowed", b"secret"), ("allowed", b"nope")):
        incoming = (3).to_bytes(4) + b"IHAVEOPT" + (1).to_bytes(4) + len(name).to_bytes(4) + name
        script = Script([("S", b"NBDMAGICIHAVEOPT\0\3", False)])
        with pytest.raises(NBDError) as caught:
            play(server_handshake(Shelf(), tls=mode), incoming, script)  # type: ignore[arg-type]
        assert isinstance(caught.value, TLSRequired) == (name != b"nope")
        assert script.lines == []
        assert script.pending == b""

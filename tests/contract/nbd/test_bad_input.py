"""What the protocol makes a server do with input that is wrong: close, or refuse and stay in step.

Floods, dribbles and resets in numbers are in tests/crash/test_nbd_adversarial.py.
"""

import errno
import resource
import socket
import struct
import time
from pathlib import Path

import pytest

from nbdwire.server import Server
from nbdwire.uri import NBDURI
from tests.support import haggling as h
from tests.support.faulty import Hooked
from tests.support.haggling import Haggler, haggling, info, option
from tests.support.nbdraw import DISC, FLUSH, READ, WRITE, Raw, connected
from tests.support.serving import noise, serving

MOST = 32 << 20


def alive(where: NBDURI) -> None:
    """Another client is served."""
    with connected(where) as client:
        client.in_step()


@pytest.mark.parametrize("first", [b"", option(h.LIST)])
@pytest.mark.parametrize(
    "junk", [b"HAVEOPTI" + bytes(8), bytes(16), b"GET / HTTP/1.1\r\n\r\n", b"\x16\3\1" + bytes(99)]
)
def test_a_wrong_option_magic_closes(where: NBDURI, first: bytes, junk: bytes) -> None:
    """nbd.md §13: wrong option magic: close."""
    with haggling(where) as client:
        if first:
            client.ask(first)
        client.send(junk + option(h.LIST))
        assert client.closed() == b""
    alive(where)


@pytest.mark.parametrize("number", [h.EXPORT_NAME, h.LIST, h.GO, h.SET_META, 99])
@pytest.mark.parametrize("length", [0xFFFF_FFFF, 64 << 20, 1 << 31, 65537])
def test_an_option_of_gigabytes_is_not_read(where: NBDURI, number: int, length: int) -> None:
    """nbd.md §13: option length 4 GiB or 64 MiB: close; never read it, never allocate it."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with haggling(where) as client:
        client.send(b"IHAVEOPT" + struct.pack(">II", number, length))
        assert client.closed() == b""
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 << 10  # KiB
    alive(where)


@pytest.mark.parametrize("number", [h.INFO, h.GO, h.LIST_META, h.SET_META])
@pytest.mark.parametrize(
    "name",
    [
        b"x" * 4097,
        b"x" * 60000,
        b"disk\0",
        b"disk\0x",
        b"\0",
        b"\xff\xfe",
        b"\xc3",
        b"\xed\xa0\x80",
    ],
)
def test_what_is_no_name_is_never_a_success(where: NBDURI, number: int, name: bytes) -> None:
    """nbd.md §13: name > 4096, non-UTF-8, NUL: error; "disk\\0x" is not "disk"."""
    tail = b"\0\0" if number in (h.INFO, h.GO) else b"\0\0\0\0"
    with haggling(where) as client:
        client.ask(option(h.STRUCTURED))
        data = struct.pack(">I", len(name)) + name + tail
        assert client.outcome(option(number, data)) == h.INVALID
        client.in_step()


def test_the_longest_legal_name_is_unknown(where: NBDURI) -> None:
    """nbd.md §13: legal 4096-byte unknown name: ERR_UNKNOWN, message <= 4096."""
    with haggling(where) as client:
        _, kind, text = client.ask(info(h.GO, "ö" * 2048))[-1]
        assert kind == h.UNKNOWN
        assert len(text) <= 4096
        client.in_step()


def test_thousands_of_options_end_some_time_and_starve_nobody(where: NBDURI) -> None:
    """nbd.md §13: thousands of options: a limit is allowed; others must not starve."""
    with haggling(where) as client:
        count = 0
        try:
            while count < 5000:
                assert client.outcome(option(99)) == h.UNSUP
                count += 1
                if count == 500:
                    alive(where)
        except (EOFError, ConnectionResetError, BrokenPipeError):
            pass
    assert 500 < count < 5000
    alive(where)


def test_a_write_above_the_maximum_is_consumed(client: Raw) -> None:
    """nbd.md §13: WRITE > max payload: consume + error, or drop (extended headers: drop)."""
    if client.session.extended:
        assert client.is_dropped_for(client.form(WRITE, 0, MOST + 1) + bytes(1 << 20))
        return
    assert client.write(0, client.form(READ, 0, 1) * ((MOST + 28) // 28)) == errno.ENOSPC
    client.in_step()


@pytest.mark.parametrize("length", [100, 4096, 100_000, 4 << 20])
@pytest.mark.parametrize("missing", [1, 50])
def test_a_write_that_does_not_end_is_not_begun(
    client: Raw, node: Hooked, length: int, missing: int
) -> None:
    """nbd.md §13: unfinished WRITE payload: never apply in part."""
    node.fail("pwrite", AssertionError("part of a payload was written"))
    client.send(client.form(WRITE, 0, length) + noise(length - missing))
    client.sock.shutdown(socket.SHUT_WR)
    assert client.hung_up()
    content = bytearray(length)
    node.pread_into(memoryview(content), 0)
    assert not any(content)


def test_a_request_that_does_not_end_is_no_request(client: Raw, node: Hooked) -> None:
    """nbd.md §13: a header that is cut off does nothing."""
    node.fail("flush", AssertionError("it was carried out"))
    client.send(client.form(FLUSH)[:-1])
    client.sock.shutdown(socket.SHUT_WR)
    assert client.sock.recv(100) == b""


def test_a_client_that_never_reads_keeps_nobody_waiting(where: NBDURI, client: Raw) -> None:
    """nbd.md §13: client never reads: back-pressure per connection; others live."""
    client.sock.setblocking(False)
    message, sent = client.form(READ, 0, 1 << 20) * 100, 0
    try:
        while sent < 1 << 24:
            sent += client.sock.send(message)
    except BlockingIOError:
        pass
    assert sent < 1 << 24, "the server reads requests whose answers nobody takes"
    alive(where)


def test_a_client_may_leave_in_the_middle_of_anything(where: NBDURI, form: dict[str, bool]) -> None:
    """nbd.md §13: RST at any point: survive."""
    for cut in (1, 10, 27, 28, 40, 4000):
        with connected(where, **form) as client:
            client.send((client.form(WRITE, 0, 4096) + noise(4096))[:cut])
            client.reset()
    alive(where)


def test_a_handshake_has_one_deadline_however_it_dribbles(tmp_path: Path) -> None:
    """nbd.md §13: deadline over the whole handshake."""
    with serving(tmp_path, Hooked(512), handshake_seconds=0.5) as (_, uri):
        began = time.monotonic()
        with haggling(uri) as client:
            assert _dribble(client) is not None
        assert time.monotonic() - began < 10
        alive(uri)


def _dribble(client: Haggler) -> bytes | None:
    """A byte whenever the server would like to wait for more; what it says in the end."""
    client.sock.settimeout(0.05)
    for byte in option(h.LIST) * 100:
        try:
            client.send(bytes([byte]))
            if client.sock.recv(100) == b"":
                return b""
        except TimeoutError:
            continue
        except (ConnectionResetError, BrokenPipeError):
            return b""
    return None


@pytest.mark.timeout(60)
def test_the_server_ends_soon_with_clients_in_all_states(tmp_path: Path, node: Hooked) -> None:
    """nbd.md §13: SIGTERM with clients in all states: end within seconds."""
    server = Server()
    server.add("disk", node)
    where = server.listen(NBDURI(socket=str(tmp_path / "end.sock")))
    with (
        haggling(where, None),
        haggling(where) as talking,
        connected(where) as idle,
        connected(where) as half,
        connected(where) as deaf,
    ):
        talking.in_step()
        idle.in_step()
        half.send(half.form(WRITE, 0, 100_000)[:20])
        deaf.send(deaf.form(READ, 0, 4 << 20) * 10)
        began = time.monotonic()
        server.stop()
        assert time.monotonic() - began < 10
        assert idle.hung_up()


def test_disc_behind_a_flood_of_requests_is_seen(client: Raw) -> None:
    """nbd.md §6, §13: what was asked before DISC is answered, and the connection ends."""
    client.send(b"".join(client.make(READ, 0, 10) for _ in range(500)) + client.form(DISC))
    assert {client.reply().error for _ in range(500)} == {0}
    assert client.sock.recv(100) == b""

"""The end of a server and of an export: what was asked is answered, what is late is told so.

nbd.md §12 (ESHUTDOWN), §13 (the end with clients in all states), §2 (ERR_SHUTDOWN).
"""

import errno
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from fleece.block.memory import MemoryNode
from nbdwire.connection import Connection
from nbdwire.errors import BusyError, ShuttingDown
from nbdwire.negotiate_client import client_handshake
from nbdwire.server import Server
from nbdwire.transport import run_handshake
from nbdwire.uri import NBDURI
from tests.support import nbdraw as raw
from tests.support.faulty import Hooked, hanging
from tests.support.nbdraw import connected, open_socket
from tests.support.serving import noise, serving
from tests.support.threads import in_thread, wait_for, wait_until

SIZE = 64 << 20
BLOCKING = pytest.mark.parametrize("blocking", [False, True])


@pytest.fixture
def ending(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set once a connection has been told that the end is near."""
    begun, real = threading.Event(), Connection.hang_up

    def hang_up(conn: Connection, how: int = socket.SHUT_RDWR, why: str = "") -> None:
        real(conn, how, why)
        begun.set()

    monkeypatch.setattr(Connection, "hang_up", hang_up)
    return begun


def lingering(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    monkeypatch.setattr("nbdwire.server.LINGER_SECONDS", seconds)


def stopping(server: Server) -> bool:
    return all(conn.stopping.is_set() for conn in server._everybody())


@BLOCKING
@pytest.mark.parametrize("end", ["remove", "stop"])
def test_a_request_that_was_read_is_answered_before_the_end(
    tmp_path: Path, ending: threading.Event, blocking: bool, end: str
) -> None:
    node = Hooked(SIZE, blocking=blocking)
    with serving(tmp_path, node) as (server, where), connected(where) as client:
        with ExitStack() as stack, hanging(node, "flush") as stuck:
            client.send(client.make(raw.FLUSH))
            wait_for(stuck.entered)
            stack.enter_context(
                in_thread(server.stop if end == "stop" else lambda: server.remove("disk"))
            )
            wait_for(ending)
            stuck.go_on.set()
        assert client.reply().error == 0
        assert client.hung_up()


@BLOCKING
def test_a_request_that_comes_late_is_told_that_the_server_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocking: bool
) -> None:
    lingering(monkeypatch, 2.0)
    node = Hooked(SIZE, blocking=blocking)
    with serving(tmp_path, node) as (server, where), connected(where) as client:
        client.in_step()
        with in_thread(lambda: server.stop(20)):
            wait_until(lambda: stopping(server))
            late = client.ask(raw.READ, 0, 4096)
            assert late.error == errno.ESHUTDOWN
            assert "shutting down" in late.message
            assert client.write(0, b"x" * 4096) == errno.ESHUTDOWN
            assert client.ask(raw.FLUSH).error == errno.ESHUTDOWN
            client.send(raw.request(raw.DISC))
        assert client.hung_up()
    found = bytearray(4096)
    node.pread_into(memoryview(found), 0)
    assert found == bytes(4096), "the late write was carried out"


def test_a_handshake_that_comes_late_is_told_that_the_server_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nbd.md §2: shutting down, options get ERR_SHUTDOWN."""
    lingering(monkeypatch, 2.0)
    with serving(tmp_path, MemoryNode(SIZE)) as (server, where), open_socket(where) as sock:
        wait_until(lambda: server.clients() == 1)
        with in_thread(lambda: server.stop(20)):
            wait_until(lambda: stopping(server))
            with pytest.raises(ShuttingDown):
                run_handshake(sock, client_handshake("disk"), None)
            sock.close()


def never_reads(client: raw.Raw) -> None:
    client.write(0, noise(8 << 20))
    client.send(b"".join(client.make(raw.READ, 0, 8 << 20) for _ in range(20)))
    wait_until(lambda: client.sock.recv(1, socket.MSG_PEEK))


def half_a_write(client: raw.Raw) -> None:
    client.send(client.make(raw.WRITE, 0, 8 << 20, 0, bytes(8 << 20))[: 3 << 20])


def half_a_header(client: raw.Raw) -> None:
    client.send(client.make(raw.READ, 0, 512)[:20])


def idle(client: raw.Raw) -> None:
    client.in_step()


@BLOCKING
@pytest.mark.parametrize("tcp", [False, True])
@pytest.mark.parametrize("state", [never_reads, half_a_write, half_a_header, idle])
def test_the_server_stops_in_bounded_time_whatever_its_client_does(
    tmp_path: Path, state: Callable[[raw.Raw], None], tcp: bool, blocking: bool
) -> None:
    node = Hooked(SIZE, blocking=blocking)
    with serving(tmp_path, node, tcp=tcp) as (server, where), connected(where) as client:
        state(client)
        began = time.monotonic()
        server.stop(timeout=0.6)
        assert time.monotonic() - began < 1.0
        assert server.clients() == 0
        assert client.hung_up()


def test_a_client_that_asks_for_ever_does_not_keep_the_server(tmp_path: Path) -> None:
    with (
        serving(tmp_path, MemoryNode(SIZE), tcp=True) as (server, where),
        connected(where) as client,
    ):
        errors = set()

        def ask() -> None:
            with suppress(OSError, EOFError):
                while True:
                    errors.add(client.ask(raw.FLUSH).error)

        with in_thread(ask):
            wait_until(lambda: errors)
            began = time.monotonic()
            server.stop(timeout=0.6)
            assert time.monotonic() - began < 1.0
        assert errors == {0, errno.ESHUTDOWN}


def test_clients_in_the_handshake_do_not_keep_the_server(tmp_path: Path) -> None:
    with serving(tmp_path, MemoryNode(SIZE)) as (server, where), ExitStack() as stack:
        for part in range(20):
            sock = stack.enter_context(open_socket(where))
            sock.sendall(b"\0\0\0\3IHAVEOPT\0\0\0\7\0\0\0\x40"[:part])
        wait_until(lambda: server.clients() == 20)
        began = time.monotonic()
        server.stop()
        assert time.monotonic() - began < 1.0


def test_storage_that_hangs_is_a_timeout_that_says_so(tmp_path: Path) -> None:
    node = Hooked(SIZE)
    with serving(tmp_path, node) as (server, where), connected(where) as client:
        with hanging(node, "flush") as stuck:
            client.send(client.make(raw.FLUSH))
            wait_for(stuck.entered)
            with pytest.raises(TimeoutError, match="the server: requests of 1 clients do not end"):
                server.stop(timeout=0.2)
        wait_until(lambda: server.clients() == 0)


def test_without_clients_the_end_is_immediate_and_may_come_twice(tmp_path: Path) -> None:
    with serving(tmp_path, MemoryNode(SIZE)) as (server, where):
        with connected(where) as client:
            client.in_step()
        wait_until(lambda: server.clients() == 0)
        began = time.monotonic()
        server.stop()
        server.stop()
        assert time.monotonic() - began < 0.5


def test_a_stopped_server_listens_nowhere_and_serves_no_socket(tmp_path: Path) -> None:
    server = Server()
    server.stop()
    with pytest.raises(OSError, match="stopped") as caught:
        server.listen(NBDURI(socket=str(tmp_path / "s")))
    assert caught.value.errno == errno.ESHUTDOWN
    assert not (tmp_path / "s").exists()
    ours, theirs = socket.socketpair()
    with theirs:
        server.serve_socket(ours)
        assert theirs.recv(100) == b""


def test_an_export_in_use_is_removed_only_the_hard_way(tmp_path: Path) -> None:
    with serving(tmp_path, MemoryNode(SIZE)) as (server, where):
        with connected(where) as client:
            client.in_step()
            with pytest.raises(BusyError, match="export 'disk' is in use") as caught:
                server.remove("disk", hard=False)
            assert caught.value.clients == 1
            client.in_step()
            assert server.exports == ["disk"]
        wait_until(lambda: server.clients() == 0)
        server.remove("disk", hard=False)
        assert server.exports == []
        with pytest.raises(KeyError):
            server.remove("disk", hard=False)


def test_the_log_tells_who_was_hung_up_and_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "nbdwire")
    with serving(tmp_path, MemoryNode(SIZE)) as (server, where):
        server.add("other", MemoryNode(SIZE))
        with connected(where) as one, connected(where, "other") as two:
            one.in_step()
            two.write(0, bytes(512))
            server.remove("disk")
            server.stop()
    closed = [message for message in caplog.messages if message.startswith("close")]
    assert len(closed) == 2
    assert closed[0].endswith(": export 'disk' was stopped")
    assert closed[1].endswith(": the server was stopped")
    assert "writes=1 others=0 bytes-read=0 bytes-written=512 seconds=" in closed[1]
    assert " slowest=" in closed[1]

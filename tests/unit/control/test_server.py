# SPDX-License-Identifier: Apache-2.0
import json
import os
import select
import socket
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fleece.control import connection as connection_module
from fleece.control.client import ControlClient
from fleece.control.server import ControlServer
from tests.support.control import FakeService, connected, serving


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "control.sock")


@pytest.fixture
def server(path: str) -> Iterator[ControlServer]:
    with serving(path, FakeService()) as running:
        yield running


def messages(sock: socket.socket, count: int) -> list[dict[str, Any]]:
    data = b""
    while data.count(b"\r\n") < count:
        piece = sock.recv(65536)
        assert piece, f"closed after {data!r}"
        data += piece
    return [json.loads(line) for line in data.splitlines()]


def negotiate(sock: socket.socket) -> None:
    sock.sendall(b'{"execute": "qmp_capabilities"}\n')
    greeting, reply = messages(sock, 2)
    assert "QMP" in greeting
    assert reply == {"return": {}}


def test_the_socket_is_only_for_its_owner(server: ControlServer) -> None:
    assert stat.S_IMODE(os.stat(server.path).st_mode) == 0o600


def test_two_clients_work_side_by_side(server: ControlServer) -> None:
    with ControlClient(server.path) as first, ControlClient(server.path) as second:
        assert first.execute("query-version") == second.execute("query-version")
        assert server.clients() == 2
        names = {thread.name for thread in threading.enumerate()}
        assert {"control", "control-1", "control-2"} <= names


def test_a_client_who_types_half_a_line_holds_up_nobody(server: ControlServer) -> None:
    with connected(server.path) as slow, ControlClient(server.path) as other:
        negotiate(slow)
        slow.sendall(b'{"execute": "query-')
        assert other.execute("query-commands")
        slow.sendall(b'version"}\n')
        (reply,) = messages(slow, 1)
        assert "package" in reply["return"]


def test_garbage_is_answered_and_the_session_goes_on(server: ControlServer) -> None:
    with connected(server.path) as sock:
        negotiate(sock)
        sock.sendall(b"\x00\x01garbage\xc3\x28\n" + b'{"execute": "query-version"}\r\n')
        bad, good = messages(sock, 2)
        assert "JSON parse error" in bad["error"]["desc"]
        assert "return" in good


def test_a_huge_line_is_refused_and_the_connection_closed(server: ControlServer) -> None:
    with connected(server.path) as sock, ControlClient(server.path) as other:
        negotiate(sock)
        with pytest.raises(OSError, match=r"reset|[Bb]roken"):
            sock.sendall(b"x" * (64 << 20))  # it is not read to its end
        assert other.execute("query-version")


def test_a_huge_line_gets_a_reason(server: ControlServer) -> None:
    with connected(server.path) as sock:
        negotiate(sock)
        sock.sendall(b"x" * ((1 << 20) + 1))
        (reply,) = messages(sock, 1)
        assert reply["error"]["desc"] == "JSON token size limit exceeded"
        assert sock.recv(1) == b""


def test_replies_still_come_after_the_client_shut_its_side(server: ControlServer) -> None:
    with connected(server.path) as sock:
        sock.sendall(b'{"execute": "qmp_capabilities"}{"execute": "query-qmp-schema"}')
        sock.shutdown(socket.SHUT_WR)
        greeting, done, schema = messages(sock, 3)
        assert "QMP" in greeting
        assert done == {"return": {}}
        assert len(schema["return"]) > 20
        assert sock.recv(1) == b""


def test_a_client_that_vanishes_is_forgotten(server: ControlServer) -> None:
    with connected(server.path) as sock:
        negotiate(sock)
        (worker,) = [t for t in threading.enumerate() if t.name == "control-1"]
        sock.sendall(b'{"execute": "query-qmp-schema"}' * 50)
    worker.join(20)
    assert not worker.is_alive()
    assert server.clients() == 0


def test_events_reach_every_negotiated_client_and_no_other(server: ControlServer) -> None:
    with (
        connected(server.path) as early,
        connected(server.path) as one,
        connected(server.path) as two,
    ):
        negotiate(one)
        negotiate(two)
        messages(early, 1)
        server.events.emit("X_FLEECE_LEASE_EXPIRED", {"name": "s1"})
        for sock in (one, two):
            (event,) = messages(sock, 1)
            assert event["event"] == "X_FLEECE_LEASE_EXPIRED"
            assert event["data"] == {"name": "s1"}
            assert abs(event["timestamp"]["seconds"] - time.time()) < 60
            assert 0 <= event["timestamp"]["microseconds"] < 1_000_000
        negotiate_reply = b'{"execute": "qmp_capabilities"}'
        early.sendall(negotiate_reply)
        assert messages(early, 1) == [{"return": {}}]


def test_an_event_of_a_command_comes_before_its_reply(path: str) -> None:
    class Telling(FakeService):
        def snapshot_drop(self, name: str) -> dict[str, Any]:
            server.events.emit("X_FLEECE_LEASE_EXPIRED", {"name": name})
            return {"name": name, "freed-bytes": 0}

    with serving(path, Telling()) as server, connected(path) as sock:
        negotiate(sock)
        sock.sendall(b'{"execute": "x-fleece-snapshot-drop", "arguments": {"name": "s1"}}')
        event, reply = messages(sock, 2)
        assert event["event"] == "X_FLEECE_LEASE_EXPIRED"
        assert reply["return"]["name"] == "s1"


def test_a_client_who_never_reads_its_events_is_cut_off_and_the_emitter_not_held_up(
    server: ControlServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "_MAX_OUTPUT", 100_000)
    with connected(server.path) as deaf, ControlClient(server.path) as other:
        negotiate(deaf)
        (worker,) = [t for t in threading.enumerate() if t.name == "control-1"]
        reader = other.events(timeout=20)
        for number in range(2000):
            server.events.emit("X_FLEECE_LEASE_EXPIRED", {"name": "x" * 1000})
            assert next(reader)["data"]["name"], number
        worker.join(20)
        assert not worker.is_alive()


def test_commands_pipelined_by_a_client_who_does_not_read_stop_being_run(path: str) -> None:
    service = FakeService()
    create = b'{"execute": "x-fleece-snapshot-create", "arguments": {"disks": ["a"]}}'
    with serving(path, service) as server, connected(path) as sock:
        negotiate(sock)
        sock.setblocking(False)
        sent = 0
        while select.select([], [sock], [], 0.5)[1] and sent < 64 << 20:
            sent += sock.send(create * 100)
        assert sent < 64 << 20, "the server took everything without being read from"
        started = time.monotonic()
        server.stop()
        assert time.monotonic() - started < 10


def test_quit_is_answered_before_the_end(path: str) -> None:
    service = FakeService()
    with serving(path, service) as server, ControlClient(path) as client:
        stopper = threading.Thread(target=lambda: (service.stopped.wait(20), server.stop()))
        stopper.start()
        assert client.execute("quit") == {}
        stopper.join(20)
        assert list(client.events(timeout=20)) == []
        assert not os.path.exists(path)


def test_stop_ends_idle_clients_and_removes_the_socket(path: str) -> None:
    with serving(path, FakeService()) as server, connected(path) as mute, connected(path) as idle:
        negotiate(idle)
        server.stop()
        assert idle.recv(1) == b""
        while mute.recv(4096):
            pass
        assert not os.path.exists(path)
        server.stop()
    assert not [t for t in threading.enumerate() if t.name.startswith("control")]


def test_stop_does_not_wait_for_a_command_that_never_ends(path: str) -> None:
    release = threading.Event()

    class Stuck(FakeService):
        def status(self) -> dict[str, Any]:
            release.wait(60)
            return {}

    server = ControlServer(path, Stuck())
    server.start()
    try:
        with connected(path) as sock:
            negotiate(sock)
            sock.sendall(b'{"execute": "x-fleece-status"}')
            started = time.monotonic()
            server.stop(timeout=0.2)
            assert time.monotonic() - started < 10
            assert sock.recv(1) == b""
    finally:
        release.set()
    for thread in threading.enumerate():
        if thread.name.startswith("control"):
            thread.join(20)


def test_a_service_may_stop_the_server_from_within_a_command(path: str) -> None:
    class Suicidal(FakeService):
        def quit(self) -> None:
            server.stop()

    with serving(path, Suicidal()) as server:
        with ControlClient(path) as client:
            assert client.execute("quit") == {}
        worker = [t for t in threading.enumerate() if t.name == "control-1"]
        for thread in worker:
            thread.join(20)
            assert not thread.is_alive()


def test_too_many_clients_are_refused_and_those_who_are_there_go_on(
    server: ControlServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fleece.control.server._MAX_CLIENTS", 1)
    with ControlClient(server.path) as first, connected(server.path) as second:
        assert second.recv(1) == b""
        assert first.execute("query-version")

"""The server around the loops: exports come and go, clients misbehave, everything ends in time."""

import logging
import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from fleece.block.graph import Disk
from fleece.block.memory import MemoryNode
from nbdwire import constants as c
from nbdwire.connection import Connection, ServedExport
from nbdwire.errors import UnknownExport
from nbdwire.negotiate import Negotiated
from nbdwire.server import Server
from nbdwire.uri import NBDURI
from tests.support import nbdraw as raw
from tests.support.faulty import Hooked, hanging, striped
from tests.support.nbdraw import connected, open_socket
from tests.support.serving import noise, serving
from tests.support.threads import wait_for, wait_until

SIZE = 64 << 20
DIRTY = "qemu:dirty-bitmap:x"


def reset(where: NBDURI, message: bytes) -> None:
    with open_socket(where) as sock:
        sock.sendall(message)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes([1, 0, 0, 0, 0, 0, 0, 0]))


# Exports


def test_a_removed_export_hangs_up_an_idle_client_and_leaves_the_others(tmp_path: Path) -> None:
    with serving(tmp_path, MemoryNode(SIZE)) as (server, where):
        server.add("other", MemoryNode(SIZE))
        with connected(where) as gone, connected(where, "other") as stays:
            gone.in_step()
            server.remove("disk")
            assert gone.hung_up()
            stays.in_step()
            assert (server.exports, server.clients("disk")) == (["other"], 0)
            with pytest.raises(UnknownExport), connected(where):
                pass


@pytest.mark.parametrize("blocking", [False, True])
def test_an_export_is_removed_under_a_client_that_does_not_read(
    tmp_path: Path, blocking: bool
) -> None:
    node = Hooked(SIZE, blocking=blocking)
    with serving(tmp_path, node) as (server, where), connected(where) as client:
        client.write(0, noise(1 << 20))
        client.send(b"".join(client.make(raw.READ, 0, 32 << 20) for _ in range(9)))
        wait_until(lambda: client.sock.recv(1, socket.MSG_PEEK))
        server.remove("disk", timeout=0.4)
        assert server.clients() == 0


@pytest.mark.parametrize("blocking", [False, True])
def test_removing_an_export_with_a_verb_that_hangs_is_a_timeout(
    tmp_path: Path, blocking: bool
) -> None:
    node = Hooked(SIZE, blocking=blocking)
    with serving(tmp_path, node) as (server, where), connected(where) as client:
        with hanging(node, "flush") as stuck:
            client.send(client.make(raw.FLUSH))
            wait_for(stuck.entered)
            with pytest.raises(TimeoutError, match="export 'disk'"):
                server.remove("disk", timeout=0.1)
            assert server.exports == []
            assert server.clients("disk") == 1
        wait_until(lambda: server.clients() == 0)


def test_names_are_checked_when_they_are_added(tmp_path: Path) -> None:
    with Server() as server:
        server.add("", MemoryNode(1))
        server.add("é" * 2048, MemoryNode(1))
        for name in ("", "x" * 4097, "a\0b", "\udc80"):
            with pytest.raises(ValueError, match=r"name|codec"):
                server.add(name, MemoryNode(1))
        with pytest.raises(KeyError):
            server.remove("never")


def test_the_default_export_answers_to_the_empty_name(tmp_path: Path) -> None:
    with (
        serving(tmp_path, MemoryNode(4096), default="disk") as (_, where),
        connected(where, "") as client,
    ):
        assert client.session.name == "disk"


def test_an_export_that_was_replaced_since_it_was_negotiated_is_not_entered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the client would trust the size and the contexts of the one before."""
    real = Connection._enter

    def late(conn: Connection, negotiated: Negotiated) -> ServedExport:
        monkeypatch.setattr(Connection, "_enter", real)
        server.remove("disk")
        server.add("disk", MemoryNode(4096))  # smaller, and without the dirty bitmap
        return real(conn, negotiated)

    monkeypatch.setattr(Connection, "_enter", late)
    contexts = {DIRTY: striped(10, 4096)}
    with serving(tmp_path, MemoryNode(SIZE), contexts=contexts) as (server, where):
        with connected(where, contexts=[DIRTY]) as client:
            assert client.session.contexts
            assert client.hung_up()
        with connected(where, contexts=[DIRTY]) as client:
            assert (client.session.size, client.session.contexts) == (4096, ())
            client.in_step()


def test_block_status_of_several_contexts_over_the_wire(tmp_path: Path) -> None:
    node = MemoryNode(SIZE)
    node.pwrite(memoryview(b"x" * 65536), 65536)
    contexts = {DIRTY: striped(50, 4096), "x-test:many": striped(7, 1)}
    names = ["base:allocation", *contexts]
    with (
        serving(tmp_path, node, contexts=contexts) as (_, where),
        connected(where, contexts=names) as client,
    ):
        ids = {name: number for number, name in client.session.contexts}
        found = client.ask(raw.STATUS, 0, 200_000).statuses()
        assert found[ids["base:allocation"]] == [(65536, 3), (65536, 0), (200_000 - 131072, 3)]
        assert found[ids[DIRTY]] == [(4096, i % 2) for i in range(48)] + [(200_000 % 4096, 0)]
        assert len(found[ids["x-test:many"]]) == c.MAX_EXTENTS
        one = client.ask(raw.STATUS, 1, 100_000, raw.REQ_ONE).statuses()
        assert [len(extents) for extents in one.values()] == [1, 1, 1]
        assert one[ids[DIRTY]] == [(4095, 0)]
        client.in_step()


# Clients that misbehave


def test_a_handshake_has_a_deadline_however_it_dribbles(tmp_path: Path) -> None:
    with (
        serving(tmp_path, MemoryNode(SIZE), handshake_seconds=0.15) as (server, where),
        open_socket(where) as silent,
        open_socket(where) as dribbling,
    ):
        dribbling.sendall(b"\0\0\0\3IHAVEOPT\0\0\0\7\0\0\xff\xff")
        while server.clients():
            with suppress(BrokenPipeError, ConnectionResetError):
                dribbling.send(b"I")  # one byte of 64 KiB of option data
            time.sleep(0.02)  # the pace of a slow client, not a synchronisation
        assert silent.recv(100).startswith(b"NBDMAGIC")
        assert silent.recv(1) == b""


def test_the_deadline_is_for_the_handshake_alone(tmp_path: Path) -> None:
    with (
        serving(tmp_path, MemoryNode(SIZE), handshake_seconds=0.2) as (server, where),
        connected(where) as client,
    ):
        with open_socket(where) as silent:
            silent.recv(100)
            assert silent.recv(1) == b""  # 0.2 seconds later
        wait_until(lambda: server.clients() == 1)
        client.in_step()


@pytest.mark.parametrize("tcp", [False, True])
def test_garbage_is_survived(tmp_path: Path, tcp: bool, caplog: pytest.LogCaptureFixture) -> None:
    greeting = b"\0\0\0\3IHAVEOPT"
    with serving(tmp_path, MemoryNode(SIZE), tcp=tcp) as (server, where):
        for garbage in (
            b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
            b"\x16\x03\x01\x02\0\1\0\1\xfc\3\3" + bytes(100),
            b"\xff" * 10_000,
            greeting + b"\0\0\0\7\xff\xff\xff\xff",
            greeting + b"\0\0\0\1\0\0\0\4nope",
            greeting + b"\0\0\0\7\0\0\0\7\0\0\0\4di",
            b"\0\0\0\3" + b"IHAVEOPX" * 50,
            b"",
        ):
            reset(where, garbage)
        wait_until(lambda: server.clients() == 0)
        with connected(where) as client:
            client.in_step()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("tcp", [False, True])
def test_connections_reset_at_any_point_leave_no_thread_and_no_descriptor(
    tmp_path: Path, tcp: bool
) -> None:
    disk = Disk("disk", Hooked(SIZE))
    with serving(tmp_path, disk, tcp=tcp) as (server, where):
        with connected(where) as client:
            client.in_step()
        wait_until(lambda: server.clients() == 0)
        threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
        for index in range(60):
            reset(where, b"\0\0\0\3IHAVEOPT\0\0\0\3\0\0\0\0"[: index % 21])
            disk.root.blocking = index % 3 == 0
            with connected(where) as client:
                write = client.make(raw.WRITE, 0, 70_000, 0, bytes(70_000))
                reads = b"".join(client.make(raw.READ, 0, 1 << 20) for _ in range(8))
                client.send((write + reads)[: 1 + index * 1500])
                client.reset()
        wait_until(lambda: server.clients() == 0)
        wait_until(lambda: threading.active_count() <= threads)
        assert len(os.listdir("/proc/self/fd")) == descriptors
        assert disk.sessions == 0
        with connected(where) as client:
            client.in_step()


def test_a_system_without_threads_refuses_the_client_and_listens_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = threading.Thread.start

    def no_thread(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with serving(tmp_path, MemoryNode(SIZE)) as (server, where):
        monkeypatch.setattr(threading.Thread, "start", no_thread)
        with open_socket(where) as refused:
            assert refused.recv(100) == b""
        monkeypatch.setattr(threading.Thread, "start", real)
        wait_until(lambda: server.clients() == 0)
        with connected(where) as client:
            client.in_step()

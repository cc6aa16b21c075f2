"""How a connection gives way: to a drain while its client is slow, and to the end of the server."""

import os
import socket
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from fleece.block.graph import Disk, drained
from fleece.block.memory import MemoryNode
from fleece.errors import DrainTimeout
from nbdwire import constants as c
from tests.support import nbdraw as raw
from tests.support.faulty import Hooked, hanging
from tests.support.nbdraw import connected, open_socket
from tests.support.serving import noise, serving
from tests.support.threads import wait_for, wait_until

SIZE = 64 << 20
DIRTY = "qemu:dirty-bitmap:x"


# The gate is never held while a client is waited for


@pytest.fixture
def disk() -> Disk:
    root = Hooked(SIZE)
    root.pwrite(memoryview(bytearray(noise(1 << 20))), 0)
    return Disk("disk", root)


def drain(disk: Disk) -> None:
    with drained([disk], timeout=5):
        pass


@pytest.mark.parametrize("blocking", [False, True])
def test_a_disk_is_drained_while_a_client_is_stuck_in_its_payload(
    tmp_path: Path, disk: Disk, blocking: bool
) -> None:
    disk.root.blocking = blocking
    with serving(tmp_path, disk) as (_, where), connected(where) as client:
        for length in (4096, 100_000, 3 << 20, 40 << 20):
            client.send(client.make(raw.WRITE, 0, length)[:28] + b"\1" * 100)
            drain(disk)
            client.send(b"\1" * (length - 100))
            assert client.reply().error == (c.NBD_EINVAL if length > 32 << 20 else 0)


@pytest.mark.parametrize("blocking", [False, True])
def test_a_disk_is_drained_while_a_client_does_not_read_its_32_mib(
    tmp_path: Path, disk: Disk, blocking: bool
) -> None:
    disk.root.blocking = blocking
    with serving(tmp_path, disk) as (_, where), connected(where) as client:
        client.send(client.make(raw.READ, 0, 32 << 20))
        wait_until(lambda: client.sock.recv(1, socket.MSG_PEEK))  # the reply has begun
        drain(disk)
        assert client.reply().assemble(0, 32 << 20)[: 1 << 20] == noise(1 << 20)


def test_control_a_drain_does_wait_for_a_verb(tmp_path: Path, disk: Disk) -> None:
    with (
        serving(tmp_path, disk) as (_, where),
        connected(where) as client,
        hanging(disk.root, "flush") as stuck,  # type: ignore[arg-type]
    ):
        client.send(client.make(raw.FLUSH))
        wait_for(stuck.entered)
        with pytest.raises(DrainTimeout), drained([disk], timeout=0.05):
            pass


def test_sessions_of_a_disk_end_with_their_connections(tmp_path: Path, disk: Disk) -> None:
    with serving(tmp_path, disk) as (server, where):
        with connected(where) as client:
            client.in_step()
            assert disk.sessions == 1
        wait_until(lambda: server.clients() == 0)
        assert disk.sessions == 0


def test_a_flush_answers_while_another_connection_writes(tmp_path: Path) -> None:
    node = Hooked(SIZE)
    with serving(tmp_path, node) as (_, where), connected(where) as one, connected(where) as two:
        with hanging(node, "pwrite") as stuck:
            one.send(one.make(raw.WRITE, 0, 4, 0, b"abcd"))
            wait_for(stuck.entered)
            assert two.ask(raw.FLUSH).error == 0
        assert one.reply().error == 0


# The end


def test_stop_is_bounded_with_clients_in_every_state(tmp_path: Path) -> None:
    node = Hooked(SIZE)
    node.pwrite(memoryview(bytearray(noise(1 << 20))), 0)
    with serving(tmp_path, node) as (server, where), ExitStack() as stack:
        silent = stack.enter_context(open_socket(where))
        half = stack.enter_context(open_socket(where))
        half.sendall(b"\0\0\0\3IHAVE")
        idle, payload, greedy = (stack.enter_context(connected(where)) for _ in range(3))
        payload.send(payload.make(raw.WRITE, 0, 1 << 20)[:28] + bytes(1000))
        greedy.send(b"".join(greedy.make(raw.READ, 0, 32 << 20) for _ in range(3)))
        wait_until(lambda: greedy.sock.recv(1, socket.MSG_PEEK))
        began = time.monotonic()
        server.stop(timeout=1.0)
        assert time.monotonic() - began < 1.5
        assert server.clients() == 0
        assert idle.hung_up()
        assert payload.hung_up()
        for sock in (silent, half):
            assert sock.recv(100).startswith(b"NBDMAGIC")
            assert sock.recv(1) == b""


def test_stop_with_a_verb_that_hangs_is_a_timeout_and_can_be_repeated(tmp_path: Path) -> None:
    node = Hooked(SIZE)
    with serving(tmp_path, node) as (server, where), connected(where) as client:
        with hanging(node, "trim") as stuck:
            client.send(client.make(raw.TRIM, 0, 4096))
            wait_for(stuck.entered)
            with pytest.raises(TimeoutError, match="1 clients do not end"):
                server.stop(timeout=0.1)
        server.stop()
        server.stop()
        assert server.clients() == 0


def test_nobody_is_accepted_by_a_server_that_was_stopped(tmp_path: Path) -> None:
    with serving(tmp_path, MemoryNode(SIZE)) as (server, where):
        server.stop()
        assert not os.path.exists(where.socket)
        with pytest.raises(OSError, match="has been stopped"):
            server.listen(where)
        assert not os.path.exists(where.socket)
        assert server.listeners == []

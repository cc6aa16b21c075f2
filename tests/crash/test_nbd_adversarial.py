"""Clients that mean harm, or are merely broken: the server lives, and nobody else notices.

nbd.md §13 and its table of vulnerabilities. With FLEECE_SOAK=N everything is done N times as often.
"""

import ctypes
import gc
import os
import random
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from fleece.block.file import FileNode
from fleece.block.graph import Disk
from fleece.block.memory import MemoryNode
from nbdwire import constants as c
from nbdwire.connection import Connection
from nbdwire.limits import Budget
from nbdwire.server import Server
from nbdwire.uri import NBDURI
from tests.support import nbdraw as raw
from tests.support.faulty import Hooked
from tests.support.nbdraw import Raw, connected, open_socket
from tests.support.serving import noise, serving
from tests.support.threads import wait_until

SOAK = int(os.environ.get("FLEECE_SOAK", "1"))
SIZE = 64 << 20
MIB = 1 << 20
CLIENT_FLAGS = b"\0\0\0\3"
TRANSPORT = pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])


ROOT = Path(__file__).resolve().parents[2]


def option(number: int, data: bytes = b"") -> bytes:
    return b"IHAVEOPT" + number.to_bytes(4, "big") + len(data).to_bytes(4, "big") + data


def sized(text: str) -> bytes:
    return len(text).to_bytes(4, "big") + text.encode()


def vanish(sock: socket.socket) -> None:
    """Close it with a RST: no orderly end."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def resident() -> int:
    """Bytes of memory that this process has now, without what only the allocator keeps."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@contextmanager
def nothing_left(server: Server) -> Iterator[None]:
    """After the block: the threads and descriptors of before, and no connection."""
    wait_until(lambda: server.clients() == 0)
    threads, files = threading.active_count(), descriptors()
    yield
    # A client that is gone already may still be waiting to be accepted. Threads: a server keeps
    # one that has nothing to do for a second, so there may be fewer than before.
    wait_until(
        lambda: (
            server.clients() == 0 and threading.active_count() <= threads and descriptors() == files
        )
    )
    assert server._house.budget.held == 0


def latency(client: Raw, rounds: int = 100) -> float:
    """Seconds for a small read, in the median."""
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        client.in_step()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


# Before transmission


@TRANSPORT
def test_200_dribbling_handshakes_do_not_keep_a_new_client_waiting(
    tmp_path: Path, tcp: bool
) -> None:
    """CVE-2024-7409, nbd.md §13. The limit of handshakes is below their number here."""
    with (
        serving(tmp_path, MemoryNode(SIZE), tcp=tcp, max_handshakes=50) as (server, where),
        nothing_left(server),
        ExitStack() as stack,
    ):
        slow = [stack.enter_context(open_socket(where)) for _ in range(200)]
        over = threading.Event()

        def dribble() -> None:
            message = CLIENT_FLAGS + option(c.OPT_GO, bytes(60_000))
            for byte in message:
                for sock in slow:
                    with suppress(OSError):
                        sock.send(bytes([byte]))
                if over.wait(0.01):  # the pace of a slow client, not a synchronisation
                    return

        dribbling = threading.Thread(target=dribble)
        dribbling.start()
        try:
            times = []
            for _ in range(20 * SOAK):
                began = time.perf_counter()
                with connected(where) as client:
                    client.in_step()
                times.append(time.perf_counter() - began)
            assert statistics.median(times) < 0.5
            assert server.clients() <= 51
        finally:
            over.set()
            dribbling.join()


@TRANSPORT
def test_options_that_announce_gigabytes_cost_nothing(tmp_path: Path, tcp: bool) -> None:
    """CVE-2017-15119, CVE-2022-26495/6: lengths of 64 KiB and more, up to 2**32 - 1."""
    with serving(tmp_path, MemoryNode(SIZE), tcp=tcp) as (server, where), nothing_left(server):
        for number in (*range(12), 0xFFFFFFFF):
            for length in (c.MAX_OPTION_DATA + 1, 64 << 20, 0xFFFFFFFF):
                head = b"IHAVEOPT" + struct.pack(">II", number, length)
                with open_socket(where) as sock:
                    sock.sendall(CLIENT_FLAGS + head)
                    received = b""
                    with suppress(ConnectionResetError):
                        while part := sock.recv(4096):
                            received += part
                    assert received.startswith(b"NBDMAGICIHAVEOPT")
                    assert len(received) < 5000


def garbage(rng: random.Random) -> bytes:
    """Bytes that are right for a while."""
    parts = [CLIENT_FLAGS]
    for _ in range(rng.randrange(4)):
        name = rng.choice([b"disk", b"", b"x" * 4096, b"\xff\xfe", b"di\0sk", rng.randbytes(20)])
        length = rng.choice([len(name), 0, 0xFFFFFFFF, len(name) + 1])
        body = struct.pack(">I", length) + name + rng.randbytes(rng.randrange(8))
        parts.append(option(rng.choice([*range(1, 12), 99]), rng.choice([b"", body])))
    text = bytearray(b"".join(parts))
    for _ in range(rng.choice([0, 0, 1, 5])):
        text[rng.randrange(len(text))] = rng.randrange(256)
    return bytes(text) + rng.choice([b"", rng.randbytes(rng.randrange(2000))])


@TRANSPORT
def test_garbage_before_transmission_ends_that_connection_only(
    tmp_path: Path, tcp: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """CVE-2011-1925, CVE-2013-7441, CVE-2017-7539, CVE-2017-9524, CVE-2019-14851."""
    rng = random.Random(20261123)
    with (
        serving(tmp_path, MemoryNode(SIZE), tcp=tcp) as (server, where),
        nothing_left(server),
        connected(where) as good,
    ):
        for index in range(200 * SOAK):
            sock = open_socket(where)
            with suppress(BrokenPipeError, ConnectionResetError):
                sock.sendall(garbage(rng))
            (vanish if index % 2 else socket.socket.close)(sock)
            if index % 20 == 0:
                good.in_step()
    assert [record for record in caplog.records if record.levelname in ("ERROR", "WARNING")] == []


@TRANSPORT
def test_garbage_in_transmission_ends_that_connection_only(tmp_path: Path, tcp: bool) -> None:
    """nbd.md §13: a wrong magic is never followed by another try to make sense of it."""
    rng = random.Random(7)
    disk = Disk("disk", MemoryNode(SIZE))
    with (
        serving(tmp_path, disk, tcp=tcp) as (server, where),
        nothing_left(server),
        connected(where) as good,
    ):
        for _ in range(60 * SOAK):
            with connected(where) as client:
                text = bytearray(client.make(raw.READ, 0, 512) * rng.randrange(1, 5))
                text[rng.choice([0, 1, 2, 3])] ^= 1 << rng.randrange(8)
                with suppress(BrokenPipeError, ConnectionResetError):
                    client.send(bytes(text) + rng.randbytes(rng.randrange(5000)))
                assert client.hung_up()
        good.in_step()
    wait_until(lambda: disk.sessions == 0)


@TRANSPORT
def test_random_fields_in_requests_are_answered_or_hung_up(tmp_path: Path, tcp: bool) -> None:
    """Every command, flag, offset and length; CVE-2025-47711/2: lengths around 2**32."""
    rng = random.Random(99)
    edges = [0, 1, 511, 512, 4096, SIZE - 1, SIZE, SIZE + 1, 2**31, 2**32 - 512, 2**32 - 1]
    with (
        serving(tmp_path, MemoryNode(SIZE), tcp=tcp) as (server, where),
        nothing_left(server),
        connected(where) as good,
    ):
        for _ in range(10 * SOAK):
            with connected(where, contexts=["base:allocation"]) as client:
                for _ in range(40):
                    kind = rng.choice([*range(9), 0xFFFF])
                    if kind in (raw.WRITE, raw.DISC):
                        continue
                    offset = rng.choice([*edges, 2**63, 2**64 - 1, 2**64 - 512])
                    flags = rng.choice([0, 1 << rng.randrange(16), 0xFFFF])
                    client.ask(kind, offset, rng.choice([*edges[:5], *edges[-3:]]), flags)
                client.in_step()
        good.in_step()


# At every byte


def session(extended: bool) -> bytes:
    """All that a client sends in its life, from its flags to DISC."""
    handshake = [
        CLIENT_FLAGS,
        option(c.OPT_LIST),
        option(c.OPT_EXTENDED_HEADERS if extended else c.OPT_STRUCTURED_REPLY),
        option(99, b"what?"),
        option(c.OPT_SET_META_CONTEXT, sized("disk") + b"\0\0\0\1" + sized("base:allocation")),
        option(c.OPT_INFO, sized("disk") + b"\0\1\0\3"),
        option(c.OPT_GO, sized("disk") + b"\0\0"),
    ]
    requests = [
        (raw.READ, 0, 600, 0),
        (raw.FLUSH, 0, 0, 0),
        (raw.ZEROES, 8192, 512, 0),
        (raw.TRIM, 8192, 512, 0),
        (raw.CACHE, 0, 512, 0),
        (raw.STATUS, 0, SIZE, 0),
        (raw.WRITE, 4096, 64, raw.FUA),
        (raw.READ, 0, 100_000, 0),
        (raw.DISC, 0, 0, 0),
    ]
    return b"".join(handshake) + b"".join(_request(extended, *fields) for fields in requests)


def _request(extended: bool, kind: int, offset: int, length: int, flags: int) -> bytes:
    payload = b"W" * length if kind == raw.WRITE else b""
    if not extended:
        return raw.request(kind, offset, length, flags=flags, cookie=kind, payload=payload)
    flags |= raw.PAYLOAD_LEN if payload else 0
    return struct.pack(">IHHQQQ", 0x21E41C71, flags, kind, kind, offset, length) + payload


@pytest.mark.parametrize("extended", [False, True], ids=["compact", "extended"])
@pytest.mark.parametrize("blocking", [False, True], ids=["worker", "followers"])
@TRANSPORT
def test_a_client_may_vanish_at_every_byte_of_its_session(
    tmp_path: Path,
    tcp: bool,
    blocking: bool,
    extended: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """And a write of which a byte is missing is not carried out, not even in part."""
    node = Hooked(SIZE, blocking=blocking)
    disk, text = Disk("disk", node), session(extended)
    written = text.index(b"W" * 64) + 64
    found = bytearray(64)
    # Followers have more threads to start; the positions are spread over both of them.
    step = 1 if SOAK > 1 else 3 if blocking else 2
    with serving(tmp_path, disk, tcp=tcp) as (server, where), nothing_left(server):
        for cut in range(int(tcp) % step, len(text) + 1, step):
            sock = open_socket(where)
            with suppress(BrokenPipeError, ConnectionResetError):
                sock.sendall(text[:cut])
            (vanish if cut % 5 == 0 else socket.socket.close)(sock)
            if cut == written - 1 or cut + step > written > cut:
                wait_until(lambda: server.clients() == 0)
                node.pread_into(memoryview(found), 4096)
                assert found == bytes(64)
        wait_until(lambda: server.clients() == 0)
        assert disk.sessions == 0
        with connected(where) as client:
            client.in_step()
    assert [record for record in caplog.records if record.levelname in ("ERROR", "WARNING")] == []


@TRANSPORT
def test_the_session_that_is_cut_is_served_when_it_is_whole(tmp_path: Path, tcp: bool) -> None:
    """The control of the test above."""
    node = MemoryNode(SIZE)
    with serving(tmp_path, node, tcp=tcp) as (server, where), nothing_left(server):
        for extended in (False, True):
            node.zero(0, 65536)
            with open_socket(where) as sock:
                sock.sendall(session(extended))
                size = 0
                while part := sock.recv(1 << 16):
                    size += len(part)
            found = bytearray(66)
            node.pread_into(memoryview(found), 4095)
            assert found == b"\0" + b"W" * 64 + b"\0"
            assert size > 1000


@TRANSPORT
def test_150_resets_in_any_state_leave_nothing_behind(tmp_path: Path, tcp: bool) -> None:
    """nbd.md §13; CVE-2017-10664 and nbdkit's assert when a client hangs up."""
    disk = Disk("disk", Hooked(SIZE))
    with serving(tmp_path, disk, tcp=tcp) as (server, where), nothing_left(server):
        for index in range(150 * SOAK):
            disk.root.blocking = index % 3 == 0
            if index % 4 == 0:
                sock = open_socket(where)
                sock.sendall(session(False)[: index % 200])
                vanish(sock)
                continue
            with connected(where) as client:
                write = client.make(raw.WRITE, 0, 70_000, 0, bytes(70_000))
                reads = b"".join(client.make(raw.READ, 0, MIB) for _ in range(8))
                client.send((write + reads)[: 1 + index * 500])
                client.reset()
        wait_until(lambda: server.clients() == 0)
        assert disk.sessions == 0


# Slow ones among others


@pytest.mark.parametrize("blocking", [False, True], ids=["worker", "followers"])
@TRANSPORT
def test_clients_that_never_read_do_not_slow_others_down(
    tmp_path: Path, tcp: bool, blocking: bool
) -> None:
    """nbd.md §13: back-pressure on each of them, bounded memory, others live."""
    node = Hooked(SIZE, blocking=blocking)
    node.pwrite(memoryview(noise(SIZE)), 0)
    budget = 96 * MIB
    with (
        serving(tmp_path, node, tcp=tcp, max_bytes_in_flight=budget) as (server, where),
        nothing_left(server),
        ExitStack() as stack,
        connected(where) as good,
    ):
        before = latency(good)
        for _ in range(12):
            client = stack.enter_context(connected(where))
            client.send(b"".join(client.make(raw.READ, 0, 16 * MIB) for _ in range(4)))
        for _ in range(3):
            assert latency(good) < max(20 * before, 0.02)
            assert server._house.budget.held <= budget
        assert good.write(0, bytes(MIB)) == 0


@TRANSPORT
def test_half_written_writes_do_not_pin_the_memory_of_all(
    tmp_path: Path, tcp: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1,000 such clients would hold 32 GiB; here the budget is for two, and a good one gets in."""
    monkeypatch.setattr(Budget, "__init__", _impatient(Budget.__init__))
    with (
        serving(tmp_path, MemoryNode(SIZE), tcp=tcp, max_bytes_in_flight=80 * MIB) as found,
        ExitStack() as stack,
    ):
        server, where = found
        stack.enter_context(nothing_left(server))
        good = stack.enter_context(connected(where))
        for _ in range(10):
            client = stack.enter_context(connected(where))
            client.send(client.make(raw.WRITE, 0, 32 * MIB) + bytes(64 << 10))
        wait_until(lambda: server._house.budget.held >= 64 * MIB)
        assert good.write(0, bytes(MIB)) == 0
        assert server._house.budget.held <= 80 * MIB
        assert good.write(0, bytes(32 * MIB)) == 0


def _impatient(real: Callable[..., None]) -> Callable[..., None]:
    def init(budget: Budget, total: int) -> None:
        real(budget, total, patience=0.1)

    return init


@pytest.mark.timeout(240)
def test_1000_idle_connections_cost_little_and_go_without_a_trace(tmp_path: Path) -> None:
    """What stays with the allocator does not grow, however often they come."""
    if not os.environ.get("FLEECE_ALONE"):
        # Memory is counted in a process of its own: what earlier tests left in the allocator of
        # this one would count too.
        this = (
            f"{__file__}::{test_1000_idle_connections_cost_little_and_go_without_a_trace.__name__}"
        )
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", this]
        subprocess.run(command, env={**os.environ, "FLEECE_ALONE": "1"}, check=True, cwd=ROOT)
        return
    path = tmp_path / "disk"
    path.write_bytes(bytes(MIB))
    node = FileNode(path)
    with serving(tmp_path, node, max_connections=1200) as (server, where):
        with connected(where) as client:
            client.in_step()
        at_first = resident()
        left = []
        for _ in range(3 + SOAK):
            with nothing_left(server):
                before = resident()
                with ExitStack() as stack:
                    clients = [stack.enter_context(connected(where)) for _ in range(1000)]
                    for client in clients[::50]:
                        client.in_step()
                    assert server.clients("disk") == 1000
                    each = (resident() - before) / 1000
                    assert latency(clients[500]) < 0.05
                    began = time.perf_counter()
                    with connected(where) as one_more:
                        one_more.in_step()
                    assert time.perf_counter() - began < 0.5
            left.append(resident() - at_first)
            assert not [thing for thing in gc.get_objects() if type(thing) is Connection]
        print(f"{each / 1024:.0f} KiB for each idle connection")
        assert each < MIB / 4
        print(f"left over, in KiB: {[bytes_left >> 10 for bytes_left in left]}")
        assert left[-1] - left[0] < 4 * MIB
    node.close()


@pytest.mark.parametrize("where", ["unix", "tcp"])
def test_the_first_byte_comes_at_once(tmp_path: Path, where: str) -> None:
    """From connect to the greeting, and to the end of the handshake (nbd.md §1: no Nagle delay)."""
    with serving(tmp_path, MemoryNode(SIZE), tcp=where == "tcp") as (_, place):
        first, whole = [], []
        for _ in range(100 * SOAK):
            began = time.perf_counter()
            with open_socket(place) as sock:
                sock.recv(1)
                first.append(time.perf_counter() - began)
            began = time.perf_counter()
            with connected(place):
                whole.append(time.perf_counter() - began)
        print(
            f"{where}: first byte {statistics.median(first) * 1e6:.0f} us, "
            f"handshake {statistics.median(whole) * 1e6:.0f} us"
        )
        assert statistics.median(first) < 0.02
        assert statistics.median(whole) < 0.03


def test_a_uri_is_enough_to_reach_the_server_under_test() -> None:
    """The control of all of the above: they talk to our server, over a socket."""
    with Server("nbd://127.0.0.1:0") as server:
        assert isinstance(server.listeners[0], NBDURI)
        with open_socket(server.listeners[0]) as sock:
            assert sock.recv(16) == b"NBDMAGICIHAVEOPT"

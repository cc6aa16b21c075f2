"""Pipelines, pools and reconnecting clients with the servers that others use, and with ours."""

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nbdwire.client import Client, connect, describe, list_exports
from nbdwire.constants import CMD_FLAG_NO_HOLE, TFLAG_CAN_MULTI_CONN
from nbdwire.errors import NegotiationError, RequestError, TLSError, WritesLost
from nbdwire.pipeline import Pipeline, Ticket
from nbdwire.pool import connect_pool
from nbdwire.reconnect import Policy
from nbdwire.tools.main import main
from nbdwire.uri import NBDURI
from tests.support import certificates, peers
from tests.support.tools import require

ROOT = Path(__file__).resolve().parents[2]
SIZE = 4 << 20
BLOCK = 4096
PATIENT = Policy(attempts=400, delay=0.02, factor=1)


@contextmanager
def ours(listen: Path, image: Path) -> Iterator[str]:
    """``python -m nbdwire serve`` in a process of its own."""
    command = [sys.executable, "-m", "nbdwire", "serve", image, "--socket", listen]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "nbd")}
    process = subprocess.Popen(list(map(str, command)), env=environment, stdout=subprocess.DEVNULL)
    try:
        peers.wait_for_socket(listen, process)
        yield f"nbd+unix:///?socket={listen}"
    finally:
        process.kill()
        process.wait()


@contextmanager
def server(kind: str, directory: Path) -> Iterator[str]:
    """A server of an empty image of SIZE bytes. It is killed in the end, not asked to leave."""
    image, listen = directory / "image", directory / "nbd.sock"
    with image.open("ab") as file:
        file.truncate(SIZE)
    if kind == "ours":
        with ours(listen, image) as uri:
            yield uri
        return
    options = ["-t", "-e", "0", "-f", "raw", "--discard=unmap", "-k", str(listen), str(image)]
    command = {
        "qemu-nbd": ["qemu-nbd", *options],
        "nbdkit": ["nbdkit", "-f", "-U", str(listen), "file", str(image)],
    }[kind]
    process = subprocess.Popen([require(command[0]), *command[1:]], stdin=subprocess.DEVNULL)
    try:
        peers.wait_for_socket(listen, process)
        yield f"nbd+unix:///?socket={listen}"
    finally:
        process.kill()
        process.wait()


KINDS = ["ours", "qemu-nbd", "nbdkit"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("structured", [True, False])
def test_hundreds_in_flight_on_several_connections_agree_with_a_model(
    kind: str, structured: bool, tmp_path: Path
) -> None:
    """Each block has one request at a time; everything else is in any order."""
    rng, model = random.Random(11), bytearray(SIZE)
    blocks = SIZE // BLOCK
    tickets: dict[int, Ticket] = {}
    reads: list[tuple[memoryview, bytes]] = []
    with server(kind, tmp_path) as uri, connect_pool(uri, 3, structured=structured) as pool:
        assert len(pool.clients) == 3
        with pool.pipeline(depth=400) as pipeline:
            for _ in range(3000):
                block, count = rng.randrange(blocks - 3), rng.randrange(1, 4)
                for near in range(block, block + count):
                    if near in tickets:
                        tickets.pop(near).result()
                ticket = step(pipeline, rng, model, block * BLOCK, count * BLOCK, reads)
                tickets.update(dict.fromkeys(range(block, block + count), ticket))
            pipeline.flush()
        assert pool.pread(SIZE, 0) == model
    assert all(view == expected for view, expected in reads)
    assert (tmp_path / "image").read_bytes() == model


def step(
    pipeline: Pipeline,
    rng: random.Random,
    model: bytearray,
    offset: int,
    length: int,
    reads: list[tuple[memoryview, bytes]],
) -> Ticket:
    offset, length = offset + rng.randrange(512), length - 512
    choice = rng.random()
    if choice < 0.4:
        content = rng.randbytes(length)
        model[offset : offset + length] = content
        return pipeline.pwrite(content, offset, fua=rng.random() < 0.02)
    if choice < 0.6:
        model[offset : offset + length] = bytes(length)
        return pipeline.zero(offset, length, rng.choice([0, CMD_FLAG_NO_HOLE]))
    view = memoryview(bytearray(length))
    reads.append((view, bytes(model[offset : offset + length])))
    return pipeline.pread_into(view, offset)


def test_errors_of_a_server_reach_their_tickets_and_no_others(tmp_path: Path) -> None:
    options = ["--filter=error", "memory", "1M", "error-pwrite=ENOSPC", "error-pwrite-rate=20%"]
    with peers.nbdkit(tmp_path / "s", *options) as uri, connect(uri) as client:
        with client.pipeline(depth=100) as pipeline:
            writes = [pipeline.pwrite(bytes([n]), n) for n in range(256)]
            results = [outcome(ticket) for ticket in writes]
        assert 10 < results.count("No space left on device") < 150
        stored = client.pread(256, 0)
    assert [bool(result) for result in results[1:]] == [not byte for byte in stored[1:]]


def outcome(ticket: Ticket) -> str | None:
    try:
        ticket.result()
    except RequestError as error:
        return error.strerror
    return None


def test_a_slow_server_answers_in_parallel(tmp_path: Path) -> None:
    """50 reads that take 0.1 s each: in a row they would take 5 s."""
    with (
        peers.nbdkit(tmp_path / "s", "--filter=delay", "memory", "1M", "rdelay=100ms") as uri,
        connect(uri) as client,
        client.pipeline(depth=50) as pipeline,
    ):
        began = time.monotonic()
        for n in range(50):
            pipeline.pread_into(memoryview(bytearray(512)), n * 512)
        pipeline.drain()
        assert time.monotonic() - began < 2.5


@pytest.mark.parametrize("kind", KINDS)
def test_a_client_outlives_a_server_that_is_killed_and_started_again(
    kind: str, tmp_path: Path
) -> None:
    socket_file = tmp_path / "nbd.sock"
    with server(kind, tmp_path) as uri:
        disk = connect(uri, reconnect=PATIENT)
        disk.pwrite(b"flushed", 0)
        disk.flush()
        disk.pwrite(b"not flushed", 4096)
    with disk:
        socket_file.unlink(missing_ok=True)
        restarted = threading.Event()

        def restart() -> None:
            with server(kind, tmp_path):
                restarted.set()
                done.wait(20)

        done = threading.Event()
        thread = threading.Thread(target=restart)
        thread.start()
        try:
            assert disk.pread(7, 0) == b"flushed"
            assert disk.losses >= 1
            with pytest.raises(WritesLost) as caught:
                disk.flush()
            assert caught.value.ranges == [(4096, 11)]
            disk.pwrite(b"not flushed", 4096)
            disk.flush()
        finally:
            assert restarted.wait(20)
            done.set()
            thread.join()
    assert (tmp_path / "image").read_bytes()[4096:4107] == b"not flushed"


def test_extended_headers_are_used_with_our_server(tmp_path: Path) -> None:
    """nbd.md §8: qemu-nbd 7.2 and nbdkit fall back to structured replies, ours need not."""
    with server("ours", tmp_path) as uri:
        with connect(uri) as client:
            assert client.session.extended
            client.pwrite(b"x" * 65536, 65536)
            client.zero(1 << 20, 1 << 20)
            found = client.extents(0, SIZE)
            assert [(x.offset, x.length) for x in found if not x.is_zero] == [(65536, 65536)]
        with connect(uri, extended=False) as client:
            assert (client.session.extended, client.session.structured) == (False, True)
            assert client.extents(0, SIZE) == found


# nbd-server, the reference implementation


@contextmanager
def nbd_server(directory: Path) -> Iterator[NBDURI]:
    """Debian's nbd-server with the export "disk"; it makes itself a daemon."""
    program = require("nbd-server")
    image, config, pid_file = directory / "image", directory / "config", directory / "pid"
    with image.open("wb") as file:
        file.truncate(SIZE)
    config.write_text(
        f"[generic]\nunixsock = {directory}/nbd.sock\nlistenaddr = 127.0.0.1\n"
        f"port = {free_port()}\nallowlist = true\n"
        f"[disk]\nexportname = {image}\nflush = true\nfua = true\ntrim = true\n"
    )
    subprocess.run([program, "-C", str(config), "-p", str(pid_file)], check=True)
    limit = time.monotonic() + 20
    while not (pid_file.exists() and pid_file.read_text().strip()):
        assert time.monotonic() < limit, "nbd-server has not begun"
        time.sleep(0.01)  # an external process: polling is all there is
    try:
        while not (directory / "nbd.sock").exists():
            assert time.monotonic() < limit, "nbd-server does not listen"
            time.sleep(0.01)
        yield NBDURI(socket=str(directory / "nbd.sock"), export="disk")
    finally:
        os.kill(int(pid_file.read_text()), signal.SIGTERM)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_nbd_server_is_read_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with nbd_server(tmp_path) as uri:
        assert list_exports(uri) == [("disk", "")]
        with connect_pool(uri, 2) as pool:
            assert pool.size == SIZE
            assert len(pool.clients) == 1 + bool(pool.flags & TFLAG_CAN_MULTI_CONN)
            content = random.Random(3).randbytes(1 << 20)
            with pool.pipeline() as pipeline:
                for offset in range(0, len(content), 1 << 16):
                    pipeline.pwrite(content[offset : offset + (1 << 16)], offset)
                pipeline.flush()
            assert pool.pread(1 << 20, 0) == content
        # It tells a wrong size in INFO; our tool asks again where that is nothing.
        assert describe(uri)[0].size in (0, SIZE)
        assert main(["list", "--long", str(uri)]) == 0
        assert f"export-size: {SIZE} (4M)" in capsys.readouterr().out
        with pytest.raises(NegotiationError, match="'nope'"):
            connect(uri.with_export("nope"))


# TLS


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> certificates.Pki:
    return certificates.create(tmp_path_factory.mktemp("pki"))


def tls_uri(listen: Path, directory: Path, **params: str) -> NBDURI:
    query = {"tls-certificates": str(directory), "tls-hostname": "localhost", **params}
    return NBDURI(socket=str(listen), tls=True, params=tuple(query.items()))


@contextmanager
def nbdkit_tls(listen: Path, directory: Path) -> Iterator[None]:
    options = ["--tls=require", f"--tls-certificates={directory}", "--tls-verify-peer"]
    with peers.nbdkit(listen, *options, "memory", str(SIZE)):
        yield


@contextmanager
def qemu_tls(listen: Path, directory: Path, image: Path) -> Iterator[None]:
    with image.open("wb") as file:
        file.truncate(SIZE)
    tls = f"tls-creds-x509,id=t,endpoint=server,verify-peer=yes,dir={directory}"
    options = ["--object", tls, "--tls-creds", "t"]
    with peers.qemu_nbd(image, listen, *options):
        yield


@pytest.mark.parametrize("kind", ["nbdkit", "qemu-nbd"])
def test_data_come_back_over_tls(kind: str, tmp_path: Path, pki: certificates.Pki) -> None:
    """nbd.md §9, §14: every verb and a pipeline on several connections, inside TLS."""
    listen = tmp_path / "s"
    serving = (
        nbdkit_tls(listen, pki.both)
        if kind == "nbdkit"
        else qemu_tls(listen, pki.both, tmp_path / "image")
    )
    content = random.Random(9).randbytes(SIZE)
    with serving, connect_pool(tls_uri(listen, pki.both), 2) as pool:
        assert pool.session.tls
        with pool.pipeline(depth=32) as pipeline:
            for offset in range(0, SIZE, 1 << 16):
                pipeline.pwrite(content[offset : offset + (1 << 16)], offset)
            pipeline.flush()
            views = [memoryview(bytearray(100_000)) for _ in range(40)]
            for n, view in enumerate(views):
                pipeline.pread_into(view, n * 100_001)
        assert all(view == content[n * 100_001 :][:100_000] for n, view in enumerate(views))
        pool.zero(0, 4096)
        assert pool.pread(SIZE, 0) == bytes(4096) + content[4096:]


def test_a_server_that_cannot_be_trusted_gets_nothing(
    tmp_path: Path, pki: certificates.Pki
) -> None:
    """CVE-2024-7383: the server's certificate and its name are verified."""
    listen = tmp_path / "s"
    with nbdkit_tls(listen, pki.both):
        for uri in (
            tls_uri(listen, pki.wrong_authority),
            tls_uri(listen, pki.both, **{"tls-hostname": "elsewhere.example"}),
        ):
            with pytest.raises(TLSError) as caught:
                connect(uri)
            assert "\n" not in str(caught.value)
        plain = NBDURI(socket=str(listen))
        with pytest.raises(NegotiationError, match="TLS"):
            connect(plain)


def test_a_server_without_tls_is_not_spoken_to_when_tls_is_wanted(
    tmp_path: Path, pki: certificates.Pki
) -> None:
    """nbd.md §14: nbds MUST fail without TLS."""
    with (
        peers.nbdkit(tmp_path / "s", "memory", "1M"),
        pytest.raises(NegotiationError, match="STARTTLS"),
    ):
        connect(tls_uri(tmp_path / "s", pki.both))


def test_all_contexts_in_one_pass(tmp_path: Path) -> None:
    image, listen = tmp_path / "disk.qcow2", tmp_path / "s"
    for command in (
        ["qemu-img", "create", "-q", "-f", "qcow2", str(image), "8M"],
        ["qemu-img", "bitmap", "--add", "-g", "65536", str(image), "b0"],
        ["qemu-io", "-c", "write -P 5 1M 100k", "-f", "qcow2", str(image)],
    ):
        subprocess.run([require(command[0]), *command[1:]], check=True, stdout=subprocess.DEVNULL)
    names = ("base:allocation", "qemu:dirty-bitmap:b0", "qemu:allocation-depth")
    with peers.qemu_nbd(image, listen, "-r", "-A", "-B", "b0", fmt="qcow2") as uri:
        client: Client
        with connect(uri, contexts=names) as client, client.pipeline() as pipeline:
            assert set(client.contexts) == set(names)
            found = pipeline.status(0, 8 << 20).result()
            assert set(found) == set(names)
            assert [x.offset for x in found[names[1]] if x.is_dirty] == [1 << 20]
            assert pipeline.status(0, 8 << 20, names[:1]).result() == {names[0]: found[names[0]]}

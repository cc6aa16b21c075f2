"""Our client against the servers that others use."""

import random
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nbdwire.client import Client, connect, list_contexts, list_exports
from nbdwire.constants import CMD_FLAG_FAST_ZERO, CMD_FLAG_FUA, CMD_FLAG_NO_HOLE
from nbdwire.errors import ConnectionClosed, NBDError, RequestError, UnknownExport
from nbdwire.uri import NBDURI
from tests.support.tools import require

SIZE = 8 << 20
BASE = "base:allocation"


@contextmanager
def running(path: Path, *command: str) -> Iterator[subprocess.Popen[bytes]]:
    """A server that listens on ``path``; it ends with the block."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        limit = time.monotonic() + 20
        while not listens(path):
            assert process.poll() is None, f"{command[0]} ended"
            assert time.monotonic() < limit, f"{command[0]} does not listen"
            time.sleep(0.01)  # an external process: polling is all there is
        yield process
    finally:
        process.kill()
        process.wait(10)


def listens(path: Path) -> bool:
    """The file alone is no proof: it is there before the server listens on it."""
    with socket.socket(socket.AF_UNIX) as sock:
        return sock.connect_ex(str(path)) == 0


@pytest.fixture
def nbdkit_memory(tmp_path: Path) -> Iterator[NBDURI]:
    path = tmp_path / "nbd.sock"
    command = [require("nbdkit"), "-f", "-U", str(path), "memory", str(SIZE)]
    with running(path, *command):
        yield NBDURI(socket=str(path))


@pytest.fixture
def nbdkit_file(tmp_path: Path) -> Iterator[NBDURI]:
    path, image = tmp_path / "nbd.sock", tmp_path / "image"
    image.touch()
    with image.open("r+b") as file:
        file.truncate(SIZE)
    command = [require("nbdkit"), "-f", "-U", str(path), "file", str(image)]
    with running(path, *command):
        yield NBDURI(socket=str(path))


@pytest.fixture
def qemu_nbd(tmp_path: Path) -> Iterator[NBDURI]:
    path, image = tmp_path / "nbd.sock", tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(SIZE)
    options = ["-t", "-f", "raw", "-e", "8", "-x", "disk ä", "-D", "a disk", "-k", str(path)]
    with running(path, require("qemu-nbd"), *options, str(image)):
        yield NBDURI(socket=str(path), export="disk ä")


@pytest.fixture(params=["nbdkit_memory", "nbdkit_file", "qemu_nbd"])
def server(request: pytest.FixtureRequest) -> NBDURI:
    uri = request.getfixturevalue(request.param)
    assert isinstance(uri, NBDURI)
    return uri


def test_data_comes_back_as_it_was_written(server: NBDURI) -> None:
    with connect(server) as client:
        assert client.size == SIZE
        assert client.contexts == (BASE,)
        content = random.Random(1).randbytes(SIZE)
        client.pwrite(content, 0)
        client.flush()
        assert client.pread(SIZE, 0) == content
        assert client.pread(1, SIZE - 1) == content[-1:]


@pytest.mark.parametrize("structured", [True, False])
def test_random_writes_zeroes_and_trims_agree_with_a_bytearray(
    server: NBDURI, structured: bool
) -> None:
    rng, model = random.Random(2), bytearray(SIZE)
    with connect(server, structured=structured) as client:
        assert client.session.structured == structured
        for _ in range(300):
            offset = rng.randrange(SIZE)
            length = min(rng.choice([1, 511, 4096, 70_000, 1 << 20]), SIZE - offset)
            step(client, rng, model, offset, length)
        assert client.pread(SIZE, 0) == model
        client.zero(0, SIZE, CMD_FLAG_NO_HOLE)
        assert client.pread(SIZE, 0) == bytes(SIZE)


def step(client: Client, rng: random.Random, model: bytearray, offset: int, length: int) -> None:
    choice = rng.randrange(4)
    if choice == 0:
        model[offset : offset + length] = content = rng.randbytes(length)
        client.pwrite(content, offset, fua=rng.random() < 0.1)
    elif choice == 1:
        model[offset : offset + length] = bytes(length)
        client.zero(offset, length, rng.choice([0, CMD_FLAG_NO_HOLE, CMD_FLAG_FUA]))
    elif choice == 2:
        client.trim(offset, length)  # what reads return now is not specified ...
        model[offset : offset + length] = content = rng.randbytes(length)
        client.pwrite(content, offset)  # ... so say it
    else:
        assert client.pread(length, offset) == model[offset : offset + length]


def test_extents_tell_data_from_holes_and_are_complete(server: NBDURI) -> None:
    with connect(server) as client:
        client.pwrite(b"x" * 65536, 1 << 20)
        client.flush()
        position, data = 0, set()
        while position < SIZE:
            for extent in client.extents(position, SIZE - position):
                assert extent.offset == position
                assert extent.length > 0
                position = extent.end
                if not extent.is_zero:
                    data.add((extent.offset, extent.end))
        assert position == SIZE
        assert min(start for start, _ in data) <= 1 << 20
        assert max(end for _, end in data) >= (1 << 20) + 65536
        assert sum(end - start for start, end in data) <= 1 << 20


def test_without_contexts_all_is_data(server: NBDURI) -> None:
    with connect(server, contexts=()) as client:
        assert client.contexts == ()
        assert [x.status for x in client.extents(0, SIZE)] == [0]


def test_threads_share_one_connection_and_keep_their_data_apart(server: NBDURI) -> None:
    share, wrong = SIZE // 8, []
    with connect(server) as client:

        def work(n: int) -> None:
            rng, base, model = random.Random(n), n * share, bytearray(share)
            client.zero(base, share)
            for _ in range(80):
                offset = rng.randrange(share)
                length = min(rng.randrange(1, 50_000), share - offset)
                if rng.random() < 0.5:
                    model[offset : offset + length] = content = rng.randbytes(length)
                    client.pwrite(content, base + offset)
                elif client.pread(length, base + offset) != model[offset : offset + length]:
                    wrong.append((n, offset))

        run_threads(work, 8)
        assert wrong == []


def run_threads(work: Callable[[int], None], count: int) -> None:
    failures: list[BaseException] = []

    def guarded(n: int) -> None:
        try:
            work(n)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []


def test_what_a_server_lists_is_what_it_has(qemu_nbd: NBDURI) -> None:
    assert list_exports(qemu_nbd) == [("disk ä", "a disk")]
    assert list_contexts(qemu_nbd) == [BASE]
    with connect(str(qemu_nbd)) as client:
        assert client.session.description == "a disk"
        assert client.session.maximum_payload == 32 << 20


def test_an_export_that_does_not_exist_is_told_so(qemu_nbd: NBDURI) -> None:
    with pytest.raises(UnknownExport, match="'nope'"):
        connect(qemu_nbd.with_export("nope"))


def test_a_server_that_is_killed_fails_what_waits_for_it(tmp_path: Path) -> None:
    path = tmp_path / "nbd.sock"
    options = ["-f", "-U", str(path), "--filter=delay", "memory", str(SIZE), "delay-read=60"]
    with running(path, require("nbdkit"), *options) as process:
        client = connect(NBDURI(socket=str(path)))
        errors: list[NBDError] = []

        def read() -> None:
            try:
                client.pread(512, 0)
            except NBDError as error:
                errors.append(error)

        threads = [threading.Thread(target=read) for _ in range(3)]
        for thread in threads:
            thread.start()
        process.kill()
        for thread in threads:
            thread.join(20)
        assert [type(error) for error in errors] == [ConnectionClosed] * 3
        client.close()


def test_an_error_of_the_server_is_its_errno_and_its_words(tmp_path: Path) -> None:
    path = tmp_path / "nbd.sock"
    options = ["-f", "-U", str(path), "--filter=error", "memory", str(SIZE)]
    failing = ["error-pwrite=ENOSPC", "error-pwrite-rate=100%"]
    with (
        running(path, require("nbdkit"), *options, *failing),
        connect(NBDURI(socket=str(path))) as client,
    ):
        for _ in range(2):
            with pytest.raises(RequestError, match="No space left"):
                client.pwrite(b"x", 0)
        assert client.pread(1, 0) == b"\0"


def test_a_read_only_server_is_read_only(tmp_path: Path) -> None:
    path = tmp_path / "nbd.sock"
    with (
        running(path, require("nbdkit"), "-r", "-f", "-U", str(path), "memory", str(SIZE)),
        connect(NBDURI(socket=str(path))) as client,
    ):
        assert client.read_only
        with pytest.raises(RequestError):
            client.pwrite(b"x", 0)


def test_a_server_without_any_extension_works(tmp_path: Path) -> None:
    """nbdkit without structured replies, GO and zeroing: the oldest of fixed newstyle."""
    path = tmp_path / "nbd.sock"
    options = ["-f", "-n", "--mask-handshake=0", "--no-sr", "-U", str(path)]
    filters = ["--filter=nozero", "memory", str(SIZE), "zeromode=none"]
    with (
        running(path, require("nbdkit"), *options, *filters),
        connect(NBDURI(socket=str(path))) as client,
    ):
        assert not client.session.structured
        client.pwrite(b"x" * 100, 0)
        client.zero(10, 20)
        assert client.pread(40, 0) == b"x" * 10 + bytes(20) + b"x" * 10
        with pytest.raises(RequestError):
            client.zero(0, 10, CMD_FLAG_FAST_ZERO)
        assert [x.status for x in client.extents(0, SIZE)] == [0]


def test_a_dirty_bitmap_is_read_together_with_the_allocation(tmp_path: Path) -> None:
    image, path = tmp_path / "disk.qcow2", tmp_path / "nbd.sock"
    subprocess.run(
        [require("qemu-img"), "create", "-q", "-f", "qcow2", str(image), str(SIZE)], check=True
    )
    subprocess.run(
        [require("qemu-img"), "bitmap", "--add", "-g", "65536", str(image), "b0"], check=True
    )
    subprocess.run(
        [require("qemu-io"), "-c", "write -P 5 1M 100k", "-f", "qcow2", str(image)],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    options = ["-t", "-r", "-f", "qcow2", "-B", "b0", "-k", str(path), str(image)]
    name = "qemu:dirty-bitmap:b0"
    with running(path, require("qemu-nbd"), *options):
        uri = NBDURI(socket=str(path))
        assert list_contexts(uri, ["qemu:dirty-bitmap:"]) == [name]
        with connect(uri, contexts=(BASE, name, "qemu:dirty-bitmap:other")) as client:
            assert set(client.contexts) == {BASE, name}
            found = client.status(0, SIZE)
            dirty = [(x.offset, x.length) for x in found[name] if x.is_dirty]
            assert dirty == [(1 << 20, 128 << 10)]
            assert [x.offset for x in found[BASE] if not x.is_zero] == [1 << 20]

import errno
import random
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest

from fleece.block import remote as remote_module
from fleece.block.memory import MemoryNode
from fleece.block.remote import RemoteNode
from fleece.errors import FleeceError, ImageError, NotFound, UsageError
from nbdwire.constants import TFLAG_HAS_FLAGS
from nbdwire.errors import ConnectionClosed, ProtocolError, WritesLost
from nbdwire.extents import Extent
from nbdwire.negotiate_client import ClientSession
from nbdwire.server import Server
from tests.support.nodes import make_file
from tests.support.peers import nbdkit, qemu_nbd, running, wait_for_socket
from tests.support.tools import require

SIZE = 1 << 20


@pytest.fixture
def uri(tmp_path: Path) -> Iterator[str]:
    with nbdkit(tmp_path / "s", "memory", str(SIZE)) as found:
        yield found


@pytest.mark.parametrize(
    ("uri", "kind"),
    [
        ("http://example.com/", UsageError),
        ("not a uri", UsageError),
        ("nbds://127.0.0.1:1/disk", ImageError),
        ("nbd+unix:///?socket=/nowhere/at/all", ImageError),
        ("nbd://127.0.0.1:1/", ImageError),
    ],
)
def test_an_export_that_cannot_be_reached_is_one_clear_line(
    uri: str, kind: type[FleeceError]
) -> None:
    with pytest.raises(kind) as caught:
        RemoteNode(uri)
    assert "\n" not in str(caught.value)
    assert "Errno" not in str(caught.value)


def test_an_unknown_export_is_not_found(tmp_path: Path) -> None:
    image = make_file(tmp_path, SIZE)
    with qemu_nbd(image, tmp_path / "s", "-x", "vm1") as uri:
        with pytest.raises(NotFound, match="nosuch"):
            RemoteNode(uri.replace("///?", "///nosuch?"))
        RemoteNode(uri.replace("///?", "///vm1?")).close()


def test_a_server_that_talks_something_else_is_refused() -> None:
    def babble() -> None:
        with listener.accept()[0] as peer:
            peer.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" + bytes(100))

    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        future = pool.submit(babble)
        with pytest.raises(ImageError, match="cannot open nbd://"):
            RemoteNode(f"nbd://127.0.0.1:{listener.getsockname()[1]}/")
        future.result()


def test_it_is_blocking_and_named_after_its_uri(uri: str) -> None:
    with closing(RemoteNode(uri)) as node:
        assert node.blocking
        assert (node.name, node.size, node.read_only) == (uri, SIZE, False)
        assert not node.pread_cached(memoryview(bytearray(512)), 0)
    with closing(RemoteNode(uri, name="far", read_only=True)) as node:
        assert (node.name, node.read_only) == ("far", True)


def test_a_read_only_server_makes_a_read_only_node(tmp_path: Path) -> None:
    with nbdkit(tmp_path / "s", "-r", "memory", "1M") as uri, closing(RemoteNode(uri)) as node:
        assert node.read_only
        with pytest.raises(OSError, match="read-only") as caught:
            node.pwrite(memoryview(b"x"), 0)
        assert caught.value.errno == errno.EPERM


@pytest.mark.parametrize(
    ("filters", "opened"), [((), 3), (("--filter=multi-conn", "multi-conn-mode=disable"), 1)]
)
def test_more_connections_are_opened_only_where_the_server_allows(
    tmp_path: Path, filters: tuple[str, ...], opened: int
) -> None:
    options, parameters = filters[:1], filters[1:]
    with (
        nbdkit(tmp_path / "s", *options, "memory", "1M", *parameters) as uri,
        closing(RemoteNode(uri, connections=3)) as node,
    ):
        assert len(node._clients) == opened
        for number in range(6):
            node.pwrite(memoryview(bytes([number]) * 512), number * 512)
        node.flush()
        buf = bytearray(6 * 512)
        node.pread_into(memoryview(buf), 0)
        assert buf == b"".join(bytes([number]) * 512 for number in range(6))


def test_an_error_of_the_server_fails_one_request_with_its_errno(tmp_path: Path) -> None:
    arguments = ["--filter=error", "memory", "1M", "error-pwrite=ENOSPC", "error-pwrite-rate=100%"]
    with nbdkit(tmp_path / "s", *arguments) as uri, closing(RemoteNode(uri)) as node:
        for _ in range(2):
            with pytest.raises(OSError, match=r".") as caught:
                node.pwrite(memoryview(b"x"), 0)
            assert caught.value.errno == errno.ENOSPC
        node.pread_into(memoryview(bytearray(10)), 0)


def test_a_server_that_dies_makes_every_later_verb_eshutdown(tmp_path: Path) -> None:
    listen = tmp_path / "s"
    with running([require("nbdkit"), "-f", "-U", listen, "memory", "1M"]) as process:
        wait_for_socket(listen, process)
        uri = f"nbd+unix:///?socket={listen}"
        node = RemoteNode(uri)
        process.kill()
        process.wait()
    buf = memoryview(bytearray(512))
    for verb in (
        lambda: node.pread_into(buf, 0),
        lambda: node.pwrite(buf, 0),
        lambda: node.zero(0, 512),
        lambda: node.trim(0, 512),
        lambda: node.flush(),
        lambda: node.extents(0, 512),
    ):
        with pytest.raises(OSError, match="the server went away") as caught:
            verb()
        assert caught.value.errno == errno.ESHUTDOWN
        assert caught.value.filename == uri
    node.close()


class FakeClient:
    """A client whose server offers nothing, and whose every request fails as it is told."""

    session = ClientSession("x", SIZE, TFLAG_HAS_FLAGS)

    size, read_only, flags, contexts = SIZE, False, TFLAG_HAS_FLAGS, ()

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __enter__(self) -> "FakeClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        pass

    def _fail(self, *_: Any) -> None:
        raise self.error

    pread_into = pwrite = zero = trim = flush = _fail

    def extents(self, offset: int, length: int) -> list[Extent]:
        return [Extent(offset, length, 0)]


@pytest.mark.parametrize(
    ("error", "number"),
    [(ProtocolError("nonsense"), errno.EIO), (ConnectionClosed("gone"), errno.ESHUTDOWN)],
)
def test_no_error_but_oserror_leaves_the_data_path(
    monkeypatch: pytest.MonkeyPatch, error: Exception, number: int
) -> None:
    monkeypatch.setattr(remote_module, "connect", lambda uri: FakeClient(error))
    node = RemoteNode("nbd://host/x")
    with pytest.raises(OSError, match=str(error)) as caught:
        node.pread_into(memoryview(bytearray(1)), 0)
    assert caught.value.errno == number


def test_hints_are_dropped_where_the_server_does_not_take_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client = FakeClient(AssertionError("asked for something that was not offered"))
    monkeypatch.setattr(remote_module, "connect", lambda uri: client)
    node = RemoteNode("nbd://host/x")
    node.trim(0, 512)
    node.flush()
    assert node.extents(3, 5) == [Extent(3, 5, 0)]


def test_if_a_later_connection_fails_the_first_is_closed(
    monkeypatch: pytest.MonkeyPatch, uri: str
) -> None:
    opened: list[Any] = []
    real = remote_module.connect

    def connect(uri: str) -> Any:
        if opened:
            raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
        opened.append(real(uri))
        return opened[0]

    monkeypatch.setattr(remote_module, "connect", connect)
    with pytest.raises(ImageError, match="Connection refused"):
        RemoteNode(uri, connections=2)
    with pytest.raises(ConnectionClosed):
        opened[0].flush()


class Strict(MemoryNode):
    """A disk of 512-byte blocks that meets nothing but whole ones."""

    meeting: threading.Barrier | None = None  # of two that read before they write

    def pread_into(self, buf: memoryview, offset: int) -> None:
        assert offset % 512 == 0
        assert len(buf) % 512 == 0
        super().pread_into(buf, offset)
        if self.meeting is not None:
            with suppress(threading.BrokenBarrierError):
                self.meeting.wait(0.3)

    def pwrite(self, buf: memoryview, offset: int, fua: bool = False) -> None:
        assert offset % 512 == 0
        assert len(buf) % 512 == 0
        super().pwrite(buf, offset, fua)


@pytest.fixture
def strict(tmp_path: Path) -> Iterator[tuple[RemoteNode, Strict]]:
    disk = Strict(SIZE)
    disk.blocking = True
    with Server(f"nbd+unix:///?socket={tmp_path}/strict") as server:
        server.add("", disk, minimum_block=512)
        with closing(RemoteNode(str(server.listeners[0]))) as node:
            yield node, disk


def test_what_is_not_aligned_to_the_servers_blocks_is_made_so(
    strict: tuple[RemoteNode, Strict],
) -> None:
    node, _ = strict
    rng, model = random.Random(5), bytearray(SIZE)
    for _ in range(600):
        offset = rng.randrange(4000)
        length = rng.choice((0, 1, 7, 511, 512, 513, 1024, 3000))
        if rng.random() < 0.3:  # the last block too
            offset = SIZE - length - rng.randrange(600)
        choice = rng.randrange(5)
        if choice == 0:
            node.zero(offset, length)
            model[offset : offset + length] = bytes(length)
        elif choice <= 2:
            data = rng.randbytes(length)
            node.pwrite(memoryview(data), offset)
            model[offset : offset + length] = data
        elif length:
            view = memoryview(bytearray(length))
            node.pread_into(view, offset)
            assert view == model[offset : offset + length]
            found = node.extents(offset, length)
            assert found[0].offset == offset
            assert found[-1].end <= offset + length
    whole = memoryview(bytearray(SIZE))
    node.pread_into(whole, 0)
    assert whole == model
    node.trim(1, 510)  # no whole block
    node.pread_into(whole, 0)
    assert whole == model


@pytest.mark.parametrize("locked", [True, False])
def test_two_writers_of_one_block_both_count(
    strict: tuple[RemoteNode, Strict], locked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the lock, the control, one is lost: both read the block before either writes."""
    node, disk = strict
    disk.meeting = threading.Barrier(2)
    if not locked:
        monkeypatch.setattr(node._ranges, "exclusive", lambda *_: nullcontext())
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda n: node.pwrite(memoryview(b"x" * 256), 256 * n), range(2)))
    disk.meeting = None
    view = memoryview(bytearray(512))
    node.pread_into(view, 0)
    assert (bytes(view) == b"x" * 512) == locked


def test_a_lost_connection_is_opened_again_if_the_uri_says_so(tmp_path: Path) -> None:
    where = f"nbd+unix:///?socket={tmp_path}/again"
    disk = MemoryNode(SIZE)
    server = Server(where)
    server.add("", disk)
    with closing(RemoteNode(f"{where}&reconnect=20")) as node:
        node.pwrite(memoryview(b"abc"), 0)
        server.stop()
        with Server(where) as second:
            second.add("", disk)
            view = memoryview(bytearray(3))
            node.pread_into(view, 0)
            assert bytes(view) == b"abc"
            with pytest.raises(WritesLost) as caught:
                node.flush()
            assert caught.value.errno == errno.EIO
            node.flush()
    with pytest.raises(UsageError, match="1 to 1000 attempts"):
        RemoteNode(f"{where}&reconnect=often")

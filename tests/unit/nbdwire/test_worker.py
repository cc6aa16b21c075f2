"""The worker loop, by raw bytes over a unix socket: requests of every shape, exact replies."""

import errno
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fleece.block.file import FileNode
from fleece.block.memory import MemoryNode
from nbdwire import constants as c
from nbdwire import lookout, worker
from nbdwire.connection import PlainSession
from nbdwire.negotiate_client import ClientSession
from nbdwire.requests import Requests
from tests.support import nbdraw as raw
from tests.support.faulty import Hooked, Mapped
from tests.support.nbdraw import DATA, ERROR, FORMS, FUA, HOLE, NONE, Raw, connected
from tests.support.serving import noise, serving
from tests.support.threads import in_thread, wait_until

SIZE = 80 << 20
SMALL = worker.SMALL_READ
MOST = c.MAX_PAYLOAD
KINDS = ("memory", "file")


@pytest.fixture(scope="module")
def content() -> bytes:
    return noise(SIZE - (16 << 20)) + bytes(16 << 20)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> Path:
    """64 MiB of data and a hole of 16 MiB."""
    path = tmp_path_factory.mktemp("image") / "disk"
    with path.open("wb") as file:
        file.write(content[: 64 << 20])
        file.truncate(SIZE)
    return path


@pytest.fixture(params=sorted(FORMS))
def form(request: pytest.FixtureRequest) -> dict[str, bool]:
    return FORMS[request.param]


@pytest.fixture
def reader(tmp_path: Path, image: Path, form: dict[str, bool]) -> Iterator[Raw]:
    node = FileNode(image, read_only=True, locking=False)
    with serving(tmp_path, node) as (_, where), connected(where, **form) as client:
        yield client
    node.close()


@pytest.fixture
def memory() -> Hooked:
    return Hooked(1 << 20)


@pytest.fixture
def client(tmp_path: Path, memory: Hooked, form: dict[str, bool]) -> Iterator[Raw]:
    with serving(tmp_path, memory) as (_, where), connected(where, **form) as client:
        yield client


EDGES = [1, 511, 4096, SMALL - 1, SMALL, SMALL + 1, 65535, 65536, 100_001, 1 << 20, MOST - 1, MOST]


@pytest.mark.parametrize("length", EDGES)
def test_reads_of_every_size_are_exact(reader: Raw, content: bytes, length: int) -> None:
    ends = SIZE - length
    for offset in (0, 1, 4095, (64 << 20) - length // 2, (64 << 20) - 1, ends):
        offset = min(offset, ends)
        assert reader.read(offset, length) == content[offset : offset + length]


def test_df_gives_one_data_chunk_over_data_and_holes(tmp_path: Path, image: Path) -> None:
    node = FileNode(image, read_only=True, locking=False)
    with serving(tmp_path, node) as (_, where), connected(where) as client:
        for length in (1000, 65536, 8 << 20, MOST):
            reply = client.ask(raw.READ, (64 << 20) - length // 2, length, raw.DF)
            assert reply.kinds == [DATA]
            assert reply.assemble((64 << 20) - length // 2, length)[-length // 4 :].count(0) > 0
        assert client.ask(raw.READ, 0, MOST + 1, raw.DF).error == c.NBD_EOVERFLOW
        client.in_step()
    node.close()


def test_holes_travel_as_hole_chunks(tmp_path: Path, image: Path, content: bytes) -> None:
    node = FileNode(image, read_only=True, locking=False)
    with serving(tmp_path, node) as (_, where), connected(where) as client:
        offset, length = (64 << 20) - 4096, 1 << 20
        reply = client.ask(raw.READ, offset, length)
        assert reply.kinds == [DATA, HOLE]
        assert reply.assemble(offset, length) == content[offset : offset + length]
        assert client.ask(raw.READ, 66 << 20, 8 << 20).kinds == [HOLE]
    node.close()


@pytest.mark.parametrize("length", [MOST + 1, 48 << 20, SIZE, 0xFFFFFFFF, 0])
def test_a_read_of_an_illegal_length_is_refused_in_step(reader: Raw, length: int) -> None:
    assert reader.ask(raw.READ, 0, length).error == c.NBD_EINVAL
    assert reader.ask(raw.READ, SIZE - 100, length).error == c.NBD_EINVAL
    reader.in_step()


def test_the_largest_write_works_and_one_byte_more_is_consumed(
    tmp_path: Path, form: dict[str, bool]
) -> None:
    node = MemoryNode(SIZE)
    data = noise(MOST + 1)
    with serving(tmp_path, node) as (_, where), connected(where, **form) as client:
        assert client.write(3, data[:MOST]) == 0
        assert client.read(3, MOST) == data[:MOST]
        behind = client.make(raw.READ, 3, 5)
        write = client.make(raw.WRITE, 7, MOST + 1, 0, data[::-1])
        if client.session.extended:  # nbd.md §8: a payload above the maximum ends the connection
            assert client.is_dropped_for(write)
            return
        client.send(write + behind)
        assert client.reply().error == c.NBD_EINVAL
        assert client.reply().assemble(3, 5) == data[:5]
        assert client.read(3, MOST) == data[:MOST]


def test_a_write_that_is_refused_is_consumed_all_the_same(client: Raw, memory: Hooked) -> None:
    for flags, offset, length, error in [
        (raw.DF, 0, 5000, c.NBD_EINVAL),
        (0, (1 << 20) - 1, 2, c.NBD_ENOSPC),
        (0, 1 << 63, 70_000, c.NBD_ENOSPC),
        (FUA, 0, 0, c.NBD_EINVAL),
    ]:
        assert client.write(offset, b"\xff" * length, flags) == error
        client.in_step()
    assert client.read(0, 1 << 20) == bytes(1 << 20)


def test_a_read_only_export_says_eperm_and_stays_in_step(reader: Raw) -> None:
    assert reader.session.flags & c.TFLAG_READ_ONLY
    assert not reader.session.flags & (c.TFLAG_SEND_TRIM | c.TFLAG_SEND_WRITE_ZEROES)
    assert reader.write(0, b"x" * 100_000) == c.NBD_EPERM
    assert reader.ask(raw.TRIM, 0, 4096).error == c.NBD_EPERM
    assert reader.ask(raw.ZEROES, 0, 4096).error == c.NBD_EPERM
    assert reader.ask(raw.FLUSH).error == 0
    reader.in_step()


@pytest.mark.parametrize("kind", [8, 77, 0xFFFF])
def test_an_unknown_command_is_refused_in_step(client: Raw, kind: int) -> None:
    assert client.ask(kind, 0, 4096).error == c.NBD_EINVAL
    client.in_step()


def test_every_command_works_between_the_others_in_one_segment(client: Raw) -> None:
    asked = [
        client.make(raw.WRITE, 10, 5, FUA, b"hello"),
        client.make(raw.READ, 9, 7, FUA),
        client.make(raw.ZEROES, 12, 1, raw.NO_HOLE),
        client.make(raw.CACHE, 0, 4096),
        client.make(raw.READ, 0, 100_000),
        client.make(raw.FLUSH),
        client.make(raw.TRIM, 0, 65536),
        client.make(raw.STATUS, 0, 65536),
        client.make(raw.READ, 9, 7),
    ]
    client.send(b"".join(asked))
    replies = [client.reply() for _ in asked]
    assert [reply.cookie.to_bytes(8, "big") for reply in replies] == [m[8:16] for m in asked]
    assert [reply.error for reply in replies] == [0, 0, 0, 0, 0, 0, 0, c.NBD_EINVAL, 0]
    assert replies[1].assemble(9, 7) == b"\0hello\0"
    assert replies[4].assemble(0, 100_000)[8:16] == b"\0\0he\0lo\0"
    assert replies[8].assemble(9, 7) == bytes(7)


def test_the_magic_of_anything_else_drops_the_connection(client: Raw) -> None:
    for magic in (0, 0x12560953, 0x96744668, 0x25609514, 0x21E41C71):
        assert magic != raw.MAGIC
    client.in_step()
    other = raw.MAGIC if client.session.extended else raw.EXTENDED_MAGIC
    client.send(raw.request(raw.READ, 0, 1, magic=other) + client.make(raw.READ, 0, 1))
    assert client.hung_up()


def test_requests_dribbled_byte_by_byte_are_answered(client: Raw) -> None:
    data = noise(64)
    messages = client.make(raw.WRITE, 7, 64, 0, data) + client.make(raw.READ, 7, 64)
    for index in range(len(messages)):
        client.send(messages[index : index + 1])
    assert client.reply().error == 0
    assert client.reply().assemble(7, 64) == data


def test_hundreds_of_requests_in_one_segment_are_answered_in_order(client: Raw) -> None:
    messages = []
    for index in range(600):
        messages += [
            client.make(raw.WRITE, index * 1000, 1000, 0, noise(1000, index)),
            client.make(raw.READ, index * 1000, 1000),
        ]
    client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
    with in_thread(lambda: client.send(b"".join(messages))):
        for index in range(600):
            assert client.reply().error == 0
            assert client.reply().assemble(index * 1000, 1000) == noise(1000, index)


@pytest.mark.parametrize("length", [3000, SMALL + 5, worker.IN_SIZE + 777])
def test_a_payload_may_be_split_anywhere(client: Raw, length: int) -> None:
    """Every position near the edges; some between. A request before and one behind."""
    data = noise(length)
    step = 1 if length == 3000 else 9973
    edges = {*range(1, 60), *range(60, length, step), *range(length - 40, length + 80)}
    edges = {edge for edge in edges if step > 1 or edge < 100 or edge > 2950 or edge % 41 == 0}
    for index, edge in enumerate(sorted(edges)):
        at = index % 97
        message = (
            client.make(raw.READ, 0, 1)
            + client.make(raw.WRITE, at, length, 0, data)
            + client.make(raw.READ, at, min(length, 4000))
        )
        client.send(message[:edge])
        client.send(message[edge:])
        assert [client.reply().error for _ in range(2)] == [0, 0]
        assert client.reply().assemble(at, min(length, 4000)) == data[:4000]


def test_a_client_that_leaves_in_the_middle_of_a_payload_has_written_nothing(
    tmp_path: Path, form: dict[str, bool]
) -> None:
    node = Hooked(1 << 20)
    writes: list[object] = []
    node.before["pwrite"] = lambda *args: writes.append(args[1])
    with serving(tmp_path, node) as (server, where):
        for length, sent in [(4096, 1), (4096, 4095), (900_000, 899_999), (MOST + 9, 70_000)]:
            with connected(where, **form) as client:
                client.send(client.form(raw.WRITE, 0, length, payload=b"\xff" * sent))
            wait_until(lambda: server.clients() == 0)
        assert writes == []
        with connected(where) as client:
            assert client.read(0, 1 << 20) == bytes(1 << 20)
            assert client.write(0, b"x") == 0
    assert writes == [0]


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EPERM, errno.ENOMEM])
def test_an_error_of_the_node_is_that_request_s_and_the_connection_goes_on(
    client: Raw, memory: Hooked, number: int
) -> None:
    for verb in ("pread_into", "pread_cached", "pwrite", "zero", "trim", "flush"):
        memory.fail(verb, OSError(number, "injected"))
    expected = number
    for kind in (raw.ZEROES, raw.TRIM, raw.FLUSH):
        assert client.ask(kind, 0, 4096).error == expected
    assert client.write(0, b"x" * 100) == expected
    for length in (100, SMALL + 1, 1 << 20):
        reply = client.ask(raw.READ, 0, length)
        assert reply.error == expected
        assert reply.kinds in ([ERROR], [])
    memory.before.clear()
    client.in_step()


def test_the_errors_in_a_pipeline_hit_only_their_own_requests(client: Raw, memory: Hooked) -> None:
    def odd_offsets_fail(buf: memoryview, offset: int) -> None:
        if offset % 2:
            raise OSError(errno.EIO, "odd")

    assert client.write(0, noise(200_000)) == 0  # a hole would not be read at all
    memory.before["pread_into"] = memory.before["pread_cached"] = odd_offsets_fail
    messages = [client.make(raw.READ, index, 50_001 if index % 3 else 20) for index in range(60)]
    with in_thread(lambda: client.send(b"".join(messages))):
        for index in range(60):
            reply = client.reply()
            assert reply.error == (c.NBD_EIO if index % 2 else 0)


def test_a_fault_of_ours_is_an_internal_error_and_no_end(client: Raw, memory: Hooked) -> None:
    memory.fail("flush", ZeroDivisionError("secret"))
    reply = client.ask(raw.FLUSH)
    assert (reply.error, reply.message) in [(c.NBD_EIO, "internal error"), (c.NBD_EIO, "")]
    client.in_step()


def test_slow_verbs_in_a_pipeline_leave_the_gate_between_them(tmp_path: Path) -> None:
    """Or a drain would have to wait for all flushes that a client has sent at once."""
    taken: list[str] = []

    class Gate:
        def __enter__(self) -> None:
            taken.append("in")

        def __exit__(self, *_: object) -> None:
            taken.append("out")

    class Session:
        gate = Gate()
        node = Hooked(1 << 20)

        def close(self) -> None:
            taken.append("closed")

    class Offered(Hooked):
        def open_session(self) -> Session:
            return Session()

    Session.node.before["flush"] = lambda: taken.append("flush")
    with serving(tmp_path, Offered(1 << 20)) as (_, where), connected(where) as client:
        client.send(b"".join(client.make(raw.FLUSH) for _ in range(20)))
        assert [client.reply().error for _ in range(20)] == [0] * 20
    text = "".join(word[0] for word in taken)
    assert text.count("f") == 20
    assert "ff" not in text
    assert text.endswith("oc")


def test_an_idle_connection_pins_no_large_buffers() -> None:
    node = MemoryNode(SIZE)
    ours, theirs = socket.socketpair()
    flags = c.TFLAG_SEND_FUA
    requests = Requests(size=SIZE, flags=flags, structured=False, contexts=(), functions={})
    loop = worker.Worker(theirs, PlainSession(node), requests, threading.Lock())
    ours.settimeout(raw.SECONDS)
    with ours, theirs, in_thread(loop.run):
        client = Raw(ours, ClientSession("disk", SIZE, flags))
        data = noise(MOST)
        assert client.write(1, data) == 0
        assert client.read(1, MOST) == data
        client.in_step()
        wait_until(lambda: len(loop._in) + len(loop._data) + len(loop._out) < 1 << 20)
        client.send(client.make(raw.DISC))


def test_a_client_that_was_silent_is_served_from_buffers_that_were_given_back(
    tmp_path: Path, form: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    rested: list[bool] = []
    rest = worker.Worker._rest
    monkeypatch.setattr(lookout, "IDLE", 1)
    monkeypatch.setattr(worker.Worker, "_rest", lambda loop: (rest(loop), rested.append(True)))
    with serving(tmp_path, MemoryNode(8 << 20)) as (_, where), connected(where, **form) as client:
        data = noise(2 << 20)
        for _ in range(3):
            assert client.write(5, data) == 0
            assert client.read(5, len(data)) == data
            assert client.read(5, 4096) == data[:4096]
            before = len(rested)
            wait_until(lambda: len(rested) > before)  # noqa: B023 (it is called at once)
        half = client.make(raw.WRITE, 0, 8, payload=b"abcdefgh")
        before = len(rested)
        client.send(half[:30])
        wait_until(lambda: len(rested) > before)
        client.send(half[30:])
        assert client.reply().error == 0
        assert client.read(0, 9) == b"abcdefgh" + data[3:4]


def test_two_clients_do_not_wait_for_each_other(tmp_path: Path) -> None:
    node = Hooked(1 << 20)
    entered, go_on = threading.Event(), threading.Event()

    def first_only(*_: object) -> None:
        node.before.clear()
        entered.set()
        assert go_on.wait(20)

    node.before["flush"] = first_only
    with serving(tmp_path, node) as (_, where), connected(where) as slow, connected(where) as quick:
        slow.send(slow.make(raw.FLUSH))
        assert entered.wait(20)
        assert quick.write(0, b"abc") == 0
        assert quick.read(0, 3) == b"abc"
        go_on.set()
        assert slow.reply().error == 0


def test_none_chunks_and_errors_never_follow_a_done_chunk(tmp_path: Path, image: Path) -> None:
    """Cold or not, the reply's last chunk, and no other, says DONE."""
    node = Mapped(image)
    with serving(tmp_path, node) as (_, where), connected(where) as client:
        for cold in (False, True):
            node.cold = cold
            reply = client.ask(raw.READ, (64 << 20) - 70_000, 140_000)
            assert [chunk.done for chunk in reply.chunks[:-1]] == [False] * (len(reply.chunks) - 1)
            assert (reply.kinds[-1] == NONE) is cold
    node.close()

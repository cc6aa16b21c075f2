"""Leader and followers: several requests of one connection at once, and an orderly end of all."""

import errno
import random
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fleece.block.memory import MemoryNode
from fleece.block.remote import RemoteNode
from nbdwire import constants as c
from nbdwire import followers
from nbdwire.connection import PlainSession
from nbdwire.export import OPAQUE_RUN, ZERO_RUN, Run
from nbdwire.uri import NBDURI
from tests.support import nbdraw as raw
from tests.support.faulty import Hooked
from tests.support.nbdraw import DATA, FORMS, HOLE, Raw, connected
from tests.support.serving import noise, serving
from tests.support.threads import in_thread, wait_for, wait_until

SIZE = 40 << 20
MOST = c.MAX_PAYLOAD


@pytest.fixture
def node() -> Hooked:
    return Hooked(SIZE, blocking=True)


@pytest.fixture(params=sorted(FORMS))
def client(tmp_path: Path, node: Hooked, request: pytest.FixtureRequest) -> Iterator[Raw]:
    form = FORMS[request.param]
    with serving(tmp_path, node) as (_, where), connected(where, **form) as client:
        yield client


def test_a_quick_request_overtakes_a_slow_one(client: Raw, node: Hooked) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def slow(buf: memoryview, offset: int) -> None:
        if offset == 0:
            entered.set()
            wait_for(go_on)

    node.before["pread_into"] = slow
    first, second = client.make(raw.READ, 0, 10), client.make(raw.READ, 10, 10)
    client.send(first)
    wait_for(entered)
    client.send(second)
    assert client.reply().cookie.to_bytes(8, "big") == second[8:16]
    go_on.set()
    assert client.reply().cookie.to_bytes(8, "big") == first[8:16]


def test_as_many_requests_as_threads_are_in_the_node_at_once(client: Raw, node: Hooked) -> None:
    """A barrier that opens only when all of them are inside at the same moment."""
    barrier = threading.Barrier(followers.THREADS)
    node.before["flush"] = lambda: barrier.wait(20)
    client.send(b"".join(client.make(raw.FLUSH) for _ in range(followers.THREADS)))
    assert [client.reply().error for _ in range(followers.THREADS)] == [0] * followers.THREADS


def test_control_one_more_than_that_has_to_wait(
    tmp_path: Path, node: Hooked, monkeypatch: pytest.MonkeyPatch
) -> None:
    barrier = threading.Barrier(followers.THREADS + 1)
    node.before["flush"] = lambda: barrier.wait(0.3)
    with serving(tmp_path, node) as (_, where), connected(where) as client:
        client.send(b"".join(client.make(raw.FLUSH) for _ in range(followers.THREADS + 1)))
        errors = {client.reply().error for _ in range(followers.THREADS + 1)}
    assert errors == {c.NBD_EIO}  # BrokenBarrierError


@pytest.mark.parametrize("length", [1, 4096, 65537, 1 << 20, MOST])
def test_reads_and_writes_are_exact(client: Raw, length: int) -> None:
    data = noise(length)
    assert client.write(7, data) == 0
    reply = client.ask(raw.READ, 7, length)
    assert reply.assemble(7, length) == data
    assert reply.kinds in ([DATA], [])


def test_a_thread_gives_a_large_buffer_back() -> None:
    follower = followers._Follower(28)
    for length in (MOST, followers.KEEP_SIZE + 1):
        assert len(follower.room(length)) == length
        follower.rest()
        assert len(follower._buffer) == followers.BUFFER


def test_illegal_requests_are_refused_in_step(client: Raw) -> None:
    for kind, offset, length, flags, error in [
        (raw.READ, 0, MOST + 1, 0, c.NBD_EINVAL),
        (raw.READ, 0, 0xFFFFFFFF, 0, c.NBD_EINVAL),
        (raw.READ, 0, 0, 0, c.NBD_EINVAL),
        (raw.READ, SIZE - 1, 2, 0, c.NBD_EINVAL),
        (raw.READ, 0, 1, raw.FAST_ZERO, c.NBD_EINVAL),
        (raw.ZEROES, SIZE, 1, 0, c.NBD_ENOSPC),
        (raw.STATUS, 0, 1, 0, c.NBD_EINVAL),
        (99, 0, 1, 0, c.NBD_EINVAL),
    ]:
        assert client.ask(kind, offset, length, flags).error == error
    for length, flags, error in [
        (100, raw.DF, c.NBD_EINVAL),
        (0, 0, c.NBD_EINVAL),
    ]:
        assert client.write(0, bytes(length), flags) == error
    client.in_step()


class Sparse(Hooked):
    """Its map is made of its extents."""

    def map(self, offset: int, length: int) -> list[Run]:
        return [
            (ZERO_RUN if extent.status & c.STATE_ZERO else OPAQUE_RUN, 0, extent.length)
            for extent in self.extents(offset, length)
        ]


@pytest.mark.parametrize("form", ["structured", "extended"])
def test_known_holes_travel_as_hole_chunks(tmp_path: Path, form: str) -> None:
    """nbd.md §7: inside the request, no overlap, DONE last; with DF one chunk of data."""
    node = Sparse(SIZE, blocking=True)
    data = noise(128 << 10)
    node.pwrite(data, 128 << 10)
    with serving(tmp_path, node) as (_, where), connected(where, **FORMS[form]) as client:
        reply = client.ask(raw.READ, 0, 512 << 10)
        kinds = [(chunk.kind, chunk.span) for chunk in reply.chunks]
        assert kinds == [
            (HOLE, (0, 128 << 10)),
            (DATA, (128 << 10, 128 << 10)),
            (HOLE, (256 << 10, 256 << 10)),
        ]
        assert reply.assemble(0, 512 << 10) == bytes(128 << 10) + data + bytes(256 << 10)
        whole = client.ask(raw.READ, 0, 512 << 10, raw.DF)
        assert [chunk.kind for chunk in whole.chunks] == [DATA]
        assert whole.assemble(0, 512 << 10) == reply.assemble(0, 512 << 10)


def test_a_payload_above_the_maximum_is_consumed_or_ends_the_connection(client: Raw) -> None:
    client.in_step()
    write = client.make(raw.WRITE, 0, MOST + 1, 0, bytes(MOST + 1))
    if client.session.extended:  # nbd.md §8
        assert client.is_dropped_for(write)
        return
    client.send(write)
    assert client.reply().error == c.NBD_EINVAL
    client.in_step()


def test_the_errors_of_the_node_are_those_of_the_reply(client: Raw, node: Hooked) -> None:
    for verb in ("pread_into", "pwrite", "zero", "trim", "flush"):
        node.fail(verb, OSError(errno.ENOSPC, "injected"))
    assert client.write(0, b"x") == c.NBD_ENOSPC
    for kind in (raw.READ, raw.ZEROES, raw.TRIM, raw.FLUSH):
        assert client.ask(kind, 0, 1).error == c.NBD_ENOSPC
    node.fail("pread_into", ZeroDivisionError())
    assert client.ask(raw.READ, 0, 1).error == c.NBD_EIO
    node.before.clear()
    client.in_step()


def test_a_wrong_magic_drops_the_connection(client: Raw) -> None:
    client.in_step()
    other = raw.MAGIC if client.session.extended else raw.EXTENDED_MAGIC
    client.send(raw.request(raw.READ, 0, 1, magic=other) + bytes(4))
    assert client.hung_up()


def test_what_is_under_way_is_answered_before_a_disconnect(client: Raw, node: Hooked) -> None:
    barrier = threading.Barrier(4)
    node.before["flush"] = lambda: barrier.wait(20)
    client.send(b"".join(client.make(raw.FLUSH) for _ in range(4)) + client.make(raw.DISC))
    assert [client.reply().error for _ in range(4)] == [0] * 4
    assert client.hung_up()


def test_a_client_that_leaves_in_a_payload_has_written_nothing(
    tmp_path: Path, node: Hooked
) -> None:
    writes: list[int] = []
    node.before["pwrite"] = lambda _, offset, *__: writes.append(offset)
    with serving(tmp_path, node) as (server, where):
        threads = threading.active_count()
        for length, sent in [(4096, 1), (4096, 4095), (3 << 20, 1 << 20), (MOST + 9, 70_000)]:
            with connected(where) as client:
                client.send(raw.request(raw.WRITE, 0, length, payload=b"\xff" * sent))
            wait_until(lambda: server.clients() == 0)
        assert writes == []
        wait_until(lambda: threading.active_count() == threads)


def test_a_session_that_cannot_be_opened_ends_the_connection_and_no_thread_is_left(
    tmp_path: Path,
) -> None:
    """The fourth thread gets none: the others must not wait for requests for ever."""

    class Offered(Hooked):
        def __init__(self) -> None:
            super().__init__(SIZE, blocking=True)
            self.given = 0

        def open_session(self) -> PlainSession:
            self.given += 1
            if self.given == 4:
                raise OSError(errno.EMFILE, "too many sessions")
            return PlainSession(self)

    with serving(tmp_path, Offered()) as (server, where):
        threads = threading.active_count()
        with connected(where) as client:
            assert client.hung_up()
        wait_until(lambda: server.clients() == 0)
        wait_until(lambda: threading.active_count() == threads)


def test_fewer_threads_than_wanted_serve_all_the_same(
    tmp_path: Path, node: Hooked, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if "/w3" in thread.name:
            raise RuntimeError("can't start new thread")
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    with serving(tmp_path, node) as (server, where):
        threads = threading.active_count()
        with connected(where) as client:
            client.in_step()
            wait_until(lambda: threading.active_count() == threads + 3)
        wait_until(lambda: server.clients() == 0)


# A model: three connections, each with a region of its own


@contextmanager
def memory_node(directory: Path, blocking: bool) -> Iterator[Any]:
    yield Hooked(3 << 20, blocking=blocking)


@contextmanager
def remote_node(directory: Path) -> Iterator[Any]:
    """Our client behind our server: two of them in a row."""
    far = directory / "far"
    far.mkdir()
    with (
        serving(far, MemoryNode(3 << 20)) as (_, where),
        closing(RemoteNode(str(where.with_export("disk")), connections=2)) as node,
    ):
        yield node


def operate(where: NBDURI, region: int, structured: bool) -> None:
    """Rounds of requests that touch disjoint places, all in flight at once, against a bytearray."""
    size, rng = 1 << 20, random.Random(region)
    base, model = region * size, bytearray(size)
    with connected(where, structured=structured) as client:
        for _ in range(25):
            messages, expected = [], {}
            cuts = sorted(rng.sample(range(1, size), 9))
            for start, stop in zip([0, *cuts], [*cuts, size], strict=True):
                message, answer = one_operation(client, rng, base, model, start, stop)
                messages.append(message)
                expected[int.from_bytes(message[8:16], "big")] = answer
            rng.shuffle(messages)
            with in_thread(partial(client.send, b"".join(messages))):
                while expected:
                    reply = client.reply()
                    answer = expected.pop(reply.cookie)
                    assert reply.error == 0
                    if answer is not None:
                        start, data = answer
                        assert reply.assemble(base + start, len(data)) == data
        assert client.read(base, size) == model


def one_operation(
    client: Raw, rng: random.Random, base: int, model: bytearray, start: int, stop: int
) -> tuple[bytes, tuple[int, bytes] | None]:
    """A request within [start, stop), and what a read of it must give."""
    start = rng.randrange(start, stop)
    length = rng.choice([1, stop - start, rng.randrange(stop - start) + 1])
    flags = rng.choice([0, 0, raw.FUA])
    kind = rng.choice([raw.READ, raw.READ, raw.WRITE, raw.WRITE, raw.ZEROES, raw.FLUSH, raw.CACHE])
    if kind == raw.READ:
        return client.make(kind, base + start, length), (start, bytes(model[start:][:length]))
    payload = rng.randbytes(length) if kind == raw.WRITE else b""
    if kind in (raw.WRITE, raw.ZEROES):
        model[start : start + length] = payload or bytes(length)
    return client.make(kind, base + start, length, flags, payload), None


@pytest.mark.parametrize("kind", ["worker", "followers", "remote"])
def test_three_connections_with_random_requests_agree_with_a_bytearray(
    tmp_path: Path, kind: str
) -> None:
    opened = remote_node(tmp_path) if kind == "remote" else memory_node(tmp_path, kind != "worker")
    with (
        opened as node,
        serving(tmp_path, node) as (_, where),
        in_thread(lambda: operate(where, 0, True)),
        in_thread(lambda: operate(where, 1, False)),
        in_thread(lambda: operate(where, 2, True)),
    ):
        assert node.blocking == (kind != "worker")

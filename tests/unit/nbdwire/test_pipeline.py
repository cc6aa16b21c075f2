"""Requests that nobody waits for one by one, against servers of a few lines."""

import errno
import random
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from nbdwire import codec
from nbdwire import constants as c
from nbdwire.client import Client
from nbdwire.errors import ConnectionClosed, NBDError, ProtocolError, RequestError
from nbdwire.extents import Extent
from nbdwire.link import Link, Sink
from nbdwire.negotiate_client import ClientSession
from nbdwire.pipeline import Pipeline, Ticket
from nbdwire.pool import Pool
from nbdwire.transport import recv_exact_into
from nbdwire.wire import choose
from tests.support.scripted import (
    ALL,
    BASE,
    EXTENDED,
    PLAIN,
    SIZE,
    STRUCTURED,
    Peer,
    Request,
    kinds,
    ok,
    serving,
)
from tests.support.threads import in_thread, wait_until

MULTI = ClientSession("disk", SIZE, ALL | c.TFLAG_CAN_MULTI_CONN)


class Disk:
    """Answers as a disk in memory; replies of a batch go out in another order."""

    def __init__(self, batch: int = 1) -> None:
        self.data = bytearray(SIZE)
        self._batch = batch
        self._held: list[bytes] = []
        self._random = random.Random(4)

    def __call__(self, request: Request, payload: bytes) -> bytes:
        _, kind, cookie, offset, length = request
        reply = codec.simple_reply(cookie)
        if kind == c.CMD_READ:
            reply += bytes(self.data[offset : offset + length])
        elif kind == c.CMD_WRITE:
            self.data[offset : offset + length] = payload
        elif kind == c.CMD_WRITE_ZEROES:
            self.data[offset : offset + length] = bytes(length)
        self._held.append(reply)
        if len(self._held) < self._batch:
            return b""
        self._random.shuffle(self._held)
        out = b"".join(self._held)
        self._held.clear()
        return out


@contextmanager
def pool_on(disk: Disk, count: int, session: ClientSession = MULTI) -> Iterator[Pool]:
    """Several connections to one disk."""
    peers, lock = [], threading.Lock()

    def answer(request: Request, payload: bytes) -> bytes:
        with lock:
            return disk(request, payload)

    with ExitStack() as stack:
        clients = []
        for _ in range(count):
            ours, theirs = socket.socketpair()
            peers.append(Peer(theirs, answer))
            clients.append(stack.enter_context(Client(ours, session)))
        yield Pool(clients)
    for peer in peers:
        peer.join()


def test_submitting_does_not_wait_and_results_can_be_had_later() -> None:
    disk = Disk(batch=4)
    with serving(disk) as (client, peer), client.pipeline(depth=8) as pipeline:
        buffer = memoryview(bytearray(3))
        tickets = [
            pipeline.pwrite(b"abc", 10),
            pipeline.zero(100, 5),
            pipeline.pread_into(buffer, 500),
        ]
        wait_until(lambda: len(peer.requests) == 3)
        assert not any(ticket.done for ticket in tickets)  # the fourth is awaited
        pipeline.cache(0, 1)
        assert [ticket.result() for ticket in tickets] == [{}, {}, {}]
        assert all(ticket.done for ticket in tickets)
    assert disk.data[10:13] == b"abc"


def test_no_more_requests_are_in_flight_than_the_depth() -> None:
    """A hostile server that answers nothing gets no more than that."""
    ours, theirs = socket.socketpair()
    with theirs, Client(ours, PLAIN) as client:
        pipeline = client.pipeline(depth=3)
        buffers = [memoryview(bytearray(4)) for _ in range(5)]

        def submit() -> list[Ticket]:
            return [pipeline.pread_into(view, 0) for view in buffers]

        with in_thread(submit) as future:
            received = bytearray(3 * codec.REQUEST_SIZE)
            recv_exact_into(theirs, memoryview(received))
            wait_until(lambda: pipeline._waiting == 1)
            theirs.setblocking(False)
            with pytest.raises(BlockingIOError):
                theirs.recv(1)
            theirs.setblocking(True)
            for cookie in range(1, 6):
                theirs.sendall(codec.simple_reply(cookie) + bytes([cookie] * 4))
        for ticket in future.result():
            ticket.result()
        pipeline.close()
    assert [bytes(view) for view in buffers] == [bytes([n] * 4) for n in range(1, 6)]


def test_a_long_read_is_several_requests_and_one_ticket() -> None:
    session = ClientSession("disk", SIZE, ALL, maximum_payload=4096)
    with serving(Disk(), session) as (client, peer), client.pipeline(depth=2) as pipeline:
        pipeline.pread_into(memoryview(bytearray(10_000)), 0).result()
    assert [x[2:] for x in kinds(peer)][:3] == [(0, 4096), (4096, 4096), (8192, 1808)]


def test_an_error_that_nobody_has_looked_at_is_raised_at_the_end() -> None:
    """CVE-2022-0485: every completion is checked."""

    def answer(request: Request, payload: bytes) -> bytes:
        return codec.simple_reply(request[2], c.NBD_EIO if request[3] == 7 else 0)

    with serving(answer) as (client, _):

        def write_all() -> None:
            with client.pipeline() as pipeline:
                for offset in range(20):
                    pipeline.pwrite(b"x", offset)

        with pytest.raises(RequestError) as caught:
            write_all()
        assert caught.value.errno == errno.EIO
        with client.pipeline() as pipeline:
            ticket = pipeline.pwrite(b"x", 7)
            with pytest.raises(RequestError):
                pipeline.flush()
            with pytest.raises(RequestError):
                ticket.result()
            pipeline.drain()  # it has been looked at
        seen: list[NBDError | None] = []
        with client.pipeline() as pipeline:  # a callback has taken it upon itself
            pipeline.pwrite(b"x", 7, then=lambda ticket: seen.append(ticket.error))
        assert [type(error) for error in seen] == [RequestError]


def test_a_callback_that_fails_is_told_and_the_connection_lives() -> None:
    def fault(_: Ticket) -> None:
        raise KeyError("mine")

    with serving(ok) as (client, _):
        with pytest.raises(NBDError, match="mine"), client.pipeline() as pipeline:
            pipeline.pwrite(b"x", 0, then=fault)
        client.pwrite(b"x", 0)


def test_a_callback_must_not_use_the_pipeline_that_called_it() -> None:
    caught: list[str] = []

    def misuse(_: Ticket) -> None:
        for call in (pipeline.drain, pipeline.close, lambda: pipeline.pwrite(b"x", 0)):
            try:
                call()
            except RuntimeError as error:
                caught.append(str(error))

    with serving(ok) as (client, _), client.pipeline(depth=1) as pipeline:
        pipeline.pwrite(b"x", 0, then=misuse)
    assert caught == ["a callback must not use the pipeline that has called it"] * 3


@pytest.mark.parametrize("how", ["the server dies", "the client is closed", "garbage"])
def test_a_lost_connection_fails_every_ticket_once(how: str) -> None:
    ours, theirs = socket.socketpair()
    told: list[type[NBDError] | None] = []
    with theirs, Client(ours, PLAIN) as client:
        pipeline = client.pipeline()
        for _ in range(5):
            pipeline.pread_into(
                memoryview(bytearray(4)),
                0,
                lambda x: told.append(type(x.error) if x.error else None),
            )
        if how == "the server dies":
            theirs.close()
        elif how == "garbage":
            theirs.sendall(b"HTTP/1.1 400 Bad Request")
        else:
            client.close()
        pipeline.drain()
        kind = ProtocolError if how == "garbage" else ConnectionClosed
        assert told == [kind] * 5
        late = pipeline.pread_into(memoryview(bytearray(4)), 0)
        with pytest.raises(kind):
            late.result()
        pipeline.close()


def test_synchronous_calls_share_the_connection_with_a_pipeline() -> None:
    disk = Disk()
    with serving(disk) as (client, _), client.pipeline() as pipeline:
        pipeline.pwrite(b"one", 0).result()
        assert client.pread(3, 0) == b"one"

        def work(n: int) -> None:
            for turn in range(50):
                client.pwrite(bytes([turn]) * 10, 1000 * n)
                assert client.pread(10, 1000 * n) == bytes([turn]) * 10

        with in_thread(lambda: work(1)), in_thread(lambda: work(2)):
            for n in range(100):
                pipeline.pwrite(bytes([n]), 5000 + n)
        assert disk.data[5000:5010] == bytes(range(100))[:10]
    with serving(disk) as (client, _):  # and without one the threads lead again
        with client.pipeline():
            pass
        assert client.pread(3, 0) == b"one"


def test_only_one_pipeline_at_a_time_uses_a_connection() -> None:
    with serving(ok) as (client, _):
        with client.pipeline(), pytest.raises(RuntimeError, match="already"):
            client.pipeline()
        with client.pipeline() as second:
            second.pwrite(b"x", 0)


def test_what_the_server_lacks_or_is_outside_is_refused_at_once() -> None:
    session = ClientSession("disk", SIZE, c.TFLAG_HAS_FLAGS)
    with serving(ok, session) as (client, peer), client.pipeline() as pipeline:
        for call, number in (
            (lambda: pipeline.trim(0, 1), errno.EOPNOTSUPP),
            (lambda: pipeline.zero(0, 1), errno.EOPNOTSUPP),
            (lambda: pipeline.pwrite(b"x", 0, fua=True), errno.EOPNOTSUPP),
            (lambda: pipeline.pwrite(b"x", SIZE), errno.EINVAL),
            (lambda: pipeline.status(0, 1, ["x:y"]), errno.EOPNOTSUPP),
        ):
            with pytest.raises(RequestError) as caught:
                call()
            assert caught.value.errno == number
        assert pipeline.pwrite(b"", 0).result() == {}
    assert kinds(peer) == [(c.CMD_DISC, 0, 0, 0)]


def test_status_comes_with_the_ticket() -> None:
    def answer(request: Request, _payload: bytes) -> bytes:
        out = b""
        for number in (1, 2):
            head = (c.STRUCTURED_REPLY_MAGIC, number == 2, c.REPLY_BLOCK_STATUS, request[2], 12)
            out += codec.CHUNK.pack(*head) + codec.U32.pack(number) + codec.EXTENT.pack(512, number)
        return out

    with serving(answer, STRUCTURED) as (client, _), client.pipeline() as pipeline:
        assert pipeline.status(0, 512, [BASE]).result() == {BASE: [Extent(0, 512, 1)]}


BIG = 16 << 20  # more than the buffers of a socket hold


def send_both_ways(pipeline: Pipeline) -> None:
    buffer = memoryview(bytearray(BIG))
    for n in range(6):
        if n % 2:
            pipeline.pwrite(bytes(BIG), 0)
        else:
            pipeline.pread_into(buffer, 0)


def test_a_server_that_sends_before_it_reads_on_does_not_block_the_pipeline() -> None:
    """Its replies are read by a thread of their own."""
    session = ClientSession("disk", 64 << 20, ALL)
    with serving(ok, session) as (client, _), client.pipeline(depth=16) as pipeline:
        send_both_ways(pipeline)


def test_without_the_reader_thread_it_would_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the test above: client and server each wait for the other to read."""
    sleeper = threading.Thread(target=lambda: None)
    sleeper.start()

    def start_none(link: Link, sink: Sink) -> threading.Thread:
        link._sink = sink
        return sleeper

    monkeypatch.setattr(Link, "start_reader", start_none)
    session = ClientSession("disk", 64 << 20, ALL)
    with serving(ok, session) as (client, peer):
        pipeline = client.pipeline(depth=16)
        with in_thread(lambda: send_both_ways(pipeline)):
            wait_until(lambda: len(peer.requests) == 1)  # its answer fills the socket
            wait_until(lambda: client.link._cookie == 2)  # and this write fills the other way
            with pytest.raises(AssertionError, match="in vain"):
                wait_until(lambda: len(peer.requests) > 1, seconds=0.3)
            client.close()
        pipeline.close()


def nothing_more(sock: socket.socket) -> bool:
    try:
        sock.recv(1, socket.MSG_DONTWAIT)
    except BlockingIOError:
        return True
    return False


@pytest.mark.parametrize("session", [PLAIN, STRUCTURED, EXTENDED])
def test_requests_leave_together_and_replies_are_taken_together(session: ClientSession) -> None:
    """The first goes out at once; the others wait for each other, or for somebody who waits."""
    ours, theirs = socket.socketpair()
    header = codec.EXTENDED_REQUEST if session.extended else codec.REQUEST
    with Client(ours, session) as client, client.pipeline(depth=32) as pipeline, theirs:
        buffers = [memoryview(bytearray(8)) for _ in range(12)]
        tickets = [pipeline.pread_into(view, 8 * n) for n, view in enumerate(buffers)]
        received = bytearray(12 * header.size)
        recv_exact_into(theirs, memoryview(received)[: 9 * header.size])
        assert nothing_more(theirs)
        with in_thread(tickets[-1].result):
            recv_exact_into(theirs, memoryview(received)[9 * header.size :])
            out = bytearray()
            for head in header.iter_unpack(received):
                _, _, kind, cookie, offset, length = head
                assert (kind, length) == (c.CMD_READ, 8)
                data = offset.to_bytes(8)
                if session.structured:
                    out += choose(True, session.extended).data(cookie, offset, offset, 8) + data
                else:
                    out += codec.simple_reply(cookie) + data
            theirs.sendall(out[:-20])
            theirs.sendall(out[-20:])
            pipeline.drain()
    assert [int.from_bytes(view) for view in buffers] == list(range(0, 96, 8))


def test_what_is_queued_leaves_when_all_before_it_is_answered() -> None:
    """Nobody waits, nothing more is submitted: the reader sends it."""
    ours, theirs = socket.socketpair()
    with Client(ours, PLAIN) as client, client.pipeline(depth=32) as pipeline, theirs:
        tickets = [pipeline.pwrite(b"x", n) for n in range(3)]
        request = bytearray(codec.REQUEST_SIZE + 1)
        recv_exact_into(theirs, memoryview(request))
        assert nothing_more(theirs)
        theirs.sendall(codec.simple_reply(1))
        both = bytearray(2 * len(request))
        recv_exact_into(theirs, memoryview(both))
        theirs.sendall(codec.simple_reply(3) + codec.simple_reply(2))
        wait_until(lambda: all(ticket.done for ticket in tickets))


@pytest.mark.parametrize("session", [PLAIN, STRUCTURED, EXTENDED])
def test_a_reply_that_comes_twice_in_one_batch_ends_the_connection(session: ClientSession) -> None:
    """The first counts, and is told; nothing is filled twice."""

    def answer(request: Request, payload: bytes) -> bytes:
        _, _, cookie, offset, length = request
        if session.structured:
            one = choose(True, session.extended).data(cookie, offset, offset, length) + b"abcd"
        else:
            one = codec.simple_reply(cookie) + b"abcd"
        return one * 3

    with serving(answer, session) as (client, _), client.pipeline() as pipeline:
        view = memoryview(bytearray(4))
        pipeline.pread_into(view, 64).result()
        assert bytes(view) == b"abcd"
        with pytest.raises(ProtocolError, match="not in flight"):
            pipeline.pread_into(view, 64).result()


@pytest.mark.parametrize("connections", [1, 3])
def test_hundreds_in_flight_agree_with_a_model(connections: int) -> None:
    """Each slot is one ticket at a time; replies come shuffled, over all connections."""
    disk, rng, model = Disk(), random.Random(7), bytearray(SIZE)
    slots, size = 256, SIZE // 256
    tickets: list[Ticket | None] = [None] * slots
    reads: list[tuple[memoryview, bytes]] = []
    with pool_on(disk, connections) as pool, pool.pipeline(depth=300) as pipeline:
        for _ in range(2000):
            slot = rng.randrange(slots)
            before = tickets[slot]
            if before is not None:
                before.result()  # what must come after is submitted after
            tickets[slot] = step(pipeline, rng, model, slot * size, size, reads)
        pipeline.flush()
    assert disk.data == model
    assert all(bytes(view) == expected for view, expected in reads)
    assert len(reads) > 200


def step(
    pipeline: Pipeline,
    rng: random.Random,
    model: bytearray,
    offset: int,
    size: int,
    reads: list[tuple[memoryview, bytes]],
) -> Ticket:
    start = offset + rng.randrange(size)
    length = rng.randrange(1, offset + size - start + 1)
    choice = rng.randrange(3)
    if choice == 0:
        content = rng.randbytes(length)
        model[start : start + length] = content
        return pipeline.pwrite(content, start)
    if choice == 1:
        model[start : start + length] = bytes(length)
        return pipeline.zero(start, length)
    view = memoryview(bytearray(length))
    reads.append((view, bytes(model[start : start + length])))
    return pipeline.pread_into(view, start)


def test_connections_take_turns() -> None:
    with pool_on(Disk(), 2) as pool:
        with pool.pipeline(depth=4) as pipeline:
            for n in range(8):
                pipeline.pwrite(b"x", n).result()
        assert pool.pread(8, 0) == b"x" * 8
        assert {client.link._cookie for client in pool.clients} == {4, 5}


def test_a_pool_is_not_made_of_what_is_not_one_export() -> None:
    with serving(ok, MULTI) as (one, _), serving(ok) as (two, _), serving(ok) as (three, _):
        with pytest.raises(ProtocolError, match="something else"):
            Pool([one, two])
        with pytest.raises(ValueError, match="does not allow several"):
            Pool([two, three])

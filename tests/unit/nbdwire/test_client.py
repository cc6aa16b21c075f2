"""The client against servers of a few lines: well-behaved, hostile and slow."""

import errno
import socket
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

from nbdwire import codec
from nbdwire import constants as c
from nbdwire.client import Client, connect, list_exports
from nbdwire.errors import ConnectionClosed, ProtocolError, RequestError
from nbdwire.export import Export
from nbdwire.extents import Extent
from nbdwire.negotiate_client import ClientSession
from nbdwire.pending import Pending
from nbdwire.transport import recv_exact_into
from nbdwire.uri import NBDURI
from tests.support.scripted import (
    ALL,
    BASE,
    DIRTY,
    PLAIN,
    SIZE,
    STRUCTURED,
    Request,
    answering,
    kinds,
    ok,
    serving,
)


def test_a_client_is_an_export() -> None:
    ours, theirs = socket.socketpair()
    with theirs, Client(ours, PLAIN) as client:
        export: Export = client
        assert isinstance(export, Export)
        assert (export.size, export.read_only) == (SIZE, False)


def test_each_verb_is_the_request_of_that_name() -> None:
    with serving(ok) as (client, peer):
        client.pread(10, 20)
        client.pwrite(b"abc", 5)
        client.pwrite(b"abc", 5, fua=True)
        client.zero(1, 2, c.CMD_FLAG_NO_HOLE | c.CMD_FLAG_FAST_ZERO)
        client.trim(3, 4, c.CMD_FLAG_FUA)
        client.cache(5, 6)
        client.flush()
    assert kinds(peer) == [
        (c.CMD_READ, 0, 20, 10),
        (c.CMD_WRITE, 0, 5, 3),
        (c.CMD_WRITE, c.CMD_FLAG_FUA, 5, 3),
        (c.CMD_WRITE_ZEROES, c.CMD_FLAG_NO_HOLE | c.CMD_FLAG_FAST_ZERO, 1, 2),
        (c.CMD_TRIM, c.CMD_FLAG_FUA, 3, 4),
        (c.CMD_CACHE, 0, 5, 6),
        (c.CMD_FLUSH, 0, 0, 0),
        (c.CMD_DISC, 0, 0, 0),
    ]


def test_nothing_is_sent_for_a_length_of_zero() -> None:
    with serving(ok) as (client, peer):
        assert client.pread(0, 0) == b""
        client.pwrite(b"", SIZE)
        client.zero(0, 0)
        client.trim(0, 0)
    assert kinds(peer) == [(c.CMD_DISC, 0, 0, 0)]


def test_large_reads_and_writes_are_cut_at_the_maximum_payload() -> None:
    session = ClientSession("disk", SIZE, ALL, minimum_block=512, maximum_payload=5000)
    with serving(ok, session) as (client, peer):
        client.pread(10_000, 0)
        client.pwrite(bytes(5000), 512)
    assert [x[2:] for x in kinds(peer)] == [
        (0, 4608),
        (4608, 4608),
        (9216, 784),
        (512, 4608),
        (5120, 392),
        (0, 0),
    ]


def test_a_server_error_is_that_errno_and_the_connection_goes_on() -> None:
    answers = iter([c.NBD_ENOSPC, 0, c.NBD_ENOTSUP, 0xDEAD, 0])
    with serving(lambda r, _: codec.simple_reply(r[2], next(answers))) as (client, _):
        for number in (errno.ENOSPC, None, errno.EOPNOTSUPP, errno.EINVAL, None):
            if number is None:
                client.flush()
                continue
            with pytest.raises(OSError) as caught:  # noqa: PT011
                client.pwrite(b"x", 0)
            assert caught.value.errno == number
            assert isinstance(caught.value, RequestError)


def test_what_is_outside_the_export_is_refused_without_a_request() -> None:
    with serving(ok) as (client, peer):
        for call in (
            lambda: client.pread(2, SIZE - 1),
            lambda: client.pread(-1, 0),
            lambda: client.pwrite(b"ab", SIZE - 1),
            lambda: client.zero(-1, 1),
            lambda: client.trim(SIZE, 1),
            lambda: client.extents(0, SIZE + 1),
        ):
            with pytest.raises(RequestError) as caught:
                call()
            assert caught.value.errno == errno.EINVAL
    assert kinds(peer) == [(c.CMD_DISC, 0, 0, 0)]


def test_writes_to_a_read_only_export_are_refused_without_a_request() -> None:
    session = ClientSession("disk", SIZE, c.TFLAG_HAS_FLAGS | c.TFLAG_READ_ONLY)
    with serving(ok, session) as (client, peer):
        assert client.read_only
        for call in (
            lambda: client.pwrite(b"x", 0),
            lambda: client.zero(0, 1),
            lambda: client.trim(0, 1),
        ):
            with pytest.raises(RequestError) as caught:
                call()
            assert caught.value.errno == errno.EPERM
        client.flush()  # nothing was written, so nothing is to be flushed
    assert kinds(peer) == [(c.CMD_DISC, 0, 0, 0)]


def test_verbs_that_the_server_lacks_are_not_supported() -> None:
    session = ClientSession("disk", SIZE, c.TFLAG_HAS_FLAGS)
    with serving(ok, session) as (client, peer):
        for call in (
            lambda: client.trim(0, 1),
            lambda: client.cache(0, 1),
            lambda: client.flush(),
            lambda: client.zero(0, 1, c.CMD_FLAG_FAST_ZERO),
            lambda: client.extents(0, 1, DIRTY),
        ):
            with pytest.raises(RequestError) as caught:
                call()
            assert caught.value.errno == errno.EOPNOTSUPP
        client.zero(10, (1 << 20) - 10)
        assert client.extents(5, 10) == [Extent(5, 10, 0)]
    assert kinds(peer) == [(c.CMD_WRITE, 0, 10, (1 << 20) - 10), (c.CMD_DISC, 0, 0, 0)]


def test_without_fua_a_flush_follows() -> None:
    session = ClientSession(
        "disk", SIZE, c.TFLAG_HAS_FLAGS | c.TFLAG_SEND_FLUSH | c.TFLAG_SEND_WRITE_ZEROES
    )
    with serving(ok, session) as (client, peer):
        client.pwrite(b"x", 0, fua=True)
        client.zero(0, 1, c.CMD_FLAG_FUA)
    assert [x[:2] for x in kinds(peer)] == [
        (c.CMD_WRITE, 0),
        (c.CMD_FLUSH, 0),
        (c.CMD_WRITE_ZEROES, 0),
        (c.CMD_FLUSH, 0),
        (c.CMD_DISC, 0),
    ]


# Structured replies


def chunk(cookie: int, kind: int, payload: bytes = b"", done: bool = False) -> bytes:
    head = codec.CHUNK.pack(c.STRUCTURED_REPLY_MAGIC, done, kind, cookie, len(payload))
    return head + payload


def data(cookie: int, offset: int, content: bytes, done: bool = False) -> bytes:
    return chunk(cookie, c.REPLY_OFFSET_DATA, codec.OFFSET.pack(offset) + content, done)


def hole(cookie: int, offset: int, size: int, done: bool = False) -> bytes:
    return chunk(cookie, c.REPLY_OFFSET_HOLE, codec.HOLE.pack(offset, size), done)


def status(cookie: int, context: int, *extents: tuple[int, int], done: bool = False) -> bytes:
    payload = codec.U32.pack(context) + b"".join(codec.EXTENT.pack(*x) for x in extents)
    return chunk(cookie, c.REPLY_BLOCK_STATUS, payload, done)


def error(cookie: int, number: int, text: bytes = b"", done: bool = False) -> bytes:
    return chunk(cookie, c.REPLY_ERROR, codec.CHUNK_ERROR.pack(number, len(text)) + text, done)


def done(cookie: int) -> bytes:
    return codec.none_chunk(cookie)


def test_chunks_may_come_in_any_order() -> None:
    def reply(n: int) -> list[bytes]:
        return [data(n, 12, b"cd"), hole(n, 14, 2), data(n, 10, b"ab"), done(n)]

    with answering(reply) as client:
        buffer = bytearray(b"\xff" * 6)
        client.pread_into(memoryview(buffer), 10)
        assert buffer == b"abcd\0\0"


def test_one_chunk_may_be_all() -> None:
    with answering(lambda n: [data(n, 0, b"x" * 100, done=True)]) as client:
        assert client.pread(100, 0) == b"x" * 100


def test_a_large_hole_is_all_zeroes() -> None:
    with answering(lambda n: [hole(n, 5, 200_001, done=True)]) as client:
        buffer = bytearray(b"\xff" * 200_003)
        client.pread_into(memoryview(buffer)[1:-1], 5)
        assert buffer == b"\xff" + bytes(200_001) + b"\xff"


def test_an_error_chunk_brings_its_message_and_the_data_may_be_incomplete() -> None:
    def reply(n: int) -> list[bytes]:
        return [data(n, 0, b"ab"), error(n, c.NBD_EIO, b"bad\nsector"), done(n)]

    with answering(reply) as client:
        for _ in range(2):
            with pytest.raises(RequestError, match="bad\ufffdsector") as caught:
                client.pread(10, 0)
            assert caught.value.errno == errno.EIO


def test_errors_with_an_offset_or_of_an_unknown_type_are_errors() -> None:
    at = codec.CHUNK_ERROR.pack(c.NBD_EIO, 2) + b"no" + codec.OFFSET.pack(3)
    new = codec.CHUNK_ERROR.pack(c.NBD_ENOSPC, 3) + b"new" + b"extra"
    replies = iter([(c.REPLY_ERROR_OFFSET, at), (0xC123, new)])
    with answering(lambda n: [chunk(n, *next(replies), True)]) as client:
        with pytest.raises(RequestError, match="no"):
            client.pread(10, 0)
        with pytest.raises(RequestError, match="new"):
            client.pread(10, 0)


def test_other_requests_may_be_answered_simply() -> None:
    with serving(ok, STRUCTURED) as (client, _):
        client.pwrite(b"x", 0)
        client.flush()


def test_the_status_of_all_contexts_comes_with_one_request() -> None:
    def reply(n: int) -> list[bytes]:
        return [status(n, 2, (50, 1), (1000, 0)), status(n, 1, (10, 3), (20, 3), (30, 0)), done(n)]

    with answering(reply) as client:
        assert client.contexts == (BASE, DIRTY)
        assert client.status(100, 200) == {
            BASE: [Extent(100, 30, 3), Extent(130, 30, 0)],
            DIRTY: [Extent(100, 50, 1), Extent(150, 150, 0)],
        }
        assert client.extents(100, 200, DIRTY)[-1].end == 300


def test_more_extents_than_are_kept_make_a_shorter_list() -> None:
    many = [(1, n % 2) for n in range(c.MAX_EXTENTS + 10)]
    session = ClientSession("disk", SIZE, ALL, structured=True, contexts=((1, BASE),))
    with answering(lambda n: [status(n, 1, *many, done=True)], session) as client:
        found = client.extents(0, SIZE)
        assert len(found) == c.MAX_EXTENTS
        assert found[-1].end == c.MAX_EXTENTS


HOSTILE_READS: dict[str, Callable[[int], list[bytes]]] = {
    "garbage": lambda n: [b"HTTP/1.1 400 Bad Request\r\n\r\n"],
    "extended": lambda n: [codec.U32.pack(c.EXTENDED_REPLY_MAGIC), bytes(40)],
    "simple": lambda n: [codec.simple_reply(n), bytes(100)],
    "simple error": lambda n: [codec.simple_reply(n, c.NBD_EIO)],
    "another cookie": lambda n: [data(n + 1, 100, bytes(100), True)],
    "before the request": lambda n: [data(n, 99, bytes(10))],
    "behind the request": lambda n: [data(n, 195, bytes(6))],
    "offset beyond all": lambda n: [data(n, 2**64 - 5, bytes(10))],
    "hole outside": lambda n: [hole(n, 150, 51)],
    "hole of 4 GiB": lambda n: [hole(n, 100, 0xFFFFFFFF)],
    "hole of nothing": lambda n: [hole(n, 100, 0)],
    "hole of a wrong length": lambda n: [chunk(n, c.REPLY_OFFSET_HOLE, bytes(13))],
    "data without data": lambda n: [chunk(n, c.REPLY_OFFSET_DATA, codec.OFFSET.pack(100))],
    "data of 4 GiB": lambda n: [codec.CHUNK.pack(c.STRUCTURED_REPLY_MAGIC, 0, 1, n, 0xFFFFFFFF)],
    "overlap": lambda n: [data(n, 100, bytes(50)), hole(n, 149, 51)],
    "the same twice": lambda n: [data(n, 150, bytes(50)), data(n, 150, bytes(50))],
    "incomplete": lambda n: [data(n, 100, bytes(99)), done(n)],
    "a gap": lambda n: [data(n, 101, bytes(99), True)],
    "nothing at all": lambda n: [done(n)],
    "none with a payload": lambda n: [chunk(n, c.REPLY_NONE, b"x", True)],
    "none that is not the last": lambda n: [chunk(n, c.REPLY_NONE)],
    "done twice": lambda n: [data(n, 100, bytes(100), True), done(n)] * 2,
    "block status": lambda n: [status(n, 1, (100, 0), done=True)],
    "unknown type": lambda n: [chunk(n, 77, bytes(20))],
    "error without a number": lambda n: [error(n, 0)],
    "error with a long message": lambda n: [
        chunk(n, c.REPLY_ERROR, codec.CHUNK_ERROR.pack(5, 50) + b"short")
    ],
    "error with too long a message": lambda n: [
        chunk(n, c.REPLY_ERROR, codec.CHUNK_ERROR.pack(5, 2) + b"long")
    ],
    "error of 4 GiB": lambda n: [
        codec.CHUNK.pack(c.STRUCTURED_REPLY_MAGIC, 0, c.REPLY_ERROR, n, 0xFFFFFFFF)
    ],
    "error that is too short": lambda n: [chunk(n, c.REPLY_ERROR, b"\0\0\0")],
    "error outside": lambda n: [
        chunk(n, c.REPLY_ERROR_OFFSET, codec.CHUNK_ERROR.pack(5, 0) + codec.OFFSET.pack(200))
    ],
    "error without its offset": lambda n: [
        chunk(n, c.REPLY_ERROR_OFFSET, codec.CHUNK_ERROR.pack(5, 0))
    ],
    "errors without end": lambda n: [error(n, c.NBD_EIO)] * 2000,
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", HOSTILE_READS)
def test_a_hostile_answer_to_a_read_ends_the_connection(name: str) -> None:
    with answering(HOSTILE_READS[name]) as client:

        def read_twice() -> bytes:
            return client.pread(100, 100) + client.pread(100, 100)

        with pytest.raises(ProtocolError) as caught:
            read_twice()
        assert "\n" not in str(caught.value)
        with pytest.raises(ProtocolError):  # and so do all later calls
            client.flush()


HOSTILE_STATUS: dict[str, Callable[[int], list[bytes]]] = {
    "a context is missing": lambda n: [status(n, 1, (100, 0), done=True)],
    "a context twice": lambda n: [status(n, 1, (100, 0)), status(n, 1, (100, 0))],
    "a context that was not negotiated": lambda n: [status(n, 3, (100, 0))],
    "no extent": lambda n: [status(n, 1)],
    "an extent of no length": lambda n: [status(n, 1, (0, 0), (100, 0))],
    "half an extent": lambda n: [chunk(n, c.REPLY_BLOCK_STATUS, bytes(15))],
    "too many extents": lambda n: [
        codec.CHUNK.pack(c.STRUCTURED_REPLY_MAGIC, 0, c.REPLY_BLOCK_STATUS, n, 4 + 8 * 2**21)
    ],
    "data": lambda n: [data(n, 0, b"x")],
    "a simple success": lambda n: [codec.simple_reply(n)],
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", HOSTILE_STATUS)
def test_a_hostile_block_status_ends_the_connection(name: str) -> None:
    with answering(HOSTILE_STATUS[name]) as client, pytest.raises(ProtocolError):
        client.extents(0, 1000)


@pytest.mark.parametrize("magic", [c.STRUCTURED_REPLY_MAGIC, 0, c.REQUEST_MAGIC])
def test_structured_replies_that_were_not_negotiated_end_the_connection(magic: int) -> None:
    with (
        answering(lambda n: [codec.CHUNK.pack(magic, 1, 0, n, 0)], PLAIN) as client,
        pytest.raises(ProtocolError, match="should begin"),
    ):
        client.flush()


def test_data_for_a_write_ends_the_connection() -> None:
    with answering(lambda n: [data(n, 0, b"x")]) as client, pytest.raises(ProtocolError):
        client.pwrite(b"x", 0)


def test_a_buffer_outside_the_asked_part_is_never_touched() -> None:
    with answering(lambda n: [data(n, 98, b"x" * 4)]) as client:
        buffer = bytearray(300)
        with pytest.raises(ProtocolError):
            client.pread_into(memoryview(buffer)[100:200], 100)
        assert buffer == bytes(300)


# Threads


def test_replies_in_reverse_order_reach_the_right_threads() -> None:
    held: list[Request] = []

    def answer(request: Request, _payload: bytes) -> bytes:
        held.append(request)
        if len(held) < 8:
            return b""
        out = [ok(r)[:16] + bytes([r[3]]) * r[4] for r in reversed(held)]
        held.clear()
        return b"".join(out)

    results: dict[int, bytes] = {}
    with serving(answer) as (client, _):

        def read(offset: int) -> None:
            results[offset] = client.pread(1000 + offset, offset)

        run_all([(read, offset) for offset in range(8)])
    assert results == {n: bytes([n]) * (1000 + n) for n in range(8)}


def run_all(calls: list[tuple[Callable[[int], None], int]]) -> None:
    threads = [threading.Thread(target=call, args=(n,)) for call, n in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()


def test_many_threads_write_and_read_their_own_data() -> None:
    disk = bytearray(SIZE)

    def answer(request: Request, payload: bytes) -> bytes:
        _, kind, cookie, offset, length = request
        if kind == c.CMD_WRITE:
            disk[offset : offset + length] = payload
            return codec.simple_reply(cookie)
        return codec.simple_reply(cookie) + bytes(disk[offset : offset + length])

    wrong: list[int] = []
    with serving(answer) as (client, _):

        def work(n: int) -> None:
            start = n * 10_000
            for turn in range(50):
                content = bytes([n, turn]) * (turn * 37 % 5000)
                client.pwrite(content, start)
                if client.pread(len(content), start) != content:
                    wrong.append(n)

        run_all([(work, n) for n in range(6)])
    assert wrong == []


def test_a_server_that_sends_before_it_reads_on_does_not_block_the_client() -> None:
    """Replies larger than all socket buffers meet writes larger than all socket buffers."""
    big = 8 << 20
    session = ClientSession("disk", 64 << 20, ALL)
    with serving(ok, session) as (client, _):

        def work(n: int) -> None:
            for _ in range(3):
                if n % 2:
                    client.pwrite(bytes(big), 0)
                else:
                    client.pread(big, 0)

        run_all([(work, n) for n in range(4)])


class Turnstile:
    """In place of the client's send lock: counts who comes, and keeps order or does not."""

    def __init__(self, *, keeps_order: bool) -> None:
        self.came = 0
        self._lock = threading.Lock() if keeps_order else nullcontext()

    def __enter__(self) -> None:
        self.came += 1
        self._lock.__enter__()

    def __exit__(self, *_: object) -> None:
        self._lock.__exit__(None, None, None)

    def acquire(self, *, blocking: bool) -> bool:
        return blocking  # the client says no good-bye


@pytest.mark.parametrize("keeps_order", [True, False], ids=["with the lock", "without (control)"])
def test_requests_of_two_threads_do_not_mix_thanks_to_the_send_lock(keeps_order: bool) -> None:
    """Both threads are sending 8 MiB when the server begins to read."""
    big = 8 << 20
    turnstile = Turnstile(keeps_order=keeps_order)
    ours, theirs = socket.socketpair()
    failures: list[int] = []
    with theirs, Client(ours, ClientSession("disk", big, ALL)) as client:
        client.link._send_lock = turnstile  # type: ignore[assignment]

        def write(n: int) -> None:
            try:
                client.pwrite(bytes([n]) * big, 0)
            except ConnectionClosed:
                failures.append(n)

        threads = [threading.Thread(target=write, args=(n,)) for n in (1, 2)]
        for thread in threads:
            thread.start()
        while turnstile.came < 2:
            threads[0].join(0.001)
        whole = all(take_whole_write(theirs, big) for _ in threads)
        theirs.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join(10)
        assert not any(thread.is_alive() for thread in threads)
    assert whole == keeps_order
    assert sorted(failures) == [1, 2]  # nobody was answered


def take_whole_write(sock: socket.socket, length: int) -> bool:
    """Receive one WRITE; whether it is one of bytes that are all the same."""
    received = bytearray(codec.REQUEST_SIZE + length)
    recv_exact_into(sock, memoryview(received))
    payload = received[codec.REQUEST_SIZE :]
    return codec.REQUEST.unpack_from(received)[0] == c.REQUEST_MAGIC and (
        payload == payload[:1] * length
    )


@pytest.mark.parametrize("count", [1, 5])
def test_a_server_that_dies_fails_all_waiting_threads_and_every_later_call(count: int) -> None:
    ours, theirs = socket.socketpair()
    errors: list[type[BaseException]] = []
    with Client(ours, PLAIN) as client:

        def read(offset: int) -> None:
            try:
                client.pread(10, offset)
            except ConnectionClosed as error:
                errors.append(type(error))

        threads = [threading.Thread(target=read, args=(n,)) for n in range(count)]
        for thread in threads:
            thread.start()
        requests = bytearray(count * codec.REQUEST_SIZE)
        recv_exact_into(theirs, memoryview(requests))
        theirs.close()
        for thread in threads:
            thread.join(10)
        assert errors == [ConnectionClosed] * count
        with pytest.raises(ConnectionClosed):
            client.pread(10, 0)


def test_close_wakes_the_threads_that_wait_and_may_be_called_again() -> None:
    ours, theirs = socket.socketpair()
    errors: list[str] = []
    client = Client(ours, PLAIN)

    def read(offset: int) -> None:
        try:
            client.pread(10, offset)
        except ConnectionClosed as error:
            errors.append(str(error))

    threads = [threading.Thread(target=read, args=(n,)) for n in range(3)]
    with theirs:
        for thread in threads:
            thread.start()
        recv_exact_into(theirs, memoryview(bytearray(3 * codec.REQUEST_SIZE)))
        client.close()
        client.close()
        for thread in threads:
            thread.join(10)
        assert not any(thread.is_alive() for thread in threads)
    assert errors == ["this client has been closed"] * 3
    with pytest.raises(ConnectionClosed):
        client.flush()


def test_close_does_not_wait_for_a_sender_that_is_stuck() -> None:
    ours, theirs = socket.socketpair()
    client = Client(ours, ClientSession("disk", 64 << 20, ALL))
    caught: list[BaseException] = []

    def write() -> None:
        try:
            client.pwrite(bytes(32 << 20), 0)
        except ConnectionClosed as error:
            caught.append(error)

    thread = threading.Thread(target=write)
    with theirs:
        thread.start()
        recv_exact_into(theirs, memoryview(bytearray(codec.REQUEST_SIZE)))
        client.close()
        thread.join(10)
        assert not thread.is_alive()
    assert len(caught) == 1


def test_an_interrupted_request_ends_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair()
    with theirs, Client(ours, PLAIN) as client:
        reader = client.link._replies

        class Interrupted:
            def read(self, finished: list[Pending]) -> None:
                raise KeyboardInterrupt

        monkeypatch.setattr(client.link, "_replies", Interrupted())
        with pytest.raises(KeyboardInterrupt):
            client.pread(10, 0)
        monkeypatch.setattr(client.link, "_replies", reader)
        with pytest.raises(ConnectionClosed):
            client.pread(10, 0)


def test_a_server_that_says_nothing_is_given_up_in_time(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        with pytest.raises(ConnectionClosed, match="in time"):
            connect(NBDURI(socket=path), timeout=0.1)
        with pytest.raises(ConnectionClosed, match="in time"):
            list_exports(f"nbd+unix:///?socket={path}", timeout=0.1)

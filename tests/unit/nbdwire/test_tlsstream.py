"""A TLS stream as a stream: what passes through it, several threads at once, and its end."""

import errno
import os
import socket
import ssl
import threading
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdwire.errors import ConnectionClosed, TLSError
from nbdwire.tls import ClientTLS, ServerTLS, TLSStream
from nbdwire.tlsstream import IN_SIZE, RECORD, STEP, UNSENT_MOST
from nbdwire.transport import Receiver, recv_exact_into, send_all
from tests.support.certificates import Pki, create
from tests.support.serving import noise
from tests.support.threads import in_thread, wait_until
from tests.support.tls import SECONDS, Tap, outcome, records, shake, sockets, soon, streams


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return create(tmp_path_factory.mktemp("pki") / "pki")


@pytest.fixture
def server(pki: Pki) -> ServerTLS:
    return ServerTLS(certificates=pki.both)


@pytest.fixture
def client(pki: Pki) -> ClientTLS:
    return ClientTLS(certificates=pki.both, hostname="localhost")


@pytest.fixture
def ends(server: ServerTLS, client: ClientTLS) -> Iterator[tuple[TLSStream, TLSStream]]:
    with streams(server, client) as both:
        yield both


def take(stream: TLSStream, length: int) -> bytes:
    data = bytearray(length)
    recv_exact_into(stream, memoryview(data))
    return bytes(data)


# What passes


@settings(derandomize=True, deadline=None, max_examples=15)
@given(
    st.lists(
        st.lists(st.integers(0, 3 * RECORD) | st.just(STEP + 1), min_size=1, max_size=4),
        min_size=1, max_size=6,
    ),
    st.integers(1, 2 * RECORD),
)  # fmt: skip
def test_what_is_sent_in_any_pieces_arrives_in_any_pieces(
    pki: Pki, messages: list[list[int]], step: int
) -> None:
    sent = [[noise(length, length) for length in lengths] for lengths in messages]
    expected = b"".join(b"".join(parts) for parts in sent)
    peer = ClientTLS(certificates=pki.both, hostname="localhost")
    with streams(ServerTLS(certificates=pki.both), peer) as (ours, theirs):

        def send() -> None:
            for parts in sent:
                assert ours.sendmsg(parts) == sum(map(len, parts))
            ours.shutdown(socket.SHUT_WR)

        received, view = bytearray(), memoryview(bytearray(step))
        with in_thread(send):
            while got := theirs.recv_into(view):
                received += view[:got]
        assert received == expected


def test_waitall_fills_the_view_and_no_flag_takes_what_is_there(
    ends: tuple[TLSStream, TLSStream],
) -> None:
    ours, theirs = ends
    data = noise(3 * RECORD + 5)
    for part in (data[:10], data[10 : RECORD + 20], data[RECORD + 20 :]):
        ours.sendall(part)
    view = memoryview(bytearray(len(data)))
    assert theirs.recv_into(view, 7, socket.MSG_WAITALL) == 7
    assert theirs.recv_into(view[7:], RECORD, socket.MSG_WAITALL) == RECORD
    # All of the rest has arrived: one call takes it, though it is several records.
    assert theirs.recv_into(view[7 + RECORD :]) == len(data) - 7 - RECORD
    assert view == data
    assert theirs.pending() == 0


def test_what_arrives_goes_into_the_callers_view_and_nowhere_else(
    ends: tuple[TLSStream, TLSStream],
) -> None:
    ours, theirs = ends
    around = bytearray(b"\xee" * 300)
    ours.sendall(bytes(range(1, 201)))
    assert theirs.recv_into(memoryview(around)[50:150]) == 100
    assert around == b"\xee" * 50 + bytes(range(1, 101)) + b"\xee" * 150
    assert theirs.pending() == 100


def test_the_receiver_and_exact_helpers_work_on_it(ends: tuple[TLSStream, TLSStream]) -> None:
    ours, theirs = ends
    data = noise(200_000)
    with in_thread(lambda: send_all(ours, data[:16], data[16:])):
        receiver = Receiver(theirs)
        assert receiver.take(16) == data[:16]
        view = memoryview(bytearray(len(data) - 16))
        receiver.into(view)
        assert view == data[16:]
    theirs.close()
    with pytest.raises(ConnectionClosed):
        recv_exact_into(ours, memoryview(bytearray(1)))


def test_small_buffers_share_a_record_and_large_ones_fill_theirs(
    server: ServerTLS, client: ClientTLS
) -> None:
    with Tap() as tap:
        mine, theirs = shake(server, client, (tap.ours, tap.theirs))
        assert isinstance(mine, TLSStream)
        assert isinstance(theirs, TLSStream)
        before = len(tap.from_ours)
        mine.sendmsg([b"h" * 16, b"d" * 512, b"e" * 100])
        take(theirs, 628)
        (record,) = records(bytes(tap.from_ours[before:]))
        assert record == (23, 628 + 17)  # application data; TLS 1.3 adds type and tag
        before = len(tap.from_ours)
        with in_thread(lambda: take(theirs, 28 + (64 << 10))):
            mine.sendmsg([b"h" * 28, bytes(64 << 10)])
        sizes = [length - 17 for _, length in records(bytes(tap.from_ours[before:]))]
        assert sizes == [28, *[RECORD] * 4]
        mine.close()
        theirs.close()


def test_nothing_passes_in_plain_text(server: ServerTLS, client: ClientTLS) -> None:
    with Tap() as tap:
        mine, theirs = shake(server, client, (tap.ours, tap.theirs))
        assert isinstance(mine, TLSStream)
        assert isinstance(theirs, TLSStream)
        mine.sendall(b"a secret" * 100)
        take(theirs, 800)
        mine.close()
        theirs.close()
        assert b"a secret" not in tap.from_ours
        assert all(kind in (20, 21, 22, 23) for kind, _ in records(bytes(tap.from_ours)))


# Threads


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_both_ends_send_and_receive_at_the_same_time(
    server: ServerTLS, client: ClientTLS, version: ssl.TLSVersion
) -> None:
    """Neither direction may wait for the other: both buffers are full most of the time."""
    client._context.maximum_version = version
    there, back = noise(8 << 20, 1), noise(8 << 20, 2)
    with streams(server, client) as (ours, theirs), ThreadPoolExecutor(3) as pool:
        pool.submit(ours.sendall, there)
        pool.submit(theirs.sendall, back)
        got = pool.submit(take, theirs, len(there))
        assert take(ours, len(back)) == back
        assert got.result(SECONDS) == there


def test_several_threads_send_while_one_receives(ends: tuple[TLSStream, TLSStream]) -> None:
    """As `nbdwire.followers` does; each message stays whole, and in its thread's order."""
    ours, theirs = ends
    size, count, threads = 5000, 40, 4

    def send(name: int) -> None:
        for number in range(count):
            ours.sendmsg([bytes([name, number]), bytes([name]) * (size - 2)])

    with ThreadPoolExecutor(threads + 2) as pool:
        jobs = [pool.submit(send, name) for name in range(threads)]
        echo = pool.submit(theirs.sendall, bytes(4 << 20))
        drain = pool.submit(take, ours, 4 << 20)
        seen = [0] * threads
        for _ in range(threads * count):
            message = take(theirs, size)
            assert message[2:] == bytes([message[0]]) * (size - 2)
            assert message[1] == seen[message[0]]
            seen[message[0]] += 1
        for job in (*jobs, echo, drain):
            job.result(SECONDS)


class _Overtaking:
    """Sends the first message after the second one, if the second one can come before it."""

    def __init__(self, sock: socket.socket, stream: TLSStream) -> None:
        self._sock = sock
        self._stream = stream
        self._calls = 0
        self.second_waits = threading.Event()
        self.second_sent = threading.Event()

    def sendall(self, data: bytes, flags: int = 0) -> None:
        self._calls += 1
        if self._calls == 1:
            wait_until(lambda: self.second_waits.is_set() or self.second_sent.is_set())
            self._sock.sendall(data, flags)
        else:
            self._sock.sendall(data, flags)
            self.second_sent.set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)


class _NoLock:
    def acquire(self, blocking: bool = True) -> bool:
        return True

    def release(self) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


class _TellingLock:
    """A lock that tells when somebody has to wait for it."""

    def __init__(self, tell: threading.Event) -> None:
        self._lock = threading.Lock()
        self._tell = tell

    def acquire(self, blocking: bool = True) -> bool:
        if self._lock.acquire(blocking=False):
            return True
        self._tell.set()
        return blocking and self._lock.acquire(timeout=SECONDS)

    def release(self) -> None:
        self._lock.release()

    def __enter__(self) -> None:
        assert self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


@pytest.mark.parametrize("locked", [True, False])
def test_records_reach_the_socket_in_the_order_in_which_they_were_made(
    ends: tuple[TLSStream, TLSStream], locked: bool
) -> None:
    """With ``locked`` False it is the control: without the lock the peer cannot decrypt them."""
    ours, theirs = ends
    sock = _Overtaking(ours._sock, ours)
    lock = _TellingLock(sock.second_waits) if locked else _NoLock()
    ours._sock = sock  # type: ignore[assignment]
    ours._sending = lock  # type: ignore[assignment]
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(ours.sendall, b"1")
        wait_until(lambda: sock._calls == 1)
        second = pool.submit(ours.sendall, b"2")
        first.result(SECONDS)
        second.result(SECONDS)
    if locked:
        assert take(theirs, 2) == b"12"
    else:
        with pytest.raises(TLSError, match="damaged or forged"):
            take(theirs, 2)


# The end


def peer_of(pki: Pki, sock: socket.socket, *, server_side: bool = False) -> ssl.SSLSocket:
    """Python's own TLS socket, which tells an end in good order from one that was cut off."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server_side else ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(pki.both / "ca-cert.pem")
    context.options &= ~getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
    if server_side:
        context.load_cert_chain(pki.both / "server-cert.pem", pki.both / "server-key.pem")
    return context.wrap_socket(
        sock,
        server_side=server_side,
        server_hostname=None if server_side else "localhost",
        suppress_ragged_eofs=False,
    )


@contextmanager
def with_other_peer(
    pki: Pki, server: ServerTLS, family: int = socket.AF_UNIX
) -> Iterator[tuple[TLSStream, ssl.SSLSocket]]:
    with sockets(family) as (ours, theirs), ThreadPoolExecutor(1) as pool:
        other = pool.submit(peer_of, pki, theirs)
        stream = server.upgrade(ours, soon())
        with other.result(SECONDS) as peer:
            yield stream, peer
            stream.close()


@pytest.mark.parametrize("end", ["close", "shutdown", "half", "goodbye"])
def test_the_peer_is_told_of_the_end(pki: Pki, server: ServerTLS, end: str) -> None:
    """nbd.md §9: close_notify, then the end of the connection."""
    with with_other_peer(pki, server) as (stream, peer):
        stream.sendall(b"last words")
        if end == "close":
            stream.close()
            stream.close()
            assert stream.fileno() == -1
        elif end == "goodbye":
            stream.goodbye()
            stream.goodbye()
        else:
            stream.shutdown(socket.SHUT_RDWR if end == "shutdown" else socket.SHUT_WR)
        assert peer.recv(100) == b"last words"
        assert peer.recv(100) == b"", "an end that was cut off would be an SSLEOFError"


def test_an_end_that_is_cut_off_would_be_noticed_by_that_peer(pki: Pki, server: ServerTLS) -> None:
    """The control of the test before."""
    with with_other_peer(pki, server) as (stream, peer):
        stream._sock.shutdown(socket.SHUT_RDWR)
        with pytest.raises(ssl.SSLEOFError):
            peer.recv(100)


@pytest.mark.parametrize("polite", [True, False])
def test_the_end_of_the_peer_is_the_end_after_what_it_sent(
    pki: Pki, server: ServerTLS, polite: bool
) -> None:
    with with_other_peer(pki, server) as (stream, peer):
        peer.sendall(b"x" * 100)
        if polite:
            peer.settimeout(0.0)
            with pytest.raises(ssl.SSLWantReadError):
                peer.unwrap()
        else:
            peer.shutdown(socket.SHUT_WR)
        view = memoryview(bytearray(200))
        assert stream.recv_into(view, 0, socket.MSG_WAITALL) == 100
        assert stream.recv_into(view) == 0
        assert stream.recv_into(view) == 0


def test_what_the_peer_sent_last_does_not_reset_the_connection_under_our_goodbye(
    pki: Pki, server: ServerTLS
) -> None:
    with with_other_peer(pki, server) as (stream, peer):
        peer.sendall(b"never read" * 1000)
        stream.sendall(b"last words")
        stream.close()
        assert peer.recv(100) == b"last words"
        assert peer.recv(100) == b""


def test_after_the_goodbye_nothing_can_be_sent(ends: tuple[TLSStream, TLSStream]) -> None:
    ours, theirs = ends
    ours.goodbye()
    with pytest.raises(TLSError, match=r"^TLS with the client is over: protocol is shutdown$"):
        ours.sendall(b"x")
    theirs.goodbye()
    assert ours.recv_into(memoryview(bytearray(1))) == 0
    assert theirs.recv_into(memoryview(bytearray(1))) == 0


def test_shutting_down_wakes_a_thread_that_receives(ends: tuple[TLSStream, TLSStream]) -> None:
    ours, _ = ends
    ours.settimeout(None)
    with in_thread(lambda: ours.recv_into(memoryview(bytearray(1)))) as receiving:
        ours.shutdown(socket.SHUT_RD)
    assert receiving.result() == 0


def test_the_end_does_not_wait_for_a_peer_that_does_not_read(
    ends: tuple[TLSStream, TLSStream],
) -> None:
    ours, _ = ends
    ours.settimeout(0.1)
    with pytest.raises(TimeoutError):
        ours.sendall(bytes(64 << 20))
    ours.settimeout(None)
    ours.close()


def test_the_end_does_not_wait_for_a_thread_that_sends(ends: tuple[TLSStream, TLSStream]) -> None:
    ours, _ = ends
    ours.settimeout(None)
    with in_thread(lambda: outcome(lambda: ours.sendall(bytes(64 << 20)))) as sending:
        wait_until(ours._sending.locked)
        ours.shutdown(socket.SHUT_RDWR)
    assert isinstance(sending.result(), (OSError, TLSError))


def test_flags_are_for_the_socket(ends: tuple[TLSStream, TLSStream]) -> None:
    """A client says good-bye without waiting (`nbdwire.link`); MSG_MORE must not hold data back."""
    ours, theirs = ends
    ours.settimeout(None)
    ours.sendall(b"x", socket.MSG_MORE)
    assert take(theirs, 1) == b"x"
    ours.sendall(b"y", socket.MSG_DONTWAIT)
    assert take(theirs, 1) == b"y"
    with pytest.raises(BlockingIOError):
        ours.sendall(bytes(64 << 20), socket.MSG_DONTWAIT)


# Limits


def test_a_time_limit_is_for_the_whole_call_however_slowly_bytes_come(
    ends: tuple[TLSStream, TLSStream],
) -> None:
    ours, theirs = ends
    theirs._ssl.write(b"x" * 1000)
    record = theirs._outgoing.read()
    ours.settimeout(0.3)

    def receive() -> int:
        return ours.recv_into(memoryview(bytearray(1)))

    with in_thread(lambda: outcome(receive)) as receiving:
        for byte in record[:-1]:
            if receiving.done():
                break
            theirs._sock.sendall(bytes([byte]))
            threading.Event().wait(0.02)
    assert isinstance(receiving.result(), TimeoutError)


@pytest.mark.parametrize(
    "forged",
    [
        b"\x17\x03\x03\xff\xff" + bytes(100),
        b"\x17\x03\x03\x00\x20" + bytes(32),
        b"\x17\x03\x01\x00\x00",
        b"\x25\x60\x95\x13" + bytes(24),
        b"\x16\x03\x03\x00\x04\x00\x00\x00\x00",
    ],
)
def test_a_forged_record_ends_the_connection_in_one_line(
    ends: tuple[TLSStream, TLSStream], forged: bytes
) -> None:
    ours, theirs = ends
    theirs._sock.sendall(forged)
    with pytest.raises(TLSError, match=r"^TLS with the client broke down: ") as caught:
        ours.recv_into(memoryview(bytearray(100)))
    assert "\n" not in str(caught.value)
    assert "_ssl.c" not in str(caught.value)
    assert ours.recv_into(memoryview(bytearray(100))) == 0
    with pytest.raises(TLSError, match="it refused"):  # and the peer was told why
        theirs.recv_into(memoryview(bytearray(1)))


def test_a_changed_bit_is_noticed(ends: tuple[TLSStream, TLSStream]) -> None:
    ours, theirs = ends
    theirs._ssl.write(b"x" * 100)
    record = bytearray(theirs._outgoing.read())
    record[50] ^= 1
    theirs._sock.sendall(record)
    with pytest.raises(TLSError, match="a record was damaged or forged"):
        ours.recv_into(memoryview(bytearray(100)))


def test_a_replayed_record_is_noticed(ends: tuple[TLSStream, TLSStream]) -> None:
    ours, theirs = ends
    theirs._ssl.write(b"x" * 100)
    record = theirs._outgoing.read()
    theirs._sock.sendall(record)
    assert take(ours, 100) == b"x" * 100
    theirs._sock.sendall(record)
    with pytest.raises(TLSError, match="a record was damaged or forged"):
        ours.recv_into(memoryview(bytearray(100)))


def test_large_data_needs_bounded_memory(ends: tuple[TLSStream, TLSStream]) -> None:
    ours, theirs = ends
    data, view = bytes(16 << 20), memoryview(bytearray(16 << 20))
    with ThreadPoolExecutor(1) as pool:
        tracemalloc.start()
        try:
            sent = pool.submit(ours.sendall, data)
            assert theirs.recv_into(view, 0, socket.MSG_WAITALL) == len(data)
            sent.result(SECONDS)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    # OpenSSL's own memory is not counted; its BIOs hold no more than these two either.
    assert peak < 4 * (STEP + IN_SIZE)


def test_answers_that_a_peer_does_not_take_do_not_pile_up(
    ends: tuple[TLSStream, TLSStream],
) -> None:
    """Key updates make OpenSSL answer; a writer that is held up must not let them add up."""
    ours, _ = ends
    ours._outgoing.write(bytes(UNSENT_MOST + 1))
    assert ours._sending.acquire()
    try:
        with pytest.raises(TLSError, match="asks for new keys without end"):
            ours._answer()
    finally:
        ours._sending.release()


def test_connections_leave_no_descriptor_behind(server: ServerTLS, client: ClientTLS) -> None:
    with streams(server, client):
        pass
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with streams(server, client) as (ours, theirs):
            ours.sendall(b"x")
            take(theirs, 1)
    assert len(os.listdir("/proc/self/fd")) == before


def test_it_is_what_the_package_takes_for_a_stream(ends: tuple[TLSStream, TLSStream]) -> None:
    ours, _ = ends
    assert ours.secure
    assert not ours.can_sendfile
    assert ours.family == socket.AF_UNIX
    assert ours.fileno() == ours._sock.fileno()
    ours._sock.close()
    with pytest.raises(OSError, match="Bad file descriptor") as caught:
        ours.sendall(b"x")
    assert caught.value.errno == errno.EBADF

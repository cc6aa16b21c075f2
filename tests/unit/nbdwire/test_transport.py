import errno
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdwire import codec
from nbdwire import constants as c
from nbdwire.errors import ConnectionClosed, ProtocolError, URIError
from nbdwire.negotiate import ExportInfo, Handshake, server_handshake
from nbdwire.negotiate_client import client_list
from nbdwire.transport import (
    Receiver,
    connect_socket,
    recv_exact_into,
    run_handshake,
    send_all,
    tune,
)
from nbdwire.uri import NBDURI


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


Pair = tuple[socket.socket, socket.socket]


def dribble(sock: socket.socket, data: bytes) -> threading.Thread:
    """Send ``data`` in single bytes, each in a send of its own, from another thread."""

    def send() -> None:
        for byte in data:
            sock.send(bytes([byte]))

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def test_an_exact_number_of_bytes_is_received_from_single_bytes(pair: Pair) -> None:
    ours, theirs = pair
    thread = dribble(theirs, bytes(range(200)))
    buffer = bytearray(200)
    recv_exact_into(ours, memoryview(buffer))
    thread.join()
    assert buffer == bytes(range(200))


def test_an_end_within_the_bytes_is_a_closed_connection(pair: Pair) -> None:
    ours, theirs = pair
    theirs.send(b"abc")
    theirs.close()
    with pytest.raises(ConnectionClosed):
        recv_exact_into(ours, memoryview(bytearray(4)))


def test_a_reset_is_a_closed_connection() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    with ours:
        linger = (1).to_bytes(4, "little") + bytes(4)
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        theirs.close()
        with pytest.raises(ConnectionClosed):
            recv_exact_into(ours, memoryview(bytearray(4)))
        with pytest.raises(ConnectionClosed):
            send_all(ours, bytes(64 << 20))


def test_many_buffers_larger_than_the_sockets_are_sent_in_order(pair: Pair) -> None:
    ours, theirs = pair
    buffers = [bytes([n % 256]) * (n * 37 % 5000) for n in range(2500)]
    received = bytearray(sum(map(len, buffers)))
    thread = threading.Thread(target=recv_exact_into, args=(theirs, memoryview(received)))
    thread.start()
    send_all(ours, *buffers)
    thread.join()
    assert received == b"".join(buffers)


def test_empty_buffers_are_nothing(pair: Pair) -> None:
    ours, theirs = pair
    send_all(ours, b"", b"")
    send_all(ours, b"", b"x", b"")
    assert theirs.recv(10) == b"x"


def test_a_receiver_returns_the_same_bytes_whatever_its_buffer(pair: Pair) -> None:
    ours, theirs = pair
    data = bytes(range(256)) * 20
    for size in (16, 17, 100, 10_000):
        receiver = Receiver(ours, size)
        thread = threading.Thread(target=theirs.sendall, args=(data,))
        thread.start()
        out, step = bytearray(), 0
        while len(out) + step <= len(data):
            if step % 2:
                view = bytearray(step)
                receiver.into(memoryview(view))
                out += view
            else:
                out += receiver.take(step)
            step = (step + 1) % 16
        rest = bytearray(len(data) - len(out))
        receiver.into(memoryview(rest))
        thread.join()
        assert out + rest == data


class OneDisk:
    def listing(self) -> list[tuple[str, str]]:
        return [("disk", "")]

    def lookup(self, name: str) -> ExportInfo | None:
        return ExportInfo("disk", 512, 1) if name == "disk" else None


REQUEST = codec.CLIENT_FLAGS.pack(3) + codec.option_request(
    c.OPT_GO, codec.info_request("disk", (c.INFO_BLOCK_SIZE,))
)


def handshake_of(pair: Pair, *, single_bytes: bool) -> bytes:
    """What a server answers to REQUEST in a handshake on a socket."""
    ours, theirs = pair
    if single_bytes:
        thread = dribble(theirs, REQUEST)
    else:
        thread = threading.Thread(target=theirs.sendall, args=(REQUEST,))
        thread.start()
    result = run_handshake(ours, server_handshake(OneDisk()), time.monotonic() + 10)
    thread.join()
    assert result is not None
    assert result.export.name == "disk"
    assert ours.gettimeout() is None
    return theirs.recv(1000)


def test_a_handshake_is_the_same_whole_and_in_single_bytes() -> None:
    answers = []
    for single_bytes in (False, True):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            answers.append(handshake_of((ours, theirs), single_bytes=single_bytes))
    assert answers[0] == answers[1]
    assert len(answers[0]) == 18 + 3 * 20 + 12 + 14


def test_nothing_behind_the_handshake_is_read(pair: Pair) -> None:
    ours, theirs = pair
    theirs.sendall(REQUEST + b"request")
    run_handshake(ours, server_handshake(OneDisk()), None)
    assert ours.recv(100) == b"request"


def test_a_silent_client_is_given_up_at_the_deadline(pair: Pair) -> None:
    with pytest.raises(ConnectionClosed, match="in time"):
        run_handshake(pair[0], server_handshake(OneDisk()), time.monotonic() + 0.05)


def test_a_client_that_dribbles_gets_no_more_time_for_it(pair: Pair) -> None:
    ours, theirs = pair
    stop = threading.Event()

    def send() -> None:
        while not stop.wait(0.01):
            theirs.send(b"\0")

    thread = threading.Thread(target=send)
    thread.start()
    start = time.monotonic()

    def endless() -> Handshake[None]:
        yield 1 << 20

    try:
        with pytest.raises(ConnectionClosed, match="in time"):
            run_handshake(ours, endless(), start + 0.2)
    finally:
        stop.set()
        thread.join()
    assert 0.2 <= time.monotonic() - start < 5


def test_a_client_that_never_reads_is_given_up_at_the_deadline(pair: Pair) -> None:
    def verbose() -> Handshake[None]:
        while True:
            yield bytes(1 << 20)

    with pytest.raises(ConnectionClosed, match="in time"):
        run_handshake(pair[0], verbose(), time.monotonic() + 0.1)


def test_the_handshakes_own_error_comes_through(pair: Pair) -> None:
    ours, theirs = pair
    theirs.sendall(codec.CLIENT_FLAGS.pack(1 << 9))
    with pytest.raises(ProtocolError):
        run_handshake(ours, server_handshake(OneDisk()), time.monotonic() + 10)


def test_a_unix_socket_is_connected(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        with connect_socket(NBDURI(socket=path), 5) as sock, listener.accept()[0] as peer:
            sock.sendall(b"x")
            assert peer.recv(1) == b"x"
            assert sock.gettimeout() is None


def test_an_abstract_socket_is_connected(tmp_path: Path) -> None:
    name = f"\0fleece-test-{tmp_path}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(name)
        listener.listen()
        with connect_socket(NBDURI(socket=name), 5) as sock, listener.accept()[0]:
            assert sock.getpeername() == name.encode()


def test_a_tcp_socket_is_connected_without_delay() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with connect_socket(NBDURI("127.0.0.1", port), 5) as sock, listener.accept()[0]:
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert sock.gettimeout() is None


def test_tuning_leaves_unix_sockets_alone(pair: Pair) -> None:
    tune(pair[0])
    assert not pair[0].getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


def test_a_refused_connection_says_to_whom(tmp_path: Path) -> None:
    missing = str(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"cannot connect to nbd\+unix:///x\?socket="):
        connect_socket(NBDURI(socket=missing, export="x"), 5)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(ConnectionRefusedError, match=f"nbd://127.0.0.1:{port}/"):
        connect_socket(NBDURI("127.0.0.1", port), 5)


def test_a_path_that_is_too_long_is_an_error_with_a_text() -> None:
    with pytest.raises(OSError, match="too long"):
        connect_socket(NBDURI(socket="/" + "x" * 200), 5)


def test_a_full_unix_backlog_times_out_instead_of_failing_at_once(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    held = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(0)
        try:
            start = time.monotonic()
            held.append(connect_socket(NBDURI(socket=path), 0.2))  # now the backlog is full
            with pytest.raises(OSError, match="cannot connect") as caught:
                connect_socket(NBDURI(socket=path), 0.2)
            assert caught.value.errno == errno.ETIMEDOUT
            assert time.monotonic() - start >= 0.2
        finally:
            for sock in held:
                sock.close()


def test_an_nbds_uri_is_not_connected_to_by_those_who_stay_in_plain_text() -> None:
    """nbd.md §14: nbds MUST fail without TLS."""
    with pytest.raises(URIError, match="does not use TLS"):
        connect_socket(NBDURI("localhost", tls=True))


def test_a_server_that_hangs_up_in_the_handshake_is_a_closed_connection(pair: Pair) -> None:
    ours, theirs = pair
    theirs.close()
    with pytest.raises(ConnectionClosed):
        run_handshake(ours, client_list(), time.monotonic() + 5)

"""A server that does not answer: the request raises in time, and the connection is over."""

import socket
import threading
import time

import pytest

from nbdwire import codec
from nbdwire.client import Client
from nbdwire.errors import ConnectionClosed
from nbdwire.watchdog import Watchdog
from tests.support.scripted import PLAIN, STRUCTURED
from tests.support.threads import in_thread


class Link:
    def __init__(self) -> None:
        self.newest = 0
        self.oldest: int | None = None
        self.error: BaseException | None = None

    def in_flight(self) -> tuple[int, int | None]:
        return self.newest, self.oldest

    def fail(self, error: BaseException) -> None:
        self.error = error


def test_a_request_is_late_after_the_limit_and_an_eighth() -> None:
    link, now = Link(), [0.0]
    dog = Watchdog(link, 8, lambda: now[0])
    for second in range(20):
        now[0] = float(second)
        link.newest, link.oldest = second, None if second < 5 else 5  # the fifth is never answered
        late = dog.look()
        assert late == (second >= 13)
        if late:
            break
    assert isinstance(link.error, ConnectionClosed)
    assert "8 seconds" in str(link.error)


def test_requests_that_are_answered_are_never_late() -> None:
    link, now = Link(), [0.0]
    dog = Watchdog(link, 8, lambda: now[0])
    for second in range(100):
        now[0] = float(second)
        link.newest, link.oldest = 10 * second, max(10 * second - 70, 1)  # seven seconds each
        assert not dog.look()


def test_no_time_is_no_limit() -> None:
    with pytest.raises(ValueError, match="above 0"):
        Watchdog(Link(), 0)


def failing(client: Client) -> ConnectionClosed:
    with pytest.raises(ConnectionClosed) as caught:
        client.pread(1, 0)
    return caught.value


def test_a_server_that_hangs_ends_the_call_and_the_connection() -> None:
    ours, theirs = socket.socketpair()
    with theirs, Client(ours, PLAIN, request_timeout=0.2) as client:
        began = time.monotonic()
        with in_thread(lambda: failing(client)) as future:
            with pytest.raises(ConnectionClosed, match=r"not answered within 0\.2 seconds"):
                client.pwrite(b"x", 0)
            assert "not answered" in str(future.result())
        assert time.monotonic() - began >= 0.2
        with pytest.raises(ConnectionClosed):
            client.pread(1, 0)


def test_a_server_that_dribbles_is_late_too() -> None:
    ours, theirs = socket.socketpair()
    over = threading.Event()

    def dribble() -> None:
        data = codec.CHUNK_OFFSET_DATA.pack(0x668E33EF, 0, 1, 1, 8 + 4000, 0) + bytes(4000)
        for n in range(len(data)):
            if over.wait(0.02):
                return
            theirs.sendall(data[n : n + 1])

    with theirs, in_thread(dribble), Client(ours, STRUCTURED, request_timeout=0.3) as client:
        try:
            with pytest.raises(ConnectionClosed, match="not answered"):
                client.pread(4000, 0)
        finally:
            over.set()


def test_a_server_that_does_not_read_ends_a_write() -> None:
    ours, theirs = socket.socketpair()
    session = type(PLAIN)("disk", 64 << 20, PLAIN.flags)
    with (
        theirs,
        Client(ours, session, request_timeout=0.2) as client,
        pytest.raises(ConnectionClosed),
    ):
        client.pwrite(bytes(32 << 20), 0)


def test_a_pipeline_is_watched_as_well() -> None:
    ours, theirs = socket.socketpair()
    with theirs, Client(ours, PLAIN, request_timeout=0.2) as client:
        pipeline = client.pipeline()
        tickets = [pipeline.pwrite(b"x", n) for n in range(4)]
        for ticket in tickets:
            with pytest.raises(ConnectionClosed):
                ticket.result()
        pipeline.close()


def test_an_idle_connection_is_not_ended() -> None:
    link, now = Link(), [0.0]
    dog = Watchdog(link, 8, lambda: now[0])
    link.newest = 7
    for second in range(100):
        now[0] = float(second)
        assert not dog.look()

"""How long a worker looks for its client's next request before it sleeps."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from nbdwire import lookout as lookout_module
from nbdwire.lookout import LIVELY, LOOK, Lookout, look_at


@pytest.fixture(autouse=True)
def _soon_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookout_module, "IDLE", 1)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


class Counted:
    """A turn that counts how often it was taken."""

    def __init__(self, free: bool = True) -> None:
        self.taken = 0
        self.free = free

    def acquire(self, blocking: bool = True) -> bool:
        assert not blocking
        self.taken += self.free
        return self.free

    def release(self) -> None:
        pass


def lookout(sock: socket.socket, turn: Counted) -> Lookout:
    return Lookout(sock, turn)  # type: ignore[arg-type]


def test_a_client_that_has_not_asked_again_soon_is_not_looked_for(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    turn = Counted()
    look = lookout(pair[0], turn)
    look.begin()
    assert turn.taken == 0
    look.end(time.perf_counter() - 2 * LIVELY)
    look.begin()
    assert turn.taken == 0


def test_a_lively_client_is_looked_for_and_not_longer_than_a_moment(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    turn = Counted()
    look = lookout(pair[0], turn)
    look.end(time.perf_counter())
    began = look.begin()
    assert turn.taken == 1
    assert time.perf_counter() - began >= LOOK
    look.end(began - 2 * LIVELY)  # nothing had come: the next wait is a sleep
    look.begin()
    assert turn.taken == 1


def test_input_ends_the_look_at_once_and_is_left_in_the_socket(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    look = lookout(pair[0], Counted())
    look.end(time.perf_counter())
    pair[1].sendall(b"x")
    look.begin()
    assert pair[0].recv(1) == b"x"


def test_only_one_connection_of_a_server_looks_at_a_time(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    turn = threading.Lock()
    look = Lookout(pair[0], turn)
    look.end(time.perf_counter())
    with turn:
        look.begin()
        assert turn.locked()  # it did not give back what it had not got
    look.end(time.perf_counter())
    look.begin()
    assert not turn.locked()


def test_a_client_that_hangs_up_ends_the_look(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    look = lookout(pair[0], Counted())
    look.end(time.perf_counter())
    pair[1].close()
    look.begin()
    assert pair[0].recv(1) == b""


class Received:
    """A stream that has received some bytes which the socket does not tell of any more."""

    def __init__(self, sock: socket.socket) -> None:
        self.bytes = 0
        self._sock = sock

    def pending(self) -> int:
        return self.bytes

    def __getattr__(self, name: str) -> object:
        return getattr(self._sock, name)


def test_what_a_stream_has_received_already_is_not_waited_for(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    turn, stream = Counted(), Received(pair[0])
    look = look_at(stream, turn)  # type: ignore[arg-type]
    stream.bytes = 1
    look.end(time.perf_counter())
    look.begin()
    assert turn.taken == 0
    stream.bytes = 0
    began = look.begin()
    assert turn.taken == 1
    assert time.perf_counter() - began >= LOOK


def test_a_socket_is_looked_at_without_asking_what_it_has_received(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    assert type(look_at(pair[0], threading.Lock())) is Lookout


@pytest.mark.parametrize("lively", [False, True])
def test_a_client_that_stays_silent_is_idle_whether_it_was_lively_or_not(
    pair: tuple[socket.socket, socket.socket], lively: bool
) -> None:
    look = lookout(pair[0], Counted())
    look.end(time.perf_counter() - (0 if lively else 2 * LIVELY))
    look.begin()
    assert look.idle
    look.idle = False
    pair[1].sendall(b"x")
    look.begin()
    assert not look.idle

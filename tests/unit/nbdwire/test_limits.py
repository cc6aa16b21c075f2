"""What clients may take of a server in all: memory for large requests, places, time."""

import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from fleece.block.memory import MemoryNode
from nbdwire import places as places_module
from nbdwire.connection import Connection
from nbdwire.errors import ConnectionClosed, PolicyRefused
from nbdwire.idle import IdleWatch
from nbdwire.limits import FREE, Budget, Keepalive, Share
from nbdwire.places import Places
from nbdwire.server import Server
from tests.support import nbdraw as raw
from tests.support.faulty import Hooked, hanging
from tests.support.nbdraw import connected, open_socket
from tests.support.serving import serving
from tests.support.threads import frequent_switches, in_thread, wait_for, wait_until

MIB = 1 << 20
SIZE = 64 << 20


def share(budget: Budget) -> Share:
    return budget.open(lambda why: None).share()


# The budget


def test_small_buffers_are_free_and_large_ones_are_counted() -> None:
    budget = Budget(4 * MIB)
    one = share(budget)
    one.take(FREE)
    assert budget.held == 0
    one.take(3 * MIB)
    one.take(2 * MIB)  # it is that large already
    assert budget.held == one.held == 3 * MIB
    assert one.keep(0)
    assert budget.held == 0


def test_who_finds_the_budget_spent_waits_until_there_is_enough() -> None:
    budget = Budget(8 * MIB)
    holder, waiter = share(budget), share(budget)
    holder.take(6 * MIB)
    with in_thread(lambda: waiter.take(4 * MIB)) as waiting:
        share(budget).take(2 * MIB)  # what is left can be had meanwhile
        assert not waiting.done()
        holder.keep(0)
    assert (budget.held, waiter.held) == (6 * MIB, 4 * MIB)


def test_a_request_larger_than_the_whole_budget_is_served_alone() -> None:
    budget = Budget(4 * MIB)
    first, large = share(budget), share(budget)
    first.take(2 * MIB)
    with in_thread(lambda: large.take(32 * MIB)) as waiting:
        assert not waiting.done()
        first.keep(0)
    assert budget.held == 32 * MIB


def test_two_that_hold_something_and_want_more_do_not_wait_for_each_other() -> None:
    budget = Budget(8 * MIB)
    shares = [share(budget) for _ in range(4)]
    for one in shares:
        one.take(2 * MIB)

    def grow(one: Share) -> None:
        one.take(8 * MIB)
        one.keep(0)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(grow, shares, timeout=20))
    assert budget.held == 0


def test_the_budget_is_never_exceeded_whatever_threads_do() -> None:
    budget = Budget(16 * MIB)
    peaks = []

    def use(seed: int) -> None:
        rng, one = random.Random(seed), share(budget)
        for _ in range(200):
            one.take(rng.randrange(1, 9 * MIB))
            peaks.append(budget.held)
            if rng.random() < 0.8:
                one.keep(rng.choice([0, 2 * MIB]))
        one.keep(0)

    with frequent_switches(), ThreadPoolExecutor(8) as pool:
        list(pool.map(use, range(8), timeout=60))
    assert max(peaks) <= 16 * MIB
    assert budget.held == 0


def test_at_rest_only_half_of_the_budget_may_be_kept() -> None:
    budget = Budget(8 * MIB)
    shares = [share(budget) for _ in range(5)]
    assert [one.keep(2 * MIB) for one in shares] == [True, True, False, False, False]
    assert [one.held for one in shares] == [2 * MIB, 2 * MIB, 0, 0, 0]
    assert shares[0].keep(4 * MIB) is False
    assert shares[0].held == 0


def test_a_client_that_does_not_go_on_is_hung_up_once_it_keeps_others_waiting() -> None:
    budget = Budget(8 * MIB, patience=0.05)
    reasons: list[str] = []
    account = budget.open(reasons.append)
    stalled = account.share()
    stalled.take(8 * MIB)
    stalled.idle_since = time.monotonic()

    def end() -> None:
        wait_until(lambda: reasons)
        account.end()

    waiter = share(budget)
    with in_thread(end):
        waiter.take(2 * MIB)
    assert reasons == ["it kept others waiting for memory that it held"]
    assert waiter.held == budget.held == 2 * MIB


def test_one_whose_storage_is_slow_is_not_hung_up() -> None:
    """The control of the test above: what it waits for is not its client."""
    budget = Budget(8 * MIB, patience=0.02)
    reasons: list[str] = []
    busy = budget.open(reasons.append).share()
    busy.take(8 * MIB)
    waiter = share(budget)
    with in_thread(lambda: waiter.take(2 * MIB)) as waiting:
        with pytest.raises(TimeoutError):
            waiting.result(0.2)
        busy.keep(0)
    assert reasons == []


def test_who_is_hung_up_does_not_wait_for_memory_any_longer() -> None:
    budget = Budget(8 * MIB)
    share(budget).take(8 * MIB)
    account = budget.open(lambda why: None)

    def take() -> None:
        with pytest.raises(ConnectionClosed, match="waited for memory"):
            account.share().take(4 * MIB)

    with in_thread(take):
        account.close()
    take()
    assert budget.held == 8 * MIB


def test_the_end_of_a_connection_gives_back_what_it_had() -> None:
    budget = Budget(8 * MIB)
    account = budget.open(lambda why: None)
    for one in (account.share(), account.share()):
        one.take(3 * MIB)
    account.end()
    assert budget.held == 0


# Places


def test_the_oldest_handshake_of_the_busiest_origin_makes_room() -> None:
    places: Places[str] = Places(9, 4)
    for client, origin in (("good", 1), ("a", 2), ("b", 2), ("c", 2)):
        assert places.arrive(client, origin) is None
    assert places.arrive("d", 2) == "a"
    assert places.arrive("new", 3) == "b"
    places.leave("good")
    assert places.arrive("e", 2) is None


def test_who_is_in_transmission_is_not_one_of_the_handshakes() -> None:
    places: Places[str] = Places(2, 1)
    assert places.arrive("one", 1) is None
    assert places.enter("one")
    assert places.arrive("two", 1) is None
    assert places.enter("two")
    assert places.full()
    assert not places.reserve("three")
    assert not places.enter("three")
    places.leave("one")
    assert places.enter("three")


def test_a_reserved_place_is_held_for_a_moment_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a client that asks for INFO, and then nothing, would keep others out."""
    now = 100.0
    monkeypatch.setattr(places_module.time, "monotonic", lambda: now)
    places: Places[str] = Places(1, 5)
    assert places.reserve("one")
    assert places.reserve("one")
    assert not places.reserve("two")
    now += places_module.RESERVED_SECONDS
    assert places.reserve("two")
    assert not places.enter("one")
    assert places.enter("two")


@pytest.mark.parametrize("bad", [(0, 1), (1, 0), (-1, 5)])
def test_a_server_has_room_for_one_at_least(bad: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="room"):
        Places(*bad)


# At a server


def test_above_max_connections_a_client_is_told_and_the_others_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """nbd.md (c) 7: at its limit qemu stops accepting, so new clients hang instead."""
    caplog.set_level("INFO", "nbdwire")
    with serving(tmp_path, MemoryNode(SIZE), max_connections=2) as (server, where):
        with connected(where) as one, connected(where):
            began = time.monotonic()
            with pytest.raises(PolicyRefused, match="too many clients"), connected(where):
                pass
            assert time.monotonic() - began < 2
            one.in_step()
        wait_until(lambda: server.clients() == 0)
        with connected(where) as client:
            client.in_step()
    assert sum("refused" in m and "too many clients" in m for m in caplog.messages) == 1


def test_a_refused_client_that_says_nothing_is_hung_up_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbdwire.connection.REFUSAL_SECONDS", 0.1)
    with (
        serving(tmp_path, MemoryNode(SIZE), max_connections=1) as (_, where),
        connected(where),
        open_socket(where) as sock,
    ):
        assert sock.recv(100).startswith(b"NBDMAGICIHAVEOPT")
        assert sock.recv(100) == b""


def test_places_are_given_back_by_every_way_to_leave(tmp_path: Path) -> None:
    """nbd.md (c) 7, nbd-server's issue 126: a slot that is never returned."""
    with serving(tmp_path, MemoryNode(SIZE), max_connections=1) as (server, where):
        for leave in (raw.Raw.close, raw.Raw.reset, lambda c: c.send(raw.request(raw.DISC))):
            for _ in range(3):
                with connected(where) as client:
                    client.in_step()
                    leave(client)
                    wait_until(lambda: server.clients() == 0)


def test_the_last_place_is_given_once_to_clients_that_come_at_the_same_time(
    tmp_path: Path,
) -> None:
    with serving(tmp_path, MemoryNode(SIZE), max_connections=3) as (server, where):
        gate, told, inside = threading.Barrier(10), [], []
        done = threading.Event()

        def come(_: int) -> None:
            gate.wait(20)
            try:
                with connected(where) as client:
                    client.in_step()
                    inside.append(client)
                    wait_for(done)
            except PolicyRefused as refusal:
                told.append(str(refusal))

        with frequent_switches(), ThreadPoolExecutor(10) as pool:
            futures = [pool.submit(come, index) for index in range(10)]
            wait_until(lambda: len(told) + len(inside) == 10)
            assert (len(inside), server.clients("disk")) == (3, 3)
            done.set()
            for future in futures:
                future.result(20)


def test_handshakes_that_do_not_end_keep_nobody_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "nbdwire")
    with (
        serving(tmp_path, MemoryNode(SIZE), max_handshakes=5) as (server, where),
        ExitStack() as stack,
    ):
        idle = [stack.enter_context(open_socket(where)) for _ in range(12)]
        with connected(where) as client:
            client.in_step()
            wait_until(lambda: server.clients() <= 6)
            for sock in idle[:7]:  # the oldest
                assert sock.recv(100).startswith(b"NBDMAGIC")
                assert sock.recv(100) == b""
    wait_until(lambda: sum("chose no export, and" in m for m in caplog.messages) == 8)


def test_a_budget_of_a_server_is_shared_by_its_connections(tmp_path: Path) -> None:
    """One holds all of it, in a write that its storage does not finish; small requests go on."""
    node = Hooked(SIZE)
    with (
        serving(tmp_path, node, max_bytes_in_flight=8 * MIB) as (server, where),
        connected(where) as first,
        connected(where) as second,
        connected(where) as third,
    ):
        held = server._house.budget
        with hanging(node, "pwrite") as stuck:
            first.send(first.make(raw.WRITE, 0, 8 * MIB, 0, bytes(8 * MIB)))
            wait_for(stuck.entered)
            assert held.held >= 8 * MIB
            del node.before["pwrite"]
            with in_thread(lambda: second.write(0, b"x" * 4 * MIB)) as waiting:
                third.in_step()
                assert third.write(0, b"y" * MIB) == 0
                assert not waiting.done()
                stuck.go_on.set()
                assert first.reply().error == 0
        first.close()
        second.close()
        wait_until(lambda: held.held == 0)


# Idle clients, dead peers


class FakeConnection:
    def __init__(self, count: int | None) -> None:
        self.count = count
        self.calls: list[tuple[int, str]] = []

    def activity(self) -> int | None:
        return self.count

    def hang_up(self, how: int, why: str) -> None:
        self.calls.append((how, why))


def test_idle_clients_are_hung_up_busy_ones_and_those_in_the_handshake_are_not() -> None:
    idle, busy, young = FakeConnection(3), FakeConnection(0), FakeConnection(None)
    watch = IdleWatch(3600, lambda: [idle, busy, young])
    for second in range(0, 7201, 900):
        busy.count = (busy.count or 0) + 1
        watch.look(float(second))
    watch.stop()
    assert [how for how, _ in idle.calls] == [socket.SHUT_RD, socket.SHUT_RDWR]
    assert idle.calls[0][1] == "it was idle for 3600 seconds"
    assert busy.calls == young.calls == []


def test_an_idle_client_is_hung_up_by_a_server_that_wants_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "nbdwire")
    with serving(tmp_path, MemoryNode(SIZE), idle_seconds=0.1) as (server, where):
        with connected(where) as client:
            client.in_step()
            assert client.hung_up()
        wait_until(lambda: server.clients() == 0)
    assert any(m.endswith("it was idle for 0.1 seconds") for m in caplog.messages)


def test_without_an_idle_time_there_is_no_watch(tmp_path: Path) -> None:
    with serving(tmp_path, MemoryNode(SIZE)):
        assert "nbd-idle" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize("keepalive", [Keepalive(7, 5, 3), None])
def test_keepalive_is_as_the_server_is_told(tmp_path: Path, keepalive: Keepalive | None) -> None:
    with (
        serving(tmp_path, MemoryNode(SIZE), tcp=True, keepalive=keepalive) as (server, where),
        connected(where) as client,
    ):
        client.in_step()
        (conn,) = server._everybody()
        assert isinstance(conn, Connection)
        sock = conn._sock
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        on = sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert bool(on) == (keepalive is not None)
        if keepalive is not None:
            names = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
            assert [sock.getsockopt(socket.IPPROTO_TCP, name) for name in names] == [7, 5, 3]


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Keepalive(idle=0)
    with pytest.raises(ValueError, match="idle"):
        Server(idle_seconds=-1.0)

"""A connection that is opened again, and what the loss of it may have cost."""

import errno
import socket
import threading
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdwire import codec
from nbdwire import constants as c
from nbdwire.client import Client
from nbdwire.errors import (
    ConnectionClosed,
    PolicyRefused,
    ProtocolError,
    RequestError,
    UnknownExport,
    WritesLost,
)
from nbdwire.negotiate_client import ClientSession
from nbdwire.reconnect import Policy, Ranges, Reconnecting
from tests.support.scripted import ALL, PLAIN, SIZE, Peer, Request
from tests.support.threads import in_thread, wait_for

MODEST = settings(derandomize=True, deadline=None, max_examples=200)
QUICK = Policy(attempts=3, delay=0.001)


class Hangup(OSError):
    """The server hangs up instead of answering."""


class Host:
    """Servers that can be killed, in front of one disk. ``flush`` is what makes data stable."""

    def __init__(self) -> None:
        self.data = bytearray(SIZE)
        self.peers: list[Peer] = []
        self.requests: list[Request] = []
        self.kill_before: Callable[[Request], bool] = lambda _: False
        self.kill_after: Callable[[Request], bool] = lambda _: False
        self.error: Callable[[Request], int] = lambda _: 0
        self.session = PLAIN
        self.problems: list[Exception] = []

    def open(self) -> Client:
        if self.problems:
            raise self.problems.pop(0)
        ours, theirs = socket.socketpair()
        self.peers.append(Peer(theirs, self.answer))
        return Client(ours, self.session)

    def answer(self, request: Request, payload: bytes) -> bytes:
        self.requests.append(request)
        _, kind, cookie, offset, length = request
        if self.kill_before(request):
            raise Hangup
        if kind == c.CMD_WRITE:
            self.data[offset : offset + length] = payload
        if self.kill_after(request):
            raise Hangup
        error = self.error(request)
        data = bytes(self.data[offset : offset + length]) if kind == c.CMD_READ else b""
        return codec.simple_reply(cookie, error) + (b"" if error else data)

    def join(self) -> None:
        for peer in self.peers:
            peer.join()


def once(kind: int) -> Callable[[Request], bool]:
    """True for the first request of that type, False ever after."""
    left = [True]

    def first(request: Request) -> bool:
        return request[1] == kind and bool(left) and left.pop()

    return first


@pytest.mark.parametrize("moment", ["kill_before", "kill_after"])
def test_a_call_in_flight_is_made_again(moment: str) -> None:
    host = Host()
    with Reconnecting(host.open, QUICK) as disk:
        for kind in (c.CMD_READ, c.CMD_WRITE, c.CMD_WRITE_ZEROES, c.CMD_TRIM, c.CMD_CACHE):
            setattr(host, moment, once(kind))
            losses = disk.losses
            if kind == c.CMD_READ:
                assert disk.pread(3, 0) == bytes(3)
            elif kind == c.CMD_WRITE:
                disk.pwrite(b"abc", 10, fua=True)
                assert host.data[10:13] == b"abc"
            else:
                {c.CMD_WRITE_ZEROES: disk.zero, c.CMD_TRIM: disk.trim, c.CMD_CACHE: disk.cache}[
                    kind
                ](0, 5)
            assert disk.losses == losses + 1
    host.join()


def test_writes_that_were_flushed_are_not_doubted() -> None:
    host = Host()
    with Reconnecting(host.open, QUICK) as disk:
        disk.pwrite(b"abc", 10)
        disk.flush()
        disk.pwrite(b"x", 0, fua=True)
        host.kill_before = once(c.CMD_READ)
        disk.pread(1, 0)
        disk.flush()
        assert disk.losses == 1
    host.join()


def test_writes_that_were_not_flushed_before_the_loss_are_reported_once() -> None:
    host = Host()
    with Reconnecting(host.open, QUICK) as disk:
        disk.pwrite(b"abc", 10)
        disk.pwrite(b"abc", 13)
        disk.zero(100, 5)
        host.kill_before = once(c.CMD_READ)
        disk.pread(1, 0)
        disk.pwrite(b"later", 500)  # this one is on the new connection
        with pytest.raises(WritesLost, match="11 bytes in 2 ranges, the first at 10") as caught:
            disk.flush()
        assert caught.value.errno == errno.EIO
        assert caught.value.ranges == [(10, 6), (100, 5)]
        disk.flush()  # told once, as fsync does
    assert [x[1] for x in host.requests].count(c.CMD_FLUSH) == 1
    host.join()


def test_a_flush_that_is_lost_is_reported_and_not_repeated_in_silence() -> None:
    host = Host()
    with Reconnecting(host.open, QUICK) as disk:
        disk.pwrite(b"abc", 10)
        host.kill_before = once(c.CMD_FLUSH)
        with pytest.raises(WritesLost) as caught:
            disk.flush()
        assert caught.value.ranges == [(10, 3)]
        disk.pwrite(b"abc", 10)
        disk.flush()
    host.join()


def test_a_flush_that_fails_leaves_its_writes_unflushed() -> None:
    host = Host()
    fails = once(c.CMD_FLUSH)
    host.error = lambda request: c.NBD_EIO if fails(request) else 0
    with Reconnecting(host.open, QUICK) as disk:
        disk.pwrite(b"abc", 10)
        with pytest.raises(RequestError) as caught:
            disk.flush()
        assert not isinstance(caught.value, WritesLost)
        host.kill_before = once(c.CMD_READ)
        disk.pread(1, 0)
        with pytest.raises(WritesLost):
            disk.flush()
    host.join()


def test_a_server_that_is_shutting_down_is_lost() -> None:
    host = Host()
    ends = once(c.CMD_READ)
    host.error = lambda request: c.NBD_ESHUTDOWN if ends(request) else 0
    with Reconnecting(host.open, QUICK) as disk:
        assert disk.pread(1, 0) == b"\0"
        assert disk.losses == 1
    host.join()


def test_other_errors_are_raised_as_they_are() -> None:
    host = Host()
    host.error = lambda _: c.NBD_ENOSPC
    with Reconnecting(host.open, QUICK) as disk:
        with pytest.raises(RequestError) as caught:
            disk.pwrite(b"x", 0)
        assert (caught.value.errno, disk.losses) == (errno.ENOSPC, 0)
    host.join()


def test_attempts_are_limited_and_the_next_call_tries_again() -> None:
    host = Host()
    with Reconnecting(host.open, QUICK) as disk:
        host.kill_before = once(c.CMD_READ)
        host.problems = [ConnectionRefusedError(111, "refused"), UnknownExport("not yet")]
        assert disk.pread(1, 0) == b"\0"  # the third attempt
        host.kill_before = once(c.CMD_READ)
        host.problems = [ConnectionRefusedError(111, "refused")] * 3
        with pytest.raises(ConnectionClosed, match=r"3 attempts.*refused"):
            disk.pread(1, 0)
        assert disk.pread(1, 0) == b"\0"
    host.join()


def test_a_server_that_always_hangs_up_is_given_up() -> None:
    host = Host()
    host.kill_before = lambda _: True
    with Reconnecting(host.open, QUICK) as disk, pytest.raises(ConnectionClosed):
        disk.pread(1, 0)
    assert len(host.requests) == 1 + QUICK.attempts
    host.join()


@pytest.mark.parametrize("problem", [PolicyRefused("no"), ProtocolError("junk")])
def test_a_refusal_for_good_is_not_tried_again(problem: Exception) -> None:
    host = Host()
    with Reconnecting(host.open, QUICK) as disk:
        host.kill_before = once(c.CMD_READ)
        host.problems = [problem]
        with pytest.raises(type(problem)):
            disk.pread(1, 0)
        assert len(host.peers) == 1
    host.join()


@pytest.mark.parametrize(
    "other", [ClientSession("disk", SIZE - 1, ALL), ClientSession("disk", SIZE, ALL | 2)]
)
def test_another_export_is_not_taken_for_the_same(other: ClientSession) -> None:
    host = Host()
    with Reconnecting(host.open, QUICK) as disk:
        host.kill_before, host.session = once(c.CMD_READ), other
        with pytest.raises(ProtocolError, match="not the same"):
            disk.pread(1, 0)
    host.join()


def test_the_first_connection_must_succeed() -> None:
    host = Host()
    host.problems = [ConnectionRefusedError(111, "refused")]
    with pytest.raises(ConnectionRefusedError):
        Reconnecting(host.open, QUICK)


def test_close_ends_the_attempts() -> None:
    host = Host()
    tried = threading.Event()

    def refuse() -> Client:
        if host.peers:
            tried.set()
            raise ConnectionRefusedError(111, "refused")
        return host.open()

    disk = Reconnecting(refuse, Policy(attempts=1000, delay=60, longest=60))
    host.kill_before = lambda _: True

    def read() -> str:
        with pytest.raises(ConnectionClosed) as caught:
            disk.pread(1, 0)
        return str(caught.value)

    with in_thread(read) as future:
        wait_for(tried)
        disk.close()
        disk.close()
    assert future.result() == "this client has been closed"
    with pytest.raises(ConnectionClosed):
        disk.pread(1, 0)
    host.join()


def test_threads_lose_a_connection_together_and_share_the_next_one() -> None:
    host = Host()
    host.kill_before = lambda _: len(host.requests) in (20, 60, 61, 62)
    with Reconnecting(host.open, Policy(attempts=10, delay=0.001)) as disk:

        def work(n: int) -> None:
            for turn in range(40):
                disk.pwrite(bytes([turn]) * 8, 8 * n)
                assert disk.pread(8, 8 * n) == bytes([turn]) * 8

        with in_thread(lambda: work(0)), in_thread(lambda: work(1)), in_thread(lambda: work(2)):
            pass
        assert 1 <= disk.losses == len(host.peers) - 1 <= 4
    host.join()


@pytest.mark.parametrize(
    ("policy", "delays"),
    [
        (Policy(attempts=5, delay=1, factor=3, longest=5), [0, 1, 3, 5, 5]),
        (Policy(attempts=1), [0]),
        (Policy(attempts=0), []),
    ],
)
def test_delays_grow_to_a_limit(policy: Policy, delays: list[float]) -> None:
    assert policy.delays() == delays


@MODEST
@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 12)), max_size=30), st.integers(1, 40))
def test_ranges_hold_at_least_what_was_added(added: list[tuple[int, int]], most: int) -> None:
    ranges, model = Ranges(most), bytearray(80)
    for start, length in added:
        ranges.add(start, start + length)
        model[start : start + length] = b"\1" * length
    found = bytearray(80)
    last = -1
    for start, stop in ranges:
        assert last < start < stop
        last = stop
        found[start:stop] = b"\1" * (stop - start)
    assert len(ranges) <= most + 1
    assert all(f >= m for f, m in zip(found, model, strict=True))
    if len(added) <= most:
        assert found == model


@pytest.mark.parametrize("moment", ["kill_before", "kill_after"])
def test_what_a_pipeline_had_in_flight_is_submitted_again(moment: str) -> None:
    host = Host()
    seen = [0]

    def third_of_forty(_: Request) -> bool:
        seen[0] += 1
        return seen[0] % 40 == 3

    setattr(host, moment, third_of_forty)
    with Reconnecting(host.open, QUICK) as disk, disk.pipeline(depth=8) as pipeline:
        tickets = [pipeline.pwrite(bytes([n]) * 16, 16 * n) for n in range(100)]
        for ticket in tickets:
            ticket.result()
        assert host.data[:1600] == b"".join(bytes([n]) * 16 for n in range(100))
        views = [memoryview(bytearray(16)) for _ in range(100)]
        done: list[object] = []
        for n, view in enumerate(views):
            pipeline.pread_into(view, 16 * n, then=lambda ticket: done.append(ticket.error))
        pipeline.drain()
        assert b"".join(views) == host.data[:1600]
        assert done == [None] * 100
        assert disk.losses >= 3
        with pytest.raises(WritesLost):
            pipeline.flush()
        pipeline.flush()
    host.join()


def test_writes_of_a_pipeline_that_were_flushed_are_not_doubted() -> None:
    host = Host()
    with Reconnecting(host.open, QUICK) as disk, disk.pipeline() as pipeline:
        pipeline.pwrite(b"abc", 0)
        pipeline.zero(10, 5)
        pipeline.flush()
        pipeline.pwrite(b"abc", 100, fua=True).result()
        host.kill_before = once(c.CMD_READ)
        pipeline.pread_into(memoryview(bytearray(1)), 0).result()
        pipeline.flush()
        pipeline.pwrite(b"abc", 200).result()
        host.kill_before = once(c.CMD_READ)
        pipeline.pread_into(memoryview(bytearray(1)), 0).result()
        with pytest.raises(WritesLost) as caught:
            pipeline.flush()
        assert caught.value.ranges == [(200, 3)]
    host.join()


def test_a_pipeline_gives_up_after_the_attempts_and_says_so() -> None:
    host = Host()
    with Reconnecting(host.open, QUICK) as disk:
        pipeline = disk.pipeline()
        host.kill_before = lambda _: True
        ticket = pipeline.pwrite(b"x", 0)
        with pytest.raises(ConnectionClosed):
            ticket.result()
        pipeline.close()
    host.join()


def test_other_errors_of_a_pipeline_are_raised_as_they_are() -> None:
    host = Host()
    host.error = lambda _: c.NBD_ENOSPC
    with Reconnecting(host.open, QUICK) as disk:
        pipeline = disk.pipeline()
        pipeline.pwrite(b"x", 0)
        with pytest.raises(RequestError) as caught:
            pipeline.drain()
        assert (caught.value.errno, disk.losses) == (errno.ENOSPC, 0)
        with pytest.raises(RequestError):
            pipeline.pwrite(b"x", SIZE)
        pipeline.close()
    host.join()

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from fleece.block import graph as graph_module
from fleece.block.graph import Disk, DiskSession, Gate, Graph, drained
from fleece.block.memory import MemoryNode
from fleece.block.node import Filter, Node
from fleece.block.null import NullNode
from fleece.errors import AlreadyExists, DrainTimeout, NotFound
from tests.support.threads import frequent_switches, in_thread, wait_for, wait_until

BUF = 16


class SlowNode(NullNode):
    """A read tells when it is in, and stays in until it is let go."""

    def __init__(self) -> None:
        super().__init__(1 << 20)
        self.entered = threading.Event()
        self.go_on = threading.Event()
        self.inside = 0

    def pread_into(self, buf: memoryview, offset: int) -> None:
        self.inside += 1
        self.entered.set()
        wait_for(self.go_on)
        self.inside -= 1


class Resume(threading.Event):
    """The event of a disk, which also tells that somebody waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.set()
        self.waited_for = threading.Event()

    def wait(self, timeout: float | None = None) -> bool:
        self.waited_for.set()
        return super().wait(timeout)


def read(session: DiskSession) -> None:
    """What a connection does for each request."""
    with session.gate:
        session.node.pread_into(memoryview(bytearray(BUF)), 0)


def without_gates(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: users come and go as they like."""
    monkeypatch.setattr(Gate, "__enter__", lambda self: None)
    monkeypatch.setattr(Gate, "__exit__", lambda self, *_: None)


def in_flight_during_a_drain() -> int:
    """A request is in its verb when the drain begins: how many the drained disk still has."""
    node = SlowNode()
    disk = Disk("vm1", node)
    session = disk.open_session()
    counted = threading.Event()
    found = 0

    def drain() -> int:
        with drained([disk]):
            inside = node.inside
            counted.set()
            return inside

    with in_thread(lambda: read(session)):
        wait_for(node.entered)
        with in_thread(drain) as result:
            wait_until(lambda: counted.is_set() or not disk._resume.is_set())
            if not counted.wait(0.05):  # with the gate it cannot be
                node.go_on.set()
            wait_for(counted)
            found = result.result()
        node.go_on.set()
    return found


def test_a_drain_waits_for_the_request_in_flight() -> None:
    assert in_flight_during_a_drain() == 0


def test_control_without_gates_the_request_is_still_in_flight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without_gates(monkeypatch)
    assert in_flight_during_a_drain() == 1


def intrusions_under_load(drains: int = 150, users: int = 4) -> tuple[int, int, float]:
    """Busy users against many drains, each of which changes the root.

    Gives how often somebody was inside a drained disk, how often the root changed under a
    request, and the longest that a drain took to come in, in seconds.
    """
    roots: list[Node] = [NullNode(BUF, "one"), NullNode(BUF, "two")]
    disk = Disk("vm1", roots[0])
    inside, changed = [0] * users, [0] * users
    stop = threading.Event()

    def use(me: int) -> None:
        session = disk.open_session()
        while not stop.is_set():
            with session.gate:
                inside[me] = 1
                before = session.node
                time.sleep(0)
                changed[me] += session.node is not before
                inside[me] = 0
        session.close()

    intruders, longest = 0, 0.0
    threads = [threading.Thread(target=use, args=(me,)) for me in range(users)]
    for thread in threads:
        thread.start()
    wait_until(lambda: disk.sessions == users)
    for number in range(drains):
        begin = time.monotonic()
        with drained([disk]):
            longest = max(longest, time.monotonic() - begin)
            disk.root = roots[number % 2]
            time.sleep(0)
            intruders += sum(inside)
    stop.set()
    for thread in threads:
        thread.join()
    assert disk.sessions == 0
    return intruders, sum(changed), longest


def test_nobody_is_inside_a_drained_disk_and_busy_users_cannot_starve_a_drain(
    record_property: Callable[[str, object], None],
) -> None:
    intruders, changed, longest = intrusions_under_load()
    record_property("longest_drain_seconds", longest)
    assert (intruders, changed) == (0, 0)
    assert longest < 1.0, f"a drain took {longest * 1000:.0f} ms against four busy users"


def test_no_intrusion_with_frequent_thread_switches_either() -> None:
    with frequent_switches():
        assert intrusions_under_load(60)[:2] == (0, 0)


def test_control_without_gates_there_are_intrusions(monkeypatch: pytest.MonkeyPatch) -> None:
    without_gates(monkeypatch)
    with frequent_switches():
        intruders, changed, _ = intrusions_under_load(60)
    assert intruders > 0
    assert changed > 0


def test_a_drain_that_takes_too_long_is_given_up_and_all_goes_on() -> None:
    slow = SlowNode()
    stuck, idle = Disk("b", slow), Disk("a", NullNode(1 << 20))
    user, other, idle_user = stuck.open_session(), stuck.open_session(), idle.open_session()
    with in_thread(lambda: read(user)):
        wait_for(slow.entered)
        begin = time.monotonic()
        with (
            pytest.raises(DrainTimeout, match="disk 'b': a request in flight"),
            drained([idle, stuck], timeout=0.05),
        ):
            pytest.fail("a request is in flight")
        assert time.monotonic() - begin < 5
        read(idle_user)
        slow.go_on.set()
        read(other)  # its gate was taken before the time ran out, or not: it works again
    with drained([idle, stuck], timeout=0):
        pass


def test_a_second_drain_of_the_same_disk_waits_for_the_first() -> None:
    disk = Disk("vm1", NullNode(1 << 20))
    with (
        drained([disk]),
        pytest.raises(DrainTimeout, match="another operation still drains it"),
        drained([disk], timeout=0.01),
    ):
        pytest.fail("it is drained by another")
    with drained([disk, disk], timeout=0):
        pass


def got_in_while_drained(disk: Disk) -> bool:
    """Whether a session that is opened in the middle of a drain gets into its first verb."""
    inside = threading.Event()
    resume = Resume()
    disk._resume = resume

    def use() -> None:
        session = disk.open_session()
        with session.gate:
            inside.set()
        session.close()

    with drained([disk]):
        user = threading.Thread(target=use)
        user.start()
        wait_until(lambda: inside.is_set() or resume.waited_for.is_set())
        early = inside.is_set()
    wait_for(inside)
    user.join()
    return early


def test_a_session_that_is_opened_during_a_drain_waits_for_its_end() -> None:
    assert not got_in_while_drained(Disk("vm1", NullNode(1 << 20)))


def test_control_a_gate_that_does_not_look_lets_it_in(monkeypatch: pytest.MonkeyPatch) -> None:
    without_gates(monkeypatch)
    assert got_in_while_drained(Disk("vm1", NullNode(1 << 20)))


def test_a_session_may_be_closed_while_its_disk_is_drained() -> None:
    disk = Disk("vm1", NullNode(1 << 20))
    session = disk.open_session()
    with drained([disk]):
        session.close()
        session.close()
    assert disk.sessions == 0


def test_an_error_inside_a_drain_lets_the_users_in_again() -> None:
    disk = Disk("vm1", NullNode(1 << 20))
    session = disk.open_session()
    with pytest.raises(ZeroDivisionError), drained([disk]):
        raise ZeroDivisionError
    read(session)
    with drained([disk], timeout=0):
        pass


def rounds_of_opposite_drains(rounds: int, meet: Callable[[], object]) -> int:
    """Two threads drain the same two disks, named in opposite orders; how often one timed out."""
    one, two = Disk("one", NullNode(BUF)), Disk("two", NullNode(BUF))
    timeouts: list[int] = []

    def drain(*disks: Disk) -> None:
        for _ in range(rounds):
            try:
                with drained(disks, timeout=0.5):
                    meet()
            except DrainTimeout:
                timeouts.append(1)

    with in_thread(lambda: drain(one, two)), in_thread(lambda: drain(two, one)):
        pass
    return len(timeouts)


def test_group_drains_in_opposite_orders_do_not_block_each_other() -> None:
    with frequent_switches():
        assert rounds_of_opposite_drains(300, lambda: time.sleep(0)) == 0


def test_control_in_the_order_of_the_caller_they_do(monkeypatch: pytest.MonkeyPatch) -> None:
    both, seen = threading.Barrier(2), set()
    hold = Disk._hold

    @contextmanager
    def first_one_each(self: Disk, deadline: float) -> Iterator[None]:
        with hold(self, deadline):
            if threading.get_ident() not in seen:
                seen.add(threading.get_ident())
                both.wait(10)
            yield

    monkeypatch.setattr(Disk, "_hold", first_one_each)
    monkeypatch.setattr(graph_module, "sorted", lambda disks, key: disks, raising=False)
    monkeypatch.setattr(graph_module, "set", lambda disks: disks, raising=False)
    assert rounds_of_opposite_drains(1, lambda: None) >= 1


class Closing(Node):
    """Says when it is closed, and fails to if it is told so."""

    def __init__(self, name: str, closed: list[str], fails: bool = False) -> None:
        super().__init__(name, BUF)
        self._closed = closed
        self._fails = fails

    def close(self) -> None:
        self._closed.append(self.name)
        if self._fails:
            raise OSError(5, "Input/output error")


class ClosingFilter(Filter):
    def __init__(self, name: str, child: Node, closed: list[str]) -> None:
        super().__init__(name, child)
        self._closed = closed

    def close(self) -> None:
        self._closed.append(self.name)
        raise OSError(28, "No space left on device")


def test_close_closes_every_node_from_the_top_even_if_one_fails() -> None:
    closed: list[str] = []
    bottom = Closing("bottom", closed)
    disk = Disk("vm1", ClosingFilter("top", ClosingFilter("middle", bottom, closed), closed))
    with pytest.raises(OSError, match="No space"):
        disk.close()
    assert closed == ["top", "middle", "bottom"]


def test_a_graph_closes_every_disk_even_if_one_fails() -> None:
    closed: list[str] = []
    graph = Graph()
    graph.add(Disk("one", Closing("1", closed, fails=True)))
    graph.add(Disk("two", Closing("2", closed)))
    with pytest.raises(OSError, match="Input/output"):
        graph.close()
    assert sorted(closed) == ["1", "2"]
    assert len(graph) == 0


def test_filters_are_attached_on_top_and_detached_anywhere() -> None:
    base = MemoryNode(BUF)
    disk = Disk("vm1", base)
    lower = Filter("lower", base)
    disk.attach(lower)
    upper = Filter("upper", lower)
    disk.attach(upper)
    assert disk.nodes() == [upper, lower, base]
    disk.detach(lower)
    assert disk.nodes() == [upper, base]
    disk.detach(upper)
    assert disk.nodes() == [base]
    for wrong in (lambda: disk.detach(lower), lambda: disk.attach(upper.__class__("x", upper))):
        with pytest.raises(ValueError, match="disk 'vm1'"):
            wrong()


def test_a_disk_shows_what_its_root_is() -> None:
    disk = Disk("vm1", NullNode(BUF))
    assert (disk.size, disk.read_only, disk.blocking) == (BUF, False, False)
    assert disk.open_session().node is disk.root


def test_the_graph_knows_its_disks_by_name() -> None:
    graph = Graph()
    with pytest.raises(NotFound, match=r"no disk named 'vm1' \(disks: none\)"):
        graph["vm1"]
    disk = Disk("vm1", NullNode(BUF))
    graph.add(disk)
    assert graph["vm1"] is disk
    assert list(graph) == [disk]
    assert "vm1" in graph
    with pytest.raises(AlreadyExists, match="vm1"):
        graph.add(Disk("vm1", NullNode(BUF)))
    with pytest.raises(NotFound, match=r"disks: vm1"):
        graph["vm2"]

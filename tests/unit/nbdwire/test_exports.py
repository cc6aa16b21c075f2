"""Exports: names, terms, made on demand; what one connection is told of them (nbd.md §3, §10)."""

import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from fleece.block.memory import MemoryNode
from nbdwire import constants as c
from nbdwire.errors import NBDError, PolicyRefused, UnknownExport
from nbdwire.exports import Exports, OnDemand
from nbdwire.negotiate_client import client_list
from nbdwire.served import serve
from nbdwire.server import Server
from nbdwire.transport import run_handshake
from nbdwire.uri import NBDURI
from tests.support import nbdraw as raw
from tests.support.nbdraw import connected, open_socket
from tests.support.serving import serving
from tests.support.threads import in_thread, wait_for, wait_until

SIZE = 1 << 20


class Closing(MemoryNode):
    """A node that knows how often it was closed."""

    def __init__(self, size: int = SIZE) -> None:
        super().__init__(size, "closing")
        self.closed = 0

    def close(self) -> None:
        self.closed += 1
        super().close()


def listing(where: NBDURI) -> list[tuple[str, str]]:
    with open_socket(where) as sock:
        return run_handshake(sock, client_list(), None)


def asked(where: NBDURI, message: bytes) -> bytes:
    """All that the server sends until it hangs up."""
    with open_socket(where) as sock:
        sock.sendall(message)
        sock.shutdown(socket.SHUT_WR)
        found = b""
        while part := sock.recv(1 << 16):
            found += part
        return found


def option(number: int, data: bytes = b"") -> bytes:
    return b"IHAVEOPT" + number.to_bytes(4, "big") + len(data).to_bytes(4, "big") + data


def chosen(name: str) -> bytes:
    return len(name.encode()).to_bytes(4, "big") + name.encode() + b"\0\0"


# Terms


def test_one_export_has_several_names(tmp_path: Path) -> None:
    node = MemoryNode(SIZE)
    with serving(tmp_path, node) as (server, where):
        server.add("alias", node, description="the same disk", read_only=True)
        assert listing(where) == [("disk", ""), ("alias", "the same disk")]
        with connected(where) as one, connected(where, "alias") as two:
            assert one.write(4096, b"x" * 512) == 0
            assert one.ask(raw.FLUSH).error == 0
            assert two.read(4096, 512) == b"x" * 512
            assert two.session.flags & c.TFLAG_READ_ONLY
            assert two.write(0, b"y" * 512) == c.NBD_EPERM
            server.remove("disk")
            two.in_step()
        with connected(where, "alias") as client:
            client.in_step()


def test_block_sizes_are_told_and_held_to(tmp_path: Path) -> None:
    with serving(tmp_path, MemoryNode(SIZE)) as (server, where):
        server.add(
            "coarse",
            MemoryNode(SIZE),
            minimum_block=4096,
            preferred_block=65536,
            maximum_payload=1 << 19,
        )
        with connected(where, "coarse") as client:
            session = client.session
            sizes = (session.minimum_block, session.preferred_block, session.maximum_payload)
            assert sizes == (4096, 65536, 1 << 19)
            assert client.ask(raw.READ, 512, 4096).error == c.NBD_EINVAL
            assert client.read(4096, 8192) == bytes(8192)


@pytest.mark.parametrize(
    "terms",
    [
        {"minimum_block": 3},
        {"minimum_block": 0},
        {"minimum_block": 1 << 17},
        {"preferred_block": 256},
        {"minimum_block": 8192, "preferred_block": 4096},
        {"maximum_payload": 1024},
        {"maximum_payload": 64 << 20},
        {"minimum_block": 4096, "maximum_payload": 4097},
    ],
)
def test_block_sizes_that_the_specification_rules_out_are_refused(terms: dict[str, int]) -> None:
    """nbd.md §10."""
    with Server() as server:
        with pytest.raises(ValueError, match=r"block|payload"):
            server.add("disk", MemoryNode(SIZE), **terms)  # type: ignore[arg-type]
        assert server.exports == []


def test_a_size_that_clients_cannot_use_is_refused() -> None:
    """CVE-2023-5215: a size of 2**63 or more."""

    class Huge(MemoryNode):
        @property
        def size(self) -> int:  # type: ignore[override]
            return 1 << 63

        @size.setter
        def size(self, _: int) -> None: ...

    with Server() as server:
        with pytest.raises(ValueError, match=r"2\*\*63"):
            server.add("disk", Huge(SIZE))
        with pytest.raises(ValueError, match="no multiple"):
            server.add("disk", MemoryNode(SIZE + 512), minimum_block=4096)


def test_an_export_that_needs_tls_is_not_to_be_had_where_there_is_none(tmp_path: Path) -> None:
    with serving(tmp_path, MemoryNode(SIZE)) as (server, where):
        server.add("secret", MemoryNode(SIZE), tls_required=True)
        with pytest.raises(PolicyRefused, match="needs TLS"), connected(where, "secret"):
            pass
        reply = asked(where, b"\0\0\0\3" + option(c.OPT_EXPORT_NAME, b"secret"))
        assert len(reply) == 18, "the greeting, and not a byte more"


def test_a_default_of_its_own_goes_before_the_servers(tmp_path: Path) -> None:
    with Server(default="one") as server:
        server.add("one", MemoryNode(512))
        server.add("two", MemoryNode(1024))
        where = server.listen(NBDURI(socket=str(tmp_path / "a")))
        other = server.listen(NBDURI(socket=str(tmp_path / "b")), default="two")
        for place, size in ((where, 512), (other, 1024)):
            with connected(place, "") as client:
                assert client.session.size == size
        server.add("", MemoryNode(2048))
        with connected(where, "") as client:
            assert client.session.size == 2048


# On demand


class Maker:
    """An ``on_export`` that writes down what it is asked for."""

    def __init__(self, make: Callable[[str], MemoryNode | None]) -> None:
        self.names: list[str] = []
        self.made: list[MemoryNode] = []
        self._make = make

    def __call__(self, name: str) -> MemoryNode | None:
        self.names.append(name)
        node = self._make(name)
        if node is not None:
            self.made.append(node)
        return node


def test_an_export_is_made_when_a_client_names_it_and_closed_when_the_last_one_leaves(
    tmp_path: Path,
) -> None:
    maker = Maker(lambda name: Closing() if name.startswith("vm") else None)
    with serving(tmp_path, MemoryNode(SIZE), on_export=maker) as (server, where):
        with connected(where, "vm1") as one:
            one.write(0, b"x" * 512)
            with connected(where, "vm1") as two:
                assert two.read(0, 512) == b"x" * 512
            wait_until(lambda: server.clients() == 1)
            one.in_step()
            (node,) = maker.made
            assert (maker.names, node.closed) == (["vm1"], 0)  # type: ignore[attr-defined]
            assert server.clients("vm1") == 1
        wait_until(lambda: server.clients() == 0)
        assert node.closed == 1  # type: ignore[attr-defined]
        with connected(where, "vm1") as client:
            assert client.read(0, 512) == bytes(512), "it is another one"
        with pytest.raises(UnknownExport), connected(where, "other"):
            pass
        assert maker.names == ["vm1", "vm1", "other"]


def test_nothing_is_made_before_a_client_names_an_export(tmp_path: Path) -> None:
    """CVE-2019-14850: nbdkit opened its backend on connect."""
    maker = Maker(lambda _: Closing())
    with serving(tmp_path, MemoryNode(SIZE), on_export=maker) as (_, where):
        options = option(c.OPT_LIST) + option(c.OPT_STRUCTURED_REPLY) + option(99, b"vm1")
        asked(where, b"\0\0\0\3" + options + option(c.OPT_ABORT))
        asked(where, b"")
        assert listing(where) == [("disk", "")]
        with connected(where) as client:
            client.in_step()
        assert maker.names == []


def test_a_client_that_names_one_after_another_holds_the_last_alone(tmp_path: Path) -> None:
    maker = Maker(lambda _: Closing())
    with serving(tmp_path, MemoryNode(SIZE), on_export=maker) as (server, where):
        infos = b"".join(option(c.OPT_INFO, chosen(f"vm{index}")) for index in range(50))
        asked(where, b"\0\0\0\3" + infos + option(c.OPT_INFO, chosen("disk")))
        wait_until(lambda: server.clients() == 0)
        assert len(maker.made) == 50
        assert [node.closed for node in maker.made] == [1] * 50  # type: ignore[attr-defined]


def test_the_same_export_is_not_made_twice_at_once(tmp_path: Path) -> None:
    inside, most, lock = [], [], threading.Lock()

    def make(name: str) -> MemoryNode:
        inside.append(name)
        most.append(len(inside))
        with lock:
            pass
        inside.remove(name)
        return Closing()

    with serving(tmp_path, MemoryNode(SIZE), on_export=make) as (server, where):
        gate = threading.Barrier(8)

        def come(_: int) -> None:
            with connected(where, "vm") as client:
                client.in_step()
                gate.wait(20)

        with ThreadPoolExecutor(8) as pool:
            with lock:
                futures = [pool.submit(come, index) for index in range(8)]
                wait_until(lambda: server.clients() == 8 and inside)
                assert inside == ["vm"]
            for future in futures:
                future.result(20)
    assert most == [1]


def test_different_exports_are_made_at_the_same_time(tmp_path: Path) -> None:
    """The control of the test above: the lock is one for each name."""
    both = threading.Barrier(2)

    def make(_: str) -> MemoryNode:
        both.wait(20)
        return Closing()

    def come() -> None:
        with connected(where, "a") as client:
            client.in_step()

    with (
        serving(tmp_path, MemoryNode(SIZE), on_export=make) as (_, where),
        in_thread(come),
        connected(where, "b") as client,
    ):
        client.in_step()


def test_an_export_is_not_made_again_while_it_is_being_closed() -> None:
    closing, go_on, alive = threading.Event(), threading.Event(), []

    class Slow(Closing):
        def close(self) -> None:
            closing.set()
            wait_for(go_on)
            alive.remove(self)
            super().close()

    def make(_: str) -> MemoryNode:
        assert not alive, "two of them, of the same name"
        alive.append(Slow())
        return alive[-1]  # type: ignore[no-any-return]

    demand = OnDemand(make)
    first = demand.use("x", "one")
    with in_thread(lambda: demand.release("x", "one")):
        wait_for(closing)
        with in_thread(lambda: demand.use("x", "two")) as second:
            assert not second.done()
            go_on.set()
    assert second.result() is not first
    assert demand.current("x") is second.result()
    demand.release("x", "two")
    assert demand.current("x") is None


@pytest.mark.parametrize("problem", [RuntimeError("no luck"), OSError(5, "broken"), KeyError("x")])
def test_an_error_in_making_is_an_unknown_export_and_a_line_in_the_log(
    tmp_path: Path, problem: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    def make(_: str) -> MemoryNode:
        raise problem

    with serving(tmp_path, MemoryNode(SIZE), on_export=make) as (_, where):
        for _ in range(2):
            with pytest.raises(UnknownExport), connected(where, "vm"):
                pass
        with connected(where) as client:
            client.in_step()
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert errors == [f"export 'vm' cannot be made: {problem!r}"] * 2


def test_what_cannot_be_served_is_an_unknown_export(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    maker: Callable[[str], object] = lambda _: "not an export"  # noqa: E731
    with (
        serving(tmp_path, MemoryNode(SIZE), on_export=maker) as (_, where),
        pytest.raises(UnknownExport),
        connected(where, "vm"),
    ):
        pass
    assert "export 'vm' cannot be made" in caplog.text


def test_an_added_export_goes_before_one_that_would_be_made(tmp_path: Path) -> None:
    maker = Maker(lambda _: Closing())
    with serving(tmp_path, MemoryNode(512), default="disk", on_export=maker) as (server, where):
        for name in ("disk", ""):
            with connected(where, name) as client:
                assert client.session.size == 512
        assert maker.names == []
        with connected(where, "vm") as client:
            client.in_step()
            server.add("vm", MemoryNode(1024))
            client.in_step()
            with connected(where, "vm") as other:
                assert other.session.size == 1024


def test_an_export_made_on_demand_can_be_taken_away(tmp_path: Path) -> None:
    maker = Maker(lambda _: Closing())
    with serving(tmp_path, MemoryNode(SIZE), on_export=maker) as (server, where):
        with connected(where, "vm") as client:
            client.in_step()
            server.remove("vm")
            assert client.hung_up()
        (node,) = maker.made
        assert node.closed == 1  # type: ignore[attr-defined]
        with pytest.raises(KeyError):
            server.remove("vm")


def test_exports_may_be_taken_away_while_clients_come(tmp_path: Path) -> None:
    """Whatever the order, a client gets in and is hung up, or is told; nobody is left behind."""
    with serving(tmp_path, MemoryNode(SIZE)) as (server, where):
        over = threading.Event()

        def come(_: int) -> int:
            count = 0
            while not over.is_set():
                with (
                    suppress(NBDError, OSError, EOFError),
                    connected(where, "vm") as client,
                ):
                    assert client.ask(raw.READ, 0, 1).error in (0, c.NBD_ESHUTDOWN)
                    count += 1
            return count

        with ThreadPoolExecutor(4) as pool, ExitStack() as stack:
            stack.callback(over.set)
            futures = [pool.submit(come, index) for index in range(4)]
            for _ in range(15):
                server.add("vm", MemoryNode(SIZE))
                wait_until(lambda: server.clients("vm"))
                server.remove("vm")
                assert server.clients("vm") == 0
            over.set()
            assert sum(future.result(20) for future in futures) > 0


def test_a_name_is_entered_only_if_it_stands_for_the_same_thing_still() -> None:
    exports = Exports()
    first, second = serve("x", MemoryNode(SIZE)), serve("x", MemoryNode(SIZE))
    assert first != second
    exports.add(first)
    entered: list[str] = []
    assert exports.enter(first, lambda: entered.append("first"))
    exports.remove("x")
    exports.add(second)
    assert not exports.enter(first, lambda: entered.append("again"))
    assert entered == ["first"]

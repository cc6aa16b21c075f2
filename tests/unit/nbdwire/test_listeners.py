"""Where a server listens: TCP, Unix, vsock, inherited sockets; sockets left behind and taken."""

import errno
import os
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from fleece.block.memory import MemoryNode
from nbdwire import listeners as listeners_module
from nbdwire.errors import URIError
from nbdwire.listeners import Inherited, inherited, uri_of
from nbdwire.negotiate_client import client_handshake
from nbdwire.server import Server
from nbdwire.transport import connect_socket, run_handshake
from nbdwire.uri import NBDURI
from tests.support.nbdraw import Raw, connected, open_socket
from tests.support.serving import serving
from tests.support.threads import wait_until

HOOK = Path(__file__).resolve().parents[3]


def unix(path: Path) -> NBDURI:
    return NBDURI(socket=str(path))


def refused(where: NBDURI) -> OSError:
    """The error of listening there."""
    with Server() as server:
        try:
            server.listen(where)
        except OSError as problem:
            assert server.listeners == []
            return problem
    raise AssertionError(f"it listens at {where}")


def test_the_socket_of_a_killed_server_is_replaced(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "nbd.sock"))
        dead.listen()
    assert (tmp_path / "nbd.sock").exists()
    with serving(tmp_path, MemoryNode(4096)) as (_, where), connected(where) as client:
        client.in_step()
    assert not (tmp_path / "nbd.sock").exists()


def test_the_socket_of_a_living_server_is_in_use_and_stays(tmp_path: Path) -> None:
    with serving(tmp_path, MemoryNode(4096)) as (_, where):
        problem = refused(where)
        assert (problem.errno, problem.filename) == (errno.EADDRINUSE, where.socket)
        with connected(where) as client:
            client.in_step()


def test_a_server_too_busy_to_accept_is_alive_all_the_same(tmp_path: Path) -> None:
    """Its backlog is full: whoever connects and waits would wait for ever."""
    path = tmp_path / "busy"
    with socket.socket(socket.AF_UNIX) as busy:
        busy.bind(str(path))
        busy.listen(0)
        with socket.socket(socket.AF_UNIX) as first:
            first.connect(str(path))
            assert refused(unix(path)).errno == errno.EADDRINUSE


@pytest.mark.parametrize("kind", ["file", "directory", "dangling", "datagram"])
def test_whatever_else_is_at_the_path_is_in_use_and_stays(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "here"
    if kind == "file":
        path.write_text("precious")
    elif kind == "directory":
        path.mkdir()
    elif kind == "dangling":
        path.symlink_to(tmp_path / "nowhere")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagram:
        if kind == "datagram":
            datagram.bind(str(path))
        assert refused(unix(path)).errno == errno.EADDRINUSE
    assert os.path.lexists(path)
    if kind == "file":
        assert path.read_text() == "precious"


def test_a_path_that_cannot_be_had_is_an_error_that_names_it(tmp_path: Path) -> None:
    missing = tmp_path / "no" / "such" / "nbd.sock"
    assert (refused(unix(missing)).errno, refused(unix(missing)).filename) == (
        errno.ENOENT,
        str(missing),
    )
    long = tmp_path / ("x" * 120)
    assert refused(unix(long)).filename == str(long)


def test_a_port_that_is_taken_is_an_error(tmp_path: Path) -> None:
    with serving(tmp_path, MemoryNode(4096), tcp=True) as (_, where):
        assert where.port != 0
        assert refused(where).errno == errno.EADDRINUSE


def test_a_port_is_free_again_at_once(tmp_path: Path) -> None:
    with serving(tmp_path, MemoryNode(4096), tcp=True) as (server, where):
        with connected(where) as client:
            client.in_step()
            server.stop()  # the server closes first: its side is in TIME_WAIT
        with Server() as again:
            assert again.listen(where).port == where.port


def test_a_name_with_several_addresses_is_tried_until_one_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = (socket.SOCK_STREAM, 0, "")
    answers: list[Any] = [
        (socket.AF_INET, *stream, ("192.0.2.1", 0)),  # nobody's: EADDRNOTAVAIL
        (socket.AF_INET, *stream, ("127.0.0.1", 0)),
    ]
    monkeypatch.setattr(listeners_module.socket, "getaddrinfo", lambda *_, **__: answers)
    with Server() as server:
        assert server.listen(NBDURI(host="many", port=0)).port
    answers.reverse()
    answers.pop(0)
    assert refused(NBDURI(host="many")).errno == errno.EADDRNOTAVAIL


def test_a_port_in_use_is_not_evaded_by_another_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(tmp_path, MemoryNode(4096), tcp=True) as (_, where):
        stream = (socket.SOCK_STREAM, 0, "")
        answers = [
            (socket.AF_INET, *stream, ("127.0.0.1", where.port)),
            (socket.AF_INET, *stream, ("127.0.0.2", where.port)),
        ]
        monkeypatch.setattr(listeners_module.socket, "getaddrinfo", lambda *_, **__: answers)
        assert refused(NBDURI(host="many")).errno == errno.EADDRINUSE


def test_an_abstract_socket_needs_no_file() -> None:
    where = NBDURI(socket=f"\0fleece-test-{os.getpid()}")
    with Server() as server:
        server.add("disk", MemoryNode(4096))
        server.listen(where)
        with connected(where) as client:
            client.in_step()


def test_one_server_listens_in_several_places(tmp_path: Path) -> None:
    with serving(tmp_path, MemoryNode(4096)) as (server, first):
        second = server.listen("nbd://127.0.0.1:0")
        assert server.listeners == [first, second]
        for where in (first, second):
            with connected(where) as client:
                client.in_step()


def test_a_socket_that_somebody_put_in_our_place_is_not_removed(tmp_path: Path) -> None:
    with serving(tmp_path, MemoryNode(4096)) as (server, where):
        os.rename(where.socket, tmp_path / "ours")
        Path(where.socket).write_text("theirs")
        server.stop()
        assert Path(where.socket).read_text() == "theirs"


# TCP, all addresses


def dual(monkeypatch: pytest.MonkeyPatch, port: int = 0) -> None:
    """localhost as it is on most hosts: IPv6 and IPv4."""

    def addresses(_host: str, port: int, **_: Any) -> list[Any]:
        return [
            (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", port, 0, 0)),
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port)),
        ]

    monkeypatch.setattr(listeners_module.socket, "getaddrinfo", addresses)


def test_a_name_with_two_addresses_is_listened_at_on_both(monkeypatch: pytest.MonkeyPatch) -> None:
    dual(monkeypatch)
    with Server("nbd://localhost:0") as server:
        server.add("disk", MemoryNode(4096))
        (where,) = server.listeners
        monkeypatch.undo()
        for host in ("::1", "127.0.0.1"):
            with connected(NBDURI(host=host, port=where.port)) as client:
                client.in_step()
        assert str(where) == f"nbd://localhost:{where.port}/"


def test_a_chosen_port_that_is_taken_on_one_address_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        dual(monkeypatch)
        assert refused(NBDURI(host="localhost", port=port)).errno == errno.EADDRINUSE
    with Server() as server:
        assert server.listen(NBDURI(host="localhost", port=port)).port == port


def test_the_ipv6_wildcard_means_ipv4_too() -> None:
    with Server("nbd://[::]:0") as server:
        server.add("disk", MemoryNode(4096))
        (where,) = server.listeners
        for host in ("::1", "127.0.0.1"):
            with connected(NBDURI(host=host, port=where.port)) as client:
                client.in_step()


def test_one_ipv6_address_means_that_address_alone() -> None:
    with Server("nbd://[::1]:0") as server:
        port = server.listeners[0].port
        assert str(server.listeners[0]) == f"nbd://[::1]:{port}/"
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))


# vsock


def test_vsock_listens_and_its_port_can_be_chosen_by_the_system() -> None:
    with Server() as server:
        server.add("disk", MemoryNode(4096))
        where = vsock(server)
        assert where.vsock
        assert 0 < where.port < 0xFFFFFFFF
        assert server.listeners == [where]


def test_a_client_comes_over_vsock() -> None:
    with Server() as server:
        server.add("disk", MemoryNode(4096))
        port = vsock(server).port
        local = NBDURI(host="1", port=port, vsock=True)  # VMADDR_CID_LOCAL
        try:
            sock = connect_socket(local, 0.5)
        except OSError as problem:
            pytest.skip(f"this kernel has no vsock loopback (module vsock_loopback): {problem}")
        with sock:
            session = run_handshake(sock, client_handshake("disk", extended=False), None)
            sock.settimeout(20)
            Raw(sock, session).in_step()


def vsock(server: Server) -> NBDURI:
    try:
        return server.listen(NBDURI(port=0, vsock=True))
    except OSError as problem:
        pytest.skip(f"this kernel has no vsock: {problem}")


# Sockets that others made


def test_a_bound_socket_is_listened_at_and_its_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "given.sock"
    given = socket.socket(socket.AF_UNIX)
    given.bind(str(path))  # and does not listen yet
    with Server(given) as server:
        server.add("disk", MemoryNode(4096))
        assert server.listeners == [unix(path)]
        with connected(unix(path)) as client:
            client.in_step()
    assert path.exists(), "whoever made it removes it"
    assert given.fileno() == -1


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_a_descriptor_of_a_listening_socket_will_do(family: socket.AddressFamily) -> None:
    host = "::1" if family == socket.AF_INET6 else "127.0.0.1"
    given = socket.create_server((host, 0), family=family)
    port = given.getsockname()[1]
    with Server() as server:
        server.add("disk", MemoryNode(4096))
        where = server.listen(given.detach())
        assert where == NBDURI(host=host, port=port)
        with connected(where) as client:
            client.in_step()


def test_an_abstract_socket_of_others_is_known_by_its_name() -> None:
    name = f"\0fleece-given-{os.getpid()}"
    given = socket.socket(socket.AF_UNIX)
    given.bind(name)
    with Server(given) as server:
        server.add("disk", MemoryNode(4096))
        assert server.listeners == [NBDURI(socket=name)]
        with connected(NBDURI(socket=name)) as client:
            client.in_step()


def test_what_cannot_be_listened_at_is_refused_in_one_line(tmp_path: Path) -> None:
    with ExitStack() as stack, Server() as server:
        ours, theirs = map(stack.enter_context, socket.socketpair())
        datagram = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        for bad, why in ((ours, "connected already"), (datagram, "no stream socket")):
            with pytest.raises(ValueError, match=why):
                server.listen(bad)
        reading, writing = os.pipe()
        stack.callback(os.close, reading)
        stack.callback(os.close, writing)
        with pytest.raises(OSError, match="non-socket"):
            server.listen(reading)
        assert server.listeners == []
        assert theirs.fileno() >= 0


def test_one_end_of_a_socketpair_is_served(tmp_path: Path) -> None:
    with Server() as server:
        server.add("disk", MemoryNode(4096))
        ours, theirs = socket.socketpair()
        server.serve_socket(ours)
        with theirs:
            session = run_handshake(theirs, client_handshake("disk", extended=False), None)
            theirs.settimeout(20)
            Raw(theirs, session).in_step()
        wait_until(lambda: server.clients() == 0)
        assert server.listeners == []


def test_a_tls_uri_needs_something_to_do_tls_with() -> None:
    with Server() as server, pytest.raises(URIError, match="needs tls"):
        server.listen("nbds://127.0.0.1:0")


ACTIVATED = """
import os, sys
from nbdwire.listeners import inherited, uri_of
for item in inherited(sys.argv[1:] or None):
    print(item.name, uri_of(item.socket), os.get_inheritable(item.socket.fileno()))
print([key for key in os.environ if key.startswith("LISTEN_")])
"""


def activated(tmp_path: Path, environment: dict[str, str], *names: str) -> list[str]:
    """Run a program as systemd would, with two sockets from descriptor 3 on; its output."""
    with ExitStack() as stack:
        given = []
        for name in ("a", "b"):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX))
            sock.bind(str(tmp_path / name))
            sock.listen()
            given.append(sock.fileno())
        # systemd puts them there between fork and exec, and only then knows the process id.
        start = (
            "import fcntl, os, sys\n"
            f"high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 100) for fd in {given}]\n"
            "for target, fd in enumerate(high, 3): os.dup2(fd, target)\n"
            "if 'LISTEN_PID' not in os.environ: os.environ['LISTEN_PID'] = str(os.getpid())\n"
            "os.execv(sys.executable, [sys.executable, '-c', *sys.argv[1:]])\n"
        )
        result = subprocess.run(
            [sys.executable, "-c", start, ACTIVATED, *names],
            env={"PYTHONPATH": str(HOOK / "nbd"), **environment},
            pass_fds=given,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    return (result.stdout or result.stderr.splitlines()[-1]).splitlines()


def test_sockets_of_systemd_come_with_their_names(tmp_path: Path) -> None:
    environment = {"LISTEN_FDS": "2", "LISTEN_FDNAMES": "public:admin"}
    assert activated(tmp_path, environment) == [
        f"public nbd+unix:///?socket={tmp_path}/a False",
        f"admin nbd+unix:///?socket={tmp_path}/b False",
        "[]",
    ]
    (tmp_path / "a").unlink()
    (tmp_path / "b").unlink()
    assert activated(tmp_path, environment, "admin")[:-1] == [
        f"admin nbd+unix:///?socket={tmp_path}/b False"
    ]


def test_sockets_of_systemd_need_no_names(tmp_path: Path) -> None:
    lines = activated(tmp_path, {"LISTEN_FDS": "2"})
    assert [line.split()[0] for line in lines[:2]] == ["unknown", "unknown"]


def test_sockets_that_were_meant_for_another_process_are_left_alone(tmp_path: Path) -> None:
    assert activated(tmp_path, {"LISTEN_FDS": "2", "LISTEN_PID": "1"}) == ["[]"]
    assert inherited() == []


@pytest.mark.parametrize(
    ("environment", "why"),
    [
        ({"LISTEN_FDS": "two"}, "no number of sockets"),
        ({"LISTEN_FDS": "-1"}, "no number of sockets"),
        ({"LISTEN_FDS": "99999"}, "no number of sockets"),
        ({"LISTEN_FDS": "2", "LISTEN_FDNAMES": "one"}, "1 names for 2 sockets"),
    ],
)
def test_an_environment_that_makes_no_sense_is_refused(
    tmp_path: Path, environment: dict[str, str], why: str
) -> None:
    (line,) = activated(tmp_path, environment)
    assert line.startswith("ValueError: ")
    assert why in line


def test_an_inherited_socket_is_served_as_any_other(tmp_path: Path) -> None:
    sock = socket.create_server(("127.0.0.1", 0))
    item = Inherited("public", sock)
    with Server() as server:
        server.add("disk", MemoryNode(4096))
        assert server.listen(item.socket) == uri_of(sock)
        with connected(server.listeners[0]) as client:
            client.in_step()


# The thread that accepts


def test_a_process_without_descriptors_accepts_later_and_still_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real, failures = socket.socket.accept, []

    def accept(sock: socket.socket) -> Any:
        if len(failures) < 2:
            failures.append(OSError(errno.EMFILE, os.strerror(errno.EMFILE)))
            raise failures[-1]
        return real(sock)

    with serving(tmp_path, MemoryNode(4096)) as (_, where):
        monkeypatch.setattr(socket.socket, "accept", accept)
        with connected(where) as client:
            client.in_step()
        # Two failures, one line: it would be ten lines a second for as long as it lasts.
        assert sum("cannot accept clients" in message for message in caplog.messages) == 1
        failures.clear()
        with open_socket(where):
            wait_until(lambda: failures)
        began = time.monotonic()
    assert time.monotonic() - began < 2

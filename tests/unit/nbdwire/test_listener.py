"""Where a server listens: sockets left behind, taken, impossible."""

import errno
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from fleece.block.memory import MemoryNode
from nbdwire import server as server_module
from nbdwire.server import Server
from nbdwire.uri import NBDURI
from tests.support.nbdraw import connected
from tests.support.serving import serving


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
    monkeypatch.setattr(server_module.socket, "getaddrinfo", lambda *_, **__: answers)
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
        monkeypatch.setattr(server_module.socket, "getaddrinfo", lambda *_, **__: answers)
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

# SPDX-License-Identifier: Apache-2.0
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fleece import errors
from fleece.control import qmp
from fleece.control.client import ControlClient
from fleece.errors import CommandNotFound, ControlError, DaemonError, FleeceError
from tests.support.control import FakeService, serving


def tree(kind: type[FleeceError] = FleeceError) -> Iterator[type[FleeceError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from tree(child)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "control.sock")


@contextmanager
def answering(path: str, *answers: bytes) -> Iterator[None]:
    """A server that says these things, one after each thing it hears, whatever that is."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()

        def serve() -> None:
            with listener.accept()[0] as sock:
                for answer in answers:
                    sock.sendall(answer)
                    if not sock.recv(65536):
                        return

        thread = threading.Thread(target=serve)
        thread.start()
        yield
        thread.join(20)


GREETING = qmp.encode(qmp.greeting())
DONE = b'{"return": {}}\r\n'


def test_every_error_class_arrives_as_itself(path: str) -> None:
    kinds = list(tree())
    assert len(kinds) > 20

    class Failing(FakeService):
        def snapshot_drop(self, name: str) -> dict[str, Any]:
            raise kinds[int(name)](f"reason {name}")

    with serving(path, Failing()), ControlClient(path) as client:
        for number, kind in enumerate(kinds):
            with pytest.raises(FleeceError) as caught:
                client.execute("x-fleece-snapshot-drop", name=str(number))
            assert type(caught.value) is kind
            assert str(caught.value) == f"reason {number}"


def test_an_error_of_another_program_is_a_control_error() -> None:
    assert type(qmp.exception({"class": "GenericError", "desc": "x"})) is ControlError
    assert type(qmp.exception({"class": "CommandNotFound", "desc": "x"})) is CommandNotFound
    assert type(qmp.exception({"class": "G", "desc": "x", "data": {"code": "?"}})) is ControlError
    assert type(qmp.exception(None)) is ControlError


def test_arguments_get_dashes_and_what_is_none_is_left_out(path: str) -> None:
    service = FakeService()
    with serving(path, service), ControlClient(path) as client:
        client.execute("x-fleece-snapshot-create", disks=["a"], cluster_size=4096, lease=None)
    ((_, disks, options),) = service.calls
    assert disks == ["a"]
    assert options["cluster_size"] == 4096
    assert options["lease"] is None


def test_events_between_commands_are_kept_in_order(path: str) -> None:
    with serving(path, FakeService()) as server, ControlClient(path) as client:
        for number in range(3):
            server.events.emit("X_FLEECE_LEASE_EXPIRED", {"name": str(number)})
        client.execute("query-version")
        server.events.emit("X_FLEECE_LEASE_EXPIRED", {"name": "3"})
        events = client.events(timeout=20)
        assert [next(events)["data"]["name"] for _ in range(4)] == ["0", "1", "2", "3"]
        server.stop()
        assert list(events) == []


def test_nobody_there_says_how_to_start_a_daemon(tmp_path: Path) -> None:
    stale = tmp_path / "stale.sock"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(stale))
    for path in (tmp_path / "none.sock", stale, tmp_path / "no" / "directory.sock"):
        with pytest.raises(DaemonError) as caught:
            ControlClient(str(path))
        assert str(caught.value).startswith(
            f"no fleece daemon answers at {path}; start one with: fleece serve"
        )


@pytest.mark.parametrize("path", ["/" + "x" * 200, "a\0b", ""])
def test_a_path_that_no_socket_can_have_is_an_error_of_one_line(path: str) -> None:
    with pytest.raises(DaemonError) as caught:
        ControlClient(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "answer", [b"NBDMAGICIHAVEOPT\0\0", b"SSH-2.0\r\n", b"[1]\r\n", b'{"x": 1}\r\n', b"{]\r\n"]
)
def test_another_kind_of_server_is_recognised(path: str, answer: bytes) -> None:
    with answering(path, answer), pytest.raises(ControlError, match="is not a fleece daemon's"):
        ControlClient(path, timeout=20)


def test_a_reply_that_is_neither_result_nor_error_is_refused(path: str) -> None:
    with answering(path, GREETING, b'{"x": 1}\n'), pytest.raises(ControlError):
        ControlClient(path)


@pytest.mark.parametrize("answers", [(b"",), (GREETING,), (GREETING, b'{"return'), (b"{",)])
def test_a_daemon_that_goes_away_is_reported(path: str, answers: tuple[bytes, ...]) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()

        def serve() -> None:
            with listener.accept()[0] as sock:
                sock.sendall(answers[0])
                for answer in answers[1:]:
                    sock.recv(65536)
                    sock.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(DaemonError, match="went away"):
            ControlClient(path)
        thread.join(20)


def test_a_daemon_that_hangs_is_given_up(path: str) -> None:
    with (
        answering(path, GREETING, DONE, b""),
        ControlClient(path) as client,
    ):
        client._timeout = 0.05
        with pytest.raises(DaemonError, match=r"did not answer within 0\.05 s"):
            client.execute("query-version")


def test_codes_and_exit_statuses_are_unique() -> None:
    kinds = list(tree())
    assert len({kind.code for kind in kinds}) == len(kinds)
    assert len({kind.exit_status for kind in kinds}) == len(kinds)
    assert all(kind.__module__ == errors.__name__ for kind in kinds)

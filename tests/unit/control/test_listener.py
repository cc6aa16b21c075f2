# SPDX-License-Identifier: Apache-2.0
import fcntl
import os
import socket
import stat
import threading
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest

from fleece.control import listener as listener_module
from fleece.control.listener import Listener
from fleece.errors import AddressError


def test_a_socket_left_by_a_killed_daemon_is_replaced(tmp_path: Path) -> None:
    path = str(tmp_path / "c.sock")
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(path)
    dead.listen()
    dead.close()  # as SIGKILL does: the file stays
    made = Listener(path)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    made.close()
    assert not os.path.exists(path)


def test_a_live_socket_is_left_alone(tmp_path: Path) -> None:
    path = str(tmp_path / "c.sock")
    first = Listener(path)
    with pytest.raises(AddressError, match=f"a fleece daemon already listens at {path}"):
        Listener(path)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
    first.close()


def test_a_live_socket_with_a_full_backlog_is_not_taken_for_a_dead_one(tmp_path: Path) -> None:
    path = str(tmp_path / "c.sock")
    with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as waiting:
        busy.bind(path)
        busy.listen(0)
        waiting.connect(path)
        with pytest.raises(AddressError, match="already listens"):
            Listener(path)


@pytest.mark.parametrize("kind", ["file", "directory", "symlink"])
def test_what_is_not_a_socket_is_never_removed(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "c.sock"
    if kind == "file":
        path.write_text("precious")
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AddressError, match="is not a socket"):
        Listener(str(path))
    assert os.path.lexists(path)


def test_a_path_that_no_socket_can_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AddressError, match="1 to 107 bytes, this one"):
        Listener(str(tmp_path / ("x" * 108)))
    with pytest.raises(AddressError, match="this one 0"):
        Listener("")


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AddressError, match=r"cannot listen at .* is not a directory$"):
        Listener(str(tmp_path / "file" / "c.sock"))


def test_the_directory_is_made_for_the_owner_alone(tmp_path: Path) -> None:
    made = Listener(str(tmp_path / "run" / "c.sock"))
    assert stat.S_IMODE(os.stat(tmp_path / "run").st_mode) == 0o700
    made.close()


def test_closing_does_not_remove_the_socket_of_a_successor(tmp_path: Path) -> None:
    path = str(tmp_path / "c.sock")
    first = Listener(path)
    os.unlink(path)
    second = Listener(path)
    first.close()
    assert os.path.exists(path)
    second.close()


@pytest.mark.parametrize("locked", [True, False])
def test_the_lock_is_what_keeps_a_fresh_socket_from_being_found_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locked: bool
) -> None:
    """Another daemon starts just when the first has found the old socket dead.

    With the lock it is refused. The control: without it both believe that the socket is theirs.
    """
    monkeypatch.setattr(listener_module, "_LOCK_SECONDS", 0.0)
    if not locked:
        monkeypatch.setattr(listener_module, "_directory_lock", lambda path: nullcontext())
    path = str(tmp_path / "c.sock")
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(path)
    others: list[Listener] = []
    somebody_listens = listener_module._somebody_listens

    def overtaken(path: str) -> bool:
        monkeypatch.setattr(listener_module, "_somebody_listens", somebody_listens)
        answer = somebody_listens(path)
        with suppress(AddressError):
            others.append(Listener(path))
        return answer

    monkeypatch.setattr(listener_module, "_somebody_listens", overtaken)
    made = Listener(path)
    assert len(others) == (0 if locked else 1)
    for listener in (made, *others):
        listener.close()


def test_of_two_daemons_that_start_at_once_one_gets_the_socket(tmp_path: Path) -> None:
    for turn in range(20):
        path = str(tmp_path / f"{turn}.sock")
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(path)
        barrier = threading.Barrier(4)
        made: list[Listener] = []
        refused: list[AddressError] = []

        def start(barrier: threading.Barrier = barrier, path: str = path) -> None:
            barrier.wait(20)
            try:
                made.append(Listener(path))  # noqa: B023
            except AddressError as error:
                refused.append(error)  # noqa: B023

        threads = [threading.Thread(target=start) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert (len(made), len(refused)) == (1, 3)
        made[0].close()


def test_a_directory_locked_by_a_stranger_is_given_up_in_bounded_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener_module, "_LOCK_SECONDS", 0.0)
    directory = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        with pytest.raises(AddressError, match="holds a lock"):
            Listener(str(tmp_path / "c.sock"))
    finally:
        os.close(directory)

# SPDX-License-Identifier: Apache-2.0
"""A listening unix socket that only we may use, in the place of a dead one but never a live one."""

import fcntl
import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from fleece.errors import AddressError

_BACKLOG: Final = 64
_MAX_PATH: Final = 107  # unix(7): sun_path holds 108 bytes, the last one is zero
_LOCK_SECONDS: Final = 5.0


class Listener:
    """A bound, listening socket of mode 0600 at ``path``. AddressError when that cannot be had.

    A socket file where nobody listens (its daemon was killed) is replaced. ``close`` removes the
    file if it is still ours.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        _check_length(path)
        try:
            _make_directory(Path(path).parent)
            with _directory_lock(path):
                _remove_stale(path)
                self.socket = _bound(path)
            self._identity = _identity(path)
        except OSError as error:
            text = f"cannot listen at {path}: {error.strerror or error}"
            raise AddressError(text) from error

    def close(self) -> None:
        """Stop listening and remove the socket file."""
        with suppress(OSError):
            if _identity(self.path) == self._identity:
                os.unlink(self.path)
        self.socket.close()


def _check_length(path: str) -> None:
    length = len(os.fsencode(path))
    if not 0 < length <= _MAX_PATH:
        raise AddressError(
            f"a socket path has 1 to {_MAX_PATH} bytes, this one {length}: {path}; "
            "choose a shorter one with --control"
        )


def _make_directory(directory: Path) -> None:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(f"{directory} is not a directory") from None


def _identity(path: str) -> tuple[int, int]:
    found = os.stat(path, follow_symlinks=False)
    return found.st_dev, found.st_ino


@contextmanager
def _directory_lock(path: str) -> Iterator[None]:
    # Two daemons that start at once must not each find the other's fresh socket stale. The lock is
    # on the directory, so that no lock file is left lying about.
    directory = os.open(Path(path).parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _lock(directory, path)
        yield
    finally:
        os.close(directory)


def _lock(directory: int, path: str) -> None:
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            return fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise AddressError(
                    f"another program holds a lock on the directory of {path}"
                ) from None
            time.sleep(0.01)


def _remove_stale(path: str) -> None:
    try:
        mode = os.stat(path, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise AddressError(f"{path} exists and is not a socket; choose another path with --control")
    if _somebody_listens(path):
        raise AddressError(
            f"a fleece daemon already listens at {path}; "
            "end it first, or choose another path with --control"
        )
    os.unlink(path)


def _somebody_listens(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # a full backlog must not hold us up: it is a live listener
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return False
        except BlockingIOError:
            return True
    return True


def _bound(path: str) -> socket.socket:
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        server.bind(path)
        # Nobody can connect before listen(), so there is no instant at which others get in.
        os.chmod(path, 0o600)
        server.listen(_BACKLOG)
        server.setblocking(False)
    except OSError:
        server.close()
        raise
    return server

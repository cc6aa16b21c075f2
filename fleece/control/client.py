# SPDX-License-Identifier: Apache-2.0
"""A client of the control socket. Standard library only, and light: every CLI command starts it."""

import json
import socket
from collections import deque
from collections.abc import Iterator
from typing import Any, Final

from fleece.control.qmp import exception
from fleece.errors import ControlError, DaemonError

_MAX_REPLY: Final = 64 << 20
_READ: Final = 64 << 10
_NOBODY: Final = (FileNotFoundError, ConnectionRefusedError, NotADirectoryError)


class ControlClient:
    """A negotiated connection to the daemon at ``path``; a context manager.

    ``timeout`` seconds are given to each answer. DaemonError when no daemon is there or it goes
    away, ControlError when something else than a daemon answers. Not for several threads at once.
    """

    def __init__(self, path: str, timeout: float | None = 60.0) -> None:
        self.path = path
        self._timeout = timeout
        self._events: deque[dict[str, Any]] = deque()
        self._buffer = bytearray()
        self._sock = self._connect()
        try:
            self.greeting: dict[str, Any] = self._greeting()
            self.execute("qmp_capabilities")
        except BaseException:
            self.close()
            raise

    def execute(self, command: str, **arguments: Any) -> Any:
        """Run a command and return what it answers; raise the very FleeceError of the daemon.

        Underscores in ``arguments`` are dashes on the wire; what is None is left out.
        """
        given = {k.replace("_", "-"): v for k, v in arguments.items() if v is not None}
        self._send({"execute": command, "arguments": given})
        while True:
            message = self._receive()
            if "event" in message:
                self._events.append(message)
            elif "error" in message:
                raise exception(message["error"])
            elif "return" in message:
                return message["return"]
            else:
                raise self._stranger()

    def events(self, timeout: float | None = None) -> Iterator[dict[str, Any]]:
        """Events as they come, those first that came between commands.

        Ends when the daemon closes the connection, or raises DaemonError when none comes within
        ``timeout`` seconds.
        """
        while True:
            while self._events:
                yield self._events.popleft()
            self._sock.settimeout(timeout)
            line = self._line()
            if line is None:
                return
            self._events.append(self._message(line))

    def close(self) -> None:
        """Hang up."""
        self._sock.close()

    def __enter__(self) -> "ControlClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(self._timeout)
        try:
            sock.connect(self.path)
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            sock.close()
            raise self._unreachable(error) from error
        return sock

    def _unreachable(self, error: Exception) -> DaemonError:
        if isinstance(error, _NOBODY):
            return DaemonError(
                f"no fleece daemon answers at {self.path}; "
                f"start one with: fleece serve --disk NAME=IMAGE --control {self.path}"
            )
        if isinstance(error, PermissionError):
            return DaemonError(f"no permission for {self.path}; be the user who runs the daemon")
        return DaemonError(f"cannot connect to {self.path}: {error}")

    def _greeting(self) -> dict[str, Any]:
        message = self._receive()
        if "QMP" not in message:
            raise self._stranger()
        return message

    def _send(self, message: dict[str, Any]) -> None:
        self._sock.settimeout(self._timeout)
        try:
            self._sock.sendall(json.dumps(message).encode("ascii") + b"\r\n")
        except OSError as error:
            raise DaemonError(f"the fleece daemon at {self.path} went away: {error}") from error

    def _receive(self) -> dict[str, Any]:
        self._sock.settimeout(self._timeout)
        line = self._line()
        if line is None:
            raise DaemonError(f"the fleece daemon at {self.path} went away before it answered")
        return self._message(line)

    def _message(self, line: bytes) -> dict[str, Any]:
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            raise self._stranger() from None
        if not isinstance(message, dict):
            raise self._stranger()
        return message

    def _line(self) -> bytes | None:
        scanned = 0
        while (end := self._buffer.find(b"\n", scanned)) < 0:
            scanned = len(self._buffer)
            if not self._fill():
                return None
            # A server of another protocol may never send a line end: look at what came first.
            if self._buffer[:1] != b"{" or len(self._buffer) > _MAX_REPLY:
                raise self._stranger()
        line = bytes(self._buffer[: end + 1])
        del self._buffer[: end + 1]
        return line

    def _fill(self) -> bool:
        try:
            data = self._sock.recv(_READ)
        except TimeoutError:
            seconds = self._sock.gettimeout()
            text = f"the fleece daemon at {self.path} did not answer within {seconds:g} s"
            raise DaemonError(text) from None
        except OSError as error:
            raise DaemonError(f"the fleece daemon at {self.path} went away: {error}") from error
        self._buffer += data
        return bool(data)

    def _stranger(self) -> ControlError:
        return ControlError(f"what answers at {self.path} is not a fleece daemon's control socket")

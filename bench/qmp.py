# SPDX-License-Identifier: Apache-2.0
"""A QMP client, just enough to drive a storage daemon."""

import json
import socket
from pathlib import Path
from types import TracebackType
from typing import Any

from bench.tools import BenchFailed

_SECONDS = 30


class QMP:
    """A connection to the monitor socket ``path``; ready for commands when made."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(_SECONDS)
        self._socket.connect(str(path))
        self._lines = self._socket.makefile("rb")
        self._events: list[str] = []
        self._read()  # the greeting
        self.execute("qmp_capabilities")

    def _read(self) -> dict[str, Any]:
        line = self._lines.readline()
        if not line:
            raise BenchFailed("the storage daemon closed its monitor")
        message: dict[str, Any] = json.loads(line)
        return message

    def execute(self, command: str, **arguments: Any) -> Any:
        """Run ``command``; underscores in argument names stand for hyphens."""
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        request = json.dumps({"execute": command, "arguments": named})
        self._socket.sendall(request.encode() + b"\n")
        while True:
            message = self._read()
            if "event" in message:
                self._events.append(message["event"])
            elif "error" in message:
                raise BenchFailed(f"{command}: {message['error']['desc']}")
            else:
                return message["return"]

    def wait_for(self, event: str) -> None:
        """Return when ``event`` has come, once."""
        while event not in self._events:
            message = self._read()
            if "event" in message:
                self._events.append(message["event"])
        self._events.remove(event)

    def close(self) -> None:
        """Hang up."""
        self._lines.close()
        self._socket.close()

    def __enter__(self) -> "QMP":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

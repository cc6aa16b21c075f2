# SPDX-License-Identifier: Apache-2.0
"""``fleece serve`` as a process of its own, and the ``fleece`` command as a person would use it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.demo.tools import DemoFailed, wait_until

START_SECONDS = 20.0
FLEECE = [sys.executable, "-m", "fleece"]


class Daemon:
    """One daemon with the disk ``name``; everything of it lives in ``directory``."""

    def __init__(self, directory: Path, name: str, image: Path) -> None:
        self.state = directory / "state"
        self._control = directory / "control.sock"
        self._socket = directory / "nbd.sock"
        self._log = directory / "serve.log"
        self._name = name
        self._image = image
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        """Where the live disk is."""
        return f"nbd+unix:///{self._name}?socket={self._socket}"

    @property
    def pid(self) -> int:
        """Of the daemon that runs now."""
        if self._process is None:
            raise DemoFailed("the daemon does not run")
        return self._process.pid

    def start(self) -> None:
        """Start it and return when it answers."""
        command = [*FLEECE, "serve", "--disk", f"{self._name}={self._image}"]
        command += ["--socket", str(self._socket), "--control", str(self._control)]
        command += ["--state", str(self.state)]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        wait_until(self._answers, "fleece serve did not answer", START_SECONDS)

    def _answers(self) -> bool:
        if self._process is not None and self._process.poll() is not None:
            raise DemoFailed(f"fleece serve ended with status {self._process.returncode}")
        return self._control.exists() and self._call("status").returncode == 0

    def _call(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        command = [*FLEECE, *arguments, "--json", "--control", str(self._control)]
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
        )

    def ask(self, *arguments: str) -> Any:
        """What ``fleece ARGUMENTS --json`` prints; `DemoFailed` with its words if it failed."""
        done = self._call(*arguments)
        if done.returncode:
            said = done.stderr.strip().splitlines() or ["nothing said"]
            raise DemoFailed(f"fleece {' '.join(arguments)}: {said[-1]}")
        return json.loads(done.stdout)

    def kill(self) -> None:
        """SIGKILL: it has no chance to save anything."""
        os.kill(self.pid, signal.SIGKILL)
        self._wait()

    def stop(self) -> int:
        """SIGTERM; returns the exit status."""
        os.kill(self.pid, signal.SIGTERM)
        return self._wait()

    def _wait(self) -> int:
        if self._process is None:
            return 0
        try:
            return self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise DemoFailed("fleece serve did not end within 20 s of SIGTERM") from None
        finally:
            self._process = None

    def close(self) -> None:
        """End it in whatever state it is."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def log_tail(self, lines: int = 5) -> list[str]:
        """The last lines that it logged."""
        if not self._log.exists():
            return []
        return self._log.read_text(errors="replace").splitlines()[-lines:]

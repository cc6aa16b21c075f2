"""`fleece serve` as a process of its own, killed and started again as a test likes it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fleece.control.client import ControlClient
from nbdwire.client import Client, connect
from nbdwire.uri import NBDURI

FLEECE = [sys.executable, "-m", "fleece"]
SECONDS = 30
Done = subprocess.CompletedProcess[str]


def environment() -> dict[str, str]:
    """Ours, without what would make fleece show tracebacks."""
    return {name: value for name, value in os.environ.items() if name != "FLEECE_DEBUG"}


def fleece(*words: object, **options: Any) -> Done:
    """Run the command line to its end."""
    return subprocess.run(
        [*FLEECE, *map(str, words)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env=environment(),
        **options,
    )


class Daemon:
    """The daemon of ``directory``. ``disks``: NAME -> what `--disk NAME=` is given."""

    def __init__(self, directory: Path, disks: Mapping[str, object], *options: str) -> None:
        self.directory = directory
        self.disks = dict(disks)
        self.options = list(options)
        self.socket = directory / "n.sock"
        self.control = directory / "c.sock"
        self.state = directory / "state"
        self.log = directory / "serve.log"
        self.process: subprocess.Popen[str] | None = None

    @property
    def command(self) -> list[str]:
        places = ["--socket", self.socket, "--control", self.control, "--state", self.state]
        disks = [f"--disk={name}={image}" for name, image in self.disks.items()]
        return [*FLEECE, "serve", "--json", *map(str, places), *disks, *self.options]

    def start(self) -> "Daemon":
        """Return when it has said that it is ready."""
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment(),
            )
        assert self.process.stdout is not None
        lines = []
        for line in self.process.stdout:
            lines.append(line)
            if line == "}\n":
                break
        if "pid" not in json.loads("".join(lines) or "{}"):
            raise AssertionError(f"it did not start:\n{self.log.read_text()}")
        return self

    @property
    def running(self) -> subprocess.Popen[str]:
        assert self.process is not None
        return self.process

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send the signal; the exit status, as soon as there is one."""
        process, self.process = self.running, None
        process.send_signal(number)
        try:
            return process.wait(SECONDS)
        finally:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()

    def kill(self) -> None:
        assert self.end(signal.SIGKILL) == -signal.SIGKILL

    def close(self) -> None:
        if self.process is not None:
            self.end(signal.SIGKILL)

    def ask(self, command: str, **arguments: Any) -> Any:
        """One command over the control socket, by its QMP name without the prefix."""
        with ControlClient(str(self.control)) as client:
            return client.execute(f"x-fleece-{command}", **arguments)

    def cli(self, *words: object) -> Done:
        """The command line, told where this daemon is."""
        return fleece(*words, "--control", self.control)

    def json(self, *words: object) -> Any:
        done = self.cli(*words, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def uri(self, export: str) -> str:
        return str(NBDURI(socket=str(self.socket), export=export))

    def client(self, export: str, contexts: Sequence[str] = ("base:allocation",)) -> Client:
        return connect(self.uri(export), contexts=contexts)

    def read(self, export: str) -> bytes:
        with self.client(export) as client:
            return client.pread(client.size, 0)

    def left(self) -> set[str]:
        """The names of the files that snapshots have on disk."""
        return {path.name for path in (self.state / "snapshots").iterdir()}


@contextmanager
def daemon(directory: Path, disks: Mapping[str, object], *options: str) -> Iterator[Daemon]:
    """A started daemon; whatever is left of it is killed in the end."""
    made = Daemon(directory, disks, *options)
    try:
        yield made.start()
    finally:
        made.close()

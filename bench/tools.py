# SPDX-License-Identifier: Apache-2.0
"""Processes, page cache and disk files: what every scenario needs."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

MiB = 1 << 20
SEARCH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin", "/usr/bin", "/bin"])
START_SECONDS = 20.0


class BenchFailed(Exception):
    """The benchmark cannot go on; the text is one line for a person."""


def find(program: str) -> str | None:
    """The path of ``program``, or None."""
    return shutil.which(program, path=SEARCH)


def need(program: str) -> str:
    """The path of ``program``; `BenchFailed` if it is not installed."""
    path = find(program)
    if path is None:
        raise BenchFailed(f"{program} is not installed; ./run setup installs it")
    return path


def say(text: str) -> None:
    """A line of progress, on standard error."""
    print(text, file=sys.stderr, flush=True)


def run(command: Sequence[str], timeout: float = 300, home: Path | None = None) -> str:
    """Standard output of ``command``; `BenchFailed` with its last words if it fails."""
    environment = None if home is None else {**os.environ, "HOME": str(home)}
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment,
    )
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or ["nothing said"]
        raise BenchFailed(f"{Path(command[0]).name} ended with {done.returncode}: {said[-1]}")
    return done.stdout


def wait_until(ready: Callable[[], bool], what: str) -> None:
    """Poll ``ready`` until it holds; `BenchFailed` says ``what`` did not happen in time."""
    deadline = time.monotonic() + START_SECONDS
    while not ready():
        if time.monotonic() > deadline:
            raise BenchFailed(f"{what} within {START_SECONDS:.0f} s")
        time.sleep(0.01)


class Process:
    """A server that runs in the foreground. Its CPU time and memory are read from /proc."""

    def __init__(self, name: str, command: Sequence[str], log: Path) -> None:
        self.name = name
        self._log = log
        with log.open("wb") as file:
            self._popen = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=file
            )
        self.pid = self._popen.pid

    def check(self) -> None:
        """`BenchFailed` if it has ended."""
        if self._popen.poll() is not None:
            said = self._log.read_text(errors="replace").strip().splitlines() or ["nothing said"]
            raise BenchFailed(f"{self.name} ended with {self._popen.returncode}: {said[-1]}")

    def cpu_seconds(self) -> float:
        """User and system time of all its threads so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def peak_memory(self) -> int:
        """Most resident bytes so far."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
        return 0

    def stop(self) -> None:
        """End it, politely if it listens."""
        if self._popen.poll() is None:
            os.kill(self.pid, signal.SIGTERM)
            try:
                self._popen.wait(10)
            except subprocess.TimeoutExpired:
                self._popen.kill()
        self._popen.wait()


def make_images(paths: Sequence[Path], size: int) -> None:
    """Equal files of ``size`` random bytes, in a page cache that looks the same for each.

    How a file came into the page cache decides in what pieces it lies there, and a small write
    into a large piece costs the kernel many times what it costs the server. So all are dropped,
    and read again as by a program that reads here and there: in single pages.
    """
    with ExitStack() as stack:
        files = [stack.enter_context(path.open("wb", buffering=0)) for path in paths]
        for _ in range(size // MiB):
            block = os.urandom(MiB)
            for file in files:
                file.write(block)
    for path in paths:
        settle([path], drop=path)
        _read_all(path)


def _read_all(path: Path) -> None:
    buffer = bytearray(8 * MiB)
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        while file.readinto(buffer):
            pass


def settle(paths: Sequence[Path], drop: Path | None = None) -> None:
    """Nothing of ``paths`` waits to be written, and nothing of ``drop`` is in the page cache.

    All paths, because what the last run left behind must not slow down the next one.
    """
    for path in paths:
        descriptor = os.open(path, os.O_RDWR)
        try:
            os.fdatasync(descriptor)
            if path == drop:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)

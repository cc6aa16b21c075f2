# SPDX-License-Identifier: Apache-2.0
"""Processes, page cache and disk files: what every scenario needs."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
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


def run(command: Sequence[str], timeout: float = 300) -> str:
    """Standard output of ``command``; `BenchFailed` with its last words if it fails."""
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout
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


def make_image(path: Path, size: int, like: Path | None = None) -> None:
    """A file of ``size`` random bytes, or a copy of ``like``."""
    if like is not None:
        shutil.copyfile(like, path)
        return
    with path.open("wb") as file:
        for _ in range(size // MiB):
            file.write(os.urandom(MiB))


def settle(path: Path, cached: bool) -> None:
    """Nothing of ``path`` waits to be written; all of it is in the page cache, or nothing is."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fdatasync(descriptor)
        if cached:
            while os.read(descriptor, 8 * MiB):
                pass
        else:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)

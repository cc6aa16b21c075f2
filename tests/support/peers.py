"""Other people's NBD servers, started for a test and stopped after it."""

import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from tests.support.tools import require

_SECONDS = 10


def wait_for_socket(path: Path, process: subprocess.Popen[bytes]) -> None:
    """Until something accepts there. (Bounded polling: it is not our process.)"""
    deadline = time.monotonic() + _SECONDS
    while time.monotonic() < deadline:
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(path))
                return
            except OSError:
                if process.poll() is not None:
                    raise AssertionError(f"the server ended with {process.returncode}") from None
        time.sleep(0.02)
    raise AssertionError(f"nobody listens at {path}")


@contextmanager
def running(command: Sequence[str | Path]) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([str(word) for word in command], stdin=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def qemu_nbd(image: Path, listen: Path, *options: str, fmt: str = "raw") -> Iterator[str]:
    """qemu-nbd serves ``image``; gives the URI."""
    command = [require("qemu-nbd"), "-t", "-e", "0", "--discard=unmap", "-f", fmt, "-k", listen]
    with running([*command, *options, image]) as process:
        wait_for_socket(listen, process)
        yield f"nbd+unix:///?socket={quote(str(listen))}"


@contextmanager
def nbdkit(listen: Path, *arguments: str) -> Iterator[str]:
    """Nbdkit with a plugin and its arguments; gives the URI."""
    with running([require("nbdkit"), "-f", "-U", listen, *arguments]) as process:
        wait_for_socket(listen, process)
        yield f"nbd+unix:///?socket={quote(str(listen))}"

# SPDX-License-Identifier: Apache-2.0
"""Real programs of the system: found where Debian keeps them, and run with their errors shown."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

# mke2fs and its relatives live where an ordinary user's PATH does not look.
SEARCH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin", "/usr/bin", "/bin"])


class DemoFailed(Exception):
    """Something was not as promised; the text is one line for a person."""


def find(program: str) -> str | None:
    """The path of ``program``, or None."""
    return shutil.which(program, path=SEARCH)


def need(program: str, package: str) -> str:
    """The path of ``program``; `DemoFailed` names the Debian package that has it."""
    path = find(program)
    if path is None:
        raise DemoFailed(f"{program} is not installed: apt-get install {package}")
    return path


def run(command: Sequence[str | Path], accept: Sequence[int] = (0,)) -> str:
    """Standard output of ``command``; `DemoFailed` if its exit status is not in ``accept``."""
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
    )
    if done.returncode not in accept:
        name = Path(str(command[0])).name
        said = (done.stderr or done.stdout).strip().splitlines() or ["nothing said"]
        raise DemoFailed(f"{name} ended with status {done.returncode}: {said[-1]}")
    return done.stdout


def wait_until(ready: Callable[[], bool], what: str, seconds: float = 20.0) -> None:
    """Poll ``ready`` until it holds; `DemoFailed` says ``what`` did not happen in ``seconds``."""
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            raise DemoFailed(f"{what}: not within {seconds:.0f} s")
        time.sleep(0.005)

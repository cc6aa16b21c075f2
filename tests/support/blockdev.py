"""Real block devices for tests."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.tools import require


@contextmanager
def loop_device(image: Path, *, sector: int = 512) -> Iterator[Path]:
    """A loop device over ``image``. Needs root; where that is not to be had the test is skipped."""
    losetup = require("losetup")
    if os.geteuid() != 0 or not os.path.exists("/dev/loop-control"):
        pytest.skip("a loop device needs root and /dev/loop-control")
    command = [losetup, "--find", "--show", "--sector-size", str(sector), str(image)]
    device = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    try:
        yield Path(device)
    finally:
        subprocess.run([losetup, "--detach", device], check=True)

"""Real programs that the tests use: found, or the test is skipped; with CI set it fails instead."""

import os
import shutil

import pytest

# Debian keeps some of them where an ordinary user's PATH does not look.
_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin", "/usr/bin", "/bin"])


def find(name: str) -> str | None:
    return shutil.which(name, path=_PATH)


def require(name: str) -> str:
    """The path of the program; without it the test fails in CI and is skipped elsewhere."""
    path = find(name)
    if path is None:
        message = f"{name} is not installed; ./run setup installs it"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return path

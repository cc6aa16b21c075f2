# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest

from fleece.control import paths


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FLEECE_CONTROL", "XDG_RUNTIME_DIR", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)


def test_root_has_system_directories(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert paths.control_socket() == "/run/fleece/control.sock"
    assert paths.nbd_socket() == "/run/fleece/nbd.sock"
    assert paths.state_directory() == Path("/var/lib/fleece")


def test_a_user_has_directories_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setenv("HOME", "/home/u")
    assert paths.control_socket() == "/home/u/.local/state/fleece/control.sock"
    monkeypatch.setenv("XDG_STATE_HOME", "/s")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/r")
    assert paths.control_socket() == "/r/fleece/control.sock"
    assert paths.state_directory() == Path("/s/fleece")


def test_the_environment_names_the_control_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEECE_CONTROL", "/x.sock")
    assert paths.control_socket() == "/x.sock"

# SPDX-License-Identifier: Apache-2.0
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fleece.cli.main import main
from tests.support.control import FakeService, serving


@dataclass(frozen=True)
class Result:
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Result]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line in this process."""

    def call(*words: str) -> Result:
        status = main(words)
        captured = capsys.readouterr()
        return Result(status, captured.out, captured.err)

    return call


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeService]:
    """A fake daemon where the command line looks for one."""
    path = str(tmp_path / "control.sock")
    monkeypatch.setenv("FLEECE_CONTROL", path)
    fake = FakeService()
    with serving(path, fake):
        yield fake


@pytest.fixture
def appliance(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Stands in for ``fleece.appliance``; what it was given is in ``given``."""
    module = ModuleType("fleece.appliance")
    module.given = []  # type: ignore[attr-defined]

    def run_daemon(config: Any, *, ready: Any = None) -> int:
        module.given.append(config)  # type: ignore[attr-defined]
        ready()
        return 17

    def run_export(options: Any) -> int:
        module.given.append(options)  # type: ignore[attr-defined]
        if options.announce:
            options.announce(options.uri)
        return 18

    module.run_daemon = run_daemon  # type: ignore[attr-defined]
    module.run_export = run_export  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fleece.appliance", module)
    return module

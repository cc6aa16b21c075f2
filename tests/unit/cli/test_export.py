# SPDX-License-Identifier: Apache-2.0
import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.unit.cli.conftest import Run


@pytest.mark.parametrize("read_only", [True, False])
def test_options_reach_the_export(
    run: Run, appliance: Any, tmp_path: Path, read_only: bool
) -> None:
    image = tmp_path / "a.img"
    image.write_bytes(b"QFI\xfb".ljust(4096))  # raw, because the user says so
    mode = ["-r"] if read_only else []
    words = ["--name", "x y", "-f", "raw", *mode, "-B", "one", "-B", "two", str(image)]
    result = run("export", "--socket", "/n", *words)
    assert result.status == 18
    (options,) = appliance.given
    node = options.open()
    assert (node.size, node.read_only) == (4096, read_only)
    node.close()
    assert options.bitmaps == ("one", "two")
    assert (options.uri.socket, options.uri.export) == ("/n", "x y")
    assert options.command == ()
    assert result.out == "nbd+unix:///x%20y?socket=/n\n"


@pytest.mark.parametrize(
    ("words", "uri"),
    [
        ((), "nbd://localhost/"),
        (("--listen", "localhost:0"), "nbd://localhost:0/"),
        (("--listen", "[::1]:5", "--name", "n"), "nbd://[::1]:5/n"),
    ],
)
def test_addresses(run: Run, appliance: Any, words: tuple[str, ...], uri: str) -> None:
    assert run("export", "a.img", *words).out == f"{uri}\n"


def test_as_json(run: Run, appliance: Any) -> None:
    result = run("export", "a.img", "--socket", "/n", "--name", "n", "--json")
    expected = {"uri": "nbd+unix:///n?socket=/n", "export": "n", "pid": os.getpid()}
    assert json.loads(result.out) == expected


def test_a_command_gets_a_private_socket_that_is_gone_afterwards(
    run: Run, appliance: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = []

    def run_export(options: Any) -> int:
        appliance.given.append(options)
        modes.append(os.stat(os.path.dirname(options.uri.socket)).st_mode & 0o777)
        return 5

    monkeypatch.setattr(appliance, "run_export", run_export)
    result = run("export", "a.img", "--", "sh", "-c", "exit 5", "--json", "--", "-r")
    assert (result.status, result.out) == (5, "")
    (options,) = appliance.given
    assert options.command == ("sh", "-c", "exit 5", "--json", "--", "-r")
    assert options.announce is None
    assert modes == [0o700]
    assert not os.path.exists(os.path.dirname(options.uri.socket))


def test_a_command_may_have_an_address_too(run: Run, appliance: Any) -> None:
    run("export", "a.img", "--listen", "localhost:0", "--", "true")
    assert str(appliance.given[0].uri) == "nbd://localhost:0/"

# SPDX-License-Identifier: Apache-2.0
import os
from pathlib import Path
from typing import Any

from fleece.config import DiskConfig
from tests.unit.cli.conftest import Run


def test_options_become_the_configuration(run: Run, appliance: Any) -> None:
    words = (
        "--disk a=1.img,format=raw --disk b=2.img --socket /n --listen :0 --control /c --state /s"
    )
    result = run("serve", *words.split(), "--log-level", "warning", "--log-json")
    assert result.status == 17
    (config,) = appliance.given
    assert config.disks == (DiskConfig("a", "1.img", "raw"), DiskConfig("b", "2.img"))
    assert (config.socket, config.listen) == ("/n", (":0",))
    assert (config.control, config.state) == ("/c", "/s")
    assert (config.log_level, config.log_json) == ("warning", True)


def test_options_replace_what_the_file_says(run: Run, appliance: Any, tmp_path: Path) -> None:
    (tmp_path / "a.img").write_bytes(b"")
    file = tmp_path / "c.yaml"
    file.write_text("disks: {a: {image: a.img}}\nlog: {json: true}\nstate: /s\n")
    run("serve", "-c", str(file), "--disk", "b=2", "-v")
    (config,) = appliance.given
    assert [disk.name for disk in config.disks] == ["a", "b"]
    assert (config.log_level, config.log_json, config.state) == ("debug", True, "/s")


def test_it_says_when_it_is_ready(run: Run, appliance: Any) -> None:
    result = run("serve", "--disk", "a=1", "--socket", "/n", "--control", "/c")
    assert result.out.splitlines() == [
        "serving 1 disk at nbd+unix:///?socket=/n",
        "control socket /c; end with Ctrl-C",
    ]
    result = run("serve", "--disk", "a=1", "--socket", "/n", "--control", "/c", "--json")
    expected = {"pid": os.getpid(), "control": "/c", "listeners": ["nbd+unix:///?socket=/n"]}
    assert result.json == expected


def test_a_configuration_that_is_wrong_is_status_3(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("dsiks: {}\n")
    result = run("serve", "-c", str(file), "--json")
    assert result.status == 3
    assert result.json["message"] == f"{file}:1: dsiks: unknown key; did you mean 'disks'?"
    assert run("serve", "-c", str(tmp_path / "none.yaml")).status == 3

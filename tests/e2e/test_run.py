# SPDX-License-Identifier: Apache-2.0
"""The script of the checkout, as far as it can be tried without installing anything."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str, cwd: Path = ROOT, **extra: str) -> "subprocess.CompletedProcess[str]":
    command = ["bash", str(ROOT / "run"), *arguments]
    env = {**os.environ, **extra}
    return subprocess.run(
        command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )


def test_help_names_every_verb_and_works_from_any_directory(tmp_path: Path) -> None:
    done = run("help", cwd=tmp_path)
    assert done.returncode == 0
    for verb in ("setup", "demo", "test", "check", "serve", "bench", "soak"):
        assert f"\n  {verb} " in done.stdout


def test_an_unknown_verb_is_a_wrong_command_line() -> None:
    done = run("tset")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "run: there is no verb 'tset'"


def test_serve_without_arguments_says_how_it_is_used() -> None:
    done = run("serve")
    assert done.returncode == 2
    assert "--disk vm1=disk.img" in done.stderr


@pytest.mark.parametrize("name", ["run", ".ci/run"])
def test_the_scripts_are_executable_and_bash_accepts_them(name: str) -> None:
    assert os.access(ROOT / name, os.X_OK)
    subprocess.run(["bash", "-n", str(ROOT / name)], check=True)

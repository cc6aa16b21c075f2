# SPDX-License-Identifier: Apache-2.0
"""The demo itself, on a small disk: every proof in it must hold."""

import io
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.demo import pull
from tests.demo.screen import Screen
from tests.demo.story import Story
from tests.demo.tools import DemoFailed
from tests.support.tools import require

ROOT = Path(__file__).resolve().parents[2]


def demo(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "tests/demo", *arguments]
    return subprocess.run(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=110
    )


def test_the_main_job_runs_and_every_proof_holds(tmp_path: Path) -> None:
    for program in ("mke2fs", "debugfs", "e2fsck", "nbdcopy", "nbdinfo", "qemu-img"):
        require(program)
    done = demo("--small", "--keep", str(tmp_path / "kept"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert "every proof held" in done.stdout
    assert "nbdinfo --map=qemu:dirty-bitmap:nightly" in done.stdout
    assert (tmp_path / "kept" / "full+increment.raw").stat().st_size == 64 << 20


def test_a_directory_with_something_in_it_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    done = demo("--small", "--keep", str(tmp_path))
    assert done.returncode == 2
    assert "not empty" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def story(directory: Path) -> Story:
    return Story(directory, 64 << 20, 16 << 20, Screen(io.StringIO()))


def test_without_real_clients_our_own_reads_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for program in ("mke2fs", "debugfs", "e2fsck"):
        require(program)
    monkeypatch.setattr(pull, "find", lambda program: None)
    told = story(tmp_path)
    try:
        told.tell()
    finally:
        told.close()


def test_the_demo_fails_if_what_was_pulled_is_not_an_instant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for program in ("mke2fs", "debugfs", "e2fsck"):
        require(program)
    # the live disk in place of the snapshot: the control of all the demo's proofs
    real = pull.full_with_ours
    monkeypatch.setattr(
        pull, "full_with_nbdcopy", lambda uri, path: real(re.sub("%40[^?]*", "", uri), path)
    )
    told = story(tmp_path)
    try:
        with pytest.raises(DemoFailed, match=r"not the disk at any instant|exactly one"):
            told.tell()
    finally:
        told.close()

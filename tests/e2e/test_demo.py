# SPDX-License-Identifier: Apache-2.0
"""The demo itself, on a small disk: every proof in it must hold."""

import subprocess
import sys
from pathlib import Path

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

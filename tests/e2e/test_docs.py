# SPDX-License-Identifier: Apache-2.0
"""Everything that the documents tell a reader to type is typed here, in the order of the page.

A page is one shell session in an empty directory. A ``text`` or ``json`` block that follows
commands is what they print, up to durations and ids. After a block that starts a daemon with ``&``
the session goes on as soon as the daemon says that it serves, as a person would.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.documents import Block, blocks, likeness, shape
from tests.support.tools import require

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 60
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [*ROOT.glob("*.md"), ROOT / "nbd" / "README.md", *(ROOT / "docs").rglob("*.md")]
)
PROGRAMS = ("nbdcopy", "nbdinfo", "qemu-img", "qemu-io", "jq", "mke2fs", "e2fsck", "debugfs")
WAIT = 'for i in $(seq 200); do grep -q "^control socket" "$OUT/{n}" && break; sleep 0.05; done'


def runnable(page: str) -> list[Block]:
    found = blocks((ROOT / page).read_text())
    return [block for block in found if block.language in ("sh", "python") and not block.reason]


def session(steps: list[Block], folder: Path) -> str:
    """The page as one script; what block n prints goes to ``$OUT/n``."""
    lines = ["set -euo pipefail", "trap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT"]
    python: list[str] = []
    for number, step in enumerate(steps):
        lines.append(f'echo {step.line} > "$OUT/line"')
        if step.language == "python":
            python.append(step.body)
            if steps[number + 1 : number + 2] and steps[number + 1].language == "python":
                continue  # blocks that follow each other are one program
            (folder / f"{number}.py").write_text("\n".join(python))
            python.clear()
            lines.append(f'python "$OUT/{number}.py" > "$OUT/{number}"')
            continue
        lines += ["{", step.body.rstrip(), f'}} > "$OUT/{number}"']
        if re.search(r"&$", step.body, re.MULTILINE):
            lines.append(WAIT.format(n=number))
    return "\n".join(lines) + "\n"


def environment(home: Path, out: Path) -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("FLEECE", "XDG_"))}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin"])
    return {**inherited, "PATH": path, "HOME": str(home), "OUT": str(out), "NO_COLOR": "1"}


@pytest.mark.parametrize("page", [page for page in PAGES if runnable(page)])
def test_what_a_page_tells_the_reader_to_type_works(
    page: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    steps = runnable(page)
    for program in PROGRAMS:
        if any(re.search(rf"\b{program}\b", step.body) for step in steps):
            require(program)
    work, out = tmp_path_factory.mktemp("d"), tmp_path_factory.mktemp("o")
    done = subprocess.run(
        ["bash", "-c", session(steps, out)],
        cwd=work,
        env=environment(work, out),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    line = (out / "line").read_text().strip()
    assert done.returncode == 0, f"{page}:{line}: status {done.returncode}\n{done.stderr}"
    for number, shown in shown_outputs(page):
        printed = (out / str(number)).read_text()
        where = f"{page}:{shown.line}"
        if shown.language == "json":
            assert shape(json.loads(printed)) == shape(json.loads(shown.body)), where
        else:
            assert likeness(printed, str(work)) == likeness(shown.body), where


def shown_outputs(page: str) -> list[tuple[int, Block]]:
    """``(number of the runnable block, the block that shows what it prints)``."""
    pairs, number, last = [], -1, None
    for block in blocks((ROOT / page).read_text()):
        if block.language in ("sh", "python") and not block.reason:
            number, last = number + 1, block
        elif block.language in ("text", "json") and last is not None:
            pairs.append((number, block))
            last = None
        else:
            last = None
    return pairs


def test_few_commands_are_not_run_and_each_says_why() -> None:
    unrun = [block for page in PAGES for block in blocks((ROOT / page).read_text()) if block.reason]
    assert len(unrun) <= 8
    assert all(len(str(block.reason).split()) >= 3 for block in unrun)


def test_a_wrong_command_on_a_page_is_found(tmp_path: Path) -> None:
    """The control of the test above: it must notice a failure in the middle of a block."""
    script = session([Block(7, "sh", "echo one\nfalse\necho two\n")], tmp_path)
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env={**os.environ, "OUT": shlex.quote(str(tmp_path))}
    )
    assert done.returncode == 1
    assert (tmp_path / "0").read_text() == "one\n"
    assert (tmp_path / "line").read_text() == "7\n"
    assert likeness("took 12 ms, 3 of 4") == likeness("took 7.5 ms, 3 of  4")
    assert likeness("65536 dirty") != likeness("65537 dirty")

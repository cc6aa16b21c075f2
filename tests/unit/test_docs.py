# SPDX-License-Identifier: Apache-2.0
"""The documents agree with the code and with each other. (tests/e2e/test_docs.py runs them.)"""

import importlib.util
import os
import re
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import fleece
from tests.support.documents import blocks, likeness, links, shape

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*ROOT.glob("*.md"), ROOT / "nbd" / "README.md", *(ROOT / "docs").rglob("*.md")]


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    path = ROOT / "docs" / "generate.py"
    spec = importlib.util.spec_from_file_location("fleece_docs_generate", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_what_the_code_says(generate: ModuleType) -> None:
    assert generate.stale() == [], "run: python docs/generate.py"


def test_the_reference_is_the_same_for_every_user(
    generate: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("FLEECE_CONTROL", "/elsewhere/control.sock")
    monkeypatch.setenv("XDG_STATE_HOME", "/elsewhere")
    monkeypatch.setenv("COLUMNS", "40")
    assert generate.stale() == []
    assert os.environ["FLEECE_CONTROL"] == "/elsewhere/control.sock"


def test_a_stale_page_is_found(generate: ModuleType, tmp_path: Path) -> None:
    for name, page in generate.PAGES.items():
        (tmp_path / name).write_text(page())
    assert generate.stale(tmp_path) == []
    (tmp_path / "cli.md").write_text(generate.cli().replace("--lease", "--leash"))
    (tmp_path / "errors.md").unlink()
    assert generate.stale(tmp_path) == ["cli.md", "errors.md"]


def test_a_key_that_the_example_does_not_explain_is_an_error(
    generate: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = tmp_path / "fleece.yaml"
    text = (ROOT / "config" / "fleece.yaml").read_text()
    short.write_text(re.sub(r"(?m)^ *# A snapshot that nobody extends.*\n", "", text))
    monkeypatch.setattr(generate, "EXAMPLE", short)
    with pytest.raises(ValueError, match=re.escape("does not explain: snapshots.lease")):
        generate.configuration()


def test_every_dependency_says_why_it_is_there() -> None:
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [
        *project["project"]["dependencies"],
        *project["project"]["optional-dependencies"]["dev"],
        *project["build-system"]["requires"],
    ]
    names = {re.split(r"[<>=]", line)[0] for line in wanted}
    page = (ROOT / "docs" / "design" / "dependencies.md").read_text()
    listed = re.findall(r"^\| ([\w.-]+) \| [^|]+ \| \S", page, re.MULTILINE)
    assert set(listed) - {"package"} == names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_page_has_sound_blocks_links_and_paths(page: Path) -> None:
    text = page.read_text()
    blocks(text)
    missing = [str(target) for target in links(page) if not target.exists()]
    # Written by ./run bench, so a fresh checkout of a branch may not have it yet.
    assert [name for name in missing if not name.endswith("performance.md")] == []
    assert not re.search(r"(?<![\w.$}])/(home|root|work)/", text), "a path of one machine"


def test_every_page_can_be_reached_from_the_readme() -> None:
    seen, todo = set(), [ROOT / "README.md"]
    while todo:
        page = todo.pop().resolve()
        if page not in seen and page.suffix == ".md" and page.exists():
            seen.add(page)
            todo += links(page)
    assert {page.resolve() for page in PAGES} - seen == set()


def test_the_changelog_has_a_place_for_what_comes_next() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    assert text.count("\n## [Unreleased]\n") == 1
    assert (
        fleece.__version__
        == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    )


def test_blocks_know_their_line_and_why_they_are_not_run() -> None:
    text = "a\n\n```sh\nls\n```\n\n```sh norun: needs a guest\nx\n```\n```\nart\n```\n"
    found = [(b.line, b.language, b.body, b.reason) for b in blocks(text)]
    assert found == [
        (3, "sh", "ls\n", None),
        (7, "sh", "x\n", "needs a guest"),
        (10, "", "art\n", None),
    ]
    with pytest.raises(ValueError, match="line 1: what is ```bash"):
        blocks("```bash\nls\n```\n")


def test_outputs_are_alike_if_only_times_and_ids_differ() -> None:
    one = "held for 0.2 ms\nx  1 MiB  now\n/d/a 0b5c1f6e-0000-4000-8000-00000000000a\n"
    two = "held for 11 ms\nx 1 MiB 2 s ago\n\n$DIR/a ffffffff-1111-4111-8111-111111111111"
    assert likeness(one, "/d") == likeness(two)
    assert likeness("dropped in 2 h unless") == likeness("dropped in 1 h 59 min unless")
    assert likeness("1 MiB") != likeness("2 MiB")
    assert shape([{"a": 1}, {"a": 2}]) == shape([{"a": 3}])
    assert shape({"a": None}) != shape({"a": 1})

# SPDX-License-Identifier: Apache-2.0
"""docs/design/protocol-conformance.md names tests that exist."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "design" / "protocol-conformance.md"
Row = tuple[str, str, str, tuple[str, ...]]


def rows(text: str) -> list[Row]:
    """(section, rule, side, tests) of each line of the table."""
    found = []
    for line in text.partition("\n## The rules\n")[2].splitlines():
        if line.startswith("| ") and not line.startswith("| section |"):
            section, rule, side, tests = (x.strip() for x in line.strip("|").split("|"))
            found.append((section, rule, side, tuple(re.findall(r"`([^`]+)`", tests))))
    return found


ROWS = rows(PAGE.read_text())


@cache
def functions_in(path: Path) -> frozenset[str]:
    """The names of a file's test functions; none if there is no such file."""
    if not path.is_file():
        return frozenset()
    tree = ast.parse(path.read_text())
    return frozenset(
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    )


def missing(names: tuple[str, ...]) -> list[str]:
    parts = [name.partition("::") for name in names]
    return [
        f"{path}::{test}"
        for path, _, test in parts
        if test not in functions_in(ROOT / "tests" / path)
    ]


@pytest.mark.parametrize("row", ROWS, ids=[rule for _, rule, _, _ in ROWS])
def test_every_rule_has_a_test_that_exists(row: Row) -> None:
    section, _, side, names = row
    assert section
    assert side in ("server", "client", "both")
    assert names
    assert missing(names) == []


def test_no_rule_is_there_twice_and_both_sides_have_theirs() -> None:
    assert len({(section, rule, side) for section, rule, side, _ in ROWS}) == len(ROWS) > 100
    assert {side for _, _, side, _ in ROWS} == {"server", "client", "both"}


def test_every_contract_test_of_the_protocol_is_in_the_table() -> None:
    listed = {name for _, _, _, names in ROWS for name in names}
    folder = ROOT / "tests" / "contract" / "nbd"
    there = {
        f"contract/nbd/{path.name}::{test}"
        for path in folder.glob("test_*.py")
        for test in functions_in(path)
    }
    assert sorted(there - listed) == []


def test_every_contract_test_names_its_rule() -> None:
    for path in (ROOT / "tests" / "contract" / "nbd").glob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                text = ast.get_docstring(node) or ""
                assert re.match(r"nbd\.md §\d+(, §\d+)*: ", text), f"{path.name}::{node.name}"


def test_a_test_that_is_gone_is_found() -> None:
    here = "unit/test_conformance_table.py::"
    assert missing((f"{here}test_a_test_that_is_gone_is_found",)) == []
    assert missing((f"{here}test_that_is_gone",)) == [f"{here}test_that_is_gone"]
    assert missing(("unit/gone.py::test_x",)) == ["unit/gone.py::test_x"]
    assert rows(
        "x\n## The rules\n\n| section | a |\n|---|\n| S | r | both | `a::b`, `c::d` |\n"
    ) == [("S", "r", "both", ("a::b", "c::d"))]

# SPDX-License-Identifier: Apache-2.0
from tests.support.control import FakeService
from tests.unit.cli.conftest import Run


def test_list(run: Run, service: FakeService) -> None:
    result = run("cursor", "list")
    assert result.out.splitlines() == [
        "DISK  CONSUMER  EPOCH  GENERATION",
        "vm1   nightly       3  abcd",
    ]
    assert run("cursor", "list", "--json").json == service.cursor_list()


def test_list_of_none(run: Run, service: FakeService) -> None:
    service.cursor_list = list  # type: ignore[method-assign]
    assert run("cursor", "list").out == "no cursors\n"
    assert run("cursor", "list", "--json").json == []


def test_remove(run: Run, service: FakeService) -> None:
    result = run("cursor", "remove", "nightly", "--disk", "vm1")
    assert result.out == "forgot consumer 'nightly' of vm1: its next snapshot is a full one\n"
    assert run("cursor", "remove", "nightly", "--json").json == service.cursor_list()
    assert service.calls == [
        ("cursor-remove", "nightly", "vm1"),
        ("cursor-remove", "nightly", None),
    ]

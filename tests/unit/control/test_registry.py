# SPDX-License-Identifier: Apache-2.0
from typing import Any, Literal

import pytest

from fleece.control.commands import REGISTRY
from fleece.control.registry import Registry
from fleece.errors import CommandNotFound, InvalidArgument
from tests.support.control import FakeService

SERVICE = FakeService()


@pytest.fixture
def registry() -> Registry:
    registry = Registry()

    @registry.command("x-all")
    def everything(
        service: Any,
        *,
        name: str,
        disks: list[str],
        cluster_size: int | None = None,
        lease: float = 1.0,
        fast: bool = False,
        policy: Literal["a", "b"] | None = None,
        deep: dict[str, Any] | None = None,
        numbers: list[list[int]] | None = None,
    ) -> dict[str, Any]:
        """Take everything.

        Not part of the summary.
        """
        return {"name": name, "cluster_size": cluster_size, "lease": lease, "fast": fast}

    @registry.command("x-nothing")
    def nothing(service: Any) -> None:
        """Do nothing."""

    return registry


GOOD: dict[str, Any] = {"name": "n", "disks": ["a"]}


def test_dashes_on_the_wire_are_underscores_in_the_function(registry: Registry) -> None:
    result = registry.execute(SERVICE, "x-all", {**GOOD, "cluster-size": 4096})
    assert result == {"name": "n", "cluster_size": 4096, "lease": 1.0, "fast": False}


def test_a_whole_number_is_taken_where_a_number_is_asked_for(registry: Registry) -> None:
    result = registry.execute(SERVICE, "x-all", {**GOOD, "lease": 3})
    assert isinstance(result, dict)
    assert isinstance(result["lease"], float)


def test_a_command_that_returns_nothing_answers_an_empty_object(registry: Registry) -> None:
    assert registry.execute(SERVICE, "x-nothing", {}) == {}


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"name": 1}, "Invalid parameter type for 'name', expected: string"),
        ({"name": None}, "Invalid parameter type for 'name', expected: string"),
        ({"name": "\ud800"}, "Parameter 'name' is not valid Unicode text"),
        ({"disks": "a"}, "Invalid parameter type for 'disks', expected: array"),
        ({"disks": ["a", 2]}, "Invalid parameter type for 'disks[1]', expected: string"),
        ({"cluster-size": "4k"}, "Invalid parameter type for 'cluster-size', expected: integer"),
        ({"cluster-size": True}, "Invalid parameter type for 'cluster-size', expected: integer"),
        ({"cluster-size": 1.5}, "Invalid parameter type for 'cluster-size', expected: integer"),
        ({"cluster-size": 1 << 63}, "Invalid parameter type for 'cluster-size', expected: integer"),
        ({"lease": "1h"}, "Invalid parameter type for 'lease', expected: number"),
        ({"lease": float("inf")}, "Invalid parameter type for 'lease', expected: number"),
        ({"lease": 10**400}, "Invalid parameter type for 'lease', expected: number"),
        ({"lease": False}, "Invalid parameter type for 'lease', expected: number"),
        ({"fast": 1}, "Invalid parameter type for 'fast', expected: boolean"),
        ({"policy": "c"}, "Parameter 'policy' does not accept value 'c'"),
        ({"policy": 1}, "Invalid parameter type for 'policy', expected: string"),
        ({"deep": []}, "Invalid parameter type for 'deep', expected: object"),
        (
            {"numbers": [[1], ["x"]]},
            "Invalid parameter type for 'numbers[1][0]', expected: integer",
        ),
        ({"cluster_size": 1}, "Parameter 'cluster_size' is unexpected"),
        ({"zz": 1}, "Parameter 'zz' is unexpected"),
    ],
)
def test_a_wrong_argument_is_refused_in_qemus_words(
    registry: Registry, more: dict[str, Any], text: str
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        registry.execute(SERVICE, "x-all", {**GOOD, **more})
    assert str(caught.value) == text


def test_what_is_missing_is_named_before_what_is_unexpected(registry: Registry) -> None:
    with pytest.raises(InvalidArgument, match=r"^Parameter 'name' is missing$"):
        registry.execute(SERVICE, "x-all", {"zz": 1})


def test_an_unknown_command_is_not_found(registry: Registry) -> None:
    with pytest.raises(CommandNotFound, match=r"^The command foo has not been found$"):
        registry.execute(SERVICE, "foo", {})


def test_a_signature_that_json_cannot_carry_is_refused_at_import() -> None:
    registry = Registry()

    def positional(service: Any, name: str) -> None: ...
    def untyped(service: Any, *, name) -> None: ...  # type: ignore[no-untyped-def]
    def of_bytes(service: Any, *, name: bytes) -> None: ...
    def of_two(service: Any, *, name: int | str) -> None: ...
    def no_default(service: Any, *, name: str | None) -> None: ...

    for number, function in enumerate((positional, untyped, of_bytes, of_two, no_default)):
        with pytest.raises(TypeError):
            registry.command(f"x-{number}")(function)
    assert list(registry) == []


def test_two_commands_cannot_have_one_name(registry: Registry) -> None:
    with pytest.raises(ValueError, match="two commands are called x-nothing"):
        registry.command("x-nothing")(lambda service: None)


def test_the_summary_is_the_first_line_of_the_docstring(registry: Registry) -> None:
    assert registry.find("x-all").summary == "Take everything."


def test_every_command_of_ours_says_what_it_does_and_carries_the_prefix() -> None:
    qemus = {"qmp_capabilities", "query-version", "query-commands", "query-qmp-schema", "quit"}
    for command in REGISTRY:
        assert command.summary.endswith("."), command.name
        assert command.name in qemus or command.name.startswith("x-fleece-")


@pytest.mark.parametrize(
    ("name", "arguments", "text"),
    [
        ("x-fleece-snapshot-create", {"disks": []}, "'disks' is empty"),
        ("x-fleece-snapshot-create", {"disks": ["a"], "lease": 0}, "'lease' expects"),
        ("x-fleece-snapshot-create", {"disks": ["a"], "on-cbw-error": "x"}, "not accept value 'x'"),
        ("x-fleece-snapshot-extend", {"name": "a", "lease": -1}, "'lease' expects"),
        ("qmp_capabilities", {"enable": ["oob"]}, "'oob' is not available"),
        ("qmp_capabilities", {"enable": ["x"]}, "does not accept value 'x'"),
    ],
)
def test_our_commands_refuse_what_cannot_be(name: str, arguments: Any, text: str) -> None:
    with pytest.raises(InvalidArgument, match=text):
        REGISTRY.execute(SERVICE, name, arguments)

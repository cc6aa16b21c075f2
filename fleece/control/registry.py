# SPDX-License-Identifier: Apache-2.0
"""One registry of typed functions: the QMP server, its schema and the documents stand on it."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from fleece.control.kinds import Kind, kind_of, optional_of
from fleece.control.service import JSON, Service
from fleece.errors import CommandNotFound, InvalidArgument

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Argument:
    """One argument: ``name`` on the wire (dashes), ``keyword`` of the function (underscores)."""

    name: str
    keyword: str
    kind: Kind
    required: bool


@dataclass(frozen=True)
class Command:
    """A function and what its signature says. ``summary`` is the docstring's first line."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Argument, ...]
    summary: str

    def bind(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The keyword arguments for the function; InvalidArgument with QEMU's text if they are off.

        Checked in the order of the signature, what is unexpected last, as QEMU does.
        """
        bound = {}
        for argument in self.arguments:
            if argument.name in given:
                bound[argument.keyword] = argument.kind.check(given[argument.name], argument.name)
            elif argument.required:
                raise InvalidArgument(f"Parameter '{argument.name}' is missing")
        self._refuse_unexpected(given)
        return bound

    def _refuse_unexpected(self, given: Mapping[str, Any]) -> None:
        known = {argument.name for argument in self.arguments}
        for name in given:
            if name not in known:
                raise InvalidArgument(f"Parameter '{name}' is unexpected")


class Registry:
    """Commands by name. Filled while modules are imported, only read afterwards."""

    def __init__(self) -> None:
        self._commands: dict[str, Command] = {}

    def command(self, name: str) -> Callable[[F], F]:
        """Register the decorated ``def f(service, *, argument: type = default) -> JSON``.

        TypeError at import when the signature says what JSON cannot carry.
        """

        def register(function: F) -> F:
            if name in self._commands:
                raise ValueError(f"two commands are called {name}")
            summary = (inspect.getdoc(function) or "").partition("\n")[0]
            self._commands[name] = Command(name, function, _arguments(function), summary)
            return function

        return register

    def __iter__(self) -> Iterator[Command]:
        return iter(self._commands.values())

    def __contains__(self, name: object) -> bool:
        return name in self._commands

    def find(self, name: str) -> Command:
        """The command; CommandNotFound with QEMU's text."""
        try:
            return self._commands[name]
        except KeyError:
            raise CommandNotFound(f"The command {name} has not been found") from None

    def execute(self, service: Service, name: str, given: Mapping[str, Any]) -> JSON:
        """Check the arguments, run the command; a command that returns nothing answers ``{}``."""
        command = self.find(name)
        result: JSON = command.function(service, **command.bind(given))
        return {} if result is None else result


def _arguments(function: Callable[..., Any]) -> tuple[Argument, ...]:
    _, *parameters = inspect.signature(function).parameters.values()
    return tuple(_argument(function.__name__, parameter) for parameter in parameters)


def _argument(function: str, parameter: inspect.Parameter) -> Argument:
    where = f"{function}({parameter.name})"
    if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
        raise TypeError(f"{where}: arguments of a command are keyword-only")
    if parameter.annotation is inspect.Parameter.empty:
        raise TypeError(f"{where}: an argument needs a type")
    required = parameter.default is inspect.Parameter.empty
    annotation, optional = optional_of(parameter.annotation)
    if optional and required:
        raise TypeError(f"{where}: what may be None needs the default None")
    wire = parameter.name.replace("_", "-")
    return Argument(wire, parameter.name, kind_of(annotation), required)

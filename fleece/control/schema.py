# SPDX-License-Identifier: Apache-2.0
"""``query-qmp-schema``: the registry in QEMU's introspection format (qapi/introspect.json)."""

import inspect
from collections.abc import Mapping
from typing import Any, Final, get_origin

from fleece.control.events import MEMBERS
from fleece.control.kinds import Boolean, Choice, Integer, Kind, ListOf, Number, Text, kind_of
from fleece.control.registry import Argument, Command, Registry

Entity = dict[str, Any]

_BUILTIN: Final[dict[type[Kind], tuple[str, str]]] = {
    Text: ("str", "string"),
    Integer: ("int", "int"),
    Number: ("number", "number"),
    Boolean: ("bool", "boolean"),
}


def describe(registry: Registry) -> list[Entity]:
    """All commands and events, then the types they name. Types are numbered, as QEMU's are."""
    types = _Types()
    top = [types.command(command) for command in registry]
    top += [types.event(name, members) for name, members in MEMBERS.items()]
    return top + types.entities


class _Types:
    """Gives each type a name when it is first met, and keeps its description."""

    def __init__(self) -> None:
        self.entities: list[Entity] = []
        self._names: dict[object, str] = {}

    def command(self, command: Command) -> Entity:
        return {
            "name": command.name,
            "meta-type": "command",
            "arg-type": self._members([_member(a, self.of(a.kind)) for a in command.arguments]),
            "ret-type": self._result(command),
            "allow-oob": False,
        }

    def event(self, name: str, members: Mapping[str, type]) -> Entity:
        described = [{"name": n, "type": self.of(kind_of(t))} for n, t in members.items()]
        return {"name": name, "meta-type": "event", "arg-type": self._members(described)}

    def of(self, kind: Kind) -> str:
        """The name of the type, described once."""
        if isinstance(kind, ListOf):
            return self._array(self.of(kind.element))
        if isinstance(kind, Choice):
            members = [{"name": word} for word in kind.values]
            return self._numbered(kind.values, "enum", members=members, values=list(kind.values))
        name, json_type = _BUILTIN.get(type(kind), ("any", "value"))
        return self._keep(name, name, "builtin", **{"json-type": json_type})

    def _result(self, command: Command) -> str:
        annotation = inspect.signature(command.function).return_annotation
        if annotation is None:
            return self._members([])
        anything = self._keep("any", "any", "builtin", **{"json-type": "value"})
        return self._array(anything) if get_origin(annotation) is list else anything

    def _array(self, element: str) -> str:
        name = f"[{element}]"
        return self._keep(name, name, "array", **{"element-type": element})

    def _members(self, members: list[dict[str, Any]]) -> str:
        return self._numbered(repr(members), "object", members=members)

    def _numbered(self, key: object, meta: str, **content: Any) -> str:
        return self._keep((meta, key), str(len(self._names)), meta, **content)

    def _keep(self, key: object, name: str, meta: str, **content: Any) -> str:
        if key not in self._names:
            self._names[key] = name
            self.entities.append({"name": name, "meta-type": meta, **content})
        return self._names[key]


def _member(argument: Argument, kind: str) -> dict[str, Any]:
    # In this format a default of null says no more than "may be left out".
    optional = {} if argument.required else {"default": None}
    return {"name": argument.name, "type": kind, **optional}

# SPDX-License-Identifier: Apache-2.0
from typing import Any

from fleece.control.commands import REGISTRY
from fleece.control.events import MEMBERS
from fleece.control.schema import describe


def entities() -> dict[str, dict[str, Any]]:
    found = describe(REGISTRY)
    by_name = {entity["name"]: entity for entity in found}
    assert len(by_name) == len(found), "a name was given twice"
    return by_name


def test_every_type_that_is_named_is_described() -> None:
    known = entities()
    for entity in known.values():
        named = [entity[key] for key in ("arg-type", "ret-type", "element-type") if key in entity]
        if entity["meta-type"] == "object":
            named += [member["type"] for member in entity["members"]]
        assert all(name in known for name in named), entity


def test_commands_and_events_are_all_there() -> None:
    known = entities()
    kinds = {name: entity["meta-type"] for name, entity in known.items()}
    assert {n for n, kind in kinds.items() if kind == "command"} == {c.name for c in REGISTRY}
    assert {n for n, kind in kinds.items() if kind == "event"} == set(MEMBERS)


def test_arguments_say_their_type_and_whether_they_may_be_left_out() -> None:
    known = entities()
    members = known[known["x-fleece-snapshot-create"]["arg-type"]]["members"]
    described = {member["name"]: member for member in members}
    assert described["disks"] == {"name": "disks", "type": "[str]"}
    assert described["lease"] == {"name": "lease", "type": "number", "default": None}
    policy = known[described["on-cbw-error"]["type"]]
    assert policy["meta-type"] == "enum"
    assert policy["values"] == ["break-snapshot", "break-guest-write"]
    assert known["[str]"]["element-type"] == "str"

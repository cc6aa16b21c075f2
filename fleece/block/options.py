# SPDX-License-Identifier: Apache-2.0
"""Options of a node as people and programs write them, as one nested dictionary of typed values.

Three spellings mean the same (QEMU, docs of ``--blockdev`` and ``--image-opts``)::

    driver=qcow2,file.driver=nbd,file.host=H,file.port=10809
    json:{"driver": "qcow2", "file": {"driver": "nbd", "host": "H", "port": "10809"}}
    json:{"driver": "qcow2", "file.driver": "nbd", "file.host": "H", "file.port": "10809"}

`parse_pairs` and `parse_json` make the nested dictionary; `typed` checks it against the `Fields`
that a driver has. Everything that is wrong is a `UsageError` of one line.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any, Final, TypeAlias

from fleece.errors import UsageError
from fleece.units import parse_size

Options: TypeAlias = dict[str, Any]
Convert: TypeAlias = Callable[[Any, str], Any]
"""``convert(value, key)``: the value as the driver wants it, or `UsageError` naming ``key``."""
Fields: TypeAlias = Mapping[str, Convert]

MOST_TEXT: Final = 1 << 20
MOST_DEPTH: Final = 256
_MAX_INT: Final = (1 << 63) - 1
_ON: Final = ("on", "yes", "true", "y")
_OFF: Final = ("off", "no", "false", "n")


def parse_pairs(text: str) -> Options:
    """``key=value,key=value``: a comma in a value is doubled, a later key replaces an earlier."""
    flat: dict[str, Any] = {}
    for pair in _split(text):
        key, equals, value = pair.partition("=")
        if not equals:
            raise UsageError(f"option {key!r} has no value; write {key or 'key'}=VALUE (or =on)")
        flat[key] = value
    return nest(flat.items())


def _split(text: str) -> Iterator[str]:
    """The parts between single commas, with doubled commas made single."""
    _check_length(text)
    part: list[str] = []
    pieces = text.split(",")
    at = 0
    while at < len(pieces):
        part.append(pieces[at])
        if at + 2 < len(pieces) and pieces[at + 1] == "":
            part.append(",")
            at += 2
            continue
        if joined := "".join(part):
            yield joined
        part.clear()
        at += 1


def parse_json(text: str) -> Options:
    """The object of ``json:{...}`` (with or without the prefix); dotted keys are taken apart."""
    _check_length(text)
    try:
        value = json.loads(
            text.removeprefix("json:"), object_pairs_hook=_object, parse_constant=_refuse_constant
        )
    except (ValueError, RecursionError) as error:
        raise UsageError(f"json: does not hold a JSON object: {error}") from None
    if not isinstance(value, dict):
        raise UsageError("json: does not hold a JSON object; write json:{...}")
    return nest(value.items())


def _check_length(text: str) -> None:
    if len(text) > MOST_TEXT:
        raise UsageError(f"options of {len(text)} characters are too long")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is there twice")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def nest(pairs: Iterable[tuple[str, Any]]) -> Options:
    """One dictionary of dictionaries, from keys with dots and from values that are nested."""
    root: Options = {}
    for path, value in _leaves(pairs, ()):
        _insert(root, path, value)
    return {key: _with_lists(value, key) for key, value in root.items()}


def _leaves(
    pairs: Iterable[tuple[str, Any]], above: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in pairs:
        path = (*above, *key.split("."))
        if "" in path:
            raise UsageError(f"option {key!r} is not a name; write name=value or group.name=value")
        if len(path) > MOST_DEPTH:
            raise UsageError("options are nested too deeply")
        if isinstance(value, list):
            value = {str(number): item for number, item in enumerate(value)}
        if isinstance(value, dict) and value:
            yield from _leaves(value.items(), path)
        else:
            yield path, value


def _insert(root: Options, path: tuple[str, ...], value: Any) -> None:
    group: Any = root
    for name in path[:-1]:
        group = group.setdefault(name, {})
        if not isinstance(group, dict):
            raise UsageError(f"option {'.'.join(path)!r}: {name!r} has a value already")
    if path[-1] in group:
        raise UsageError(f"option {'.'.join(path)!r} is there twice, or is a group elsewhere")
    group[path[-1]] = value


def _with_lists(value: Any, where: str) -> Any:
    """Groups whose names are 0, 1, 2, ... become lists."""
    if not isinstance(value, dict):
        return value
    items = {name: _with_lists(item, f"{where}.{name}") for name, item in value.items()}
    numbers = [name for name in items if name.isascii() and name.isdigit()]
    if not numbers:
        return items
    if set(items) != {str(number) for number in range(len(items))}:
        raise UsageError(f"option {where!r}: the numbers of a list must be 0, 1, 2 and so on")
    return [items[str(number)] for number in range(len(items))]


def typed(options: Mapping[str, Any], fields: Fields, where: str) -> Options:
    """The options that ``fields`` has, converted; ``where`` ("driver qcow2") is for messages."""
    out: Options = {}
    for key, value in options.items():
        convert = fields.get(key)
        if convert is None:
            raise UsageError(f"{where} has no option {key!r}; {_nearest(key, fields)}")
        out[key] = convert(value, key)
    return out


def _nearest(key: str, fields: Fields) -> str:
    close = get_close_matches(key, fields, 1)
    return f"did you mean {close[0]!r}?" if close else "it has " + ", ".join(sorted(fields))


def text(value: Any, key: str) -> str:
    """A string without NUL."""
    if not isinstance(value, str) or "\0" in value:
        raise UsageError(f"option {key!r} must be a string, not {_shown(value)}")
    return value


def number_text(value: Any, key: str) -> str:
    """A string; JSON may have a number in its place (``port``)."""
    plain = isinstance(value, int) and not isinstance(value, bool)
    return str(value) if plain else text(value, key)


def boolean(value: Any, key: str) -> bool:
    """On or off; true or false."""
    if isinstance(value, bool):
        return value
    if value in _ON or value in _OFF:
        return value in _ON
    raise UsageError(f"option {key!r} must be on or off, not {_shown(value)}")


def integer(value: Any, key: str) -> int:
    """A whole number that is not negative."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 20:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MAX_INT:
        raise UsageError(f"option {key!r} must be a number, not {_shown(value)}")
    return value


def size(value: Any, key: str) -> int:
    """Bytes: a number, or text such as 64k and 1.5G."""
    if isinstance(value, str):
        try:
            value = parse_size(value)
        except ValueError as error:
            raise UsageError(f"option {key!r}: {error}") from None
    return integer(value, key)


def choice(*names: str) -> Convert:
    """One of ``names``."""

    def convert(value: Any, key: str) -> str:
        if value not in names:
            raise UsageError(
                f"option {key!r} must be one of {', '.join(names)}, not {_shown(value)}"
            )
        return str(value)

    return convert


def group(fields: Fields) -> Convert:
    """Options of their own, below the key."""

    def convert(value: Any, key: str) -> Options:
        if not isinstance(value, dict):
            raise UsageError(f"option {key!r} is a group ({key}.NAME), not {_shown(value)}")
        return typed(value, fields, f"option group {key!r}")

    return convert


def node(value: Any, key: str) -> Options:
    """The options of another node, which that node's driver will check."""
    if not isinstance(value, dict):
        raise UsageError(
            f"option {key!r} must be a node ({key}.driver=...), not {_shown(value)}: "
            "there are no nodes of other names here"
        )
    return value


def node_or_none(value: Any, key: str) -> Options | None:
    """As `node`; null (in JSON) or nothing (``backing=``): there shall be none."""
    return None if value is None or value == "" else node(value, key)


def _shown(value: Any) -> str:
    text = json.dumps(value) if not isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

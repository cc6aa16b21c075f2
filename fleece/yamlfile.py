# SPDX-License-Identifier: Apache-2.0
"""A YAML file as nodes that know their line and key, so that every error can name them.

Only PyYAML's ``compose`` is used: it builds no object of the file's choosing and does not expand
aliases, so that a small file stays small.
"""

import difflib
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeVar

import yaml

from fleece.errors import ConfigError

MAX_FILE: Final = 256 << 10
"""Bytes of a configuration file."""

T = TypeVar("T")

_NAMES: Final = {
    "tag:yaml.org,2002:bool": "a truth value",
    "tag:yaml.org,2002:float": "a number",
    "tag:yaml.org,2002:int": "a number",
    "tag:yaml.org,2002:map": "a mapping",
    "tag:yaml.org,2002:null": "nothing",
    "tag:yaml.org,2002:seq": "a list",
    "tag:yaml.org,2002:str": "text",
    "tag:yaml.org,2002:timestamp": "a date",
}
_MAPPING: Final = "tag:yaml.org,2002:map"
_TEXT: Final = "tag:yaml.org,2002:str"
_TRUTH: Final = {"yes": True, "true": True, "on": True, "no": False, "false": False, "off": False}


class Node:
    """One value of the file. ``key`` is its path from the root, with dots.

    Every reading method raises ConfigError ``FILE:LINE: KEY: what is wrong``.
    """

    def __init__(self, file: str, node: yaml.Node, key: str, key_node: yaml.Node) -> None:
        self._file = file
        self._node = node
        self._key_node = key_node
        self.key = key

    def error(self, text: str) -> ConfigError:
        """What is wrong with this value."""
        return self._error(self._node, text)

    def _error(self, at: yaml.Node, text: str) -> ConfigError:
        key = f" {self.key}:" if self.key else ""
        return ConfigError(f"{self._file}:{at.start_mark.line + 1}:{key} {text}")

    def _expected(self, what: str, hint: str = "") -> ConfigError:
        found = _NAMES.get(self._node.tag, f"a {self._node.tag!r}")
        return self.error(f"expected {what}, found {found}{hint}")

    # Mappings.

    def items(self) -> Iterator[tuple[str, "Node"]]:
        """The keys and values of a mapping, in the order of the file. A key may not come twice."""
        if not isinstance(self._node, yaml.MappingNode) or self._node.tag != _MAPPING:
            raise self._expected("a mapping")
        seen: dict[str, int] = {}
        for key_node, value in self._node.value:
            key = self._key_text(key_node)
            line = key_node.start_mark.line + 1
            if key in seen:
                raise self._error(key_node, f"{key!r} was already given in line {seen[key]}")
            seen[key] = line
            yield key, Node(self._file, value, f"{self.key}.{key}".lstrip("."), key_node)

    def _key_text(self, node: yaml.Node) -> str:
        if not isinstance(node, yaml.ScalarNode):
            raise self._error(node, "a key must be plain text")
        if node.tag == "tag:yaml.org,2002:merge":
            raise self._error(node, "merging with << is not supported; write the keys out")
        return str(node.value)

    def only(self, *known: str) -> None:
        """Refuse every key that is not ``known``; the nearest known one is suggested."""
        for key, node in self.items():
            if key not in known:
                near = difflib.get_close_matches(key, known, 1, 0.5)
                hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
                raise node._error(node._key_node, f"unknown key; {hint}")

    def get(self, name: str) -> "Node | None":
        """The value of a key, or None without one."""
        return next((node for key, node in self.items() if key == name), None)

    def require(self, name: str) -> "Node":
        """The value of a key that must be there."""
        node = self.get(name)
        if node is None:
            raise self._error(self._key_node, f"the key {name!r} is missing")
        return node

    # Values.

    def text(self) -> str:
        """The text."""
        if self._node.tag != _TEXT or not isinstance(self._node, yaml.ScalarNode):
            quotable = isinstance(self._node, yaml.ScalarNode) and self._node.value
            raise self._expected("text", "; put it in quotes" if quotable else "")
        return str(self._node.value)

    def boolean(self) -> bool:
        """True or false."""
        if self._node.tag != "tag:yaml.org,2002:bool":
            raise self._expected("true or false")
        return _TRUTH[str(self._node.value).lower()]

    def choice(self, words: tuple[str, ...]) -> str:
        """One of ``words``."""
        text = self.text()
        if text not in words:
            raise self.error(f"{text!r} is none of {', '.join(words)}")
        return text

    def list_or_one(self) -> list["Node"]:
        """The elements of a list; a single value counts as a list of one."""
        if not isinstance(self._node, yaml.SequenceNode):
            return [self]
        elements = enumerate(self._node.value)
        return [Node(self._file, item, f"{self.key}[{i}]", item) for i, item in elements]

    def convert(self, parse: Callable[[str], T]) -> T:
        """``parse`` of the text; its ValueError becomes ours."""
        return self._converted(self.text(), parse)

    def convert_raw(self, parse: Callable[[str], T]) -> T:
        """The same, and a number is taken as it is written: ``64k`` and ``65536`` are both fine."""
        if self._node.tag.endswith(":int") or self._node.tag.endswith(":float"):
            return self._converted(str(self._node.value), parse)
        return self.convert(parse)

    def convert_key(self, parse: Callable[[str], T]) -> T:
        """``parse`` of the key under which this value stands."""
        return self._converted(str(self._key_node.value), parse)

    def _converted(self, text: str, parse: Callable[[str], T]) -> T:
        try:
            return parse(text)
        except ValueError as error:
            raise self.error(str(error)) from None


def load_mapping(path: str) -> Node:
    """The root of the file, which must be a mapping. ConfigError for whatever is wrong with it."""
    text = _read(path)
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(path, error) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{path}:{line}: not valid YAML: {error.reason}") from None
    except RecursionError:
        raise ConfigError(f"{path}: not a configuration: nested too deeply") from None
    if root is None:
        root = yaml.MappingNode(_MAPPING, [], _start(path), _start(path))
    return Node(path, root, "", root)


def _start(path: str) -> Any:
    return yaml.Mark(path, 0, 0, 0, None, 0)


def _syntax_error(path: str, error: yaml.MarkedYAMLError) -> ConfigError:
    mark = error.problem_mark or error.context_mark
    line = mark.line + 1 if mark else 1
    reason = ", ".join(filter(None, (error.context, error.problem)))
    return ConfigError(f"{path}:{line}: not valid YAML: {reason}")


def _read(path: str) -> str:
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_FILE + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"cannot read {path}: {reason}") from error
    if len(data) > MAX_FILE:
        raise ConfigError(f"{path} is larger than {MAX_FILE >> 10} KiB: is it a configuration?")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: not valid UTF-8") from None

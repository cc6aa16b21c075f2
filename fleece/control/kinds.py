# SPDX-License-Identifier: Apache-2.0
"""The types that a command's argument may have, read from its annotation.

A kind checks a value that came as JSON and refuses it with QEMU's words. ``where`` is the
argument's name on the wire, with an index inside lists: ``disks[1]``.
"""

import math
import types
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Union, get_args, get_origin

from fleece.errors import InvalidArgument

_INT64_MIN, _INT64_MAX = -(1 << 63), (1 << 63) - 1


class Kind(ABC):
    """One type of argument. ``expected`` is what QEMU calls it in its messages."""

    expected: ClassVar[str]

    @abstractmethod
    def accepts(self, value: object) -> bool:
        """Whether the JSON value has this type."""

    def check(self, value: Any, where: str) -> Any:
        """The value as the command takes it; InvalidArgument when it is of another type."""
        if not self.accepts(value):
            text = f"Invalid parameter type for '{where}', expected: {self.expected}"
            raise InvalidArgument(text)
        return value


@dataclass(frozen=True)
class Text(Kind):
    """A string that can be written as UTF-8: a lone surrogate is refused."""

    expected = "string"

    def accepts(self, value: object) -> bool:
        """Whether it is a string."""
        return isinstance(value, str)

    def check(self, value: Any, where: str) -> str:
        """The string; a lone surrogate would fail later, far from the one who sent it."""
        text: str = super().check(value, where)
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InvalidArgument(f"Parameter '{where}' is not valid Unicode text") from None
        return text


@dataclass(frozen=True)
class Integer(Kind):
    """A whole number of 64 bits. ``true`` is not one."""

    expected = "integer"

    def accepts(self, value: object) -> bool:
        """Whether it is a whole number in the range."""
        whole = isinstance(value, int) and not isinstance(value, bool)
        return whole and _INT64_MIN <= value <= _INT64_MAX  # type: ignore[operator]


@dataclass(frozen=True)
class Number(Kind):
    """Any finite number."""

    expected = "number"

    def accepts(self, value: object) -> bool:
        """Whether it is a number that a float can hold: 1e999 is infinite to JSON readers."""
        if isinstance(value, float):
            return math.isfinite(value)
        return Integer().accepts(value)

    def check(self, value: Any, where: str) -> float:
        """The number as a float."""
        return float(super().check(value, where))


@dataclass(frozen=True)
class Boolean(Kind):
    """``true`` or ``false``."""

    expected = "boolean"

    def accepts(self, value: object) -> bool:
        """Whether it is one of the two."""
        return isinstance(value, bool)


@dataclass(frozen=True)
class Object(Kind):
    """A JSON object, passed on as it is."""

    expected = "object"

    def accepts(self, value: object) -> bool:
        """Whether it is an object."""
        return isinstance(value, dict)


@dataclass(frozen=True)
class Choice(Kind):
    """One of a few words."""

    values: tuple[str, ...]
    expected = "string"

    def accepts(self, value: object) -> bool:
        """Whether it is a string at all; which one is looked at afterwards."""
        return isinstance(value, str)

    def check(self, value: Any, where: str) -> str:
        """The word; InvalidArgument when it is none of ours."""
        word: str = super().check(value, where)
        if word not in self.values:
            raise InvalidArgument(f"Parameter '{where}' does not accept value '{word}'")
        return word


@dataclass(frozen=True)
class ListOf(Kind):
    """A list whose elements are all of one kind."""

    element: Kind
    expected = "array"

    def accepts(self, value: object) -> bool:
        """Whether it is a list."""
        return isinstance(value, list)

    def check(self, value: Any, where: str) -> list[Any]:
        """The list, each element checked."""
        items: list[Any] = super().check(value, where)
        return [self.element.check(item, f"{where}[{i}]") for i, item in enumerate(items)]


_PLAIN: dict[object, Kind] = {str: Text(), int: Integer(), float: Number(), bool: Boolean()}


def kind_of(annotation: Any) -> Kind:
    """The kind of an annotation; TypeError for one that has no place on the wire."""
    if annotation in _PLAIN:
        return _PLAIN[annotation]
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is list:
        return ListOf(kind_of(inner[0]))
    if origin is dict:
        return Object()
    if origin is Literal and all(isinstance(word, str) for word in inner):
        return Choice(inner)
    raise TypeError(f"an argument cannot be of type {annotation!r}")


def optional_of(annotation: Any) -> tuple[Any, bool]:
    """``(T, True)`` for ``T | None``, ``(T, False)`` for every other annotation."""
    if get_origin(annotation) not in (Union, types.UnionType):
        return annotation, False
    rest = tuple(part for part in get_args(annotation) if part is not type(None))
    if len(rest) != 1:
        raise TypeError(f"an argument cannot be of type {annotation!r}")
    return rest[0], True

# SPDX-License-Identifier: Apache-2.0
"""QMP on the wire: the words of docs/interop/qmp-spec, as bytes and back.

UTF-8 comes in, ASCII goes out, each message on a line of its own that ends with CR LF. An error
object carries, beside QEMU's ``class`` and ``desc``, our own ``data: {"code": ...}``: the word of
``fleece.errors`` from which a client makes the same exception again.
"""

import json
import re
import time
from typing import Any, Final

from fleece import __version__
from fleece.errors import CommandNotFound, ControlError, FleeceError

MAX_MESSAGE: Final = 1 << 20
"""Bytes of one message to the server; what is longer ends the connection."""

_STRINGS: Final = re.compile(r'"(?:[^"\\]|\\.)*"|\'(?:[^\'\\]|\\.)*\'', re.DOTALL)
_ESCAPES: Final = re.compile(r'\\(.)|"', re.DOTALL)


def version() -> dict[str, Any]:
    """Our version in the shape of QEMU's ``query-version``."""
    major, minor, micro = (int(part) for part in __version__.split(".")[:3])
    numbers = {"major": major, "minor": minor, "micro": micro}
    return {"qemu": numbers, "package": f"fleece {__version__}"}


def greeting() -> dict[str, Any]:
    """What the server says first."""
    return {"QMP": {"version": version(), "capabilities": []}}


def encode(message: dict[str, Any]) -> bytes:
    """The message as one line."""
    return json.dumps(message).encode("ascii") + b"\r\n"


def decode(frame: bytes) -> Any:
    """The JSON value in ``frame``; single-quoted strings are taken too, as QEMU takes them.

    ControlError with QEMU's "JSON parse error" for everything that is not JSON.
    """
    try:
        text = frame.decode()
    except UnicodeDecodeError:
        raise ControlError("JSON parse error, invalid UTF-8 sequence in string") from None
    if "'" in text:
        text = _STRINGS.sub(_double_quoted, text)
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at column {error.colno}"
    except RecursionError:
        reason = "nested too deeply"
    except ValueError as error:
        reason = str(error)
    raise ControlError(f"JSON parse error, {reason}") from None


def _double_quoted(match: re.Match[str]) -> str:
    literal = match.group()
    if literal[0] == '"':
        return literal
    return '"' + _ESCAPES.sub(_escape, literal[1:-1]) + '"'


def _escape(match: re.Match[str]) -> str:
    if match.group() == '"':
        return '\\"'
    return "'" if match.group(1) == "'" else match.group()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("duplicate key")
    return members


def _refuse_constant(word: str) -> None:
    raise ValueError(f"invalid keyword '{word}'")


def event(name: str, data: dict[str, Any]) -> dict[str, Any]:
    """An event that happens now."""
    seconds, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
    stamp = {"seconds": seconds, "microseconds": nanoseconds // 1000}
    return {"timestamp": stamp, "event": name, "data": data}


def error(problem: FleeceError) -> dict[str, Any]:
    """The error object of a reply."""
    kind = "CommandNotFound" if isinstance(problem, CommandNotFound) else "GenericError"
    return {"class": kind, "desc": str(problem), "data": {"code": problem.code}}


def exception(reply: Any) -> FleeceError:
    """The exception that an error object stands for: the very class the daemon raised.

    An object without our code (another program's) becomes CommandNotFound or ControlError.
    """
    described = reply if isinstance(reply, dict) else {}
    text = str(described.get("desc", "the daemon reported an error without a description"))
    data = described.get("data")
    found = _by_code().get(str(data.get("code"))) if isinstance(data, dict) else None
    if found is None:
        found = CommandNotFound if described.get("class") == "CommandNotFound" else ControlError
    return found(text)


def _by_code() -> dict[str, type[FleeceError]]:
    classes, todo = {}, [FleeceError]
    while todo:
        kind = todo.pop()
        classes[kind.code] = kind
        todo += kind.__subclasses__()
    return classes

# SPDX-License-Identifier: Apache-2.0
"""One control client's conversation, without a socket: bytes in, replies out."""

import logging
from collections.abc import Iterator
from typing import Any, Final

from fleece.control import qmp
from fleece.control.framing import BadFrame, Framer
from fleece.control.registry import Registry
from fleece.control.service import Service
from fleece.errors import CommandNotFound, ControlError, FleeceError

log = logging.getLogger(__name__)

_MEMBERS: Final = ("execute", "arguments", "id")


class Session:
    """What one client may do now.

    ``negotiated`` turns true with ``qmp_capabilities``; before it every other command is refused.
    ``over`` turns true when the input cannot be followed any further: send what was yielded, close.
    """

    def __init__(self, registry: Registry, service: Service) -> None:
        self._registry = registry
        self._service = service
        self._framer = Framer()
        self.negotiated = False
        self.over = False

    def greeting(self) -> bytes:
        """What to send first."""
        return qmp.encode(qmp.greeting())

    def receive(self, data: bytes) -> Iterator[bytes]:
        """Run each command that is complete now, and yield its reply before the next is run."""
        for frame in self._framer.feed(data):
            if isinstance(frame, BadFrame):
                self.over = frame.fatal
                yield qmp.encode({"error": qmp.error(ControlError(str(frame)))})
            else:
                yield self._answer(frame)

    def _answer(self, frame: bytes) -> bytes:
        request: dict[str, Any] = {}
        try:
            request = _request(qmp.decode(frame))
            reply = qmp.encode({"return": self._execute(request), **_id(request)})
        except FleeceError as problem:
            return qmp.encode({"error": qmp.error(problem), **_id(request)})
        except Exception as problem:
            # A bug of ours must not end the client's session, nor show it a traceback.
            failure = _internal_error(request, problem)
            return qmp.encode({"error": qmp.error(failure), **_id(request)})
        return reply

    def _execute(self, request: dict[str, Any]) -> Any:
        _check_members(request)
        name = request["execute"]
        if (name == "qmp_capabilities") is self.negotiated:
            raise CommandNotFound(
                "Capabilities negotiation is already complete, command ignored"
                if self.negotiated
                else "Expecting capabilities negotiation with 'qmp_capabilities'"
            )
        result = self._registry.execute(self._service, name, request.get("arguments", {}))
        self.negotiated = True  # before it, only qmp_capabilities comes to this line
        return result


def _request(message: Any) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise ControlError("QMP input must be a JSON object")
    return message


def _check_members(request: dict[str, Any]) -> None:
    for name in request:
        if name not in _MEMBERS:
            raise ControlError(f"QMP input member '{name}' is unexpected")
    if "execute" not in request:
        raise ControlError("QMP input lacks member 'execute'")
    if not isinstance(request["execute"], str):
        raise ControlError("QMP input member 'execute' must be a string")
    if not isinstance(request.get("arguments", {}), dict):
        raise ControlError("QMP input member 'arguments' must be an object")


def _id(request: dict[str, Any]) -> dict[str, Any]:
    return {"id": request["id"]} if "id" in request else {}


def _internal_error(request: dict[str, Any], problem: Exception) -> FleeceError:
    name = request.get("execute")
    what = f"{type(problem).__name__}: {problem}"
    log.error("internal error in a command", extra={"command": name, "reason": what})
    log.debug("internal error in a command", extra={"command": name}, exc_info=problem)
    return FleeceError(f"internal error in {name}: {what}; the log at level debug has more")

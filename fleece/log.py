# SPDX-License-Identifier: Apache-2.0
"""Logging for a daemon: one line for each event, on standard error, for people or for machines.

Text is ``key=value``, JSON is one object a line; both carry the same keys. What a call passes in
``extra`` becomes keys of its own: ``log.info("disk added", extra={"disk": "vm1"})``. INFO is the
lifecycle, once for each connection, job and snapshot; never a request, a payload or a key.
"""

import json
import logging
import sys
import traceback
from datetime import UTC, datetime
from typing import Any, Final, TextIO

LEVELS: Final = ("debug", "info", "warning", "error", "critical")

_STANDARD: Final = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime"}


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    """What a line says, in order. A traceback is for developers: only when DEBUG is shown."""
    moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds")
    fields: dict[str, Any] = {
        "time": moment.replace("+00:00", "Z"),
        "level": record.levelname.lower(),
        "logger": record.name,
        "msg": record.getMessage(),
    }
    fields.update((k, v) for k, v in record.__dict__.items() if k not in _STANDARD)
    if record.exc_info and record.exc_info[1] is not None:
        fields["error"] = "".join(traceback.format_exception_only(record.exc_info[1])).strip()
        if logging.getLogger(record.name).isEnabledFor(logging.DEBUG):
            fields["traceback"] = "".join(traceback.format_exception(*record.exc_info))
    return fields


def _plain(value: object) -> str:
    """``value`` as it is if no reader can mistake it, else as a JSON string."""
    text = str(value)
    if text and text.isprintable() and not any(c in text for c in ' ="\\'):
        return text
    return json.dumps(text)


class TextFormatter(logging.Formatter):
    """``time=... level=info logger=fleece.block msg="disk added" disk=vm1``."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, whatever the message holds."""
        return " ".join(f"{key}={_plain(value)}" for key, value in _fields(record).items())


class JSONFormatter(logging.Formatter):
    """The same keys as one JSON object; what JSON has no type for becomes text."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, whatever the message holds."""
        return json.dumps(_fields(record), default=str)


class _Handler(logging.StreamHandler[TextIO]):
    """Standard error that went away must not stop a daemon, nor fill it with tracebacks."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Lose the line."""


def setup(level: str = "info", json: bool = False, stream: TextIO | None = None) -> None:
    """Send every log line of ``level`` and above to ``stream`` (standard error).

    May be called again: the last call holds. Raises ValueError for a level not in `LEVELS`.
    """
    if level.lower() not in LEVELS:
        raise ValueError(f"{level!r} is not a log level; use one of {', '.join(LEVELS)}")
    handler = _Handler(sys.stderr if stream is None else stream)
    handler.setFormatter(JSONFormatter() if json else TextFormatter())
    root = logging.getLogger()
    for old in [h for h in root.handlers if isinstance(h, _Handler)]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())

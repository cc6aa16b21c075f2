# SPDX-License-Identifier: Apache-2.0
"""Where one JSON message ends and the next begins, in bytes that come in any pieces.

QEMU ends a message where its brackets balance, not at a line end: old clients send no line end,
and people write one object over several lines. So do we. A line that does not begin with a
bracket is a message of its own (and will be refused).
"""

import re
from collections.abc import Iterator
from typing import Final

from fleece.control.qmp import MAX_MESSAGE

MAX_NESTING: Final = 1024

_SPACE: Final = b" \t\r\n"
_OUTSIDE: Final = re.compile(rb"[{}\[\]\"'\xfe\xff]")
_INSIDE: Final = {
    ord('"'): re.compile(rb"[\"\\\x00-\x1f\xfe\xff]"),
    ord("'"): re.compile(rb"['\\\x00-\x1f\xfe\xff]"),
}
_BACKSLASH: Final = ord("\\")


class BadFrame(Exception):
    """These bytes are no message. With ``fatal`` the stream cannot be followed any further."""

    def __init__(self, text: str, fatal: bool = False) -> None:
        super().__init__(text)
        self.fatal = fatal


class Framer:
    """Feed it bytes, take out messages. It never holds more than ``limit`` bytes and one read."""

    def __init__(self, limit: int = MAX_MESSAGE) -> None:
        self._limit = limit
        self._buffer = bytearray()
        self._start_over()

    def _start_over(self) -> None:
        self._scanned = 0
        self._depth = 0
        self._quote = 0

    def feed(self, data: bytes) -> Iterator[bytes | BadFrame]:
        """Each message that is complete now, and in its place each error."""
        self._buffer += data
        while True:
            try:
                frame = self._next()
            except BadFrame as problem:
                yield problem
                if problem.fatal:
                    return
                continue
            if frame is None:
                return
            yield frame

    def _next(self) -> bytes | None:
        if not self._scanned:
            self._skip_space()
        if not self._buffer:
            return None
        end = self._end()
        if (len(self._buffer) if end is None else end) > self._limit:
            raise BadFrame("JSON token size limit exceeded", fatal=True)
        return None if end is None else self._take(end)

    def _skip_space(self) -> None:
        del self._buffer[: len(self._buffer) - len(self._buffer.lstrip(_SPACE))]

    def _take(self, end: int) -> bytes:
        frame = bytes(self._buffer[:end])
        del self._buffer[:end]
        self._start_over()
        return frame

    def _end(self) -> int | None:
        if self._buffer[0] in b"{[":
            return self._end_of_brackets()
        newline = self._buffer.find(b"\n", self._scanned)
        self._scanned = len(self._buffer)
        return newline + 1 if newline >= 0 else None

    def _end_of_brackets(self) -> int | None:
        buffer = self._buffer
        while True:
            pattern = _INSIDE[self._quote] if self._quote else _OUTSIDE
            match = pattern.search(buffer, self._scanned)
            if match is None:
                self._scanned = len(buffer)
                return None
            at = match.start()
            if buffer[at] == _BACKSLASH and at + 1 == len(buffer):
                self._scanned = at  # what it escapes has not come yet
                return None
            self._scanned = at + 1
            self._step(buffer[at])
            if not self._depth:
                return self._scanned

    def _step(self, byte: int) -> None:
        if byte >= 0xFE or (byte < 0x20 and self._quote):
            self._take(self._scanned)
            raise BadFrame(f"JSON parse error, stray byte 0x{byte:02x}")
        if self._quote:
            self._inside(byte)
        elif byte in b"\"'":
            self._quote = byte
        else:
            self._depth += 1 if byte in b"{[" else -1
        if self._depth > MAX_NESTING:
            raise BadFrame("JSON nesting depth limit exceeded", fatal=True)

    def _inside(self, byte: int) -> None:
        if byte == _BACKSLASH:
            self._scanned += 1
        else:
            self._quote = 0

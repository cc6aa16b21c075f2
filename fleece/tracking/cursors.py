# SPDX-License-Identifier: Apache-2.0
"""Cursors: for each consumer of a disk, the last checkpoint that it acknowledged."""

import json
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from fleece.errors import InvalidArgument, TrackingError
from fleece.tracking.atomic import replace_file

MAX_CONSUMER: Final = 200

_VERSION: Final = 1
_MAX_BYTES: Final = 64 << 20
_KINDS: Final = {"consumer": str, "generation": str, "epoch": int}


@dataclass(frozen=True)
class Cursor:
    """``consumer`` has everything that was written up to the end of ``epoch``."""

    consumer: str
    generation: str
    epoch: int


def check_consumer(name: str) -> None:
    """Raises `InvalidArgument` unless ``name`` can be that of a consumer.

    It becomes part of a metadata context, ``qemu:dirty-bitmap:NAME``.
    """
    if not 1 <= len(name) <= MAX_CONSUMER:
        raise InvalidArgument(
            f"the name of a consumer has 1 to {MAX_CONSUMER} characters, not {len(name)}"
        )
    if "/" in name or not name.isprintable():
        raise InvalidArgument(
            f"{name!r} cannot be the name of a consumer: no '/', no control characters"
        )


class CursorStore:
    """The cursors of one disk, in a JSON file that each change replaces, durable on return.

    Readers never wait for the disk: a checkpoint asks for the cursors while the guest is held.
    ``problem`` says why the file could not be read, if so; its cursors are lost then.
    """

    def __init__(self, path: Path) -> None:
        """Load ``path`` if it is there. Raises OSError if it may not be read."""
        self._path = path
        self._lock = threading.Lock()
        self._cursors: dict[str, Cursor] = {}
        self.problem: str | None = None
        try:
            self._cursors = _load(path)
        except FileNotFoundError:
            pass
        except (ValueError, RecursionError):
            self.problem = f"the file of cursors {path} is damaged"

    def get(self, consumer: str) -> Cursor | None:
        """The cursor of ``consumer``; None if it has none."""
        return self._cursors.get(consumer)

    def list(self) -> list[Cursor]:
        """All of them, by name."""
        return sorted(self._cursors.values(), key=lambda cursor: cursor.consumer)

    def acknowledge(self, cursor: Cursor, current: str) -> Cursor:
        """Move the consumer's cursor to ``cursor``; returns what holds now.

        It never moves back: not to an earlier epoch, and from the ``current`` generation not to
        another one. Raises `InvalidArgument` for the name, `TrackingError` if it cannot be stored.
        """
        check_consumer(cursor.consumer)
        with self._lock:
            old = self._cursors.get(cursor.consumer)
            if old is not None and _is_later(old, cursor, current):
                return old
            self._replace({**self._cursors, cursor.consumer: cursor})
            return cursor

    def remove(self, consumer: str) -> bool:
        """Forget ``consumer``; False if it has no cursor. Raises `TrackingError`."""
        with self._lock:
            if consumer not in self._cursors:
                return False
            self._replace({k: v for k, v in self._cursors.items() if k != consumer})
            return True

    def _replace(self, cursors: dict[str, Cursor]) -> None:
        rows = [asdict(cursor) for _, cursor in sorted(cursors.items())]
        text = json.dumps({"version": _VERSION, "cursors": rows}, indent=1) + "\n"
        try:
            replace_file(self._path, text.encode())
        except OSError as error:
            raise TrackingError(
                f"cannot store the cursor in {self._path}: {error.strerror}; nothing was changed"
            ) from error
        self._cursors = cursors


def _is_later(old: Cursor, new: Cursor, current: str) -> bool:
    """Whether ``old`` must stay although ``new`` is acknowledged."""
    if old.generation == new.generation:
        return old.epoch >= new.epoch
    return old.generation == current


def _load(path: Path) -> dict[str, Cursor]:
    with path.open("rb") as file:
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise ValueError("too long")
    document = json.loads(data)
    if not isinstance(document, dict) or document.get("version") != _VERSION:
        raise ValueError("no cursors of this version")
    rows = document.get("cursors")
    if not isinstance(rows, list):
        raise ValueError("no list of cursors")
    return {cursor.consumer: cursor for cursor in map(_parse, rows)}


def _parse(row: object) -> Cursor:
    if not isinstance(row, dict) or {k: type(v) for k, v in row.items()} != _KINDS:
        raise ValueError("not a cursor")
    return Cursor(row["consumer"], row["generation"], row["epoch"])

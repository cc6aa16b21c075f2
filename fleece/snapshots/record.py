# SPDX-License-Identifier: Apache-2.0
"""What the daemon must know to find its snapshots again: one small file for each, replaced whole.

The order of the writes makes every moment safe to be killed in: a record of phase ``creating``
names the files before they exist, so a start finds and removes what was never announced;
``active`` is written before the snapshot is reported; ``dropped`` before its first file goes.

``dropped`` is told by the name of the file, not by its contents: to rename takes no space, and a
snapshot must be droppable when it is what has filled the disk.
"""

import contextlib
import json
import logging
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Final

from fleece.errors import SnapshotError
from fleece.tracking.atomic import replace_file, sync_directory

log = logging.getLogger(__name__)

CREATING: Final = "creating"
ACTIVE: Final = "active"
DROPPED: Final = "dropped"

SUFFIX: Final = ".snapshot.json"
DROPPED_SUFFIX: Final = ".dropped.json"


@dataclass
class Part:
    """One disk of a snapshot.

    ``image`` and ``inode`` (``[device, inode]``) say which file the disk was. ``since`` and
    ``reasons`` say, as of the instant, what each consumer had acknowledged (an epoch), or None and
    why there is nothing to count from.
    """

    disk: str
    image: str
    inode: list[int]
    overlay: str
    size: int
    cluster_size: int
    policy: str
    map_file: str | None = None
    epoch: int | None = None
    generation: str | None = None
    since: dict[str, int | None] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def files(self) -> list[Path]:
        """Everything that goes when the snapshot goes."""
        return [Path(name) for name in (self.overlay, self.map_file) if name]


@dataclass
class Record:
    """One snapshot. Times are seconds since 1970; ``serial`` orders the snapshots of a daemon."""

    name: str
    serial: int
    created: float
    boot_id: str
    phase: str
    consumer: str | None
    lease_expires: float | None
    parts: list[Part]
    drain_microseconds: int = 0
    acknowledged: list[str] = field(default_factory=list)


class Records:
    """The records in a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def _path(self, record: Record) -> Path:
        suffix = DROPPED_SUFFIX if record.phase == DROPPED else SUFFIX
        return self.directory / (record.name + suffix)

    def save(self, record: Record) -> None:
        """Write or replace; SnapshotError if that fails, with the old record in place."""
        try:
            replace_file(self._path(record), json.dumps(asdict(record), indent=1).encode())
        except OSError as problem:
            raise SnapshotError(
                f"cannot record snapshot {record.name!r} in {self.directory}: "
                f"{problem.strerror}; free some space there, or choose another with --state"
            ) from problem

    def drop(self, record: Record) -> None:
        """Make it one of phase ``dropped``; SnapshotError if that fails, with it as it was."""
        before, phase = self._path(record), record.phase
        record.phase = DROPPED
        try:
            before.rename(self._path(record))
        except OSError as problem:
            record.phase = phase
            raise SnapshotError(
                f"cannot drop snapshot {record.name!r}: its record {before} cannot be renamed: "
                f"{problem.strerror}; see to that directory"
            ) from problem

    def remove(self, record: Record) -> None:
        """Forget it. Idempotent."""
        for suffix in (SUFFIX, DROPPED_SUFFIX):
            (self.directory / (record.name + suffix)).unlink(missing_ok=True)
        sync_directory(self.directory)

    def touch(self, record: Record, when: int) -> None:
        """Give its file the time ``when``, in nanoseconds since 1970. Never fails."""
        with contextlib.suppress(OSError):  # it was dropped meanwhile, or is as it was
            os.utime(self._path(record), ns=(when, when))

    def touched(self, record: Record) -> int:
        """The time of its file, in nanoseconds since 1970; 0 if there is none."""
        try:
            return self._path(record).stat().st_mtime_ns
        except OSError:
            return 0

    def load(self) -> list[Record]:
        """All of them, oldest first. One that cannot be read is logged and left where it is.

        Removes what a killed process was about to put in place (`replace_file`), the maps of
        changes in this directory too.
        """
        for path in self.directory.glob(".*.tmp"):
            path.unlink(missing_ok=True)
        found = [record for record in map(_read, self._files()) if record is not None]
        return sorted(found, key=lambda record: record.serial)

    def _files(self) -> Iterable[Path]:
        for suffix in (SUFFIX, DROPPED_SUFFIX):
            yield from self.directory.glob("*" + suffix)


def _read(path: Path) -> Record | None:
    try:
        record = _parse(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as problem:
        log.error("cannot read the snapshot record %s: %s; it is left out", path, problem)
        return None
    if path.name == record.name + DROPPED_SUFFIX:
        record.phase = DROPPED
    elif path.name != record.name + SUFFIX:
        log.error("the snapshot record %s is one of %r; it is left out", path, record.name)
        return None
    return record


def _parse(data: Any) -> Record:
    if not isinstance(data, dict) or not isinstance(data.get("parts"), list):
        raise ValueError("it is not a record of a snapshot")
    parts = [Part(**part) for part in data.pop("parts")]
    record = Record(parts=parts, **data)
    _check_kinds(record)
    for part in parts:
        _check_kinds(part)
    return record


_KINDS: Final[dict[object, tuple[type, ...]]] = {
    str: (str,),
    int: (int,),
    float: (int, float),
    str | None: (str, type(None)),
    int | None: (int, type(None)),
    float | None: (int, float, type(None)),
}


def _check_kinds(thing: Record | Part) -> None:
    """ValueError unless every plain field holds what it is declared to hold."""
    for about in fields(thing):
        value = getattr(thing, about.name)
        kinds = _KINDS.get(about.type, (list, dict))
        if not isinstance(value, kinds):
            raise ValueError(f"its member {about.name!r} is of the wrong type")

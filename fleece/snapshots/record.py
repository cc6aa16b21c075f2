# SPDX-License-Identifier: Apache-2.0
"""What the daemon must know to find its snapshots again: one small file for each, replaced whole.

The order of the writes makes every moment safe to be killed in: a record of phase ``creating``
names the files before they exist, so a start finds and removes what was never announced;
``active`` is written before the snapshot is reported; ``dropped`` before its first file goes.
"""

import json
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from fleece.errors import SnapshotError
from fleece.tracking.atomic import replace_file, sync_directory

log = logging.getLogger(__name__)

CREATING: Final = "creating"
ACTIVE: Final = "active"
DROPPED: Final = "dropped"

SUFFIX: Final = ".snapshot.json"


@dataclass
class Part:
    """One disk of a snapshot.

    ``since`` and ``reasons`` say, as of the instant, what each consumer had acknowledged (an
    epoch), or None and why there is nothing to count from.
    """

    disk: str
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

    def _path(self, name: str) -> Path:
        return self.directory / (name + SUFFIX)

    def save(self, record: Record) -> None:
        """Write or replace; SnapshotError if that fails, with the old record in place."""
        try:
            replace_file(self._path(record.name), json.dumps(asdict(record), indent=1).encode())
        except OSError as problem:
            raise SnapshotError(
                f"cannot record snapshot {record.name!r} in {self.directory}: "
                f"{problem.strerror}; free some space there, or choose another with --state"
            ) from problem

    def remove(self, record: Record) -> None:
        """Forget it. Idempotent."""
        self._path(record.name).unlink(missing_ok=True)
        sync_directory(self.directory)

    def load(self) -> list[Record]:
        """All of them, oldest first. One that cannot be read is logged and left where it is."""
        found = []
        for path in self.directory.glob("*" + SUFFIX):
            try:
                found.append(_parse(json.loads(path.read_bytes())))
            except (OSError, ValueError, TypeError, KeyError) as problem:
                log.error("cannot read the snapshot record %s: %s; it is left out", path, problem)
        return sorted(found, key=lambda record: record.serial)


def _parse(data: dict[str, Any]) -> Record:
    parts = [Part(**part) for part in data.pop("parts")]
    return Record(parts=parts, **data)

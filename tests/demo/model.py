# SPDX-License-Identifier: Apache-2.0
"""What the disk must hold at an instant, worked out from the writers' logs and from nothing else.

The instant lies between two moments: everything acknowledged before the snapshot was asked for
is in it, nothing issued after it was made is. In between, for each writer, exactly one length of
its log fits. Over several writers the lengths must also be one instant: if a write is in it, then
so is every write that was acknowledged before that one was even issued.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.demo.disk import copy_sparse
from tests.demo.tools import DemoFailed
from tests.demo.writer import SECTOR, Write

CHUNK = 1 << 20


@dataclass(frozen=True)
class Window:
    """Per writer, the fewest and the most writes that the instant can hold."""

    low: tuple[int, ...]
    high: tuple[int, ...]

    @property
    def states(self) -> int:
        """How many states of the disk are possible: every length of every writer's log."""
        return math.prod(high - low + 1 for low, high in zip(self.low, self.high, strict=True))


@dataclass(frozen=True)
class Instant:
    """``cut``: how many writes of each writer it holds. ``path``: the whole disk as it was."""

    cut: tuple[int, ...]
    path: Path

    @property
    def writes(self) -> int:
        """How many writes it holds."""
        return sum(self.cut)


def prove(
    pulled: Path, base: Path, logs: Sequence[Sequence[Write]], window: Window, model: Path
) -> Instant:
    """Show that ``pulled`` is one instant within ``window``, byte for byte, or `DemoFailed`.

    ``base`` is the disk before the first write. The instant is built in the new file ``model``.
    """
    copy_sparse(base, model)
    cut = []
    with model.open("r+b", buffering=0) as ours, pulled.open("rb", buffering=0) as theirs:
        for number, log in enumerate(logs):
            low, high = window.low[number], window.high[number]
            for write in log[:low]:
                os.pwrite(ours.fileno(), write.data(), write.offset)
            cut.append(low + _settle(log[low:high], ours.fileno(), theirs.fileno(), number))
    _compare(model, pulled)
    _check_order(logs, cut)
    return Instant(tuple(cut), model)


def _settle(doubtful: Sequence[Write], ours: int, theirs: int, number: int) -> int:
    """Find how many of ``doubtful`` the disk ``theirs`` holds, and write just these to ``ours``."""
    differ = _differences(doubtful, ours, theirs)
    fitting = [] if differ else [0]
    undo: list[tuple[int, bytes]] = []
    for count, write in enumerate(doubtful, 1):
        undo.append((write.offset, os.pread(ours, write.length, write.offset)))
        os.pwrite(ours, write.data(), write.offset)
        differ -= _sectors(write)
        differ |= _differences([write], ours, theirs)
        if not differ:
            fitting.append(count)
    if len(fitting) != 1:
        raise DemoFailed(
            f"writer {number}: {len(fitting)} of its {len(doubtful) + 1} possible states are what "
            "was pulled; it must be exactly one"
        )
    for offset, before in reversed(undo[fitting[0] :]):
        os.pwrite(ours, before, offset)
    return fitting[0]


def _sectors(write: Write) -> set[int]:
    return set(range(write.offset, write.offset + write.length, SECTOR))


def _differences(writes: Sequence[Write], ours: int, theirs: int) -> set[int]:
    """Offsets of the sectors under ``writes`` in which the two files are not equal."""
    differ = set()
    for write in writes:
        left = os.pread(ours, write.length, write.offset)
        right = os.pread(theirs, write.length, write.offset)
        if left != right:
            for at in range(0, write.length, SECTOR):
                if left[at : at + SECTOR] != right[at : at + SECTOR]:
                    differ.add(write.offset + at)
    return differ


def _compare(model: Path, pulled: Path) -> None:
    """`DemoFailed` unless the two files are equal from the first byte to the last."""
    sizes = model.stat().st_size, pulled.stat().st_size
    if sizes[0] != sizes[1]:
        raise DemoFailed(f"{pulled.name} has {sizes[1]} bytes, the disk had {sizes[0]}")
    with model.open("rb") as left, pulled.open("rb") as right:
        for offset in range(0, sizes[0], CHUNK):
            if left.read(CHUNK) != right.read(CHUNK):
                raise DemoFailed(
                    f"{pulled.name} is not the disk at any instant: it differs within the "
                    f"1 MiB from offset {offset}"
                )


def equal(left: Path, right: Path) -> bool:
    """Whether the two files hold the same bytes."""
    try:
        _compare(left, right)
    except DemoFailed:
        return False
    return True


def _check_order(logs: Sequence[Sequence[Write]], cut: Sequence[int]) -> None:
    """`DemoFailed` if a write is in, and one that had ended before it began is not."""
    begun = max(
        (log[count - 1].issued for log, count in zip(logs, cut, strict=True) if count), default=0.0
    )
    for number, (log, count) in enumerate(zip(logs, cut, strict=True)):
        if count < len(log) and log[count].acknowledged < begun:
            raise DemoFailed(
                f"no instant: write {count} of writer {number} is missing, and another writer's "
                "that was issued after it had been acknowledged is there"
            )

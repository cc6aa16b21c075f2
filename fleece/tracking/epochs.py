# SPDX-License-Identifier: Apache-2.0
"""The epoch map: for each granule of a disk, the epoch in which it was last written.

A cell is one byte, a *slot*; a table of 256 words says which epoch a slot stands for. The state
beside the cells is 257 words of 64 bits::

    word 0         the current slot; the current epoch is what the table says of it
    words 1..256   the table: epoch of slot 0..255, 0 = the slot is free
                   (slot 0 is never free: "last written in epoch table[0] or before")

Both may lie in shared memory of a process that is killed between any two stores, so the order of
the stores matters. Every word is stored at once (8 aligned bytes), every cell is a byte, and each
state in between is right or makes some granule look *newer* than it is: more is copied, nothing is
missed.

- `EpochMap.mark` stores the cells before the write is submitted.
- `EpochMap.advance` stores ``table[free slot] = epoch + 1``, which means nothing as long as no cell
  and not word 0 has that slot, and then word 0. That store alone is the checkpoint. After a kill
  between the two, the entry has an epoch above the current one; it is freed at the next start.
- Collapsing, when no slot is free: (1) ``table[0]`` is raised to the latest epoch that goes to slot
  0, (2) cells are rewritten, each slot X to a slot whose epoch is not before that of X, (3) the
  entries of the slots that no cell has any more become 0. In the middle of (2) a cell is X, whose
  entry still stands, or its newer heir. A slot is free for use again only after (3).
"""

import uuid
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from itertools import pairwise
from typing import Final

from fleece.errors import TrackingError
from fleece.tracking.frozen import SLOTS, FrozenMap
from fleece.units import is_power_of_two

STATE_WORDS: Final = 1 + SLOTS
GRANULARITY: Final = 65536
MIN_GRANULARITY: Final = 4096
MAX_KEPT: Final = 192
"""How many checkpoints stay told apart when slots run out; the oldest are thinned out beyond."""

_REWRITE_CHUNK: Final = 1 << 20


def granules_of(size: int, granularity: int) -> int:
    """How many granules of ``granularity`` bytes a disk of ``size`` bytes has."""
    return -(-size // granularity)


class EpochMap:
    """Which granule was last written in which epoch, over any writable memory.

    ``mark`` may be called by any number of threads at once. ``advance`` and ``freeze`` only while
    the disk is drained, that is, while nobody marks: a cell marked in the middle of a collapse
    could be lost.
    """

    __slots__ = (
        "_cells",
        "_epoch",
        "_fill",
        "_shift",
        "_slot",
        "_state",
        "generation",
        "granularity",
        "granules",
        "size",
    )

    def __init__(
        self, cells: memoryview, state: memoryview, *, size: int, granularity: int, generation: str
    ) -> None:
        """Use ``cells`` (bytes) and ``state`` (STATE_WORDS words), as `start` or a kill left them.

        Raises `TrackingError` if they contradict themselves.
        """
        self.size = size
        self.granularity = granularity
        self.generation = generation
        self.granules = granules_of(size, granularity)
        self._shift = granularity.bit_length() - 1
        self._cells = cells
        self._state = state
        check_granularity(granularity)
        if len(cells) != self.granules or len(state) != STATE_WORDS:
            raise TrackingError("the epoch map does not fit the size of its disk")
        _recover(state)
        self._use(state[0])

    @classmethod
    def in_memory(cls, size: int, granularity: int = GRANULARITY) -> "EpochMap":
        """A new map that ends with the process."""
        cells = memoryview(bytearray(granules_of(size, granularity)))
        state = memoryview(bytearray(8 * STATE_WORDS)).cast("Q")
        start(state)
        generation = str(uuid.uuid4())
        return cls(cells, state, size=size, granularity=granularity, generation=generation)

    @property
    def epoch(self) -> int:
        """The current epoch: the one to which a write belongs now. The first is 1."""
        return self._epoch

    def mark(self, offset: int, length: int) -> None:
        """Bytes ``[offset, offset + length)`` are about to be written. Call *before* submitting.

        A cell that has the current slot already is not stored again: the page stays clean and the
        kernel need not write it back once more.
        """
        shift = self._shift
        first = offset >> shift
        last = (offset + length - 1) >> shift
        if first == last:
            if self._cells[first] != self._slot:
                self._cells[first] = self._slot
        else:
            self._cells[first : last + 1] = self._fill * (last + 1 - first)

    def advance(self, keep: Iterable[int] = ()) -> int:
        """End the current epoch and return its number S, the checkpoint. Only while drained.

        What is written from now on belongs to S + 1. ``keep`` are the checkpoints from which
        somebody will count changes; the others may be merged when slots run out, and changes since
        one of those then hold more than what changed, never less.
        """
        ended = self._epoch
        slot = self._free_slot() or self._collapse({*keep, ended})
        self._state[1 + slot] = ended + 1
        self._state[0] = slot
        self._use(slot)
        return ended

    def freeze(self) -> FrozenMap:
        """A copy of the map as of the last checkpoint: in the same drain as `advance`."""
        return FrozenMap(
            bytes(self._cells),
            tuple(self._state[1:]),
            epoch=self._epoch - 1,
            size=self.size,
            granularity=self.granularity,
            generation=self.generation,
        )

    def _use(self, slot: int) -> None:
        self._slot = slot
        self._fill = bytes((slot,))
        self._epoch: int = self._state[1 + slot]

    def _free_slot(self) -> int:
        """The first slot that is not in use, or 0."""
        return next((slot for slot in range(1, SLOTS) if not self._state[1 + slot]), 0)

    def _collapse(self, keep: set[int]) -> int:
        """Merge epochs between which nobody in ``keep`` (it holds the current one) asks.

        Returns one of the slots that it freed: 255 are in use, no more than MAX_KEPT + 1 stay.
        """
        heirs, floor = self._heirs(_thinned(self._told_apart(keep)))
        state = self._state
        if floor > state[1]:
            state[1] = floor
        table = bytearray(range(SLOTS))
        for slot, heir in heirs.items():
            table[slot] = heir
        rewrite(self._cells, bytes(table))
        for slot in heirs:
            state[1 + slot] = 0
        return min(heirs)

    def _told_apart(self, keep: set[int]) -> list[int]:
        """The checkpoints at which the map can still be cut for somebody in ``keep``, in order.

        One that was merged into a later epoch is cut at the last live one before it.
        """
        live = sorted({self._state[1], *filter(None, self._state[2:])})
        places = (bisect_right(live, epoch) for epoch in keep if epoch <= self._epoch)
        return sorted({live[place - 1] for place in places if place})

    def _heirs(self, kept: list[int]) -> tuple[dict[int, int], int]:
        """Slot -> the slot it is merged into, and the latest epoch that is merged into slot 0.

        Epochs with no kept checkpoint between them go to the latest of them, those up to the first
        kept checkpoint to slot 0. The current slot is never given up: word 0 names it.
        """
        live = sorted(
            (self._state[1 + slot], slot) for slot in range(1, SLOTS) if self._state[1 + slot]
        )
        heirs, floor = {}, 0
        groups: dict[int, list[int]] = {}
        for epoch, slot in live:
            group = bisect_left(kept, epoch)
            if group:
                groups.setdefault(group, []).append(slot)
            elif slot != self._slot:
                heirs[slot], floor = 0, epoch
        for members in groups.values():
            heirs.update((slot, members[-1]) for slot in members[:-1])
        return heirs, floor


def check_granularity(granularity: int) -> None:
    """Raises `TrackingError` unless it is a power of two and at least 4096."""
    if granularity < MIN_GRANULARITY or not is_power_of_two(granularity):
        raise TrackingError(
            f"a granularity of {granularity} bytes is not a power of two from {MIN_GRANULARITY} up"
        )


def start(state: memoryview) -> None:
    """Make zeroed words the state of a new generation: epoch 1 in slot 1."""
    state[1 + 1] = 1
    state[0] = 1


def rewrite(cells: memoryview, table: bytes) -> None:
    """Replace every cell c by ``table[c]`` in place; pages on which nothing changes stay clean."""
    for position in range(0, len(cells), _REWRITE_CHUNK):
        chunk = cells[position : position + _REWRITE_CHUNK]
        old = bytes(chunk)
        new = translated(old, table)
        if new != old:
            chunk[:] = new


def translated(cells: bytes, table: bytes) -> bytes:
    """``table[c]`` for each c of ``cells``."""
    return cells.translate(table)


def _thinned(kept: list[int]) -> list[int]:
    """At most MAX_KEPT of these checkpoints, the last one among them: every other old one goes."""
    while len(kept) > MAX_KEPT:
        cut = min(2 * (len(kept) - MAX_KEPT), len(kept) - 1)
        kept = kept[1:cut:2] + kept[cut:]
    return kept


def _recover(state: memoryview) -> None:
    """Undo what a kill in the middle of `EpochMap.advance` left; TrackingError if impossible."""
    slot = state[0]
    epoch = state[1 + slot] if 0 < slot < SLOTS else 0
    live = sorted(state[2:])  # not slot 0: half-way through a collapse it equals one of them
    if not state[1] < epoch or any(a == b != 0 for a, b in pairwise(live)):
        raise TrackingError("the table of epochs contradicts itself")
    for other in range(1, SLOTS):
        if state[1 + other] > epoch:
            state[1 + other] = 0

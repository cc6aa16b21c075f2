# SPDX-License-Identifier: Apache-2.0
"""An epoch map as of one checkpoint, and the answer to "what changed since".

Nothing here runs per granule: `bytes.translate` turns a copy of the map into one byte of 0 or 1 for
each granule, and `bytes.find` jumps from one edge to the next. 1 TiB in granules of 64 KiB are
16 MiB and take some 10 ms.
"""

import struct
import zlib
from pathlib import Path
from typing import Final

from fleece.errors import TrackingError
from fleece.tracking.atomic import replace_file
from nbdwire.constants import STATE_DIRTY
from nbdwire.extents import Extent

SLOTS: Final = 256
MAX_VIEW_EXTENTS: Final = 16384

_MAGIC: Final = b"FLCFROZN"
_VERSION: Final = 1
# magic, version, CRC-32 of all that follows; then epoch, size, granularity, generation, slot table
_PREFIX: Final = struct.Struct("<8sII")
_BODY: Final = struct.Struct(f"<QQQ40s{SLOTS}Q")
_EDGE: Final = (b"\1", b"\0")  # what ends a run of granules that are clean, dirty


class ChangedView:
    """Which granules changed. Callable as `nbdwire.export.ExtentsFunction`; safe for all threads.

    It keeps one byte for each granule: 16 MiB for 1 TiB in granules of 64 KiB.
    """

    __slots__ = ("_bits", "_granularity", "_shift", "size")

    def __init__(self, bits: bytes, size: int, granularity: int) -> None:
        self._bits = bits
        self._granularity = granularity
        self._shift = granularity.bit_length() - 1
        self.size = size

    def __call__(self, offset: int, length: int) -> list[Extent]:
        """Extents with STATE_DIRTY or 0, in order from ``offset``, without gaps, coalesced.

        They cover ``length`` bytes exactly, or less if there are MAX_VIEW_EXTENTS of them. The
        range must lie in the disk, so the last granule of an odd-sized disk is clipped to it.
        """
        bits, shift, end = self._bits, self._shift, offset + length
        stop = (end + self._granularity - 1) >> shift
        out: list[Extent] = []
        while offset < end and len(out) < MAX_VIEW_EXTENTS:
            granule = offset >> shift
            dirty = bits[granule]
            edge = bits.find(_EDGE[dirty], granule, stop)
            upto = end if edge < 0 else edge << shift
            out.append(Extent(offset, upto - offset, STATE_DIRTY if dirty else 0))
            offset = upto
        return out

    @property
    def dirty_bytes(self) -> int:
        """How many bytes of the disk are dirty; the last granule counts as far as the disk goes."""
        total = self._bits.count(1) * self._granularity
        if self._bits.endswith(b"\1"):
            total -= -self.size % self._granularity
        return total


class FrozenMap:
    """A copy of an epoch map. ``epoch`` is the checkpoint S: the last epoch that is in it.

    ``cells`` has one byte for each granule, a slot; ``table`` the epoch of each of the 256 slots,
    0 for one that is not in use. What ``table[0]`` says is an upper bound.
    """

    __slots__ = ("cells", "epoch", "generation", "granularity", "size", "table")

    def __init__(
        self,
        cells: bytes,
        table: tuple[int, ...],
        *,
        epoch: int,
        size: int,
        granularity: int,
        generation: str,
    ) -> None:
        self.cells = cells
        self.table = table
        self.epoch = epoch
        self.size = size
        self.granularity = granularity
        self.generation = generation

    def changed(self, since: int | None) -> ChangedView:
        """The granules whose epoch lies in (``since``, ``epoch``]; None: all of them.

        Epochs that were merged count as the latest among them, so the answer may hold more than
        what changed and never less. Of a consumer that has a later instant than this one nothing
        is known here: everything.
        """
        return ChangedView(self.cells.translate(self._newer(since)), self.size, self.granularity)

    def dirty_bytes(self, since: int | None) -> int:
        """As ``changed(since).dirty_bytes``."""
        return self.changed(since).dirty_bytes

    def _newer(self, since: int | None) -> bytes:
        if since is None or since > self.epoch:
            return b"\1" * SLOTS
        # A cell with a slot that is not in use cannot be; if it is, it must not count as clean.
        return bytes(
            epoch > since or (not epoch and slot > 0) for slot, epoch in enumerate(self.table)
        )

    def save(self, path: Path, *, durable: bool = False) -> None:
        """Replace the file ``path`` by this map.

        Without ``durable`` it survives the end of the process, not a crash of the host: nor does
        the snapshot that it belongs to. Raises `TrackingError`.
        """
        name = self.generation.encode()
        body = _BODY.pack(self.epoch, self.size, self.granularity, name, *self.table)
        checksum = zlib.crc32(self.cells, zlib.crc32(body))
        prefix = _PREFIX.pack(_MAGIC, _VERSION, checksum)
        try:
            replace_file(path, (prefix, body, self.cells), durable=durable)
        except OSError as error:
            raise TrackingError(
                f"cannot save the map of changes {path}: {error.strerror}"
            ) from error

    @classmethod
    def load(cls, path: Path) -> "FrozenMap":
        """What `save` wrote. Raises `TrackingError` if the file is not there, torn or foreign."""
        try:
            data = path.read_bytes()
        except OSError as error:
            raise TrackingError(
                f"cannot load the map of changes {path}: {error.strerror}"
            ) from error
        body = memoryview(data)[_PREFIX.size :]
        if len(body) < _BODY.size or _PREFIX.unpack_from(data) != (
            _MAGIC,
            _VERSION,
            zlib.crc32(body),
        ):
            raise TrackingError(f"the map of changes {path} is damaged")
        return cls._parse(body, path)

    @classmethod
    def _parse(cls, body: memoryview, path: Path) -> "FrozenMap":
        epoch, size, granularity, generation, *table = _BODY.unpack_from(body)
        cells = bytes(body[_BODY.size :])
        if granularity.bit_count() != 1 or len(cells) != -(-size // granularity):
            raise TrackingError(f"the map of changes {path} is damaged")
        return cls(
            cells,
            tuple(table),
            epoch=epoch,
            size=size,
            granularity=granularity,
            generation=generation.rstrip(b"\0").decode("utf-8", "replace"),
        )

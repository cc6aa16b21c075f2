# SPDX-License-Identifier: Apache-2.0
"""Tables of one cluster (L2 tables, refcount blocks) in memory: an LRU that knows what is dirty.

Not thread-safe: the caller holds the image's metadata lock.
"""

from collections import OrderedDict
from collections.abc import Iterable
from typing import Final, NamedTuple

from fleece.block.node import Node
from fleece.formats.qcow2 import constants as c
from fleece.formats.qcow2.entries import corrupt
from fleece.formats.qcow2.hosting import regular_end

DEFAULT_LIMIT: Final = 32 << 20
DIRTY_LIMIT: Final = 8 << 20


class Table:
    """``data`` is the table as it is on disk, big-endian; bytes [low, high) of it are newer.

    ``busy``: a write-back of it is under way, so its place on disk must not be read.
    """

    __slots__ = ("busy", "data", "high", "low", "offset")

    def __init__(self, offset: int, data: bytearray) -> None:
        self.offset = offset
        self.data = data
        self.low = len(data)
        self.high = 0
        self.busy = False

    def touch(self, low: int, high: int) -> None:
        """Bytes [low, high) were changed."""
        self.low = min(self.low, low)
        self.high = max(self.high, high)


class Piece(NamedTuple):
    """Bytes of ``table`` as they were at one moment, to be written at ``offset`` of the file."""

    table: Table
    offset: int
    data: bytes


class TableCache:
    """Tables of ``length`` bytes of ``file``, by their host offset.

    ``limit`` bounds the bytes of tables that could be read again; dirty ones stay.
    """

    def __init__(self, file: Node, length: int, limit: int = DEFAULT_LIMIT) -> None:
        self._file = file
        self._length = length
        self._most = max(2, limit // length)
        self._tables: OrderedDict[int, Table] = OrderedDict()
        self._dirty: dict[int, Table] = {}
        self._end = 0  # of the file, when it was last looked at

    @property
    def dirty_bytes(self) -> int:
        """What dirty tables keep in memory."""
        return len(self._dirty) * self._length

    def get(self, offset: int) -> Table:
        """The table at ``offset``; OSError if it cannot be read."""
        table = self._tables.get(offset)
        if table is not None:
            self._tables.move_to_end(offset)
            return table
        if offset >= self._end:
            self._check_end(offset)
        data = bytearray(self._length)
        self._file.pread_into(memoryview(data), offset)
        return self._insert(Table(offset, data))

    def _check_end(self, offset: int) -> None:
        """A table behind the end would read as empty, and a write of it makes the file huge."""
        self._end = regular_end(self._file) or c.MAX_SIZE
        if offset >= self._end:
            raise corrupt(f"a table at {offset:#x}, behind the end of the file")

    def add(self, offset: int, data: bytearray) -> Table:
        """A new table, which the caller has written already."""
        return self._insert(Table(offset, data))

    def _insert(self, table: Table) -> Table:
        self._tables[table.offset] = table
        if len(self._tables) > self._most:
            self._evict()
        return table

    def _evict(self) -> None:
        for offset, table in self._tables.items():
            if offset not in self._dirty and not table.busy:
                del self._tables[offset]
                return

    def forget(self) -> None:
        """Read every table again; the caller has written the dirty ones, and changed the file."""
        self._tables = OrderedDict(self._dirty)

    def touch(self, table: Table, low: int, high: int) -> None:
        """Bytes [low, high) of ``table`` were changed and have to be written."""
        table.touch(low, high)
        self._dirty[table.offset] = table
        # It may have been evicted as soon as it was read, where all the others are dirty.
        self._tables[table.offset] = table

    def take_dirty(self) -> list[Piece]:
        """What has to be written, in the order of the file; it counts as clean from now on."""
        pieces = []
        for offset in sorted(self._dirty):
            table = self._dirty[offset]
            pieces.append(
                Piece(table, offset + table.low, bytes(table.data[table.low : table.high]))
            )
            table.low, table.high, table.busy = self._length, 0, True
        self._dirty.clear()
        return pieces

    def settle(self, pieces: Iterable[Piece], *, written: bool) -> None:
        """The end of a write-back; if it failed, the pieces are dirty again."""
        for table, offset, data in pieces:
            table.busy = False
            if not written:
                low = offset - table.offset
                self.touch(table, low, low + len(data))

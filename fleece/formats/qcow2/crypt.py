# SPDX-License-Identifier: Apache-2.0
"""`EncryptedNode`: the plain text of a node that holds ciphertext, in sectors of 512 bytes.

A request that does not begin and end with a sector has to read, change and write whole ones, so
it must keep everybody else out of these sectors: a write beside it would be undone, and a read
would meet half of the new ciphertext. Hence a `RangeLock` by sector: such writes are exclusive,
all others shared. (Reads and writes of whole sectors at the same bytes race with or without us.)
"""

import errno
import os
from typing import Final

from fleece.block.node import Filter, Node
from fleece.block.ranges import RangeLock
from fleece.formats.qcow2.ciphers import SECTOR, Key
from fleece.units import MiB, align_down, align_up
from nbdwire.constants import CMD_FLAG_FAST_ZERO, CMD_FLAG_FUA
from nbdwire.export import OPAQUE_RUN, Run
from nbdwire.extents import Extent

__all__ = ["SECTOR", "EncryptedNode", "Key"]

# Ciphertext is made in pieces of this size: what a request needs beside its own buffer.
_PIECE: Final = 1 * MiB


class EncryptedNode(Filter):
    """Sectors of ``child`` from ``base`` on, through ``key``; offsets count from ``base``.

    Sector numbers, which the key needs, count from ``base`` too; with ``key.guest_iv`` they are
    those that the caller of `pread_at` and `pwrite_at` gives. Zeroes are ciphertext like all data,
    and holes of the child read as noise: nothing here is known to be zero.
    """

    def __init__(self, child: Node, key: Key, *, base: int = 0, name: str | None = None) -> None:
        super().__init__(child.name if name is None else name, child)
        self.size = child.size - base
        self.key = key
        self._base = base
        self._sectors = RangeLock()

    def pread_into(self, buf: memoryview, offset: int) -> None:
        """Read and decrypt; what lies around a part of a sector is read into a buffer."""
        self.pread_at(buf, offset, offset)

    def pread_at(self, buf: memoryview, offset: int, guest: int) -> None:
        """As `pread_into`, for bytes that the guest disk has at ``guest``."""
        if not buf:
            return
        start, stop = align_down(offset, SECTOR), align_up(offset + len(buf), SECTOR)
        with self._sectors.shared(start // SECTOR, stop // SECTOR):
            if start == offset and stop == offset + len(buf):
                self._load(buf, offset, guest)
                return
            whole = memoryview(bytearray(stop - start))
            self._load(whole, start, align_down(guest, SECTOR))
        buf[:] = whole[offset - start : offset - start + len(buf)]

    def pread_cached(self, buf: memoryview, offset: int) -> bool:
        """As `pread_into` if the child need not wait, and nobody changes a part of a sector."""
        if offset % SECTOR or len(buf) % SECTOR or len(self._sectors):
            return False
        if not self.next.pread_cached(buf, offset + self._base):
            return False
        self.key.decrypt(buf, offset // SECTOR)
        return True

    def _load(self, buf: memoryview, offset: int, guest: int) -> None:
        self.next.pread_into(buf, offset + self._base)
        self.key.decrypt(buf, self._number(offset, guest))

    def _number(self, offset: int, guest: int) -> int:
        return (guest if self.key.guest_iv else offset) // SECTOR

    def pwrite(self, buf: memoryview, offset: int, fua: bool = False) -> None:
        """Encrypt a copy and write it."""
        self.pwrite_at(buf, offset, offset, fua)

    def pwrite_at(self, buf: memoryview, offset: int, guest: int, fua: bool = False) -> None:
        """As `pwrite`, for bytes that the guest disk has at ``guest``."""
        if self.read_only:
            raise OSError(errno.EPERM, "opened read-only", self.name)
        if not buf:
            return
        start, stop = align_down(offset, SECTOR), align_up(offset + len(buf), SECTOR)
        first, last = start // SECTOR, stop // SECTOR
        if start == offset and stop == offset + len(buf):
            with self._sectors.shared(first, last):
                self._store(buf, offset, guest, fua)
            return
        with self._sectors.exclusive(first, last):
            whole = self._merged(buf, offset, guest)
            self._store(whole, start, align_down(guest, SECTOR), fua)

    def _merged(self, buf: memoryview, offset: int, guest: int) -> memoryview:
        """``buf`` with what is around it in its first and its last sector."""
        start, stop = align_down(offset, SECTOR), align_up(offset + len(buf), SECTOR)
        shift = align_down(guest, SECTOR) - start
        whole = memoryview(bytearray(stop - start))
        self._load(whole[:SECTOR], start, start + shift)
        if stop - start > SECTOR:
            self._load(whole[-SECTOR:], stop - SECTOR, stop - SECTOR + shift)
        whole[offset - start : offset - start + len(buf)] = buf
        return whole

    def _store(self, buf: memoryview, offset: int, guest: int, fua: bool) -> None:
        for at in range(0, len(buf), _PIECE):
            secret = memoryview(bytearray(buf[at : at + _PIECE]))
            self.key.encrypt(secret, self._number(offset + at, guest + at))
            self.next.pwrite(secret, offset + at + self._base, fua)

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        """Encrypted zeroes are data; FAST_ZERO: EOPNOTSUPP."""
        if flags & CMD_FLAG_FAST_ZERO:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP), self.name)
        zeroes = memoryview(bytes(min(length, _PIECE)))
        for at in range(offset, offset + length, _PIECE):
            self.pwrite(zeroes[: offset + length - at], at)
        if flags & CMD_FLAG_FUA:
            self.flush()

    def trim(self, offset: int, length: int, flags: int = 0) -> None:
        """Whole sectors of the child; they read as noise."""
        start, stop = align_up(offset, SECTOR), align_down(offset + length, SECTOR)
        if start < stop:
            with self._sectors.exclusive(start // SECTOR, stop // SECTOR):
                self.next.trim(start + self._base, stop - start, flags)

    def extents(self, offset: int, length: int) -> list[Extent]:
        """All of it is data."""
        return [Extent(offset, length, 0)]

    def map(self, offset: int, length: int) -> list[Run]:
        """No byte lies anywhere as it reads."""
        return [(OPAQUE_RUN, 0, length)]

    def prefetch(self, offset: int, length: int) -> None:
        """Of the ciphertext."""
        self.next.prefetch(offset + self._base, length)

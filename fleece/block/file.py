# SPDX-License-Identifier: Apache-2.0
"""`FileNode`: a regular file or a block device of this host."""

import errno
import logging
import os
from os import preadv, pwritev
from typing import Final, NoReturn

from fleece.block.fallocate import PUNCH_HOLE, UNSUPPORTED, ZERO_RANGE, fallocate
from fleece.block.holes import HoleMap, Stretch
from fleece.block.locks import lock_image
from fleece.block.node import Node
from fleece.block.null import clear
from fleece.block.opening import Opened, open_file
from fleece.units import MiB, align_down, align_up
from nbdwire.constants import (
    CMD_FLAG_FAST_ZERO,
    CMD_FLAG_FUA,
    CMD_FLAG_NO_HOLE,
    STATE_HOLE,
    STATE_ZERO,
)
from nbdwire.export import ZERO_RUN, Run
from nbdwire.extents import Extent

_ZEROES: Final = bytes(1 * MiB)

log = logging.getLogger(__name__)


class FileNode(Node):
    """The bytes of ``path``; what lies behind the end of a file reads as zeroes.

    ``locking``: refuse to start, with `ImageInUse`, when another program (QEMU too) writes the
    image, and make it refuse as long as we are here. The other errors are `NotFound` and
    `ImageError`. A block device that we write must not be mounted.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        read_only: bool = False,
        name: str | None = None,
        locking: bool = True,
    ) -> None:
        opened = open_file(path, read_only=read_only)
        try:
            if locking:
                lock_image(opened.fd, opened.shown, write=not read_only)
        except BaseException:
            os.close(opened.fd)
            raise
        super().__init__(
            os.fspath(path) if name is None else name, opened.size, read_only=read_only
        )
        self._use(opened)

    def _use(self, opened: Opened) -> None:
        self._fd = opened.fd
        self._block = opened.block  # 1: a regular file, any offset may be punched
        self._device = opened.device
        self._nowait = os.RWF_NOWAIT
        self._dsync = os.RWF_DSYNC
        self._never: frozenset[int] = frozenset()  # the fallocate modes that do not work here
        self._sync_failed = 0
        self._holes = HoleMap(opened.fd)

    def fileno(self) -> int:
        """The descriptor; -1 once closed."""
        return self._fd

    def pread_into(self, buf: memoryview, offset: int) -> None:
        """One system call."""
        got = preadv(self._fd, (buf,), offset)
        if got != len(buf):
            self._read_rest(buf, offset, got)

    def pread_cached(self, buf: memoryview, offset: int) -> bool:
        """True if the page cache has all of it; always where the file itself lives in memory."""
        try:
            got = preadv(self._fd, (buf,), offset, self._nowait)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            self._nowait = got = 0
        if got == len(buf):
            return True
        if self._nowait:
            return False
        self._read_rest(buf, offset, got)
        return True

    def _read_rest(self, buf: memoryview, offset: int, got: int) -> None:
        """The kernel gave less than asked: at the end of the file, or for over 2 GiB."""
        while got < len(buf):
            more = preadv(self._fd, (buf[got:],), offset + got)
            if more == 0:
                clear(buf[got:])
                return
            got += more

    def pwrite(self, buf: memoryview, offset: int, fua: bool = False) -> None:
        """One system call; with ``fua`` it waits for the storage."""
        if self.read_only:
            self._refuse()
        if fua:
            self._write_stable(buf, offset)
            return
        done = pwritev(self._fd, (buf,), offset)
        if done != len(buf):
            self._write_rest(buf, offset, done, 0)

    def _write_rest(self, buf: memoryview, offset: int, done: int, flags: int) -> None:
        while done < len(buf):
            more = pwritev(self._fd, (buf[done:],), offset + done, flags)
            if more == 0:
                raise OSError(errno.EIO, "the write made no progress", self.name)
            done += more

    def _write_stable(self, buf: memoryview, offset: int) -> None:
        if self._dsync:
            try:
                self._write_rest(buf, offset, 0, self._dsync)
                return
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP:
                    self._note_lost_write(error)
                    raise
                self._dsync = 0
        self._write_rest(buf, offset, 0, 0)
        self.flush()

    def _note_lost_write(self, error: OSError) -> None:
        """The kernel tells of a page that it could not write once only, to whoever syncs next."""
        if error.errno == errno.EIO:
            self._fail_syncs(error)

    def _refuse(self) -> NoReturn:
        raise OSError(errno.EPERM, "opened read-only", self.name)

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        """A hole, or allocated zeroes with NO_HOLE; written where the storage can do neither.

        FAST_ZERO: EOPNOTSUPP instead of writing.
        """
        if self.read_only:
            self._refuse()
        start, stop = align_up(offset, self._block), align_down(offset + length, self._block)
        fast = bool(flags & CMD_FLAG_FAST_ZERO)
        if start < stop and self._zero_quickly(start, stop - start, flags):
            self._write_zeroes(offset, start)
            self._write_zeroes(stop, offset + length)
        elif fast:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP), self.name)
        else:
            self._write_zeroes(offset, offset + length)
        if flags & CMD_FLAG_FUA:
            self.flush()

    def _zero_quickly(self, offset: int, length: int, flags: int) -> bool:
        """False if that cannot be done here; nothing has changed then."""
        if not flags & CMD_FLAG_NO_HOLE and self._fallocate(PUNCH_HOLE, offset, length):
            self._holes.punched(offset, offset + length)
            return True
        if self._device and flags & CMD_FLAG_FAST_ZERO:
            return False  # the kernel would write zeroes itself, and not say so
        if self._fallocate(ZERO_RANGE, offset, length):
            self._holes.punched(offset, offset + length)
            return True
        return False

    def _fallocate(self, mode: int, offset: int, length: int) -> bool:
        if mode in self._never:
            return False
        try:
            fallocate(self._fd, mode, offset, length)
        except OSError as error:
            if error.errno in UNSUPPORTED:
                self._never |= {mode}
            elif error.errno != errno.EINVAL:
                raise
            return False
        return True

    def _write_zeroes(self, start: int, stop: int) -> None:
        zeroes = memoryview(_ZEROES)
        for offset in range(start, stop, len(_ZEROES)):
            self._write_rest(zeroes[: stop - offset], offset, 0, 0)

    def trim(self, offset: int, length: int, flags: int = 0) -> None:
        """A hole where the storage can make one, in whole blocks of a device."""
        if self.read_only:
            self._refuse()
        start, stop = align_up(offset, self._block), align_down(offset + length, self._block)
        if start < stop and self._fallocate(PUNCH_HOLE, start, stop - start):
            self._holes.punched(start, stop)
        if flags & CMD_FLAG_FUA:
            self.flush()

    def flush(self) -> None:
        """One ``fdatasync`` for each call: no shortcut, so nothing that it could miss.

        Once one has failed they all do: the kernel drops what it could not write, and a second
        call would succeed without it.
        """
        if self._sync_failed:
            raise OSError(self._sync_failed, os.strerror(self._sync_failed), self.name)
        if self.read_only:
            return
        if self._fd < 0:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF), self.name)
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            self._fail_syncs(error)
            raise

    def _fail_syncs(self, error: OSError) -> None:
        self._sync_failed = error.errno or errno.EIO
        log.error(
            "writes were lost on their way to storage; every flush fails until it is opened again",
            extra={"image": self.name, "error": error.strerror},
        )

    def _walk(self, offset: int, length: int) -> list[Stretch]:
        if self._device:
            return [(offset, offset + length, True)]
        return self._holes.walk(offset, length)

    def extents(self, offset: int, length: int) -> list[Extent]:
        """Data and holes of a file; a block device is all data."""
        return [
            Extent(start, stop - start, 0 if data else STATE_HOLE | STATE_ZERO)
            for start, stop, data in self._walk(offset, length)
        ]

    def map(self, offset: int, length: int) -> list[Run]:
        """Runs of this file, and zero runs for its holes and for what lies behind its end."""
        return [
            (self._fd, start, stop - start) if data else (ZERO_RUN, 0, stop - start)
            for start, stop, data in self._walk(offset, length)
        ]

    def prefetch(self, offset: int, length: int) -> None:
        """``posix_fadvise(WILLNEED)``."""
        os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Close the descriptor; its locks end with it. What was not flushed may not be stable."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

# SPDX-License-Identifier: Apache-2.0
"""`FileExport`: a file, a block device or anonymous memory as an export, for the tools."""

import ctypes
import errno
import os
import stat
from typing import Final

from nbdwire import constants as c
from nbdwire.export import Run
from nbdwire.extents import Extent, coalesce

_KEEP_SIZE: Final = 0x01
_PUNCH_HOLE: Final = 0x02 | _KEEP_SIZE
_ZERO_RANGE: Final = 0x10 | _KEEP_SIZE
_NEVER: Final = (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV, errno.EINVAL)
_ZEROES: Final = bytes(1 << 20)
_MOST_EXTENTS: Final = 1024  # in one answer; who wants more asks again

_libc = ctypes.CDLL(None, use_errno=True)
_fallocate = getattr(_libc, "fallocate64", None) or _libc.fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_fallocate.restype = ctypes.c_int


class FileExport:
    """The bytes of the descriptor ``fd``, which it owns. See `nbdwire.export.Export`."""

    def __init__(self, fd: int, size: int, read_only: bool = False) -> None:
        self._fd = fd
        self.size = size
        self.read_only = read_only
        self._regular = stat.S_ISREG(os.fstat(fd).st_mode)
        self._nowait = True

    @classmethod
    def open(cls, path: str, read_only: bool = False) -> "FileExport":
        """A regular file or a block device. OSError."""
        fd = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
        try:
            mode = os.fstat(fd).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
                raise OSError(errno.EINVAL, "neither a regular file nor a block device", path)
            return cls(fd, os.lseek(fd, 0, os.SEEK_END), read_only)
        except OSError as problem:
            os.close(fd)
            raise OSError(problem.errno, problem.strerror, path) from None  # /proc has no sizes
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def memory(cls, size: int, read_only: bool = False) -> "FileExport":
        """Memory that takes no more of itself than what was written."""
        fd = os.memfd_create("nbdwire", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, size)
            return cls(fd, size, read_only)
        except BaseException:
            os.close(fd)
            raise

    def close(self) -> None:
        """Idempotent."""
        fd, self._fd = self._fd, -1  # its number is somebody else's from now on
        if fd >= 0:
            os.close(fd)

    def pread_into(self, buf: memoryview, offset: int) -> None:
        """Fill ``buf``; behind the end of a file that has shrunk there are zeroes."""
        done = 0
        while done < len(buf):
            got = os.preadv(self._fd, [buf[done:]], offset + done)
            if not got:
                buf[done:] = bytes(len(buf) - done)
                return
            done += got

    def pread_cached(self, buf: memoryview, offset: int) -> bool:
        """Whether ``buf`` could be filled without waiting for storage."""
        if not self._nowait:
            self.pread_into(buf, offset)
            return True
        try:
            return os.preadv(self._fd, [buf], offset, os.RWF_NOWAIT) == len(buf)
        except BlockingIOError:
            return False
        except OSError as problem:
            if problem.errno != errno.EOPNOTSUPP:
                raise
            self._nowait = False  # tmpfs: all of it is memory
            return self.pread_cached(buf, offset)

    def prefetch(self, offset: int, length: int) -> None:
        """Start to read."""
        os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_WILLNEED)

    def map(self, offset: int, length: int) -> list[Run]:
        """All of it is in one file."""
        return [(self._fd, offset, length)]

    def pwrite(self, buf: memoryview, offset: int, fua: bool = False) -> None:
        """Write all of ``buf``."""
        self._check_writable()
        view, done = memoryview(buf), 0
        while done < len(view):
            done += os.pwrite(self._fd, view[done:], offset + done)
        if fua:
            self.flush()

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        """Punch a hole, or with NO_HOLE zero the range where it is."""
        self._check_writable()
        mode = _ZERO_RANGE if flags & c.CMD_FLAG_NO_HOLE else _PUNCH_HOLE
        if not self._allocate(mode, offset, length):
            if flags & c.CMD_FLAG_FAST_ZERO:
                raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
            for start in range(offset, offset + length, len(_ZEROES)):
                self.pwrite(memoryview(_ZEROES)[: offset + length - start], start)
        if flags & c.CMD_FLAG_FUA:
            self.flush()

    def trim(self, offset: int, length: int, flags: int = 0) -> None:
        """Punch a hole, if that can be done."""
        self._check_writable()
        self._allocate(_PUNCH_HOLE, offset, length)
        if flags & c.CMD_FLAG_FUA:
            self.flush()

    def allocate(self, offset: int, length: int) -> None:
        """Make room on storage for the range; contents stay."""
        if self._regular:
            os.posix_fallocate(self._fd, offset, length)

    def _allocate(self, mode: int, offset: int, length: int) -> bool:
        """``fallocate``; False if this file cannot do that."""
        while _fallocate(self._fd, mode, offset, length):
            number = ctypes.get_errno()
            if number in _NEVER:
                return False
            if number != errno.EINTR:
                raise OSError(number, os.strerror(number))
        return True

    def flush(self) -> None:
        """``fdatasync``."""
        if self._fd < 0:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        if not self.read_only:
            os.fdatasync(self._fd)

    def _check_writable(self) -> None:
        if self.read_only:
            raise OSError(errno.EPERM, "opened read-only")

    def extents(self, offset: int, length: int) -> list[Extent]:
        """The holes that the file system knows; a device is all data."""
        if not self._regular:
            return [Extent(offset, length, 0)]
        found: list[Extent] = []
        position, end = offset, offset + length
        while position < end and len(found) < _MOST_EXTENTS:
            data = min(self._seek(position, os.SEEK_DATA, end), end)
            if data > position:
                hole = c.STATE_HOLE | c.STATE_ZERO
                found.append(Extent(position, data - position, hole))
            position = data
            if position < end:
                stop = min(self._seek(position, os.SEEK_HOLE, end), end)
                found.append(Extent(position, stop - position, 0))
                position = stop
        return coalesce(found)

    def _seek(self, position: int, what: int, end: int) -> int:
        try:
            return os.lseek(self._fd, position, what)
        except OSError as problem:
            if problem.errno == errno.ENXIO:  # no more data up to the end of the file
                return end
            raise

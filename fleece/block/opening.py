# SPDX-License-Identifier: Apache-2.0
"""Opening a file or block device of this host as an image, or saying clearly why not."""

import errno
import fcntl
import os
import stat
import sys
from typing import Final, NamedTuple

from fleece.errors import FleeceError, ImageError, ImageInUse, NotFound

_BLKSSZGET: Final = 0x1268  # linux/fs.h: the logical block size of a device, as an int


class Opened(NamedTuple):
    """``fd`` is the caller's to close; ``block`` is what offsets of a device must be multiples of.

    ``shown`` is the path as messages name it.
    """

    fd: int
    size: int
    block: int
    device: bool
    shown: str


def open_file(path: str | os.PathLike[str], *, read_only: bool) -> Opened:
    """Open a regular file or block device. `NotFound`, `ImageInUse` or `ImageError` if not."""
    shown = _show(os.fspath(path))
    try:
        # Before it is opened: opening alone may rewind a tape or wait for a FIFO's writer.
        mode = os.stat(path).st_mode
        _refuse_others(mode, shown)
        fd = os.open(path, _flags(mode, read_only))
    except ValueError as error:
        raise ImageError(f"cannot open image {shown}: {error}; check the path") from None
    except OSError as error:
        raise _refusal(error, shown, read_only) from error
    try:
        return _measure(fd, shown)
    except BaseException:
        os.close(fd)
        raise


def _show(path: str) -> str:
    """A path may hold a line break; a message must not."""
    return path if path.isprintable() else repr(path)


def _flags(mode: int, read_only: bool) -> int:
    flags = os.O_RDONLY if read_only else os.O_RDWR
    if stat.S_ISBLK(mode) and not read_only:
        flags |= os.O_EXCL  # EBUSY if it is mounted or somebody else has claimed it
    return flags | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY


def _measure(fd: int, shown: str) -> Opened:
    os.set_blocking(fd, True)
    status = os.fstat(fd)
    _refuse_others(status.st_mode, shown)
    if stat.S_ISREG(status.st_mode):
        return Opened(fd, status.st_size, 1, False, shown)
    try:
        size = os.lseek(fd, 0, os.SEEK_END)
        block = int.from_bytes(fcntl.ioctl(fd, _BLKSSZGET, bytes(4)), sys.byteorder)
    except OSError as error:
        raise ImageError(f"cannot use device {shown}: {error.strerror}; check it") from error
    return Opened(fd, size, block, True, shown)


def _refuse_others(mode: int, shown: str) -> None:
    if stat.S_ISREG(mode) or stat.S_ISBLK(mode):
        return
    kinds = {
        stat.S_IFDIR: "a directory",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFCHR: "a character device",
        stat.S_IFSOCK: "a socket",
    }
    kind = kinds.get(stat.S_IFMT(mode), "something else")
    raise ImageError(
        f"cannot open image {shown}: it is {kind}; name a regular file or a block device"
    )


def _refusal(error: OSError, shown: str, read_only: bool) -> FleeceError:
    number = error.errno
    if number in (errno.ENOENT, errno.ENOTDIR):
        return NotFound(f"there is no image {shown}; check the path, or create it first")
    if number == errno.EBUSY:
        return ImageInUse(
            f"device {shown} is in use (mounted, or claimed by another program); "
            "unmount it, or open it read-only"
        )
    access = "reading" if read_only else "writing"
    hints = {
        errno.EACCES: f"run as a user with the right of {access} it",
        errno.EPERM: f"run as a user with the right of {access} it",
        errno.EROFS: "open it read-only",
        errno.ETXTBSY: "stop the program that it is, or open it read-only",
        errno.EMFILE: "raise the limit of open files (ulimit -n)",
    }
    if number == errno.EACCES and not read_only:
        hints[number] += ", or open it read-only"
    reason = (error.strerror or str(error)).lower()
    return ImageError(f"cannot open image {shown}: {reason}; {hints.get(number or 0, 'check it')}")

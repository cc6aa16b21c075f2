# SPDX-License-Identifier: Apache-2.0
"""Image locks that QEMU understands, so that two programs never write one image.

QEMU says what it does with a file by read locks on single bytes of it, held by the open file
description (``F_OFD_SETLK``): byte ``100 + i`` is locked by whoever uses permission ``i``, byte
``200 + i`` by whoever does not let others use it. Whoever opens the file takes its own bytes first
and looks for bytes of others that contradict them afterwards: two that come at once may both
fail, but never both succeed. (QEMU, block/file-posix.c and qapi/block-core.json, BlockPermission;
verified against qemu-nbd, qemu-io and qemu-img 7.2.)

The bytes need not exist, and the kernel drops the locks with the last descriptor, so a killed
process leaves none behind.
"""

import errno
import fcntl
import logging
import struct
from enum import IntFlag
from typing import Final

from fleece.errors import ImageError, ImageInUse

USED_BASE: Final = 100
UNSHARED_BASE: Final = 200

_FLOCK: Final = struct.Struct("hhqqi4x")  # struct flock: type, whence, start, length, pid
_WITHOUT_LOCKS: Final = (errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL)

log = logging.getLogger(__name__)


class Permission(IntFlag):
    """What QEMU distinguishes; the bit number is the distance of the byte from its base."""

    CONSISTENT_READ = 1 << 0
    WRITE = 1 << 1
    WRITE_UNCHANGED = 1 << 2
    RESIZE = 1 << 3


_CHANGES: Final = Permission.WRITE | Permission.RESIZE


def lock_image(fd: int, path: str, *, write: bool) -> None:
    """Declare that ``fd`` writes the image (or only reads it) and that nobody else may write it.

    Raises `ImageInUse` if another open file description forbids that; nothing is locked then. The
    lock ends when ``fd`` is closed. A file system without locks is logged, and goes unlocked.
    """
    used = Permission.CONSISTENT_READ | (_CHANGES if write else Permission(0))
    taken = _offsets(USED_BASE, used) + _offsets(UNSHARED_BASE, _CHANGES)
    try:
        for offset in taken:
            _set(fd, fcntl.F_RDLCK, offset)
        writers = _held(fd, USED_BASE, _CHANGES)
        excluders = _held(fd, UNSHARED_BASE, used)
    except OSError as error:
        _unlock(fd, taken)
        if error.errno not in _WITHOUT_LOCKS:
            raise ImageError(f"cannot lock image {path}: {error.strerror}; try again") from error
        log.warning("image goes unlocked: its file system has no locks", extra={"image": path})
        return
    if writers or excluders:
        _unlock(fd, taken)
        raise ImageInUse(_refusal(path, writers))


def _refusal(path: str, writers: Permission) -> str:
    if writers:
        return (
            f"image {path} is in use by another process (it holds a write lock); "
            "stop that program, or read a snapshot that it exports"
        )
    return (
        f"image {path} is in use by another process (it reads it and excludes writers); "
        "stop that program, or open the image read-only"
    )


def _offsets(base: int, permissions: Permission) -> list[int]:
    return [base + p.value.bit_length() - 1 for p in Permission if p in permissions]


def _set(fd: int, kind: int, offset: int) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, 0, offset, 1, 0))


def _unlock(fd: int, offsets: list[int]) -> None:
    for offset in offsets:
        try:
            _set(fd, fcntl.F_UNLCK, offset)
        except OSError:
            return  # no locks here at all; otherwise closing the descriptor ends them


def _held(fd: int, base: int, permissions: Permission) -> Permission:
    """Those of ``permissions`` whose byte somebody else has locked."""
    found = Permission(0)
    for permission in Permission:
        offset = base + permission.value.bit_length() - 1
        if permission in permissions and _locked_by_another(fd, offset):
            found |= permission
    return found


def _locked_by_another(fd: int, offset: int) -> bool:
    """Whether a write lock on the byte would be refused; our own locks do not count."""
    request = _FLOCK.pack(fcntl.F_WRLCK, 0, offset, 1, 0)
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, request)
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)

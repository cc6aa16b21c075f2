# SPDX-License-Identifier: Apache-2.0
"""The less usual ways to create: over a file or a device that is there, and with a data file."""

import fcntl
import os
import stat
import struct
from pathlib import Path
from typing import Final

from fleece.block.locks import lock_image
from fleece.errors import ImageError
from fleece.formats.qcow2 import preallocate
from fleece.formats.qcow2.create import CreateOptions, write_tables
from fleece.formats.qcow2.header import Header
from fleece.formats.qcow2.hosting import write_all
from fleece.formats.qcow2.layout import Layout

_GET_FLAGS: Final = 0x80086601  # FS_IOC_GETFLAGS
_SET_FLAGS: Final = 0x40086602
_NO_COW: Final = 0x00800000  # FS_NOCOW_FL


def write(
    path: Path, header: Header, layout: Layout, start: bytes, luks: bytes, options: CreateOptions
) -> None:
    """What `create` writes. Two syncs, so that no header is there before its tables are."""
    data_path = None if options.data_file is None else path.parent / options.data_file
    if data_path is not None and _same(data_path, path):
        raise ImageError(f"{path}: the data file cannot be the image itself")
    fd, is_new = open_emptied(path, layout.end << layout.bits, options)
    try:
        if data_path is not None:
            make_data_file(data_path, header.size, options)
        write_tables(fd, header, layout, luks, options)
        if options.sync:
            os.fsync(fd)
        write_all(fd, start, 0)
        if options.sync:
            os.fsync(fd)
    except BaseException:
        if is_new:
            path.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)


def _same(first: Path, second: Path) -> bool:
    return os.path.realpath(first) == os.path.realpath(second)


def open_emptied(path: Path, needed: int, options: CreateOptions) -> tuple[int, bool]:
    """``(descriptor, whether the file is new)``; locked, empty or with ``needed`` zero bytes.

    OSError, `ImageInUse`, or `ImageError` if a device is too small.
    """
    # Without O_EXCL a FIFO could be at the path, whose opening would wait.
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
    existed = path.exists()
    fd = os.open(path, flags | (0 if options.overwrite else os.O_EXCL), 0o644)
    try:
        lock_image(fd, str(path), write=True)
        _empty(fd, path, needed)
        if options.nocow:
            _set_nocow(fd)
    except BaseException:
        os.close(fd)
        if not existed:
            path.unlink(missing_ok=True)
        raise
    return fd, not existed


def _empty(fd: int, path: Path, needed: int) -> None:
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        os.ftruncate(fd, 0)
        return
    if not stat.S_ISBLK(mode):
        raise ImageError(f"{path}: this is neither a file nor a block device")
    there = os.lseek(fd, 0, os.SEEK_END)
    if there < needed:
        raise ImageError(f"{path}: the device has {there} bytes, and the image needs {needed}")
    preallocate.reserve(fd, 0, needed, "full")


def _set_nocow(fd: int) -> None:
    """As the file system can: btrfs has it, for others it is not an error."""
    try:
        raw = fcntl.ioctl(fd, _GET_FLAGS, bytes(8))
        flags = struct.unpack("@l", raw)[0]
        fcntl.ioctl(fd, _SET_FLAGS, struct.pack("@l", flags | _NO_COW))
    except OSError:
        return


def make_data_file(path: Path, size: int, options: CreateOptions) -> None:
    """A raw file of ``size`` bytes, locked while it is made."""
    fd, is_new = open_emptied(path, size, options)
    try:
        if stat.S_ISREG(os.fstat(fd).st_mode):
            os.ftruncate(fd, size)
        preallocate.reserve(fd, 0, size, options.preallocation)
        if options.sync:
            os.fsync(fd)
    except BaseException:
        if is_new:
            path.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)

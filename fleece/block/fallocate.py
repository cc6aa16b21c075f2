# SPDX-License-Identifier: Apache-2.0
"""``fallocate(2)`` with its modes, which Python's ``os`` does not offer.

None of the modes here changes the size of the file.
"""

import ctypes
import errno
import os
from typing import Final

KEEP_SIZE: Final = 0x01
PUNCH_HOLE: Final = 0x02 | KEEP_SIZE
ZERO_RANGE: Final = 0x10 | KEEP_SIZE

UNSUPPORTED: Final = (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV)
"""What a file system, or a kernel, answers that never does this."""

_libc = ctypes.CDLL(None, use_errno=True)
_fallocate = getattr(_libc, "fallocate64", None) or _libc.fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_fallocate.restype = ctypes.c_int


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """Do ``mode`` to the whole range, or raise OSError."""
    while _fallocate(fd, mode, offset, length) != 0:
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))

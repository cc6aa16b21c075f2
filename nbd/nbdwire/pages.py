# SPDX-License-Identifier: Apache-2.0
"""Buffers that take memory only where they are used: who asks for little costs little.

A `bytearray` fills itself with zeroes, which touches all of it.
"""

import contextlib
import mmap
from typing import Final

_PRIVATE: Final = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


def pages(size: int) -> mmap.mmap:
    """``size`` bytes, more than 0, all zero; given back when nothing refers to them any more."""
    return mmap.mmap(-1, size, _PRIVATE)


def give_back(buffer: mmap.mmap) -> None:
    """Its content is of no use any longer: it takes no memory until it is used again."""
    with contextlib.suppress(OSError):  # locked into memory (mlockall): then it stays there
        buffer.madvise(mmap.MADV_DONTNEED)

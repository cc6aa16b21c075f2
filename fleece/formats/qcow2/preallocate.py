# SPDX-License-Identifier: Apache-2.0
"""L2 tables of a disk that is there from the start, and space reserved for what is in it."""

import os
import sys
from array import array
from typing import Final

from fleece.formats.qcow2 import constants as c
from fleece.formats.qcow2.header import Header
from fleece.formats.qcow2.hosting import write_all
from fleece.formats.qcow2.layout import Layout, pack_entries

_PIECE: Final = 1 << 20


def reserve(fd: int, offset: int, length: int, mode: str) -> None:
    """Space for a range: ``"falloc"`` allocates, ``"full"`` writes zeroes, else nothing is done.

    OSError if there is too little. The file may have to grow for it.
    """
    if mode == "falloc" and length:
        os.posix_fallocate(fd, offset, length)
    elif mode == "full":
        zeroes = memoryview(bytes(min(length, _PIECE)))
        for at in range(0, length, _PIECE):
            write_all(fd, zeroes[: length - at], offset + at)


def write_l2_tables(fd: int, header: Header, layout: Layout) -> None:
    """The L1 table and L2 tables that map guest cluster n to data cluster n."""
    size = header.cluster_size
    tables = range(layout.l2_at << layout.bits, layout.data_at << layout.bits, size)
    if not tables:
        return
    first, flags = _first_cluster(header, layout), _flags(header)
    left = -(-header.size // size)
    for offset in tables:
        count = min(left, header.l2_entries)
        write_all(fd, _table(first, count, flags, header), offset)
        first, left = first + count, left - count
    write_all(fd, pack_entries([offset | c.COPIED for offset in tables]), header.l1_offset)


def _first_cluster(header: Header, layout: Layout) -> int:
    return 0 if header.has_data_file else layout.data_at


def _flags(header: Header) -> int:
    """Of an entry whose cluster reads as zeroes."""
    # What is in a new cluster would be decrypted, to noise; with extended L2 entries nothing of the
    # cluster counts until its bits are set.
    noise = header.crypt_method and not header.extended_l2
    return c.COPIED | (c.ZERO if noise else 0)


def _table(first: int, count: int, flags: int, header: Header) -> bytes:
    size = header.cluster_size
    start = first * size | flags
    entries = array("Q", range(start, start + count * size, size))
    if header.extended_l2:
        words = array("Q", bytes(16 * count))
        words[0::2] = entries
        if header.raw_data_file:
            words[1::2] = array("Q", [(1 << c.SUBCLUSTERS) - 1]) * count
        entries = words
    if sys.byteorder == "little":
        entries.byteswap()
    return entries.tobytes()

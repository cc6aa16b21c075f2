# SPDX-License-Identifier: Apache-2.0
"""Compressed clusters: where they lie, and their contents (deflate only, reading only)."""

import zlib

from fleece.block.node import Node
from fleece.formats.qcow2 import constants as c
from fleece.formats.qcow2.tables import corrupt

_SECTOR = 512


def place(entry: int, cluster_bits: int) -> tuple[int, int]:
    """``(offset, length)`` in the file of the compressed cluster of an L2 entry, in bytes.

    The length covers whole sectors, so the stream may end before it.
    """
    split = 62 - (cluster_bits - 8)
    offset = entry & ((1 << split) - 1)
    sectors = ((entry & (c.COMPRESSED - 1)) >> split) + 1
    return offset, sectors * _SECTOR - offset % _SECTOR


def span(entry: int, cluster_bits: int) -> tuple[int, int]:
    """``(first, count)``: the host clusters that the compressed cluster holds a reference to."""
    offset, length = place(entry, cluster_bits)
    first = offset >> cluster_bits
    return first, ((offset + length - 1) >> cluster_bits) - first + 1


def read(file: Node, entry: int, cluster_bits: int) -> bytes:
    """The guest cluster of a PACKED entry. OSError (EIO) if the stream is not one."""
    offset, length = place(entry, cluster_bits)
    packed = bytearray(length)
    file.pread_into(memoryview(packed), offset)
    size = 1 << cluster_bits
    try:
        # A window of 32 KiB reads every raw deflate stream; QEMU writes with 4 KiB.
        data = zlib.decompressobj(-15).decompress(packed, size)
    except zlib.error as error:
        raise corrupt(f"the compressed cluster at {offset:#x}: {error}") from None
    if len(data) != size:
        raise corrupt(f"the compressed cluster at {offset:#x} is too short")
    return data

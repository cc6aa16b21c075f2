# SPDX-License-Identifier: Apache-2.0
"""What lies where in a new image, in clusters, and the bytes of its tables. Needs no numpy."""

import struct
from collections.abc import Sequence
from typing import NamedTuple


class Layout(NamedTuple):
    """Clusters of each part, in the order of the file; the header is one in front of them.

    The properties are where the parts begin, in clusters.
    """

    bits: int
    table: int
    blocks: int
    l1: int
    luks: int
    l2: int
    data: int

    @property
    def blocks_at(self) -> int:
        """Behind header and refcount table."""
        return 1 + self.table

    @property
    def l1_at(self) -> int:
        """Behind the refcount blocks."""
        return self.blocks_at + self.blocks

    @property
    def luks_at(self) -> int:
        """Behind the L1 table."""
        return self.l1_at + self.l1

    @property
    def l2_at(self) -> int:
        """Behind the LUKS header."""
        return self.luks_at + self.luks

    @property
    def data_at(self) -> int:
        """Behind the L2 tables; data lies there in the guest's order."""
        return self.l2_at + self.l2

    @property
    def end(self) -> int:
        """Clusters of the file."""
        return self.data_at + self.data


def count_blocks(bits: int, refcount_bits: int, others: int) -> tuple[int, int]:
    """``(refcount blocks, clusters of the refcount table)`` for ``others`` clusters and themselves.

    ``bits`` is that of the cluster size.
    """
    per_block = (8 << bits) // refcount_bits
    blocks, table = 1, 1
    while True:
        blocks_needed = -(-(others + table + blocks) // per_block)
        table_needed = -(-blocks_needed * 8 // (1 << bits))
        if (blocks_needed, table_needed) == (blocks, table):
            return blocks, table
        blocks, table = max(blocks, blocks_needed), max(table, table_needed)


def pack_entries(values: Sequence[int]) -> bytes:
    """64-bit entries of a table."""
    return struct.pack(f">{len(values)}Q", *values)


def pack_ones(count: int, refcount_bits: int) -> bytes:
    """``count`` refcounts of 1. Counts below 8 bits lie in their byte from the lowest bit up."""
    if refcount_bits >= 8:
        return (1).to_bytes(refcount_bits // 8, "big") * count
    per_byte = 8 // refcount_bits
    full = sum(1 << (at * refcount_bits) for at in range(per_byte))
    whole, rest = divmod(count, per_byte)
    last = full & ((1 << (rest * refcount_bits)) - 1)
    return bytes([full]) * whole + (bytes([last]) if rest else b"")

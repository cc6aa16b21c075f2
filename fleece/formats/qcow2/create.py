# SPDX-License-Identifier: Apache-2.0
"""Make a new, empty qcow2 image: header, refcount table, first refcount block, L1 table."""

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fleece.errors import ImageError, UnsupportedFeature
from fleece.formats.qcow2 import constants as c
from fleece.formats.qcow2 import header as headers
from fleece.formats.qcow2.header import Header
from fleece.formats.qcow2.hosting import write_all
from fleece.units import align_up, format_size, is_power_of_two

_FEATURE_NAMES: Final = (
    (0, 0, b"dirty bit"),
    (0, 1, b"corrupt bit"),
    (0, 2, b"external data file"),
    (0, 3, b"compression type"),
    (0, 4, b"extended L2 entries"),
    (1, 0, b"lazy refcounts"),
    (2, 0, b"bitmaps"),
    (2, 1, b"raw external data"),
)


@dataclass(frozen=True)
class CreateOptions:
    """``cluster_size`` in bytes; ``version`` 2 or 3; ``lazy_refcounts`` needs version 3."""

    cluster_size: int = 65536
    version: int = 3
    backing: str | None = None
    backing_format: str | None = None
    lazy_refcounts: bool = False


def create(path: str | os.PathLike[str], size: int, options: CreateOptions | None = None) -> None:
    """A new image of ``size`` bytes, rounded up to a multiple of 512 as QEMU does.

    OSError (FileExistsError too) if it cannot be written, `UnsupportedFeature` for a size or an
    option that cannot be, `ImageError` if the name of the backing file does not fit. No file is
    left behind then.
    """
    path = Path(path)
    options = options or CreateOptions()
    header = _plan(align_up(size, 512), options)
    try:
        start = headers.build(header)
    except ValueError as error:
        raise ImageError(f"{path}: {error}; use a shorter path or larger clusters") from None
    _write(path, header, start)


def _plan(size: int, options: CreateOptions) -> Header:
    """Cluster 0 header, then refcount table, refcount blocks, L1 table."""
    bits = options.cluster_size.bit_length() - 1
    _check(size, bits, options)
    l1_size = -(-size // (1 << (2 * bits - 3)))
    blocks, table_clusters = _count_clusters(bits, align_up(l1_size * 8, 1 << bits) >> bits)
    return Header(
        version=options.version,
        cluster_bits=bits,
        size=size,
        l1_size=l1_size,
        l1_offset=(1 + table_clusters + blocks) << bits,
        refcount_table_offset=1 << bits,
        refcount_table_clusters=table_clusters,
        compatible=c.COMPATIBLE_LAZY_REFCOUNTS if options.lazy_refcounts else 0,
        backing_file=headers.backing_name(options.backing) if options.backing else None,
        backing_format=options.backing_format,
        extensions=()
        if bits <= 12 or options.version == 2
        else ((c.EXT_FEATURE_NAMES, _feature_table()),),
    )


def _check(size: int, bits: int, options: CreateOptions) -> None:
    cluster_size = options.cluster_size
    if not is_power_of_two(cluster_size) or not c.MIN_CLUSTER_BITS <= bits <= c.MAX_CLUSTER_BITS:
        raise UnsupportedFeature(
            f"a cluster size of {cluster_size} bytes is not possible; "
            "take a power of two from 512 to 2M"
        )
    if options.version not in (2, 3):
        raise UnsupportedFeature(f"qcow2 version {options.version} is not possible; take 2 or 3")
    if options.lazy_refcounts and options.version == 2:
        raise UnsupportedFeature("lazy refcounts need qcow2 version 3")
    if options.backing and not options.backing_format:
        raise UnsupportedFeature("a backing file needs a format: raw or qcow2")
    if not 0 <= size <= c.MAX_SIZE or -(-size // (1 << (2 * bits - 3))) * 8 > c.MAX_L1_BYTES:
        raise UnsupportedFeature(
            f"clusters of {format_size(cluster_size)} are too small for a disk of "
            f"{format_size(size)}; take larger ones"
        )


def _count_clusters(bits: int, l1_clusters: int) -> tuple[int, int]:
    """``(refcount blocks, clusters of the refcount table)`` to count everything, themselves too."""
    per_block = 1 << (bits - 1)
    blocks, table_clusters = 1, 1
    while True:
        used = 1 + table_clusters + blocks + l1_clusters
        needed = -(-used // per_block)
        table = -(-needed * 8 // (1 << bits))
        if (needed, table) == (blocks, table_clusters):
            return needed, table
        blocks, table_clusters = max(blocks, needed), max(table_clusters, table)


def _feature_table() -> bytes:
    return b"".join(
        bytes((kind, bit)) + name.ljust(46, b"\0") for kind, bit, name in _FEATURE_NAMES
    )


def _write(path: Path, header: Header, start: bytes) -> None:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        _write_tables(fd, header)
        write_all(fd, start, 0)
        os.fsync(fd)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)


def _write_tables(fd: int, header: Header) -> None:
    bits = header.cluster_bits
    first_block = header.refcount_table_offset + (header.refcount_table_clusters << bits)
    blocks = (header.l1_offset - first_block) >> bits
    end = header.l1_offset + align_up(header.l1_size * 8, header.cluster_size)
    os.ftruncate(fd, end)
    offsets = range(first_block, header.l1_offset, header.cluster_size)
    write_all(fd, struct.pack(f">{blocks}Q", *offsets), header.refcount_table_offset)
    write_all(fd, b"\0\1" * (end >> bits), first_block)

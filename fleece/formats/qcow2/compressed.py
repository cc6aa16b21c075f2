# SPDX-License-Identifier: Apache-2.0
"""Compressed clusters: where they lie, and their contents, deflate or zstd, both ways.

Source: QEMU's ``docs/interop/qcow2``, "Compressed Clusters Descriptor". A hostile stream costs no
more than its cluster: input is what the entry says, output is cut at one cluster.
"""

import errno
import sys
from typing import Any, Final

from zlib_ng import zlib_ng as zlib  # the same calls; inflates in 0.6 of the time

from fleece.block.node import Node
from fleece.formats.qcow2 import constants as c
from fleece.formats.qcow2.entries import corrupt

_DeflateError: Final[type[Exception]] = zlib.error  # type: ignore[assignment]  # its stubs err

DEFLATE: Final = 0
ZSTD: Final = 1

_SECTOR: Final = 512
# QEMU inflates with a window of 4 KiB; what we write has to fit into that.
_WRITE_WINDOW: Final = -12
# A window of 32 KiB reads every raw deflate stream.
_READ_WINDOW: Final = -15
# The largest window that a zstd decoder takes without being told: a frame may ask for 2 GiB.
_WINDOW_LOG: Final = 27


def place(entry: int, cluster_bits: int) -> tuple[int, int]:
    """``(offset, length)`` in the file of the compressed cluster of an L2 entry, in bytes.

    The length covers whole sectors, so the stream may end before it.
    """
    split = 62 - (cluster_bits - 8)
    offset = entry & ((1 << split) - 1)
    sectors = ((entry & (c.COMPRESSED - 1)) >> split) + 1
    return offset, sectors * _SECTOR - offset % _SECTOR


def entry_for(offset: int, length: int, cluster_bits: int) -> int:
    """The L2 entry of ``length`` compressed bytes at ``offset`` of the file.

    OSError (EFBIG) if the entry has no room for the offset. The inverse of `place`.
    """
    split = 62 - (cluster_bits - 8)
    if offset >> split:
        raise OSError(
            errno.EFBIG, f"compressed data at {offset:#x} is further than an entry can say"
        )
    sectors = (offset + length - 1) // _SECTOR - offset // _SECTOR
    return c.COMPRESSED | sectors << split | offset


def span(entry: int, cluster_bits: int) -> tuple[int, int]:
    """``(first, count)``: the host clusters that the compressed cluster holds a reference to."""
    offset, length = place(entry, cluster_bits)
    first = offset >> cluster_bits
    return first, ((offset + length - 1) >> cluster_bits) - first + 1


def read(file: Node, entry: int, cluster_bits: int, compression_type: int = DEFLATE) -> bytes:
    """The guest cluster of a PACKED entry. OSError (EIO) if the stream is not one.

    The last sector may lie behind the end of the file, which reads as zeroes.
    """
    offset, length = place(entry, cluster_bits)
    packed = bytearray(length)
    file.pread_into(memoryview(packed), offset)
    try:
        data = unpack(packed, compression_type, 1 << cluster_bits)
    except ValueError as error:
        raise corrupt(f"the compressed cluster at {offset:#x}: {error}") from None
    return data


def unpack(packed: bytes | bytearray, compression_type: int, size: int) -> bytes:
    """``size`` bytes, one cluster, from a stream with anything behind it. Else ValueError."""
    if compression_type == ZSTD:
        return _unpack_zstd(packed, size)
    try:
        data = zlib.decompressobj(_READ_WINDOW).decompress(packed, size)
    except _DeflateError as error:
        raise ValueError(str(error)) from None
    if len(data) != size:
        raise ValueError(f"it ends after {len(data)} of {size} bytes")
    return data


def pack(data: bytes | memoryview, compression_type: int, cluster_bits: int) -> bytes | None:
    """The stream of one cluster; None if it would not be smaller than the cluster.

    ``data`` may be shorter than a cluster (at the end of a disk): zeroes stand for the rest.
    """
    size = 1 << cluster_bits
    if len(data) < size:
        data = bytes(data) + bytes(size - len(data))
    packed = _pack_zstd(data) if compression_type == ZSTD else _pack_deflate(data)
    return packed if len(packed) < size else None


def _pack_deflate(data: bytes | memoryview) -> bytes:
    packer = zlib.compressobj(
        zlib.Z_DEFAULT_COMPRESSION, zlib.DEFLATED, _WRITE_WINDOW, zlib.DEF_MEM_LEVEL + 1
    )
    return packer.compress(data) + packer.flush()


def _pack_zstd(data: bytes | memoryview) -> bytes:
    packer = _zstd().ZstdCompressor()
    return bytes(packer.compress(data, packer.FLUSH_FRAME))


def _unpack_zstd(packed: bytes | bytearray, size: int) -> bytes:
    """Frames that follow each other, until there is a whole cluster; the last one must be whole."""
    zstd = _zstd()
    options = {zstd.DecompressionParameter.window_log_max: _WINDOW_LOG}
    view, at, parts, missing = memoryview(packed), 0, [], size
    try:
        while missing:
            end = at + zstd.get_frame_size(view[at:])
            unpacker = zstd.ZstdDecompressor(options=options)
            # One byte more than there may be: so a frame that is too long shows.
            data = unpacker.decompress(view[at:end], missing + 1)
            if len(data) > missing or not unpacker.eof:
                raise ValueError("a frame does not end where its cluster does")
            parts.append(data)
            missing -= len(data)
            at = end
    except zstd.ZstdError as error:
        raise ValueError(str(error)) from None
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _zstd() -> Any:
    """The module, which only images of that kind need."""
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    return zstd

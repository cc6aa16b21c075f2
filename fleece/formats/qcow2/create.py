# SPDX-License-Identifier: Apache-2.0
"""Make a new, empty qcow2 image: all of its metadata first, the header with the magic last.

The layout is QEMU's: header, refcount table, refcount blocks, L1 table, then what only some images
have: LUKS header, L2 tables and data clusters of a preallocated disk. Needs no numpy.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fleece.errors import ImageError, UnsupportedFeature
from fleece.formats.qcow2 import constants as c
from fleece.formats.qcow2 import header as headers
from fleece.formats.qcow2.header import Header
from fleece.formats.qcow2.hosting import write_all
from fleece.formats.qcow2.layout import Layout, count_blocks, pack_entries, pack_ones
from fleece.units import align_up, format_size, is_power_of_two

if TYPE_CHECKING:
    from fleece.formats.qcow2.luks import LuksOptions

PREALLOCATIONS: Final = ("off", "metadata", "falloc", "full")
COMPRESSIONS: Final = ("zlib", "zstd")
"""Names of the compression types 0 and 1."""

_PIECE: Final = 1 << 20

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
    """QEMU's options. ``cluster_size`` in bytes; ``version`` 2 (compat 0.10) or 3 (1.1).

    ``compression_type`` and ``preallocation`` are names. ``data_file`` is recorded as it is, and a
    relative one lies beside the image. ``encryption`` with ``passphrase`` makes a LUKS image.
    ``backing`` is a path, or with ``backing_verbatim`` any filename (``nbd://...``), recorded as it
    is. ``overwrite``: replace what is at the path; a device keeps its size.
    """

    cluster_size: int = 65536
    version: int = 3
    backing: str | None = None
    backing_format: str | None = None
    backing_verbatim: bool = False
    lazy_refcounts: bool = False
    preallocation: str = "off"
    refcount_bits: int = 16
    extended_l2: bool = False
    compression_type: str = "zlib"
    data_file: str | None = None
    data_file_raw: bool = False
    encryption: "LuksOptions | None" = None
    passphrase: bytes = field(default=b"", repr=False)
    nocow: bool = False
    overwrite: bool = False
    sync: bool = True

    @property
    def preallocated(self) -> bool:
        """Whether L2 tables and clusters are made at once."""
        # The raw data file is the disk: no table may ever say that a part of it is not there.
        return self.preallocation != "off" or self.data_file_raw


def create(path: str | os.PathLike[str], size: int, options: CreateOptions | None = None) -> None:
    """A new image of ``size`` bytes, rounded up to a multiple of 512 as QEMU does.

    OSError (FileExistsError too) if it cannot be written, `UnsupportedFeature` for a size or an
    option that cannot be, `ImageError` if the names do not fit into the first cluster, `ImageInUse`
    if another program has the file that would be replaced. A new file is not left behind then.
    """
    path = Path(path)
    options = options or CreateOptions()
    if size < 0:
        raise UnsupportedFeature(f"{size} bytes are no size of a disk")
    check(align_up(size, 512), options)
    luks = _luks_header(options)
    header, layout = plan(align_up(size, 512), options, len(luks))
    try:
        start = headers.build(header)
    except ValueError as error:
        raise ImageError(f"{path}: {error}; use a shorter path or larger clusters") from None
    if options.data_file is not None or options.overwrite or options.nocow:
        from fleece.formats.qcow2 import replace

        replace.write(path, header, layout, start, luks, options)
    else:
        _write_new(path, header, layout, start, luks, options)


def _luks_header(options: CreateOptions) -> bytes:
    if options.encryption is None:
        return b""
    from fleece.formats.qcow2 import luks

    return luks.new(options.passphrase, options.encryption)[0]


def check(size: int, options: CreateOptions) -> None:
    """Raise `UnsupportedFeature` for what cannot be. ``size`` is a multiple of 512."""
    _check_geometry(size, options)
    if options.version not in (2, 3):
        raise UnsupportedFeature(f"qcow2 version {options.version} is not possible; take 2 or 3")
    if options.compression_type not in COMPRESSIONS:
        raise UnsupportedFeature(f"there is no compression type {options.compression_type!r}")
    if options.preallocation not in PREALLOCATIONS:
        raise UnsupportedFeature(f"there is no preallocation {options.preallocation!r}")
    if options.version == 2:
        _check_version_2(options)
    if options.backing and not options.backing_format:
        raise UnsupportedFeature("a backing file needs a format: raw or qcow2")
    _check_combinations(options)


def _check_geometry(size: int, options: CreateOptions) -> None:
    cluster_size, bits = options.cluster_size, options.cluster_size.bit_length() - 1
    if not is_power_of_two(cluster_size) or not c.MIN_CLUSTER_BITS <= bits <= c.MAX_CLUSTER_BITS:
        raise UnsupportedFeature(
            f"a cluster size of {cluster_size} bytes is not possible; "
            "take a power of two from 512 to 2M"
        )
    if not is_power_of_two(options.refcount_bits) or options.refcount_bits > 64:
        raise UnsupportedFeature(
            f"refcounts of {options.refcount_bits} bits are not possible; "
            "take a power of two from 1 to 64"
        )
    if options.extended_l2 and bits < c.MIN_EXTENDED_CLUSTER_BITS:
        raise UnsupportedFeature("extended L2 entries need clusters of 16 KiB at least")
    if size > c.MAX_SIZE or l1_size(size, options) * 8 > c.MAX_L1_BYTES:
        raise UnsupportedFeature(
            f"clusters of {format_size(cluster_size)} are too small for a disk of "
            f"{format_size(size)}; take larger ones"
        )


def _check_version_2(options: CreateOptions) -> None:
    for wanted, what in (
        (options.lazy_refcounts, "lazy refcounts"),
        (options.refcount_bits != 16, "refcounts of other than 16 bits"),
        (options.extended_l2, "extended L2 entries"),
        (options.compression_type != "zlib", f"compression with {options.compression_type}"),
        (options.data_file is not None, "an external data file"),
    ):
        if wanted:
            raise UnsupportedFeature(f"{what} need qcow2 version 3 (compat=1.1)")


def _check_combinations(options: CreateOptions) -> None:
    if options.data_file_raw and options.data_file is None:
        raise UnsupportedFeature("data_file_raw needs data_file")
    if options.backing and options.data_file_raw:
        raise UnsupportedFeature("a raw data file cannot have a backing file")
    if options.backing and options.preallocation != "off" and not options.extended_l2:
        raise UnsupportedFeature(
            "a preallocated image can have a backing file only with extended_l2=on"
        )
    if options.encryption is None:
        return
    if options.preallocated and options.version == 2:
        raise UnsupportedFeature("an encrypted image can be preallocated in version 3 only")
    if options.data_file_raw:
        raise UnsupportedFeature("a raw data file cannot be encrypted")


def l1_size(size: int, options: CreateOptions) -> int:
    """Entries of the L1 table."""
    bits = options.cluster_size.bit_length() - 1
    return -(-size // (1 << (2 * bits - (4 if options.extended_l2 else 3))))


def plan(size: int, options: CreateOptions, luks_bytes: int = 0) -> tuple[Header, Layout]:
    """The header of an image with these options, and what lies where in it."""
    layout = _layout(size, options, luks_bytes)
    bits = layout.bits
    incompatible = (
        (c.INCOMPATIBLE_DATA_FILE if options.data_file is not None else 0)
        | (c.INCOMPATIBLE_COMPRESSION if options.compression_type != "zlib" else 0)
        | (c.INCOMPATIBLE_EXTENDED_L2 if options.extended_l2 else 0)
    )
    header = Header(
        version=options.version,
        cluster_bits=bits,
        size=size,
        l1_size=l1_size(size, options),
        l1_offset=layout.l1_at << bits,
        refcount_table_offset=1 << bits,
        refcount_table_clusters=layout.table,
        refcount_order=options.refcount_bits.bit_length() - 1,
        incompatible=incompatible,
        compatible=c.COMPATIBLE_LAZY_REFCOUNTS if options.lazy_refcounts else 0,
        autoclear=c.AUTOCLEAR_RAW_DATA_FILE if options.data_file_raw else 0,
        backing_file=_backing(options),
        backing_format=options.backing_format,
        crypt_method=c.CRYPT_LUKS if luks_bytes else c.CRYPT_NONE,
        compression_type=COMPRESSIONS.index(options.compression_type),
        extensions=_extensions(options, layout, luks_bytes),
    )
    return header, layout


def _backing(options: CreateOptions) -> str | None:
    if not options.backing or options.backing_verbatim:
        return options.backing or None
    return headers.backing_name(options.backing)


def _layout(size: int, options: CreateOptions, luks_bytes: int) -> Layout:
    bits = options.cluster_size.bit_length() - 1
    tables = l1_size(size, options) if options.preallocated else 0
    inside = options.preallocated and options.data_file is None
    data = align_up(size, 1 << bits) >> bits if inside else 0
    l1 = align_up(l1_size(size, options) * 8, 1 << bits) >> bits
    luks = align_up(luks_bytes, 1 << bits) >> bits
    blocks, table = count_blocks(bits, options.refcount_bits, 1 + l1 + luks + tables + data)
    if table << bits > c.MAX_REFCOUNT_TABLE_BYTES:
        raise UnsupportedFeature("a preallocated image of this size needs larger clusters")
    return Layout(bits, table, blocks, l1, luks, tables, data)


def _extensions(
    options: CreateOptions, layout: Layout, luks_bytes: int
) -> tuple[tuple[int, bytes], ...]:
    found: list[tuple[int, bytes]] = []
    if options.data_file is not None:
        found.append((c.EXT_DATA_FILE, os.fsencode(options.data_file)))
    if luks_bytes:
        place = (layout.luks_at << layout.bits).to_bytes(8, "big") + luks_bytes.to_bytes(8, "big")
        found.append((c.EXT_CRYPTO, place))
    if options.version == 3 and options.cluster_size > 4096:
        found.append((c.EXT_FEATURE_NAMES, feature_table()))
    return tuple(found)


def feature_table() -> bytes:
    """The header extension with the names of all feature bits."""
    return b"".join(
        bytes((kind, bit)) + name.ljust(46, b"\0") for kind, bit, name in _FEATURE_NAMES
    )


def _write_new(
    path: Path, header: Header, layout: Layout, start: bytes, luks: bytes, options: CreateOptions
) -> None:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        write_tables(fd, header, layout, luks, options)
        write_all(fd, start, 0)
        if options.sync:
            os.fsync(fd)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)


def _write_ones(fd: int, offset: int, count: int, refcount_bits: int) -> None:
    """In pieces: a preallocated disk may have more counts than there is memory."""
    piece = (_PIECE * 8) // refcount_bits
    for at in range(0, count, piece):
        ones = pack_ones(min(piece, count - at), refcount_bits)
        write_all(fd, ones, offset + at * refcount_bits // 8)


def write_tables(
    fd: int, header: Header, layout: Layout, luks: bytes, options: CreateOptions
) -> None:
    """Everything but the header, into a file that is empty or full of zeroes."""
    bits = layout.bits
    if not os.fstat(fd).st_size:
        os.ftruncate(fd, layout.end << bits)
    blocks = range(layout.blocks_at << bits, layout.l1_at << bits, 1 << bits)
    write_all(fd, pack_entries(blocks), header.refcount_table_offset)
    _write_ones(fd, layout.blocks_at << bits, layout.end, options.refcount_bits)
    if luks:
        write_all(fd, luks, layout.luks_at << bits)
    if options.preallocated:
        from fleece.formats.qcow2 import preallocate

        preallocate.write_l2_tables(fd, header, layout)
        if not header.has_data_file:
            preallocate.reserve(
                fd, layout.data_at << bits, layout.data << bits, options.preallocation
            )

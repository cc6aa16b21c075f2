# SPDX-License-Identifier: Apache-2.0
"""The header of a qcow2 image: read with every field checked, and written.

Nothing here believes a length or an offset before it was compared with the limits in
`constants` and with the length of the file; nothing here imports numpy.
"""

import os
import struct
from dataclasses import dataclass, replace
from typing import Final

from fleece.block.node import Node
from fleece.errors import ImageCorrupt, ImageError, NotAnImage, UnsupportedFeature
from fleece.formats.qcow2 import constants as c
from fleece.units import align_up

_V2: Final = struct.Struct(">IIQIIQIIQQIIQ")
_V3: Final = struct.Struct(">QQQII")
_EXTENSION: Final = struct.Struct(">II")


@dataclass(frozen=True)
class Header:
    """The fields of the header. Offsets and ``size`` are bytes; names are as the image has them."""

    version: int
    cluster_bits: int
    size: int
    l1_size: int
    l1_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    refcount_order: int = 4
    incompatible: int = 0
    compatible: int = 0
    autoclear: int = 0
    backing_file: str | None = None
    backing_format: str | None = None
    crypt_method: int = 0
    snapshots: int = 0
    snapshots_offset: int = 0
    compression_type: int = 0
    header_length: int = c.V3_HEADER_LENGTH
    extensions: tuple[tuple[int, bytes], ...] = ()
    extra: bytes = b""
    """What the header has behind the fields that are known here; a rewrite keeps it."""

    @property
    def cluster_size(self) -> int:
        """Bytes."""
        return 1 << self.cluster_bits

    @property
    def extended_l2(self) -> bool:
        """Whether L2 entries have 16 bytes, and clusters 32 subclusters."""
        return bool(self.incompatible & c.INCOMPATIBLE_EXTENDED_L2)

    @property
    def subclusters(self) -> int:
        """Parts of a cluster that can be there without the others: 32 or 1."""
        return c.SUBCLUSTERS if self.extended_l2 else 1

    @property
    def l2_entry_size(self) -> int:
        """Bytes of one L2 entry."""
        return 16 if self.extended_l2 else 8

    @property
    def l2_entries(self) -> int:
        """Guest clusters that one L2 table describes."""
        return self.cluster_size // self.l2_entry_size

    @property
    def lazy_refcounts(self) -> bool:
        """Whether counts may be behind while the dirty bit is set."""
        return bool(self.compatible & c.COMPATIBLE_LAZY_REFCOUNTS)

    @property
    def dirty(self) -> bool:
        """Whether the refcounts are not to be trusted."""
        return bool(self.incompatible & c.INCOMPATIBLE_DIRTY)

    @property
    def corrupt(self) -> bool:
        """Whether the image is known to be damaged, and must not be written."""
        return bool(self.incompatible & c.INCOMPATIBLE_CORRUPT)

    @property
    def has_data_file(self) -> bool:
        """Whether the guest's data lies in a file of its own."""
        return bool(self.incompatible & c.INCOMPATIBLE_DATA_FILE)

    @property
    def raw_data_file(self) -> bool:
        """Whether that file alone is a raw image of the disk."""
        return self.has_data_file and bool(self.autoclear & c.AUTOCLEAR_RAW_DATA_FILE)

    @property
    def data_file(self) -> str | None:
        """The name of that file, as the image has it; it may have none."""
        return _name(extension(self, c.EXT_DATA_FILE))

    @property
    def has_bitmaps(self) -> bool:
        """Whether there is a bitmap directory that is to be believed."""
        valid = self.autoclear & c.AUTOCLEAR_BITMAPS
        return bool(valid) and extension(self, c.EXT_BITMAPS) is not None

    def feature_name(self, kind: int, bit: int) -> str:
        """What the image calls the feature bit (kind 0 incompatible, 1 compatible, 2 autoclear)."""
        for number, data in self.extensions:
            if number != c.EXT_FEATURE_NAMES:
                continue
            for at in range(0, len(data) - 47, 48):
                if data[at] == kind and data[at + 1] == bit:
                    return repr(data[at + 2 : at + 48].rstrip(b"\0").decode("ascii", "replace"))
        return "a feature that the image does not name"


def extension(header: Header, number: int) -> bytes | None:
    """The data of the first header extension of this type; None if there is none."""
    return next((data for found, data in header.extensions if found == number), None)


def with_extension(header: Header, number: int, data: bytes | None) -> Header:
    """The header with this extension in the place of the old one, or without it."""
    extensions = [pair for pair in header.extensions if pair[0] != number]
    if data is not None:
        at = next((i for i, p in enumerate(header.extensions) if p[0] == number), len(extensions))
        extensions.insert(at, (number, data))
    return replace(header, extensions=tuple(extensions))


def parse(data: bytes, file_size: int, path: str) -> Header:
    """The header in ``data``, the first cluster of an image of ``file_size`` bytes.

    `NotAnImage`, `UnsupportedFeature` (another version) or `ImageCorrupt`, naming ``path``.
    """
    fields = _fields(data, path)
    _check_geometry(fields, path)
    extensions = _extensions(data, fields, path)
    header = Header(
        **{k: v for k, v in fields.items() if not k.startswith("backing")},
        backing_file=_backing_name(data, fields, path),
        backing_format=_text(dict(extensions).get(c.EXT_BACKING_FORMAT)),
        extensions=extensions,
        extra=data[c.V3_HEADER_LENGTH : fields["header_length"]],
    )
    _check_features(header, path)
    _check_tables(header, file_size, path)
    return header


def cluster_size_of(data: bytes) -> int:
    """The cluster size that a header claims, 512 where the claim is absurd: how much to read."""
    bits = data[23] if len(data) >= 24 else 0
    return 1 << bits if c.MIN_CLUSTER_BITS <= bits <= c.MAX_CLUSTER_BITS else 512


def _fields(data: bytes, path: str) -> dict[str, int]:
    if len(data) < c.V2_HEADER_LENGTH or data[:4] != c.MAGIC.to_bytes(4, "big"):
        raise NotAnImage(f"{path}: this is not a qcow2 image; name the right format with -f")
    v = _V2.unpack_from(data)
    names = (
        "magic version backing_offset backing_size cluster_bits size crypt_method l1_size "
        "l1_offset refcount_table_offset refcount_table_clusters snapshots snapshots_offset"
    )
    fields = dict(zip(names.split(), v, strict=True))
    del fields["magic"]
    if fields["version"] not in (2, 3):
        raise UnsupportedFeature(f"{path}: qcow2 version {fields['version']} is not supported")
    fields["header_length"] = c.V2_HEADER_LENGTH
    if fields["version"] == 3:
        _add_v3(fields, data, path)
    return fields


def _add_v3(fields: dict[str, int], data: bytes, path: str) -> None:
    if len(data) < c.V3_MIN_HEADER_LENGTH:
        raise ImageCorrupt(f"{path}: the file ends inside the qcow2 header")
    names = "incompatible compatible autoclear refcount_order header_length"
    fields.update(zip(names.split(), _V3.unpack_from(data, c.AT_INCOMPATIBLE), strict=True))
    if fields["header_length"] > c.V3_MIN_HEADER_LENGTH < len(data):
        fields["compression_type"] = data[c.V3_MIN_HEADER_LENGTH]


def _check_geometry(fields: dict[str, int], path: str) -> None:
    bits, length = fields["cluster_bits"], fields["header_length"]
    if not c.MIN_CLUSTER_BITS <= bits <= c.MAX_CLUSTER_BITS:
        raise ImageCorrupt(f"{path}: cluster size 2^{bits} is not between 512 bytes and 2 MiB")
    if length > 1 << bits or length < (c.V3_MIN_HEADER_LENGTH if fields["version"] == 3 else 72):
        raise ImageCorrupt(f"{path}: header length {length} cannot be")
    if fields.get("refcount_order", 4) > 6:
        raise ImageCorrupt(f"{path}: refcount order {fields['refcount_order']} is above 6")
    if fields["size"] > c.MAX_SIZE:
        raise ImageCorrupt(f"{path}: virtual size {fields['size']} is above 2^63 - 1")
    if fields["crypt_method"] > 2:
        raise ImageCorrupt(f"{path}: encryption method {fields['crypt_method']} is unknown")


def _extensions(data: bytes, fields: dict[str, int], path: str) -> tuple[tuple[int, bytes], ...]:
    """All of them but the end mark, in order; unknown ones too, a rewrite must keep them."""
    at = fields["header_length"]
    end = min(fields["backing_offset"] or len(data), len(data), 1 << fields["cluster_bits"])
    found = []
    while at + 8 <= end:
        number, length = _EXTENSION.unpack_from(data, at)
        if number == c.EXT_END:
            break
        if length > end - at - 8:
            raise ImageCorrupt(f"{path}: header extension {number:#x} is longer than its place")
        found.append((number, data[at + 8 : at + 8 + length]))
        at += 8 + align_up(length, 8)
    return tuple(found)


def _backing_name(data: bytes, fields: dict[str, int], path: str) -> str | None:
    offset, length = fields["backing_offset"], fields["backing_size"]
    if not offset or not length:
        return None
    room = min(1 << fields["cluster_bits"], len(data)) - offset
    if offset < fields["header_length"] or length > min(c.MAX_BACKING_NAME, room):
        raise ImageCorrupt(f"{path}: the backing file's name does not fit into the first cluster")
    name = os.fsdecode(data[offset : offset + length])
    if "\0" in name:
        raise ImageCorrupt(f"{path}: the backing file's name holds a NUL byte")
    return name


def _text(data: bytes | None) -> str | None:
    return None if data is None else data.decode("ascii", "backslashreplace")


def _name(data: bytes | None) -> str | None:
    return None if data is None else os.fsdecode(data)


def _check_features(header: Header, path: str) -> None:
    if header.extended_l2 and header.cluster_bits < c.MIN_EXTENDED_CLUSTER_BITS:
        raise ImageCorrupt(f"{path}: extended L2 entries need clusters of 16 KiB at least")
    if header.crypt_method == c.CRYPT_LUKS:
        place = extension(header, c.EXT_CRYPTO)
        if place is None or len(place) != 16:
            raise ImageCorrupt(f"{path}: it is encrypted, and where the LUKS header is it omits")
    bitmaps = extension(header, c.EXT_BITMAPS)
    if bitmaps is not None and len(bitmaps) != 24:
        raise ImageCorrupt(f"{path}: the bitmap extension has {len(bitmaps)} bytes, not 24")
    if b"\0" in (extension(header, c.EXT_DATA_FILE) or b""):
        raise ImageCorrupt(f"{path}: the data file's name holds a NUL byte")


def _check_tables(header: Header, file_size: int, path: str) -> None:
    covered = header.l1_size * header.l2_entries << header.cluster_bits
    if header.l1_size * 8 > c.MAX_L1_BYTES:
        raise ImageCorrupt(f"{path}: an L1 table of {header.l1_size} entries is above the limit")
    if covered < header.size:
        raise ImageCorrupt(f"{path}: the L1 table is too small for {header.size} bytes")
    table_bytes = header.refcount_table_clusters << header.cluster_bits
    if not 0 < table_bytes <= c.MAX_REFCOUNT_TABLE_BYTES:
        raise ImageCorrupt(f"{path}: a refcount table of {table_bytes} bytes is not valid")
    if header.snapshots > c.MAX_SNAPSHOTS:
        raise ImageCorrupt(f"{path}: {header.snapshots} internal snapshots are above the limit")
    spans = [("refcount table", header.refcount_table_offset, table_bytes)]
    if header.l1_size:
        spans.append(("L1 table", header.l1_offset, header.l1_size * 8))
    if header.snapshots:
        # An entry has 40 bytes at least; how many there are is known when they are read.
        spans.append(("snapshot table", header.snapshots_offset, header.snapshots * 40))
    for name, start, length in spans:
        _check_span(name, start, length, header, file_size, path)
    if header.l1_size and _overlap(spans[0], spans[1]):
        raise ImageCorrupt(f"{path}: the L1 table and the refcount table overlap")


def _check_span(
    name: str, start: int, length: int, header: Header, file_size: int, path: str
) -> None:
    if start % header.cluster_size:
        raise ImageCorrupt(f"{path}: the {name} at {start:#x} is not aligned to a cluster")
    if not header.cluster_size <= start < file_size or start + length > c.MAX_SIZE:
        raise ImageCorrupt(f"{path}: the {name} at {start:#x} lies outside of the file")


def _overlap(a: tuple[str, int, int], b: tuple[str, int, int]) -> bool:
    return a[1] < b[1] + b[2] and b[1] < a[1] + a[2]


def check_supported(header: Header, path: str, *, writable: bool) -> None:
    """Raise `UnsupportedFeature` or `ImageCorrupt` for what this driver cannot open."""
    unknown = header.incompatible & ~c.KNOWN_INCOMPATIBLE
    if unknown:
        bit = (unknown & -unknown).bit_length() - 1
        name = f"incompatible bit {bit}, {header.feature_name(0, bit)},"
        raise UnsupportedFeature(f"{path}: the qcow2 feature {name} is not supported")
    if bool(header.incompatible & c.INCOMPATIBLE_COMPRESSION) != bool(header.compression_type):
        raise ImageCorrupt(
            f"{path}: the compression type and its feature bit contradict each other"
        )
    if header.compression_type > c.COMPRESSION_ZSTD:
        raise UnsupportedFeature(
            f"{path}: compression type {header.compression_type} is not supported "
            "(deflate and zstd are)"
        )
    if writable and header.crypt_method == c.CRYPT_AES:
        raise UnsupportedFeature(
            f"{path}: its old AES encryption is weak, and is only read; convert it to LUKS with: "
            "fleece image convert -O qcow2 -o encrypt.format=luks,encrypt.key-secret=ID"
        )
    if writable and header.corrupt:
        raise ImageCorrupt(
            f"{path}: the image is marked corrupt and cannot be opened read/write; "
            "open it read-only, or repair it with: fleece image check -r all"
        )


def build(header: Header) -> bytes:
    """The header, its extensions and the backing file's name, as they begin an image.

    Raises ValueError if they do not fit into a cluster or the name is too long.
    """
    extensions = [e for e in header.extensions if e[0] != c.EXT_BACKING_FORMAT]
    if header.backing_format is not None:
        extensions.insert(0, (c.EXT_BACKING_FORMAT, header.backing_format.encode()))
    tail = b"".join(_pack_extension(number, data) for number, data in extensions) + bytes(8)
    name = os.fsencode(header.backing_file or "")
    length = c.V2_HEADER_LENGTH
    if header.version == 3:
        length = c.V3_HEADER_LENGTH + len(header.extra)
    at = length + len(tail) if name else 0
    if len(name) > c.MAX_BACKING_NAME or length + len(tail) + len(name) > header.cluster_size:
        raise ValueError(f"a backing file name of {len(name)} bytes does not fit into the header")
    return _pack(header, at, len(name), length) + tail + name


def _pack(header: Header, backing_offset: int, backing_size: int, length: int) -> bytes:
    head = _V2.pack(
        c.MAGIC,
        header.version,
        backing_offset,
        backing_size,
        header.cluster_bits,
        header.size,
        header.crypt_method,
        header.l1_size,
        header.l1_offset,
        header.refcount_table_offset,
        header.refcount_table_clusters,
        header.snapshots,
        header.snapshots_offset,
    )
    if header.version == 2:
        return head
    head += _V3.pack(
        header.incompatible, header.compatible, header.autoclear, header.refcount_order, length
    )
    return head + bytes([header.compression_type]) + bytes(7) + header.extra


def rewrite(file: Node, old: Header, new: Header, name: str) -> Header:
    """Put ``new`` in the place of ``old``, durably; the header as it is on disk then.

    Of a layout that stays the same only the fields that differ are written, in one write from the
    first to the last of them; else all of the start of the first cluster is. `ImageError` if what
    ``new`` says does not fit into the first cluster: nothing is written then.
    """
    if new.version == 3:
        new = replace(new, header_length=c.V3_HEADER_LENGTH + len(new.extra))
    else:
        new = replace(new, header_length=c.V2_HEADER_LENGTH)
    try:
        data = build(new).ljust(new.cluster_size, b"\0")
    except ValueError as error:
        raise ImageError(f"{name}: {error}; make its names shorter") from None
    before = bytearray(old.cluster_size)
    file.pread_into(memoryview(before), 0)
    differing = [at for at in range(0, len(data), 8) if data[at : at + 8] != before[at : at + 8]]
    if differing:
        low, high = differing[0], differing[-1] + 8
        file.pwrite(memoryview(data)[low:high], low)
        file.flush()
    return new


def _pack_extension(number: int, data: bytes) -> bytes:
    return _EXTENSION.pack(number, len(data)) + data + bytes(-len(data) % 8)


def backing_name(path: str) -> str:
    """``path`` as an image may record it: a name that no program takes for ``protocol:rest``."""
    first = path.split("/", 1)[0]
    return f"./{path}" if ":" in first else path

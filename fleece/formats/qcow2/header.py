# SPDX-License-Identifier: Apache-2.0
"""The header of a qcow2 image: read with every field checked, and written.

Nothing here believes a length or an offset before it was compared with the limits in
`constants` and with the length of the file; nothing here imports numpy.
"""

import os
import struct
from dataclasses import dataclass
from typing import Final

from fleece.errors import ImageCorrupt, NotAnImage, UnsupportedFeature
from fleece.formats.qcow2 import constants as c
from fleece.units import align_up

_V2: Final = struct.Struct(">IIQIIQIIQQIIQ")
_V3: Final = struct.Struct(">QQQII")
_EXTENSION: Final = struct.Struct(">II")

_FEATURES: Final = {
    (0, 0): "dirty bit",
    (0, 1): "corrupt bit",
    (0, 2): "external data file",
    (0, 3): "compression type",
    (0, 4): "extended L2 entries",
    (1, 0): "lazy refcounts",
    (2, 0): "bitmaps",
    (2, 1): "raw external data",
}


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

    @property
    def cluster_size(self) -> int:
        """Bytes."""
        return 1 << self.cluster_bits

    @property
    def l2_entries(self) -> int:
        """Guest clusters that one L2 table describes."""
        return self.cluster_size // 8

    @property
    def lazy_refcounts(self) -> bool:
        """Whether counts may be behind while the dirty bit is set."""
        return bool(self.compatible & c.COMPATIBLE_LAZY_REFCOUNTS)

    @property
    def dirty(self) -> bool:
        """Whether the refcounts are not to be trusted."""
        return bool(self.incompatible & c.INCOMPATIBLE_DIRTY)

    def feature_name(self, kind: int, bit: int) -> str:
        """What the image calls the feature bit (kind 0 incompatible, 1 compatible, 2 autoclear)."""
        for number, data in self.extensions:
            if number != c.EXT_FEATURE_NAMES:
                continue
            for at in range(0, len(data) - 47, 48):
                if data[at] == kind and data[at + 1] == bit:
                    return repr(data[at + 2 : at + 48].rstrip(b"\0").decode("ascii", "replace"))
        return "a feature that the image does not name"


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
    )
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
    for name, start, length in spans:
        _check_span(name, start, length, header, file_size, path)
    if len(spans) == 2 and _overlap(spans[0], spans[1]):
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
    """Raise `UnsupportedFeature` or `ImageCorrupt` for what this driver cannot open (yet)."""
    _check_incompatible(header, path)
    if header.crypt_method:
        raise UnsupportedFeature(f"{path}: encrypted qcow2 images are not supported")
    if header.compression_type:
        raise UnsupportedFeature(
            f"{path}: compression type {header.compression_type} is not supported (deflate is)"
        )
    if writable:
        _check_writable(header, path)


def _check_incompatible(header: Header, path: str) -> None:
    known = c.INCOMPATIBLE_DIRTY | c.INCOMPATIBLE_CORRUPT
    bits = header.incompatible & ~known
    # The compression bit says only that the type field counts; the type itself is checked.
    if header.compression_type:
        bits &= ~c.INCOMPATIBLE_COMPRESSION
    elif bits & c.INCOMPATIBLE_COMPRESSION:
        raise ImageCorrupt(f"{path}: the compression type bit is set, and the type is deflate")
    if not bits:
        return
    bit = (bits & -bits).bit_length() - 1
    name = _FEATURES.get((0, bit)) or f"incompatible bit {bit}, {header.feature_name(0, bit)},"
    raise UnsupportedFeature(f"{path}: the qcow2 feature {name} is not supported")


def _check_writable(header: Header, path: str) -> None:
    if header.incompatible & c.INCOMPATIBLE_CORRUPT:
        raise ImageCorrupt(
            f"{path}: the image is marked corrupt and cannot be opened read/write; "
            f"open it read-only, or repair it with: qemu-img check -r all"
        )
    if header.snapshots:
        raise UnsupportedFeature(
            f"{path}: writing to an image with internal snapshots is not supported; "
            "open it read-only"
        )
    if header.refcount_order < 3:
        raise UnsupportedFeature(
            f"{path}: writing with {1 << header.refcount_order} bit refcounts is not supported; "
            "open it read-only"
        )
    if header.autoclear & c.AUTOCLEAR_BITMAPS:
        raise UnsupportedFeature(
            f"{path}: writing would invalidate the persistent bitmaps of the image; open it "
            "read-only, or remove them with: qemu-img bitmap --remove"
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
    length = c.V3_HEADER_LENGTH if header.version == 3 else c.V2_HEADER_LENGTH
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
    return head + bytes([header.compression_type]) + bytes(7)


def _pack_extension(number: int, data: bytes) -> bytes:
    return _EXTENSION.pack(number, len(data)) + data + bytes(-len(data) % 8)


def backing_name(path: str) -> str:
    """``path`` as an image may record it: a name that no program takes for ``protocol:rest``."""
    first = path.split("/", 1)[0]
    return f"./{path}" if ":" in first else path

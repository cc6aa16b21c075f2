# SPDX-License-Identifier: Apache-2.0
"""What an image is, in the schema of ``qemu-img info --output=json`` (QEMU 7.2, ImageInfo).

Only the image itself is opened; what it names is told, and not touched, unless the chain is asked
for. The order of the keys is the one in which QEMU prints them for people.
"""

import os
from collections.abc import Mapping
from typing import Any, Final

from fleece.block.file import FileNode
from fleece.block.node import Node
from fleece.block.window import Window
from fleece.errors import ImageError
from fleece.formats.chain import combined
from fleece.formats.opening import Asked, Layer, Opener, Step
from fleece.formats.qcow2 import bitmap_directory, snapshot_table
from fleece.formats.qcow2.constants import COMPRESSION_ZSTD, CRYPT_LUKS, MAX_CHAIN_DEPTH
from fleece.formats.qcow2.header import Header
from fleece.formats.qcow2.snapshot_table import Snapshot
from fleece.units import align_up

Info = dict[str, Any]
_SECTOR: Final = 512


def describe(
    source: str | Mapping[str, Any], fmt: str | None = None, *, chain: bool = False, asked: Asked
) -> list[Info]:
    """The image, and with ``chain`` all of its backing files, within what ``asked`` allows.

    A `FleeceError` if one of them cannot be opened, or OSError if it cannot be read.
    """
    with Opener(asked) as opener:
        step: Step | None = opener.first(source, fmt, True)
        found: list[Info] = []
        while step is not None:
            if len(found) >= MAX_CHAIN_DEPTH:
                raise ImageError(f"{source}: more than {MAX_CHAIN_DEPTH} backing files")
            layer = opener.layer(step)
            found.append(of_layer(layer))
            step = opener.below(layer) if chain else None
        return found


def of_layer(layer: Layer) -> Info:
    """One image, without what it names."""
    info: Info = {"filename": visible(layer.shown), "format": layer.driver}
    info["virtual-size"] = _virtual_size(layer)
    actual = actual_size(layer.node)
    if actual is not None:
        info["actual-size"] = actual
    header = layer.header
    if header is None:
        if isinstance(layer.node, FileNode):
            info["dirty-flag"] = False
        return info | _plain_luks(layer) if layer.driver == "luks" else info
    info["dirty-flag"] = header.dirty
    if header.crypt_method:
        info["encrypted"] = True
    info["cluster-size"] = header.cluster_size
    if header.backing_file is not None:
        _add_backing(info, header, layer.shown)
    if header.snapshots:
        snapshots = snapshot_table.read(layer.node, header, layer.name)
        info["snapshots"] = [snapshot_info(snapshot) for snapshot in snapshots]
    info["format-specific"] = {"type": "qcow2", "data": _specific(layer, header)}
    return info


def _virtual_size(layer: Layer) -> int:
    """Bytes of the disk: QEMU counts in sectors, so a raw one ends with a whole one."""
    if layer.header is not None:
        return align_up(layer.header.size, _SECTOR)
    if "offset" in layer.options or "size" in layer.options:
        window = Window(layer.node, layer.options.get("offset", 0), layer.options.get("size"))
        return align_up(window.size, _SECTOR)
    return align_up(layer.node.size, _SECTOR)


def actual_size(node: Node) -> int | None:
    """Bytes that the file takes on its file system; None for what is no file of this host."""
    if isinstance(node, FileNode):
        return os.fstat(node.fileno()).st_blocks * 512
    return None


def _add_backing(info: Info, header: Header, shown: str) -> None:
    name = header.backing_file or ""
    info["backing-filename"] = visible(name)
    info["full-backing-filename"] = visible(combined(shown, name))
    if header.backing_format is not None:
        info["backing-filename-format"] = visible(header.backing_format)


def visible(text: str) -> str:
    """``text`` of an image, as it can be shown and encoded: other bytes than UTF-8 are escaped."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def snapshot_info(snapshot: Snapshot) -> Info:
    """One internal snapshot, as SnapshotInfo."""
    info: Info = {
        "id": snapshot.identity.decode("utf-8", "backslashreplace"),
        "name": snapshot.name.decode("utf-8", "backslashreplace"),
        "vm-state-size": snapshot.vm_state_size,
        "date-sec": snapshot.seconds,
        "date-nsec": snapshot.nanoseconds,
        "vm-clock-sec": snapshot.clock // 10**9,
        "vm-clock-nsec": snapshot.clock % 10**9,
    }
    if snapshot.icount is not None:
        info["icount"] = snapshot.icount
    return info


def _specific(layer: Layer, header: Header) -> Info:
    """ImageInfoSpecificQCow2."""
    v3 = header.version == 3
    data: Info = {"compat": "1.1" if v3 else "0.10"}
    data["compression-type"] = "zstd" if header.compression_type == COMPRESSION_ZSTD else "zlib"
    if v3:
        data["lazy-refcounts"] = header.lazy_refcounts
        bitmaps = bitmap_directory.read(layer.node, header, layer.name)
        if bitmaps:
            data["bitmaps"] = [bitmap_info(bitmap) for bitmap in bitmaps]
    data["refcount-bits"] = 1 << header.refcount_order
    if header.has_data_file:
        if header.data_file is not None:
            data["data-file"] = visible(header.data_file)
        data["data-file-raw"] = header.raw_data_file
    if header.crypt_method:
        data["encrypt"] = _encryption(layer, header)
    if v3:
        data["corrupt"] = header.corrupt
        data["extended-l2"] = header.extended_l2
    return data


def bitmap_info(bitmap: bitmap_directory.Bitmap) -> Info:
    """One persistent bitmap, as Qcow2BitmapInfo."""
    names = {bitmap_directory.IN_USE: "in-use", bitmap_directory.AUTO: "auto"}
    return {
        "flags": [name for flag, name in names.items() if bitmap.flags & flag],
        "name": visible(bitmap.name),
        "granularity": bitmap.granularity,
    }


def _encryption(layer: Layer, header: Header) -> Info:
    """What the LUKS header says; no key is needed for it."""
    if header.crypt_method != CRYPT_LUKS:
        return {"format": "aes"}
    from fleece.formats.qcow2 import luks

    offset, length = luks.place(header, layer.name)
    return luks_info(luks.read_header(layer.node, offset, length, layer.name))


def _plain_luks(layer: Layer) -> Info:
    """A LUKS file or partition of its own."""
    from fleece.formats.qcow2 import luks

    header = luks.read_header(layer.node, 0, layer.node.size, layer.name)
    return {
        "virtual-size": align_up(layer.node.size - header.length, _SECTOR),
        "encrypted": True,
        "format-specific": {"type": "luks", "data": _without_format(luks_info(header))},
    }


def _without_format(info: Info) -> Info:
    return {key: value for key, value in info.items() if key != "format"}


def luks_info(header: Any) -> Info:
    """A `fleece.formats.qcow2.luks.LuksHeader` as QCryptoBlockInfoLUKS, in QEMU's order."""
    halves = 2 if header.mode == "xts" else 1
    info: Info = {"ivgen-alg": header.iv_generator}
    if header.iv_hash:
        info["ivgen-hash-alg"] = header.iv_hash
    info |= {
        "hash-alg": header.hash,
        "cipher-alg": f"{header.cipher}-{header.key_bytes * 8 // halves}",
        "uuid": header.uuid,
        "format": "luks",
        "cipher-mode": header.mode,
        "slots": [_slot(slot) for slot in header.slots],
        "payload-offset": header.payload * _SECTOR,
        "master-key-iters": header.digest_iterations,
    }
    return info


def _slot(slot: Any) -> Info:
    if not slot.active:
        return {"active": False, "key-offset": slot.material * _SECTOR}
    return {
        "active": True,
        "iters": slot.iterations,
        "key-offset": slot.material * _SECTOR,
        "stripes": slot.stripes,
    }

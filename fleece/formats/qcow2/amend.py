# SPDX-License-Identifier: Apache-2.0
"""Change the options of an image that is there: version, refcount width, names, key slots.

Everything works on an image that nobody else uses and whose counts are right (not dirty): open it
read/write first, which repairs it. After a change the node that has it open must be closed. A
crash at any moment leaves the image as it was or as it shall be, with leaked clusters at worst.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from fleece.block.node import Node
from fleece.errors import ImageError, UnsupportedFeature
from fleece.formats.qcow2 import constants as c
from fleece.formats.qcow2 import header as headers
from fleece.formats.qcow2.create import feature_table
from fleece.formats.qcow2.expand import expand_zero_clusters
from fleece.formats.qcow2.header import Header
from fleece.formats.qcow2.recount import recount
from fleece.units import is_power_of_two

_DEFAULT_WIDTH: Final = 16


@dataclass(frozen=True)
class Changes:
    """What shall be different; None is "as it is". ``version`` 2 or 3."""

    version: int | None = None
    refcount_bits: int | None = None
    lazy_refcounts: bool | None = None
    data_file: str | None = None
    data_file_raw: bool | None = None
    backing_file: str | None = None
    backing_format: str | None = None


def amend(
    file: Node,
    header: Header,
    changes: Changes,
    name: str,
    progress: Callable[[int, int], None] | None = None,
) -> Header:
    """Apply ``changes`` to the image in ``file``; the header as it is on disk then.

    `UnsupportedFeature` or `ImageError` for what cannot be, before anything is changed.
    """
    target = changes.version or header.version
    _check(header, changes, target, name)
    if target > header.version:
        header = _upgrade(file, header, name)
    bits = changes.refcount_bits
    if bits is not None and bits != 1 << header.refcount_order:
        header = recount(file, header, name, order=bits.bit_length() - 1)
    header = _rewrite_names(file, header, changes, name)
    if target < header.version:
        header = _downgrade(file, header, name, progress)
    return header


def _check(header: Header, changes: Changes, target: int, name: str) -> None:
    if header.dirty or header.corrupt:
        raise ImageError(f"{name}: repair it first: fleece image check -r all")
    bits = changes.refcount_bits
    if bits is not None and (not is_power_of_two(bits) or bits > 64):
        raise UnsupportedFeature(
            f"{name}: refcounts of {bits} bits are not possible; take a power of two from 1 to 64"
        )
    width = bits or 1 << header.refcount_order
    lazy = header.lazy_refcounts if changes.lazy_refcounts is None else changes.lazy_refcounts
    if target == 2:
        _check_version_2(header, changes, width, name)
        if lazy and changes.lazy_refcounts:
            raise UnsupportedFeature(f"{name}: lazy refcounts need compat=1.1")
    _check_names(header, changes, name)


def _check_version_2(header: Header, changes: Changes, width: int, name: str) -> None:
    if width != _DEFAULT_WIDTH:
        raise UnsupportedFeature(
            f"{name}: compat=0.10 needs refcounts of 16 bits; add refcount_bits=16"
        )
    features = header.incompatible & ~c.INCOMPATIBLE_DIRTY
    for bit, what in (
        (c.INCOMPATIBLE_DATA_FILE, "an external data file"),
        (c.INCOMPATIBLE_COMPRESSION, "zstd compression"),
        (c.INCOMPATIBLE_EXTENDED_L2, "extended L2 entries"),
    ):
        if features & bit:
            raise UnsupportedFeature(
                f"{name}: it has {what}, which compat=0.10 does not know; "
                "make such an image with: fleece image convert -o compat=0.10"
            )


def _check_names(header: Header, changes: Changes, name: str) -> None:
    for new, old, what in (
        (changes.backing_file, header.backing_file, "backing file"),
        (changes.backing_format, header.backing_format, "format of the backing file"),
    ):
        if new is not None and new != (old or ""):
            raise UnsupportedFeature(
                f"{name}: the {what} cannot be amended; use: fleece image rebase"
            )
    if changes.data_file is not None and not header.has_data_file:
        raise UnsupportedFeature(f"{name}: it has no external data file, and cannot get one")
    if changes.data_file_raw and not header.raw_data_file:
        raise UnsupportedFeature(f"{name}: data_file_raw cannot be set for an image that exists")


def _upgrade(file: Node, header: Header, name: str) -> Header:
    """Version 3 has longer fields, in the header and in the snapshot table."""
    new = replace(
        header, version=3, incompatible=0, compatible=0, autoclear=0, extra=b"", refcount_order=4
    )
    if header.cluster_size > 4096:
        new = headers.with_extension(new, c.EXT_FEATURE_NAMES, feature_table())
    header = headers.rewrite(file, header, new, name)
    from fleece.formats.qcow2 import repair

    header, mended = repair.mend_snapshots(file, header, lambda _: None)
    return recount(file, header, name) if mended else header


def _rewrite_names(file: Node, header: Header, changes: Changes, name: str) -> Header:
    """What only the header says."""
    new = header
    if changes.lazy_refcounts is not None and header.version == 3:
        bit = c.COMPATIBLE_LAZY_REFCOUNTS
        compatible = new.compatible & ~bit | (bit if changes.lazy_refcounts else 0)
        new = replace(new, compatible=compatible)
    if changes.data_file is not None:
        data = os.fsencode(changes.data_file) or None
        new = headers.with_extension(new, c.EXT_DATA_FILE, data)
    if changes.data_file_raw is False:
        new = replace(new, autoclear=new.autoclear & ~c.AUTOCLEAR_RAW_DATA_FILE)
    return header if new == header else headers.rewrite(file, header, new, name)


def _downgrade(
    file: Node, header: Header, name: str, progress: Callable[[int, int], None] | None
) -> Header:
    """Version 2 has no zero clusters, no bitmaps and no feature bits."""
    header = expand_zero_clusters(file, header, name, progress)
    had_bitmaps = headers.extension(header, c.EXT_BITMAPS) is not None
    new = replace(header, version=2, incompatible=0, compatible=0, autoclear=0, extra=b"")
    for number in (c.EXT_BITMAPS, c.EXT_FEATURE_NAMES):
        new = headers.with_extension(new, number, None)
    header = headers.rewrite(file, header, new, name)
    return recount(file, header, name) if had_bitmaps else header

# SPDX-License-Identifier: Apache-2.0
"""How a qcow2 image behaves while it is open: QEMU's runtime options of the driver."""

from collections.abc import Callable
from dataclasses import dataclass

from fleece.formats.qcow2 import overlap
from fleece.formats.qcow2.cache import DEFAULT_LIMIT
from fleece.formats.qcow2.freespace import OTHER, REQUEST, SNAPSHOT


@dataclass(frozen=True)
class Qcow2Options:
    """Options of an open image, with QEMU's names.

    ``discard``: whether space that the guest gives up goes back to the file system at all
    (``discard=unmap``); the ``pass_discard_*`` say for which reasons (its own request, a deleted
    internal snapshot, anything else). ``discard_no_unref``: a trimmed cluster keeps its place in
    the file. ``overlap_check``: bits of `fleece.formats.qcow2.overlap`. The caches are in bytes.
    ``on_corrupt`` is called once, with a line that says why, when the image turns out to be
    corrupt and is closed to writes.
    """

    lazy_refcounts: bool | None = None
    discard: bool = True
    pass_discard_request: bool = True
    pass_discard_snapshot: bool = True
    pass_discard_other: bool = False
    discard_no_unref: bool = False
    overlap_check: int = overlap.ALL
    l2_cache_bytes: int = DEFAULT_LIMIT
    refcount_cache_bytes: int = DEFAULT_LIMIT
    on_corrupt: Callable[[str], None] | None = None

    def passes_discard(self, reason: int) -> bool:
        """Whether space that became free for ``reason`` (see `freespace`) is given back."""
        wanted = {
            REQUEST: self.pass_discard_request,
            SNAPSHOT: self.pass_discard_snapshot,
            OTHER: self.pass_discard_other,
        }
        return self.discard and wanted[reason]

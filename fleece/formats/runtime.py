# SPDX-License-Identifier: Apache-2.0
"""The options of an open qcow2 image, from QEMU's names to `Qcow2Options`. Imports numpy."""

from typing import Any

from fleece.block.options import Options
from fleece.errors import UsageError
from fleece.formats.qcow2 import overlap
from fleece.formats.qcow2.options import Qcow2Options

_SAME = {
    "lazy-refcounts": "lazy_refcounts",
    "pass-discard-request": "pass_discard_request",
    "pass-discard-snapshot": "pass_discard_snapshot",
    "pass-discard-other": "pass_discard_other",
    "discard-no-unref": "discard_no_unref",
}


def qcow2_options(options: Options) -> Qcow2Options:
    """From the typed options of a ``qcow2`` node. `UsageError` for sizes that contradict."""
    found: dict[str, Any] = {_SAME[key]: value for key, value in options.items() if key in _SAME}
    if options.get("discard") in ("ignore", "off"):
        found["discard"] = False
    if "overlap-check" in options:
        found["overlap_check"] = _overlap(options["overlap-check"])
    return Qcow2Options(**found, **_caches(options))


def _overlap(wanted: Options) -> int:
    bits = overlap.LEVELS[wanted.get("template", "all")]
    for name, bit in overlap.SWITCHES.items():
        if name in wanted:
            bits = bits | bit if wanted[name] else bits & ~bit
    return bits


def _caches(options: Options) -> dict[str, Any]:
    """Bytes of the two caches; of ``cache-size`` the tables get three quarters."""
    l2, refcount = options.get("l2-cache-size"), options.get("refcount-cache-size")
    both = options.get("cache-size")
    if both is not None:
        if (l2 or 0) + (refcount or 0) > both:
            raise UsageError("l2-cache-size and refcount-cache-size are more than cache-size")
        if l2 is None:
            l2 = both * 3 // 4 if refcount is None else both - refcount
        if refcount is None:
            refcount = both - l2
    sizes = {"l2_cache_bytes": l2, "refcount_cache_bytes": refcount}
    return {name: size for name, size in sizes.items() if size is not None}

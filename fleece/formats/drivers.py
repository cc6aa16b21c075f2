# SPDX-License-Identifier: Apache-2.0
"""The drivers that an image is opened with, and the options that each of them has.

Names and values are QEMU's (qapi/block-core.json). An option that only tunes QEMU's own machinery
(``aio``, ``cache.direct``, ``l2-cache-entry-size``) is accepted and changes nothing here.
"""

from typing import Any, Final

from fleece.block import options as o
from fleece.block.options import Fields
from fleece.errors import UsageError

COMMON: Final[Fields] = {
    "driver": o.text,
    "node-name": o.text,
    "read-only": o.boolean,
    "auto-read-only": o.boolean,
    "force-share": o.boolean,
    "discard": o.choice("unmap", "on", "ignore", "off"),
    "detect-zeroes": o.choice("off", "on", "unmap"),
    "cache": o.group({"direct": o.boolean, "no-flush": o.boolean, "writeback": o.boolean}),
}

_FILE: Final[Fields] = {
    **COMMON,
    "filename": o.text,
    "aio": o.choice("threads", "native", "io_uring"),
    "aio-max-batch": o.integer,
    "locking": o.choice("auto", "on", "off"),
    "pr-manager": o.text,
    "drop-cache": o.boolean,
    "x-check-cache-dropped": o.boolean,
}

_NBD: Final[Fields] = {
    **COMMON,
    "server": o.group(
        {
            "type": o.choice("unix", "inet"),
            "path": o.text,
            "host": o.text,
            "port": o.number_text,
        }
    ),
    "path": o.text,
    "host": o.text,
    "port": o.number_text,
    "export": o.text,
    "uri": o.text,
}

OVERLAP_TEMPLATES: Final = ("none", "constant", "cached", "all")
OVERLAP_KINDS: Final = (
    "main-header",
    "active-l1",
    "active-l2",
    "refcount-table",
    "refcount-block",
    "snapshot-table",
    "inactive-l1",
    "inactive-l2",
    "bitmap-directory",
)
_overlap_template: Final = o.choice(*OVERLAP_TEMPLATES)
_overlap_group: Final = o.group(
    {"template": _overlap_template, **dict.fromkeys(OVERLAP_KINDS, o.boolean)}
)


def _overlap(value: Any, key: str) -> dict[str, Any]:
    if isinstance(value, dict):
        return dict(_overlap_group(value, key))
    return {"template": _overlap_template(value, key)}


_QCOW2: Final[Fields] = {
    **COMMON,
    "file": o.node,
    "backing": o.node_or_none,
    "data-file": o.node,
    "lazy-refcounts": o.boolean,
    "pass-discard-request": o.boolean,
    "pass-discard-snapshot": o.boolean,
    "pass-discard-other": o.boolean,
    "discard-no-unref": o.boolean,
    "overlap-check": _overlap,
    "cache-size": o.size,
    "l2-cache-size": o.size,
    "l2-cache-entry-size": o.size,
    "refcount-cache-size": o.size,
    "cache-clean-interval": o.integer,
    "encrypt": o.group({"format": o.choice("aes", "luks"), "key-secret": o.text}),
}

PROTOCOLS: Final[dict[str, Fields]] = {
    "file": _FILE,
    "host_device": _FILE,
    "nbd": _NBD,
    "null-co": {
        **COMMON,
        "size": o.size,
        "latency-ns": o.integer,
        "read-zeroes": o.boolean,
    },
}
"""Drivers without a file below them."""

FORMATS: Final[dict[str, Fields]] = {
    "raw": {**COMMON, "file": o.node, "offset": o.size, "size": o.size},
    "qcow2": _QCOW2,
    "luks": {**COMMON, "file": o.node, "key-secret": o.text, "header": o.node},
}
"""Drivers that find a disk in a file."""


def checked(driver: str, options: o.Options) -> o.Options:
    """The options of ``driver``, typed; `UsageError` for a driver or an option that is unknown."""
    fields = PROTOCOLS.get(driver) or FORMATS.get(driver)
    if fields is None:
        raise UsageError(
            f"driver {driver!r} is not supported; use {', '.join([*FORMATS, *PROTOCOLS])}"
        )
    return o.typed(options, fields, f"driver {driver}")

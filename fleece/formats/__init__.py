# SPDX-License-Identifier: Apache-2.0
"""Image formats: raw and qcow2. `open_image` makes a node of a file, `probe` guesses its format.

`fleece.formats.opening.open_node` opens whatever a command line can name.
Importing this is cheap: the qcow2 driver, which needs numpy, is imported when an image is opened.
"""

import os
from collections.abc import Callable

from fleece.block.file import FileNode
from fleece.block.node import Node
from fleece.errors import UnsupportedFeature, UsageError
from fleece.formats.chain import POLICIES, Policy
from fleece.formats.opening import open_path
from fleece.formats.raw import format_of

FORMATS = ("raw", "qcow2")

__all__ = ["FORMATS", "open_image", "probe"]


def probe(path: str | os.PathLike[str]) -> str:
    """``"qcow2"`` if the file begins like one, else ``"raw"``. `NotFound`, `ImageError`.

    Do not trust the answer for a disk whose contents somebody else writes: a raw disk becomes a
    "qcow2" one as soon as its user writes four bytes to it, and a qcow2 image can name other files
    of the host. Whoever knows the format of a disk should say so. (`open_image` without a format
    refuses the write that would change the answer.)
    """
    file = FileNode(path, read_only=True, locking=False)
    try:
        return format_of(file)
    finally:
        file.close()


def open_image(
    path: str | os.PathLike[str],
    fmt: str | None = None,
    *,
    read_only: bool = False,
    backing: str = "same-tree",
    on_corrupt: Callable[[str], None] | None = None,
) -> Node:
    """The image ``path`` as a node, locked against other programs; close it in the end.

    ``fmt`` is one of `FORMATS`, or None to look (see `probe`). ``backing`` says which backing and
    data files named in an image are opened: ``"same-tree"`` (within the directory of the image),
    ``"any-local"`` or ``"none"``; never a device, a ``json:`` name or one with a protocol.
    ``on_corrupt`` is told, once, why a qcow2 image was found to be corrupt and closed to writes.
    `NotFound`, `ImageInUse` or another `ImageError`.
    """
    if backing not in POLICIES:
        raise UsageError(f"backing policy {backing!r} is unknown; use {', '.join(POLICIES)}")
    if fmt is not None and fmt not in FORMATS:
        raise UnsupportedFeature(
            f"{os.fspath(path)}: format {fmt!r} is not supported; use {' or '.join(FORMATS)}"
        )
    policy = Policy.of([backing])
    return open_path(path, fmt, read_only=read_only, policy=policy, on_corrupt=on_corrupt)

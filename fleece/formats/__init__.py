# SPDX-License-Identifier: Apache-2.0
"""Image formats: raw and qcow2. `open_image` makes a node of a file, `probe` guesses its format.

Importing this is cheap: the qcow2 driver, which needs numpy, is imported when an image is opened.
"""

import os

from fleece.block.file import FileNode
from fleece.block.node import Node
from fleece.errors import UnsupportedFeature
from fleece.formats.raw import QCOW2_MAGIC, GuessedRawNode, magic_of

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
        return "qcow2" if magic_of(file) == QCOW2_MAGIC else "raw"
    finally:
        file.close()


def open_image(
    path: str | os.PathLike[str],
    fmt: str | None = None,
    *,
    read_only: bool = False,
    backing: str = "same-tree",
) -> Node:
    """The image ``path`` as a node, locked against other programs; close it in the end.

    ``fmt`` is one of `FORMATS`, or None to look (see `probe`). ``backing`` says which backing files
    named in an image are opened: ``"same-tree"`` (within the directory of the image),
    ``"any-local"`` or ``"none"``; never a device, a ``json:`` name or one with a protocol.
    `NotFound`, `ImageInUse` or another `ImageError`.
    """
    if fmt == "raw":
        return FileNode(path, read_only=read_only)
    if fmt is None:
        guessed = GuessedRawNode(path, read_only=read_only)
        try:
            looks_raw = magic_of(guessed) != QCOW2_MAGIC
        except BaseException:
            guessed.close()
            raise
        if looks_raw:
            return guessed
        guessed.close()
    elif fmt != "qcow2":
        raise UnsupportedFeature(
            f"{os.fspath(path)}: format {fmt!r} is not supported; use {' or '.join(FORMATS)}"
        )
    from fleece.formats.chain import open_chain

    return open_chain(path, read_only=read_only, backing=backing)

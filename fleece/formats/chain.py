# SPDX-License-Identifier: Apache-2.0
"""A qcow2 image with all of its backing files, within what the caller allows.

An image may name any file as its backing file, and whoever made the image gets to read it. So a
name is followed only if it is a plain path that the policy covers, to a regular file, and with the
format that the image says; a chain that comes back to a file, or is too long, is refused.
"""

import os
import stat
from pathlib import Path
from typing import Final, NamedTuple

from fleece.block.file import FileNode
from fleece.block.node import Node
from fleece.errors import ImageCorrupt, ImageError, NotFound, UnsupportedFeature, UsageError
from fleece.formats.qcow2.constants import MAX_CHAIN_DEPTH
from fleece.formats.qcow2.header import Header
from fleece.formats.qcow2.image import Qcow2Node, read_header

SAME_TREE: Final = "same-tree"
ANY_LOCAL: Final = "any-local"
NONE: Final = "none"
POLICIES: Final = (SAME_TREE, ANY_LOCAL, NONE)


class _Layer(NamedTuple):
    """One file of a chain; ``header`` is None if it is raw."""

    file: FileNode
    header: Header | None


def open_chain(path: str | os.PathLike[str], *, read_only: bool, backing: str) -> Node:
    """The qcow2 image ``path``; see `fleece.formats.open_image` for arguments and errors."""
    if backing not in POLICIES:
        raise UsageError(f"backing policy {backing!r} is unknown; use {', '.join(POLICIES)}")
    layers: list[_Layer] = []
    try:
        _collect(layers, Path(path), read_only, backing)
        return _assemble(layers, read_only)
    except BaseException:
        for layer in layers:
            layer.file.close()
        raise


def _collect(layers: list[_Layer], path: Path, read_only: bool, policy: str) -> None:
    """Open the files of the chain, from the top, into ``layers``."""
    root = Path(os.path.realpath(path)).parent
    seen: set[tuple[int, int]] = set()
    current, fmt = path, "qcow2"
    while True:
        layer = _open_layer(current, fmt, read_only or bool(layers))
        layers.append(layer)
        if len(layers) > 1:
            _check_regular(layer.file, current)
        _check_chain(layer.file, current, seen)
        if layer.header is None or layer.header.backing_file is None:
            return
        directory = Path(os.path.realpath(current)).parent
        fmt = _backing_format(layer.header, current)
        current = _resolve(layer.header.backing_file, current, directory, root, policy)


def _open_layer(path: Path, fmt: str, read_only: bool) -> _Layer:
    file = FileNode(path, read_only=read_only)
    try:
        return _Layer(file, read_header(file, file.name) if fmt == "qcow2" else None)
    except OSError as error:
        file.close()
        raise ImageError(f"{path}: cannot be read: {error.strerror or error}") from error
    except BaseException:
        file.close()
        raise


def _check_chain(file: FileNode, path: Path, seen: set[tuple[int, int]]) -> None:
    status = os.fstat(file.fileno())
    identity = (status.st_dev, status.st_ino)
    if identity in seen:
        raise ImageCorrupt(f"{path}: the chain of backing files comes back to this file")
    if len(seen) >= MAX_CHAIN_DEPTH:
        raise ImageError(f"{path}: more than {MAX_CHAIN_DEPTH} backing files; flatten the chain")
    seen.add(identity)


def _check_regular(file: FileNode, path: Path) -> None:
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        raise ImageError(f"{path}: a backing file named by an image must be a regular file")


def _backing_format(header: Header, path: Path) -> str:
    fmt = header.backing_format
    name = header.backing_file
    if fmt is None:
        raise ImageError(
            f"{path}: it names its backing file {name!r} without a format; "
            "say which it is with: qemu-img rebase -u -F FORMAT -b BACKING"
        )
    if fmt not in ("raw", "qcow2"):
        raise UnsupportedFeature(f"{path}: backing files of format {fmt!r} are not supported")
    return fmt


def _resolve(name: str, image: Path, directory: Path, root: Path, policy: str) -> Path:
    """The path of backing file ``name`` of ``image``; ImageError if it must not be opened."""
    if policy == NONE:
        raise ImageError(f"{image}: it has a backing file, {name!r}, and these are not allowed")
    if ":" in name.split("/", 1)[0]:
        raise ImageError(f"{image}: its backing file {name!r} is not a plain path; not opened")
    path = Path(os.path.realpath(directory / name))
    if policy == SAME_TREE and not path.is_relative_to(root):
        raise ImageError(
            f"{image}: its backing file {name!r} lies outside of {root}; not opened, "
            "allow it with the backing policy any-local"
        )
    # Looked at before it is opened: opening a FIFO or a device may do something.
    if not path.exists():
        raise NotFound(f"{image}: its backing file {name!r} does not exist")
    if not path.is_file():
        raise ImageError(f"{image}: its backing file {name!r} is not a regular file; not opened")
    return path


def _assemble(layers: list[_Layer], read_only: bool) -> Node:
    """Nodes from the bottom up; each takes over the one below it."""
    node: Node | None = None
    for depth in range(len(layers) - 1, -1, -1):
        file, header = layers[depth]
        if header is None:
            node = file
        else:
            node = Qcow2Node(file, backing=node, header=header, read_only=read_only or depth > 0)
    assert node is not None
    return node

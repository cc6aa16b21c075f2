"""The implementations of Node that the contract suite runs on.

To add one: write a context manager ``f(directory, size, read_only)`` here that gives a node of
``size`` zero bytes (import its module inside, so that a broken one fails its own tests only), and
decorate it with ``@node_case("name")``.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.blockdev import loop_device
from tests.support.peers import nbdkit, qemu_nbd

Factory = Callable[[Path, int, bool], AbstractContextManager[Any]]


@dataclass(frozen=True)
class NodeCase:
    """``stores``: gives back what was written. ``unit``: sizes must be multiples of it.
    ``has_read_only``: can be opened with ``read_only=True``."""

    name: str
    open: Factory
    stores: bool = True
    unit: int = 1
    has_read_only: bool = True


CASES: list[NodeCase] = []


def node_case(
    name: str, *, stores: bool = True, unit: int = 1, has_read_only: bool = True
) -> Callable[[Callable[[Path, int, bool], Iterator[Any]]], Factory]:
    def add(function: Callable[[Path, int, bool], Iterator[Any]]) -> Factory:
        factory = contextmanager(function)
        CASES.append(NodeCase(name, factory, stores, unit, has_read_only))
        return factory

    return add


def make_file(directory: Path, size: int) -> Path:
    path = directory / "disk.raw"
    with path.open("wb") as file:
        file.truncate(size)
    return path


@node_case("file")
def _file(directory: Path, size: int, read_only: bool) -> Iterator[Any]:
    from fleece.block.file import FileNode

    with closing(FileNode(make_file(directory, size), read_only=read_only)) as node:
        yield node


@node_case("file-tmpfs")
def _file_tmpfs(directory: Path, size: int, read_only: bool) -> Iterator[Any]:
    from fleece.block.file import FileNode

    if not os.path.ismount("/dev/shm"):
        pytest.skip("/dev/shm is not a tmpfs here")
    with ExitStack() as stack:
        memory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
        path = make_file(memory, size)
        yield stack.enter_context(closing(FileNode(path, read_only=read_only)))


@node_case("block-device", unit=4096)
def _block_device(directory: Path, size: int, read_only: bool) -> Iterator[Any]:
    from fleece.block.file import FileNode

    with (
        loop_device(make_file(directory, size)) as device,
        closing(FileNode(device, read_only=read_only)) as node,
    ):
        yield node


@node_case("memory", has_read_only=False)
def _memory(directory: Path, size: int, read_only: bool) -> Iterator[Any]:
    from fleece.block.memory import MemoryNode

    with closing(MemoryNode(size)) as node:
        yield node


@node_case("null", stores=False, has_read_only=False)
def _null(directory: Path, size: int, read_only: bool) -> Iterator[Any]:
    from fleece.block.null import NullNode

    with closing(NullNode(size)) as node:
        yield node


@node_case("remote-qemu-nbd", unit=512)
def _remote_qemu(directory: Path, size: int, read_only: bool) -> Iterator[Any]:
    from fleece.block.remote import RemoteNode

    with (
        qemu_nbd(make_file(directory, size), directory / "s") as uri,
        closing(RemoteNode(uri, read_only=read_only)) as node,
    ):
        yield node


@node_case("remote-nbdkit")
def _remote_nbdkit(directory: Path, size: int, read_only: bool) -> Iterator[Any]:
    from fleece.block.remote import RemoteNode

    arguments = ["-r"] if read_only else []
    with (
        nbdkit(directory / "s", *arguments, "memory", str(size)) as uri,
        closing(RemoteNode(uri, connections=3)) as node,
    ):
        yield node


@node_case("qcow2", unit=512)
def _qcow2(directory: Path, size: int, read_only: bool) -> Iterator[Any]:
    from fleece.formats import open_image
    from fleece.formats.qcow2.create import CreateOptions, create

    path = directory / "disk.qcow2"
    path.unlink(missing_ok=True)
    create(path, size, CreateOptions(cluster_size=4096))
    with closing(open_image(path, "qcow2", read_only=read_only)) as node:
        yield node

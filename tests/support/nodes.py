"""The implementations of `nbdwire.export.Export` that the contract suite runs on.

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

from nbdwire.uri import NBDURI
from tests.support.blockdev import loop_device
from tests.support.peers import nbdkit, qemu_nbd
from tests.support.serving import noise, serving
from tests.support.snapshots import Rig, read

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


@node_case("window")
def _window(directory: Path, size: int, read_only: bool) -> Iterator[Any]:
    from fleece.block.file import FileNode
    from fleece.block.window import Window

    file = FileNode(make_file(directory, size + 8192), read_only=read_only)
    with closing(Window(file, 4096, size)) as node:
        yield node


@node_case("detect-zeroes")
def _detect_zeroes(directory: Path, size: int, read_only: bool) -> Iterator[Any]:
    from fleece.block.detect_zeroes import DetectZeroes
    from fleece.block.file import FileNode

    file = FileNode(make_file(directory, size), read_only=read_only)
    with closing(DetectZeroes(file, "unmap", owns=True)) as node:
        yield node


def open_qcow2(
    path: Path, size: int, read_only: bool, **options: Any
) -> AbstractContextManager[Any]:
    """A new image that reads as zeroes, whatever its backing file has."""
    from fleece.formats import open_image
    from fleece.formats.qcow2.create import CreateOptions, create

    path.unlink(missing_ok=True)
    create(path, size, CreateOptions(**options))
    if "backing" in options:
        with closing(open_image(path, "qcow2")) as node:
            node.zero(0, size)
    return closing(open_image(path, "qcow2", read_only=read_only))


@node_case("qcow2", unit=512)
def _qcow2(directory: Path, size: int, read_only: bool) -> Iterator[Any]:
    with open_qcow2(directory / "disk.qcow2", size, read_only, cluster_size=4096) as node:
        yield node


@node_case("qcow2-64k", unit=512)
def _qcow2_64k(directory: Path, size: int, read_only: bool) -> Iterator[Any]:
    with open_qcow2(directory / "disk.qcow2", size, read_only) as node:
        yield node


@node_case("qcow2-backed", unit=512)
def _qcow2_backed(directory: Path, size: int, read_only: bool) -> Iterator[Any]:
    backing = directory / "backing.raw"
    backing.write_bytes(noise(size * 2 // 3))  # it ends before the image does
    options = {"backing": backing.name, "backing_format": "raw", "cluster_size": 4096}
    with open_qcow2(directory / "disk.qcow2", size, read_only, **options) as node:
        yield node


@node_case("live-under-snapshots", has_read_only=False)
def _live(directory: Path, size: int, read_only: bool) -> Iterator[Any]:
    """What is written to the disk must not be seen in its snapshots."""
    with live_disk(directory, size) as rig:
        views = [rig.snapshot(), rig.snapshot()]
        yield rig.disk.root
        for view in views:
            for offset in range(0, size, 1 << 20):
                part = min(1 << 20, size - offset)
                assert read(view, offset, part) == bytes(part)


@contextmanager
def live_disk(directory: Path, size: int) -> Iterator[Rig]:
    from fleece.block.file import FileNode

    with closing(FileNode(make_file(directory, size))) as file:
        rig = Rig(directory, file, cluster_size=4096)
        yield rig
        rig.close()


@node_case("snapshot", stores=False)
def _snapshot(directory: Path, size: int, read_only: bool) -> Iterator[Any]:
    """Half of the live disk has changed since."""
    with live_disk(directory, size) as rig:
        view = rig.snapshot()
        for offset in range(1000, size - 3000, 20_000):
            rig.write(noise(3000), offset)
        yield view


@node_case("tracked-disk", has_read_only=False)
def _tracked(directory: Path, size: int, read_only: bool) -> Iterator[Any]:
    """As the appliance serves it: the root of a disk, found through a session of it."""
    from fleece.block.file import FileNode
    from fleece.block.graph import Disk
    from fleece.tracking.epochs import EpochMap
    from fleece.tracking.tracker import Tracker

    with closing(FileNode(make_file(directory, size))) as file:
        disk = Disk("disk", Tracker("tracker", file, EpochMap.in_memory(size)))
        with closing(disk.open_session()) as session, session.gate:
            yield session.node


@contextmanager
def our_server(directory: Path, size: int, read_only: bool) -> Iterator[NBDURI]:
    from fleece.block.file import FileNode

    with (
        closing(FileNode(make_file(directory, size), read_only=read_only)) as file,
        serving(directory, file) as (_, where),
    ):
        yield where.with_export("disk")


@node_case("remote-ours")
def _remote_ours(directory: Path, size: int, read_only: bool) -> Iterator[Any]:
    from fleece.block.remote import RemoteNode

    with (
        our_server(directory, size, read_only) as where,
        closing(RemoteNode(str(where), connections=2)) as node,
    ):
        yield node


@node_case("client")
def _client(directory: Path, size: int, read_only: bool) -> Iterator[Any]:
    from nbdwire.client import connect

    with our_server(directory, size, read_only) as where, connect(where) as client:
        yield client


@node_case("client-structured")
def _client_structured(directory: Path, size: int, read_only: bool) -> Iterator[Any]:
    from nbdwire.client import connect

    with (
        our_server(directory, size, read_only) as where,
        connect(where, extended=False) as client,
    ):
        yield client


@node_case("client-simple")
def _client_simple(directory: Path, size: int, read_only: bool) -> Iterator[Any]:
    from nbdwire.client import connect

    with (
        our_server(directory, size, read_only) as where,
        connect(where, extended=False, structured=False) as client,
    ):
        yield client


@node_case("client-pool")
def _pool(directory: Path, size: int, read_only: bool) -> Iterator[Any]:
    from nbdwire.pool import connect_pool

    with our_server(directory, size, read_only) as where, connect_pool(where, 3) as pool:
        yield pool


@node_case("client-reconnecting")
def _reconnecting(directory: Path, size: int, read_only: bool) -> Iterator[Any]:
    from nbdwire.client import connect
    from nbdwire.reconnect import Policy

    with (
        our_server(directory, size, read_only) as where,
        connect(where, reconnect=Policy()) as client,
    ):
        yield client


@node_case("tool-file")
def _tool_file(directory: Path, size: int, read_only: bool) -> Iterator[Any]:
    from nbdwire.tools.files import FileExport

    path = str(make_file(directory, size))
    with closing(FileExport.open(path, read_only)) as export:
        yield export


@node_case("tool-memory")
def _tool_memory(directory: Path, size: int, read_only: bool) -> Iterator[Any]:
    from nbdwire.tools.files import FileExport

    with closing(FileExport.memory(size, read_only)) as export:
        yield export

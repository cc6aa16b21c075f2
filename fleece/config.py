# SPDX-License-Identifier: Apache-2.0
"""What the daemon is asked to be: from a YAML file, from the command line, or from both.

The file is read with its line numbers by ``fleece.yamlfile``; here is what its keys mean. Every
error is one line that names file, line and key.
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Final

from fleece.block.node import Node as BlockNode
from fleece.control import paths
from fleece.errors import UsageError
from fleece.log import LEVELS
from fleece.units import is_power_of_two, parse_duration, parse_size
from fleece.yamlfile import Node, load_mapping
from nbdwire.constants import DEFAULT_PORT
from nbdwire.uri import NBDURI

FORMATS: Final = ("raw", "qcow2")
POLICIES: Final = ("break-snapshot", "break-guest-write")

MAX_NAME: Final = 200
"""Bytes of a disk's name. File names are made of it, and a snapshot's name is added to it."""

_CLUSTER_RANGE: Final = (4 << 10, 2 << 20)
_GRANULE_RANGE: Final = (4 << 10, 16 << 20)


@dataclass(frozen=True)
class DiskConfig:
    """One disk. ``format`` None: look into the image; ``granularity`` in bytes, None: default."""

    name: str
    image: str
    format: str | None = None
    read_only: bool = False
    description: str = ""
    tracking: bool = True
    granularity: int | None = None


@dataclass(frozen=True)
class Config:
    """All that ``run_daemon`` needs to know. Paths are absolute or relative to the process.

    ``socket`` and ``listen`` (HOST:PORT each) are where NBD clients connect, see `listeners`.
    ``overlay_directory`` None means below ``state``; ``cluster_size`` is in bytes, ``lease`` in
    seconds, None: a snapshot lives until it is dropped.
    """

    disks: tuple[DiskConfig, ...] = ()
    socket: str | None = None
    listen: tuple[str, ...] = ()
    control: str = field(default_factory=paths.control_socket)
    state: str = field(default_factory=lambda: str(paths.state_directory()))
    overlay_directory: str | None = None
    cluster_size: int = 64 << 10
    on_cbw_error: str = "break-snapshot"
    lease: float | None = None
    log_level: str = "info"
    log_json: bool = False

    @property
    def listeners(self) -> tuple[NBDURI, ...]:
        """Where to listen: what was asked for, else ``nbd.sock`` in the runtime directory."""
        socket = self.socket
        if socket is None and not self.listen:
            socket = paths.nbd_socket()
        # Absolute: the URIs that we tell must mean the same in every directory.
        unix = (NBDURI(socket=os.path.abspath(socket)),) if socket else ()
        return unix + tuple(map(parse_listen, self.listen))


@dataclass(frozen=True)
class ExportOptions:
    """All that ``run_export`` needs to know: one image, one address, perhaps a command.

    ``open`` opens the image. ``bitmaps``: names of persistent bitmaps of it to offer, as
    ``qemu:dirty-bitmap:NAME``. ``uri`` says where to listen and, as its export, under which name.
    ``command`` is run with ``$uri``, ``$unixsocket`` and ``$exportname`` in its environment and
    its exit status is that of ``run_export``; without one it serves until SIGINT or SIGTERM.
    ``announce`` is called once with the URI (the port is the real one) as soon as clients can
    connect, and before the command runs.
    """

    open: Callable[[], BlockNode]
    uri: NBDURI
    bitmaps: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    announce: Callable[[NBDURI], None] | None = None


def load(path: str, check_paths: bool = True) -> Config:
    """The configuration in the YAML file at ``path``; ConfigError names file, line and key.

    Relative paths in it are relative to the file. Without ``check_paths`` images and directories
    that it names need not be there.
    """
    root = load_mapping(path)
    root.only("disks", "nbd", "control", "state", "snapshots", "log")
    reader = _Reader(os.path.dirname(path), check_paths)
    values: dict[str, Any] = {}
    reader.top(root, values)
    return replace(Config(), **values)


def override(
    config: Config,
    *,
    disks: Iterable[DiskConfig] = (),
    socket: str | None = None,
    listen: Iterable[str] = (),
    control: str | None = None,
    state: str | None = None,
    log_level: str | None = None,
    log_json: bool | None = None,
) -> Config:
    """``config`` with what the command line says instead: None and empty change nothing.

    A disk replaces the one of the same name in the file, or is added; UsageError if two of
    ``disks`` have one name. A socket or an address on the command line replaces all addresses of
    the file.
    """
    merged = {disk.name: disk for disk in config.disks}
    named: set[str] = set()
    for disk in disks:
        if disk.name in named:
            raise UsageError(f"--disk names {disk.name!r} twice; give each disk a name of its own")
        named.add(disk.name)
        merged[disk.name] = disk
    listen = tuple(listen)
    if socket is not None or listen:
        config = replace(config, socket=socket, listen=listen)
    return replace(
        config,
        disks=tuple(merged.values()),
        control=control or config.control,
        state=state or config.state,
        log_level=log_level or config.log_level,
        log_json=config.log_json if log_json is None else log_json,
    )


def check_disk_name(name: str) -> str:
    """``name`` if a disk may be called so; ValueError says why not.

    It becomes part of file names and export names: no ``/``, no ``@`` (which begins the snapshot's
    name), no control characters, at most 200 bytes.
    """
    if not name:
        raise ValueError("a disk's name cannot be empty")
    if bad := next((c for c in name if c in "/@" or not c.isprintable()), None):
        raise ValueError(f"a disk's name cannot hold {bad!r}")
    if len(name.encode()) > MAX_NAME:
        raise ValueError(f"a disk's name has at most {MAX_NAME} bytes")
    return name


def parse_listen(text: str) -> NBDURI:
    """The address ``HOST:PORT``, ``[IPV6]:PORT``, ``HOST`` or ``:PORT``; ValueError if it is none.

    Without a host it is localhost, never every interface: who wants that writes ``0.0.0.0``.
    """
    host, colon, port = text.strip().rpartition(":")
    if not colon or port.endswith("]"):
        host, port = text.strip(), str(DEFAULT_PORT)
    bare = host.removeprefix("[").removesuffix("]")
    bracketed = host.startswith("[") and host.endswith("]")
    if (":" in bare) is not bracketed or not (port.isascii() and port.isdigit()):
        raise ValueError(f"{text!r} is no address; write it like localhost:10809 or [::1]:10809")
    if int(port) > 65535:
        raise ValueError(f"{text!r} is no address: a port is at most 65535")
    return NBDURI(host=bare or "localhost", port=int(port))


def parse_disk(text: str) -> DiskConfig:
    """The disk in ``NAME=IMAGE[,OPTION...]``.

    OPTION is ``format=F``, ``read-only``, ``tracking=off``, ``granularity=64k`` or
    ``description=TEXT``. A comma in the image or description is written twice. UsageError says
    what is wrong.
    """
    name, equals, rest = text.partition("=")
    if not equals:
        raise UsageError(f"--disk {text}: write it as NAME=IMAGE")
    parts = rest.replace(",,", "\0").split(",")  # no argument of a program can hold a NUL
    image, *options = (part.replace("\0", ",") for part in parts)
    try:
        disk = DiskConfig(check_disk_name(name), image)
        for option in options:
            disk = replace(disk, **_disk_option(option))
    except ValueError as error:
        raise UsageError(f"--disk {text}: {error}") from None
    if not image:
        raise UsageError(f"--disk {text}: the image is missing")
    return disk


def _disk_option(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if key in ("read-only", "tracking") and value in ("", "on", "off"):
        return {key.replace("-", "_"): value != "off"}
    if not equals or key not in _DISK_OPTIONS:
        raise ValueError(f"there is no option {text!r}; a comma in a path is written twice")
    return {key: _DISK_OPTIONS[key](value)}


def _size_between(bounds: tuple[int, int]) -> Callable[[str], int]:
    def parse(text: str) -> int:
        size = parse_size(text)
        if not (is_power_of_two(size) and bounds[0] <= size <= bounds[1]):
            low, high = bounds[0] >> 10, bounds[1] >> 20
            raise ValueError(f"{text} is not a power of two between {low}k and {high}M")
        return size

    return parse


def _known_format(text: str) -> str:
    if text not in FORMATS:
        raise ValueError(f"{text!r} is not a format; use {' or '.join(FORMATS)}")
    return text


def _lease(text: str) -> float:
    seconds = parse_duration(text)
    if seconds <= 0:
        raise ValueError(f"{text} is not a lease: it must be longer than nothing")
    return seconds


def _listen(text: str) -> str:
    parse_listen(text)
    return text


_cluster_size: Final = _size_between(_CLUSTER_RANGE)
_granularity: Final = _size_between(_GRANULE_RANGE)
_DISK_OPTIONS: Final[dict[str, Callable[[str], object]]] = {
    "format": _known_format,
    "description": str,
    "granularity": _granularity,
}


@dataclass(frozen=True)
class _Reader:
    """Turns the nodes of the file into values; knows where relative paths begin."""

    directory: str
    check_paths: bool

    def top(self, root: Node, values: dict[str, Any]) -> None:
        if node := root.get("disks"):
            values["disks"] = tuple(self._disk(key, disk) for key, disk in node.items())
        if node := root.get("nbd"):
            self._nbd(node, values)
        for key in ("control", "state"):
            if node := root.get(key):
                values[key] = self._path(node)
        if node := root.get("snapshots"):
            self._snapshots(node, values)
        if node := root.get("log"):
            self._log(node, values)

    def _disk(self, name: str, node: Node) -> DiskConfig:
        node.convert_key(check_disk_name)
        node.only("image", "format", "read-only", "description", "tracking", "granularity")
        image = node.require("image")
        values: dict[str, Any] = {}
        _set(values, "format", node.get("format"), lambda n: n.convert(_known_format))
        _set(values, "read_only", node.get("read-only"), Node.boolean)
        _set(values, "description", node.get("description"), Node.text)
        _set(values, "tracking", node.get("tracking"), Node.boolean)
        _set(values, "granularity", node.get("granularity"), lambda n: n.convert_raw(_granularity))
        disk = DiskConfig(name, self._existing(image, os.path.exists, "does not exist"))
        return replace(disk, **values)

    def _nbd(self, node: Node, values: dict[str, Any]) -> None:
        node.only("socket", "listen")
        _set(values, "socket", node.get("socket"), self._path)
        if listen := node.get("listen"):
            addresses = listen.list_or_one()
            values["listen"] = tuple(address.convert(_listen) for address in addresses)

    def _snapshots(self, node: Node, values: dict[str, Any]) -> None:
        node.only("overlay-directory", "cluster-size", "on-cbw-error", "lease")
        if directory := node.get("overlay-directory"):
            problem = "is not a directory"
            values["overlay_directory"] = self._existing(directory, os.path.isdir, problem)
        _set(
            values, "cluster_size", node.get("cluster-size"), lambda n: n.convert_raw(_cluster_size)
        )
        _set(values, "on_cbw_error", node.get("on-cbw-error"), lambda n: n.choice(POLICIES))
        _set(values, "lease", node.get("lease"), lambda n: n.convert_raw(_lease))

    def _log(self, node: Node, values: dict[str, Any]) -> None:
        node.only("level", "json")
        _set(values, "log_level", node.get("level"), lambda n: n.choice(LEVELS))
        _set(values, "log_json", node.get("json"), Node.boolean)

    def _path(self, node: Node) -> str:
        text = os.path.expanduser(node.text())
        if not text or "\0" in text:
            raise node.error("expected a path")
        return os.path.join(self.directory, text)

    def _existing(self, node: Node, test: Callable[[str], bool], problem: str) -> str:
        path = self._path(node)
        if self.check_paths and not test(path):
            raise node.error(f"{path} {problem}")
        return path


def _set(
    values: dict[str, Any], name: str, node: Node | None, read: Callable[[Node], object]
) -> None:
    if node is not None:
        values[name] = read(node)

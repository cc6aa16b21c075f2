# SPDX-License-Identifier: Apache-2.0
"""`open_node`: the one way from what a user names to a node with everything below it.

A chain is opened from the top, layer by layer, and put together from the bottom. What a user names
is trusted; what an image names goes through the policy of `fleece.formats.chain`.
"""

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from fleece.block.detect_zeroes import DetectZeroes
from fleece.block.discard import IgnoreDiscard
from fleece.block.file import FileNode
from fleece.block.node import Node
from fleece.block.noflush import NoFlush
from fleece.block.null import NullNode
from fleece.block.options import Options
from fleece.block.window import Window
from fleece.errors import ImageCorrupt, ImageError, ImageInUse, UnsupportedFeature, UsageError
from fleece.formats import drivers
from fleece.formats.chain import SAME_TREE_POLICY, Policy, combined
from fleece.formats.filenames import filename, nbd_uri, normal, protocol_options
from fleece.formats.qcow2 import header as headers
from fleece.formats.qcow2.constants import MAX_CHAIN_DEPTH
from fleece.formats.qcow2.header import Header
from fleece.formats.raw import GuardedRaw, GuessedRawNode, format_of
from fleece.units import GiB

_NULL_SIZE: Final = 1 * GiB


@dataclass(frozen=True)
class Asked:
    """How to open: what all layers have in common.

    ``keys``: secrets by their id. ``share``: take no locks, for reading only. ``data_files``: open
    them with the images that have them. ``writable_backing``: backing files too are opened for
    writing (``commit``). ``on_corrupt``: see `Qcow2Options`.
    """

    policy: Policy = SAME_TREE_POLICY
    keys: Mapping[str, bytes] = field(default_factory=dict)
    share: bool = False
    data_files: bool = True
    writable_backing: bool = False
    on_corrupt: Callable[[str], None] | None = None


@dataclass
class Layer:
    """One image of a chain. ``node`` holds its bytes (or is the disk itself, for raw).

    ``shown`` is its filename as QEMU shows it. ``header`` is that of a qcow2 image. ``path`` is
    None for what is no file of this host; names in the image are relative to its directory.
    ``root`` is where the policy starts from. ``data`` is the external data file.
    """

    driver: str
    node: Node
    options: Options
    read_only: bool
    shown: str = ""
    header: Header | None = None
    path: Path | None = None
    root: Path | None = None
    data: Node | None = None

    @property
    def name(self) -> str:
        """What messages call the image."""
        return self.node.name


@dataclass(frozen=True)
class Step:
    """What to open next. ``named``: what an image calls it ("backing file"), "" for a user's.

    ``root``: where the policy starts from; None: from the directory of what is opened. ``shown``:
    the filename as QEMU shows it, if it does not follow from the options.
    """

    options: Options
    read_only: bool
    root: Path | None = None
    named: str = ""
    shown: str = ""


def open_node(
    source: str | Mapping[str, Any],
    fmt: str | None = None,
    *,
    read_only: bool = False,
    allow_backing: Policy = SAME_TREE_POLICY,
    keys: Mapping[str, bytes] | None = None,
    force_share: bool = False,
    writable_backing: bool = False,
    snapshot: str | None = None,
) -> Node:
    """``source``, a filename or options, with all layers below it; close the node in the end.

    ``fmt`` is the format if ``source`` does not say it; without one it is guessed (raw or qcow2),
    and a raw disk that was guessed cannot be written so that it looks like another format.
    ``snapshot``: an internal snapshot, by id or name, instead of the disk as it is now.
    A `FleeceError` if anything is wrong; nothing is left open then.
    """
    asked = Asked(allow_backing, keys or {}, force_share, True, writable_backing)
    with Opener(asked) as opener:
        node = opener.open(normal(source, fmt), read_only)
        if not read_only and node.read_only and "auto-read-only" not in normal(source):
            raise ImageError(f"{node.name}: it is read-only; open it read-only")
        if snapshot is not None:
            node = opener.at_snapshot(node, snapshot)
        opener.keep()
        return node


def open_path(
    path: str | os.PathLike[str],
    fmt: str | None,
    *,
    read_only: bool,
    policy: Policy,
    on_corrupt: Callable[[str], None] | None = None,
) -> Node:
    """As `open_node`, of a path that is never taken for a protocol."""
    options: Options = {"file": {"driver": "file", "filename": os.fspath(path)}}
    if fmt is not None:
        options["driver"] = fmt
    with Opener(Asked(policy, on_corrupt=on_corrupt)) as opener:
        node = opener.open(options, read_only)
        opener.keep()
        return node


class Opener:
    """Opens layers, and closes all of them at its end unless `keep` was called."""

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self._seen: set[tuple[int, int]] = set()
        self._opened: list[Node] = []

    def __enter__(self) -> "Opener":
        return self

    def __exit__(self, *_: object) -> None:
        while self._opened:
            with suppress(OSError):
                self._opened.pop().close()

    def keep(self) -> None:
        """All is well: what was opened stays open."""
        self._opened.clear()

    def open(self, options: Options, read_only: bool) -> Node:
        """The node with all below it."""
        layers = self._layers(Step(options, read_only))
        node: Node | None = None
        while layers:
            node = self._assemble(layers.pop(), node)
        assert node is not None
        return node

    def chain(self, source: str | Mapping[str, Any], fmt: str | None = None) -> list[Layer]:
        """The layers, from the top, each as it is in its file: for who looks and reads no data."""
        return self._layers(self.first(source, fmt, True))

    @staticmethod
    def first(source: str | Mapping[str, Any], fmt: str | None, read_only: bool) -> Step:
        """The step for the top of a chain."""
        options = normal(source, fmt)
        shown = source if isinstance(source, str) and not source.startswith("json:") else ""
        remote = isinstance(options.get("file"), dict) and options["file"].get("driver") == "nbd"
        return Step(options, read_only, shown="" if remote else shown)

    def _layers(self, first: Step) -> list[Layer]:
        layers: list[Layer] = []
        step: Step | None = first
        while step is not None:
            if len(layers) >= MAX_CHAIN_DEPTH:
                raise ImageError(
                    f"{layers[0].name}: more than {MAX_CHAIN_DEPTH} backing files; "
                    "flatten the chain"
                )
            layers.append(self.layer(step))
            step = self.below(layers[-1])
        return layers

    def layer(self, step: Step) -> Layer:
        """One image, without what it names but its data file."""
        options, driver = step.options, step.options.get("driver")
        if driver in drivers.PROTOCOLS:
            options = drivers.checked(driver, options)
            node = self._protocol(driver, options, self._mode(options, step), step)
            shown = step.shown or filename(driver, options)
            return Layer(driver, node, options, node.read_only, shown)
        if driver is not None and driver not in drivers.FORMATS:
            raise UnsupportedFeature(
                f"format {driver!r} is not supported; use {' or '.join(drivers.FORMATS)}"
            )
        return self._format_layer(driver, options, step)

    def _format_layer(self, driver: str | None, options: Options, step: Step) -> Layer:
        child = options.get("file")
        if not isinstance(child, dict):
            raise UsageError(f"driver {driver or 'option'}: file is missing (file.filename=PATH)")
        read_only = self._mode(options, step)
        node, path = self._file(child, read_only, step, guess=driver is None)
        if driver is None:
            driver = format_of(node)
            if driver == "raw" and not isinstance(node, FileNode):
                node = self._owned(GuardedRaw(node))
        options = drivers.checked(driver, {**options, "driver": driver})
        shown = step.shown or filename(driver, options)
        layer = Layer(driver, node, options, read_only or node.read_only, shown, path=path)
        layer.root = step.root or (None if path is None else _directory(path))
        if driver == "qcow2":
            layer.header = self._header(layer)
            layer.data = self._data_file(layer)
        return layer

    def _mode(self, options: Options, step: Step) -> bool:
        """Whether it is opened read-only."""
        value = drivers.COMMON["read-only"](options.get("read-only", False), "read-only")
        return step.read_only or bool(value)

    def _file(
        self, options: Options, read_only: bool, step: Step, *, guess: bool
    ) -> tuple[Node, Path | None]:
        """The node below a format, and its path if it is a file."""
        if "driver" not in options and "filename" in options:
            options = {**options, **protocol_options(str(options["filename"]))}
            if options["driver"] == "nbd":
                del options["filename"]
        driver = options.get("driver")
        inner = Step(options, read_only, step.root, step.named)
        if driver not in drivers.PROTOCOLS:  # one format in another
            return self.open(options, read_only), None
        options = drivers.checked(driver, options)
        node = self._protocol(driver, options, self._mode(options, inner), inner, guess=guess)
        is_file = driver in ("file", "host_device")
        return node, Path(options["filename"]) if is_file else None

    def _owned(self, node: Node) -> Node:
        self._opened.append(node)
        return node

    def _protocol(
        self, driver: str, options: Options, read_only: bool, step: Step, *, guess: bool = False
    ) -> Node:
        name = options.get("node-name")
        if driver == "null-co":
            node: Node = NullNode(options.get("size", _NULL_SIZE), name or "null")
        elif driver == "nbd":
            from fleece.block.remote import RemoteNode

            node = RemoteNode(nbd_uri(options), read_only=read_only, name=name)
        else:
            node = self._open_file(options, read_only, step, guess)
        return self._filtered(self._owned(node), options)

    def _open_file(self, options: Options, read_only: bool, step: Step, guess: bool) -> FileNode:
        if "filename" not in options:
            raise UsageError(f"driver {options['driver']}: filename is missing")
        path = options["filename"]
        share = self._asked.share or options.get("force-share", False)
        if share and not read_only:
            raise UsageError(f"{path}: only what is opened read-only can be shared without locks")
        kind: type[FileNode] = GuessedRawNode if guess and _looks_raw(path) else FileNode
        locking = not share and options.get("locking", "auto") != "off"
        name = options.get("node-name")
        try:
            node = kind(path, read_only=read_only, name=name, locking=locking)
        except ImageInUse:
            raise
        except ImageError:
            if read_only or not options.get("auto-read-only"):
                raise
            node = kind(path, read_only=True, name=name, locking=locking)
        try:
            self._remember(node, path, step, kind)
        except BaseException:
            node.close()
            raise
        return node

    def _remember(self, node: FileNode, path: str, step: Step, kind: type[FileNode]) -> None:
        status = os.fstat(node.fileno())
        identity = (status.st_dev, status.st_ino)
        if step.named:
            self._asked.policy.check_opened(node.fileno(), step.named, Path(path), step.root)
            if identity in self._seen:
                raise ImageCorrupt(f"{path}: the chain of backing files comes back to this file")
        self._seen.add(identity)
        if kind is GuessedRawNode and format_of(node) != "raw":
            raise ImageError(f"{path}: it changed while it was opened; try again")

    def _filtered(self, node: Node, options: Options) -> Node:
        """The filters that the common options ask for."""
        if options.get("discard") in ("ignore", "off") and options.get("driver") != "qcow2":
            node = self._owned(IgnoreDiscard(node, owns=True))
        if options.get("cache", {}).get("no-flush") and options.get("driver") in drivers.PROTOCOLS:
            node = self._owned(NoFlush(node))
        mode = options.get("detect-zeroes", "off")
        if mode != "off":
            node = self._owned(DetectZeroes(node, mode, owns=True))
        return node

    def _header(self, layer: Layer) -> Header:
        try:
            return read_header(layer.node, layer.name)
        except OSError as error:
            raise ImageError(f"{layer.name}: cannot be read: {error.strerror or error}") from error

    def _data_file(self, layer: Layer) -> Node | None:
        """The external data file: the one that the options name, or the image."""
        assert layer.header is not None
        given = layer.options.get("data-file")
        if not self._asked.data_files:
            return None
        if given is not None:
            return self._file(given, layer.read_only, Step({}, layer.read_only), guess=False)[0]
        if not layer.header.has_data_file:
            return None
        name = layer.header.data_file
        if name is None:
            raise ImageError(f"{layer.name}: it does not name its data file; give data-file=")
        path = self._asked.policy.resolve(name, "data file", layer.path, layer.root)
        step = Step({}, layer.read_only, layer.root, "data file")
        options = {"driver": "file", "filename": str(path)}
        return self._file(options, layer.read_only, step, guess=False)[0]

    def below(self, layer: Layer) -> Step | None:
        """How to open the backing file of ``layer``; None if it has none."""
        if layer.header is None:
            return None
        read_only = layer.read_only or not self._asked.writable_backing
        given = layer.options.get("backing", {})
        if given is None or (given and ("file" in given or "filename" in given)):
            return None if given is None else Step(normal(given), read_only)
        if given.get("driver") in drivers.PROTOCOLS:
            return Step(given, read_only)
        if layer.header.backing_file is None:
            return None
        name = layer.header.backing_file
        path = self._asked.policy.resolve(name, "backing file", layer.path, layer.root)
        driver = given.get("driver") or backing_format(layer.header, layer.name)
        file = {"driver": "file", "filename": str(path)}
        options = {**given, "driver": driver, "file": file}
        shown = combined(layer.shown, name)
        return Step(options, read_only, layer.root, "backing file", shown)

    def _assemble(self, layer: Layer, backing: Node | None) -> Node:
        if layer.driver == "raw":
            return self._raw(layer)
        if layer.driver == "qcow2":
            return self._filtered(self._owned(self._qcow2(layer, backing)), layer.options)
        if layer.driver == "luks":
            return self._filtered(self._owned(self._luks(layer)), layer.options)
        return layer.node

    def _raw(self, layer: Layer) -> Node:
        node, options = layer.node, layer.options
        if "offset" in options or "size" in options:
            node = self._owned(Window(node, options.get("offset", 0), options.get("size")))
        return self._filtered(node, options)

    def _qcow2(self, layer: Layer, backing: Node | None) -> Node:
        from fleece.formats.qcow2.image import Qcow2Node
        from fleece.formats.runtime import qcow2_options

        return Qcow2Node(
            layer.node,
            backing=backing,
            data_file=self._decrypted(layer),
            read_only=layer.read_only,
            name=layer.options.get("node-name", layer.name),
            header=layer.header,
            options=replace(qcow2_options(layer.options), on_corrupt=self._asked.on_corrupt),
        )

    def _decrypted(self, layer: Layer) -> Node | None:
        """Where the plain data lies; None if that is the image itself."""
        assert layer.header is not None
        secret = layer.options.get("encrypt", {}).get("key-secret")
        if not layer.header.crypt_method or secret is None:
            return layer.data
        from fleece.formats.qcow2 import luks
        from fleece.formats.qcow2.crypt import EncryptedNode

        key = luks.open_key(layer.node, layer.header, self._key(secret), layer.name)
        if layer.data is not None:
            return self._owned(luks.LuksNode(layer.data, key))  # it closes the data file
        return self._owned(EncryptedNode(layer.node, key))

    def _luks(self, layer: Layer) -> Node:
        from fleece.formats.qcow2 import luks

        if "header" in layer.options:
            raise UnsupportedFeature(f"{layer.name}: a detached LUKS header is not supported")
        if "key-secret" not in layer.options:
            raise UsageError(
                f"{layer.name}: it is encrypted; give its passphrase: --object "
                "secret,id=sec0,file=FILE and key-secret=sec0"
            )
        return luks.open_luks(layer.node, self._key(layer.options["key-secret"]))

    def _key(self, name: str) -> bytes:
        try:
            return self._asked.keys[name]
        except KeyError:
            raise UsageError(
                f"there is no secret {name!r}; give it with --object secret,id={name},file=FILE"
            ) from None

    def at_snapshot(self, node: Node, which: str) -> Node:
        """An internal snapshot of ``node`` as a node, which takes over ``node``."""
        from fleece.formats.qcow2.image import Qcow2Node
        from fleece.formats.qcow2.snapshots import open_snapshot

        if not isinstance(node, Qcow2Node):
            raise UnsupportedFeature(f"{node.name}: only qcow2 images have internal snapshots")
        return open_snapshot(node, which)


def _directory(path: Path) -> Path:
    return Path(os.path.realpath(path)).parent


def _looks_raw(path: str) -> bool:
    file = FileNode(path, read_only=True, locking=False)
    try:
        return format_of(file) == "raw"
    finally:
        file.close()


def backing_format(header: Header, name: str) -> str:
    """The format of the backing file, which is never guessed. `ImageError` without one."""
    fmt = header.backing_format
    if fmt is None:
        raise ImageError(
            f"{name}: it names its backing file {header.backing_file!r} without a format; "
            "say which it is with: fleece image rebase -u -F FORMAT -b BACKING"
        )
    if fmt not in ("raw", "qcow2"):
        raise UnsupportedFeature(f"{name}: backing files of format {fmt!r} are not supported")
    return fmt


def read_header(file: Node, name: str) -> Header:
    """The validated header of ``file``; `NotAnImage`, `UnsupportedFeature` or `ImageCorrupt`."""
    start = _start(file, 512)
    return headers.parse(_start(file, headers.cluster_size_of(start)), file.size, name)


def _start(file: Node, length: int) -> bytes:
    data = bytearray(min(length, file.size))
    if data:
        file.pread_into(memoryview(data), 0)
    return bytes(data)

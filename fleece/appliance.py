# SPDX-License-Identifier: Apache-2.0
"""The composition root: from a configuration to running disks, exports, snapshots and control.

The start goes from what fails cheapest to what clients can see: state directory, control socket,
disks, snapshots of an earlier run, exports, and the addresses last. The end is the reverse.
"""

import contextlib
import errno
import fcntl
import logging
import os
import select
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fleece import __version__
from fleece import log as logs
from fleece.block.graph import Disk
from fleece.block.node import Filter, Node
from fleece.config import Config, DiskConfig, ExportOptions
from fleece.control import paths
from fleece.control.events import BLOCK_IMAGE_CORRUPTED, Events
from fleece.control.server import ControlServer
from fleece.errors import (
    AddressError,
    Busy,
    ClientError,
    ConfigError,
    NotFound,
    TrackingError,
    UsageError,
)
from fleece.formats import open_image, probe
from fleece.snapshots.live import ServedDisk, timestamp
from fleece.snapshots.manager import SnapshotManager
from fleece.snapshots.plan import Defaults
from fleece.tracking.epochs import GRANULARITY
from fleece.tracking.identity import Identity
from fleece.tracking.store import DiskTracking
from nbdwire.export import ExtentsFunction
from nbdwire.server import Server
from nbdwire.uri import NBDURI

log = logging.getLogger(__name__)


class StopSignal:
    """SIGTERM, SIGINT or `set` end the wait. A pipe: a signal handler must take no lock.

    The kernel may give the signal to any thread, and Python calls handlers in the main thread only
    when that comes back from its system call. So the wait must not rely on a handler: it is woken
    by what Python's C code writes to the pipe at once, in whatever thread (`set_wakeup_fd`).
    """

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._before = {
            number: signal.signal(number, self._caught)
            for number in (signal.SIGTERM, signal.SIGINT)
        }

    def _caught(self, _number: int, _frame: object) -> None:
        """Nothing: the number of the signal is in the pipe already."""

    def set(self) -> None:
        """End the wait. From any thread, or a signal handler."""
        with contextlib.suppress(OSError):  # full: it is set already; closed: it is over
            os.write(self._writer, b"\0")

    def wait(self) -> None:
        """Return when it is set."""
        os.read(self._reader, 1)

    def fileno(self) -> int:
        """Readable once it is set."""
        return self._reader

    def close(self) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._reader)
        os.close(self._writer)


class Appliance:
    """A running daemon; `fleece.control.service.Service` of its control socket."""

    def __init__(self, config: Config, quit: Callable[[], None]) -> None:
        self._config = config
        self._quit = quit
        self._started = timestamp(time.time())
        self._stack = ExitStack()
        self.events = Events()
        self.disks: dict[str, ServedDisk] = {}
        self._manager: SnapshotManager | None = None
        self.server = Server(default=config.disks[0].name if len(config.disks) == 1 else None)

    # Start and stop

    def start(self) -> None:
        """Everything, or a FleeceError and nothing is left behind."""
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def _start(self) -> None:
        config, state = self._config, Path(self._config.state)
        self._stack.enter_context(_state_lock(state))
        _make_runtime_directory(config)
        control = ControlServer(config.control, self, self.events)
        self._stack.callback(control.stop)
        self._stack.callback(self._last_beat)
        for disk in config.disks:
            self._open_disk(disk, state / "tracking")
        self._manager = self._make_snapshots(config, state)
        self._stack.callback(self.snapshots.stop)
        self._stack.callback(self._hang_up)
        self.snapshots.start()
        for disk in config.disks:
            served = self.disks[disk.name].disk
            self.server.add(disk.name, served, description=disk.description)
        for uri in config.listeners:
            listen(self.server, uri)
        control.start()

    def _open_disk(self, config: DiskConfig, directory: Path) -> None:
        image = Path(os.path.abspath(config.image))
        identity = _identity(image)
        for other in self.disks.values():
            if os.path.exists(image) and os.path.samefile(other.image, image):
                raise ConfigError(
                    f"disks {other.name!r} and {config.name!r} are the same image {image}; "
                    "an image can be served as one disk only"
                )
        tracking = self._open_tracking(config, image, directory) if config.tracking else None
        try:
            node = open_image(
                str(image),
                config.format,
                read_only=config.read_only,
                on_corrupt=partial(self._tell_corruption, config.name, str(image)),
            )
        except BaseException:
            if tracking is not None:
                tracking.close(clean=False)
            raise
        disk = Disk(config.name, node if tracking is None else tracking.tracker(node))
        fmt = config.format or probe(str(image))
        served = ServedDisk(disk, image, fmt, identity, tracking)
        self.disks[config.name] = served
        self._stack.callback(_close_disk, served)

    def _tell_corruption(self, disk: str, image: str, why: str) -> None:
        data = {"device": disk, "node-name": image, "msg": why, "fatal": True}
        self.events.emit(BLOCK_IMAGE_CORRUPTED, data)

    @staticmethod
    def _open_tracking(config: DiskConfig, image: Path, directory: Path) -> DiskTracking:
        """Before the image is opened for writing: that may change its time of change already."""
        look = open_image(str(image), config.format, read_only=True)
        size = look.size
        look.close()
        granularity = config.granularity or GRANULARITY
        tracking = DiskTracking.open(directory, config.name, size, image, granularity=granularity)
        if tracking.reason_new is not None:
            log.info("disk %r: tracking begins anew: %s", config.name, tracking.reason_new)
        return tracking

    def _make_snapshots(self, config: Config, state: Path) -> SnapshotManager:
        records = state / "snapshots"
        overlays = Path(config.overlay_directory or records)
        for directory in (records, overlays):
            _make_directory(directory)
        defaults = Defaults(
            overlay_directory=overlays.absolute(),
            cluster_size=config.cluster_size,
            policy=config.on_cbw_error,
            lease=config.lease,
        )
        return SnapshotManager(self.disks, self.server, records, defaults, self.events.emit)

    def _last_beat(self) -> None:
        """The images are closed: whatever changes them from now on is not us."""
        if self._manager is not None:
            self._manager.beat()

    def _hang_up(self) -> None:
        """End the NBD server. If a request hangs for ever, leave everything as a kill would."""
        try:
            self.server.stop()
        except TimeoutError as problem:
            log.error("%s; ending without closing the disks in order", problem)
            self._stack.pop_all()

    def stop(self) -> None:
        """The reverse of `start`, as far as it came. Idempotent."""
        self._stack.close()

    @property
    def snapshots(self) -> SnapshotManager:
        """Of a started appliance."""
        assert self._manager is not None
        return self._manager

    # What the commands ask

    def status(self) -> dict[str, Any]:
        """The daemon as a whole."""
        return {
            "version": __version__,
            "pid": os.getpid(),
            "started": self._started,
            "listeners": [str(uri) for uri in self.server.listeners],
            "control": self._config.control,
            "state": self._config.state,
            "disks": [self._disk_status(served) for served in self.disks.values()],
            "snapshots": self.snapshots.list(),
            "clients": self.server.clients(),
        }

    def _disk_status(self, served: ServedDisk) -> dict[str, Any]:
        tracking = served.tracking
        return {
            "name": served.name,
            "image": str(served.image),
            "format": served.format,
            "size": served.disk.size,
            "read-only": served.disk.read_only,
            "export": served.name,
            "uris": [str(uri.with_export(served.name)) for uri in self.server.listeners],
            "clients": self.server.clients(served.name),
            "tracking": tracking
            and {
                "generation": tracking.generation,
                "epoch": tracking.epoch,
                "granularity": tracking.granularity,
            },
        }

    def snapshot_create(
        self,
        disks: list[str],
        *,
        name: str | None = None,
        consumer: str | None = None,
        lease: float | None = None,
        cluster_size: int | None = None,
        on_cbw_error: str | None = None,
    ) -> dict[str, Any]:
        """One instant of all ``disks``."""
        return self.snapshots.create(
            disks,
            name=name,
            consumer=consumer,
            lease=lease,
            cluster_size=cluster_size,
            policy=on_cbw_error,
        )

    def snapshot_list(self) -> list[dict[str, Any]]:
        """Oldest first."""
        return self.snapshots.list()

    def snapshot_ack(self, name: str, consumer: str | None) -> dict[str, Any]:
        """The consumer has all of it."""
        return self.snapshots.acknowledge(name, consumer)

    def snapshot_extend(self, name: str, lease: float) -> dict[str, Any]:
        """Let it live ``lease`` seconds from now."""
        return self.snapshots.extend(name, lease)

    def snapshot_drop(self, name: str) -> dict[str, Any]:
        """End it."""
        return self.snapshots.drop(name)

    def cursor_list(self) -> list[dict[str, Any]]:
        """Every consumer of every disk."""
        return [
            {
                "disk": served.name,
                "consumer": cursor.consumer,
                "generation": cursor.generation,
                "epoch": cursor.epoch,
            }
            for served in self.disks.values()
            if served.tracking is not None
            for cursor in served.tracking.cursors()
        ]

    def cursor_remove(self, consumer: str, disk: str | None) -> list[dict[str, Any]]:
        """Forget a consumer of one disk, or of all."""
        if disk is not None and disk not in self.disks:
            raise NotFound(f"there is no disk named {disk!r} (disks: {', '.join(self.disks)})")
        gone = [
            cursor
            for cursor in self.cursor_list()
            if cursor["consumer"] == consumer and disk in (None, cursor["disk"])
        ]
        if not gone:
            where = f"disk {disk!r}" if disk is not None else "any disk"
            raise NotFound(f"consumer {consumer!r} has no cursor on {where}")
        for cursor in gone:
            tracking = self.disks[cursor["disk"]].tracking
            assert tracking is not None
            tracking.remove_cursor(consumer)
        return gone

    def quit(self) -> None:
        """Ask for the end."""
        self._quit()


def run_daemon(config: Config, *, ready: Callable[[], None] | None = None) -> int:
    """Run until SIGTERM, SIGINT or the command ``quit``; the exit status."""
    logs.setup(config.log_level, config.log_json)
    stop = StopSignal()
    try:
        appliance = Appliance(config, stop.set)
        appliance.start()
        log.info("ready version=%s disks=%d", __version__, len(config.disks))
        try:
            if ready is not None:
                ready()
            stop.wait()
            log.info("stopping")
        finally:
            appliance.stop()
        return 0
    finally:
        stop.close()


def run_export(options: ExportOptions) -> int:
    """Export one image, until told to stop or while a command runs; the exit status."""
    logs.setup("warning")
    stop = StopSignal()
    try:
        node = options.open()
        with ExitStack() as stack:
            stack.callback(node.close)
            contexts = bitmap_contexts(node, options.bitmaps)
            server = Server(default=options.uri.export)
            stack.callback(server.stop)
            server.add(options.uri.export, node, contexts=contexts)
            uri = listen(server, options.uri)
            if options.announce is not None:
                options.announce(uri)
            if options.command:
                return _run_command(options.command, uri, stop)
            stop.wait()
        return 0
    finally:
        stop.close()


def bitmap_contexts(node: Node, names: tuple[str, ...]) -> dict[str, ExtentsFunction]:
    """The contexts that tell what persistent bitmaps of an image hold. `FleeceError` if none do."""
    if not names:
        return {}
    from fleece.formats.qcow2 import bitmaps
    from fleece.formats.qcow2.image import Qcow2Node

    while isinstance(node, Filter):
        node = node.next
    if not isinstance(node, Qcow2Node):
        raise UsageError(f"{node.name}: only qcow2 images have persistent bitmaps")
    return {f"qemu:dirty-bitmap:{name}": bitmaps.find(node, name).extents for name in names}


def _run_command(command: tuple[str, ...], uri: NBDURI, stop: StopSignal) -> int:
    """Run it with the export in its environment; SIGTERM and Ctrl-C are passed on to it."""
    names = {"uri": str(uri), "unixsocket": uri.socket, "exportname": uri.export}
    try:
        child = subprocess.Popen(command, env={**os.environ, **names})
    except OSError as problem:
        raise ClientError(f"cannot run {command[0]!r}: {problem.strerror}") from problem
    watcher = os.pidfd_open(child.pid)
    try:
        poll = select.poll()
        poll.register(watcher, select.POLLIN)
        poll.register(stop.fileno(), select.POLLIN)
        while watcher not in dict(poll.poll()):
            poll.unregister(stop.fileno())
            child.terminate()
    finally:
        os.close(watcher)
    status = child.wait()
    return status if status >= 0 else 128 - status


def _identity(image: Path) -> Identity:
    """Before it is opened for writing, which may change it. What is not there, opening tells."""
    try:
        return Identity.of(image)
    except OSError:
        return Identity(0, 0, 0, 0, 0)


def listen(server: Server, uri: NBDURI) -> NBDURI:
    """Accept clients at ``uri``; AddressError says why that cannot be, and what to do."""
    try:
        return server.listen(uri)
    except OSError as problem:
        raise AddressError(_why_not(uri, problem)) from problem


def _why_not(uri: NBDURI, problem: OSError) -> str:
    if uri.socket:
        where = f"the socket {uri.socket}"
        if problem.errno == errno.EADDRINUSE:
            kind = "a server listens there" if is_socket(uri.socket) else "it is no socket"
            return f"{where} exists already and {kind}; choose another path with --socket"
        if problem.errno == errno.ENOENT:
            return f"cannot make {where}: its directory does not exist; create it first"
        return f"cannot make {where}: {problem.strerror or problem}"
    where = f"{uri.host or 'localhost'}:{uri.port}"
    if problem.errno == errno.EADDRINUSE:
        return f"{where} is in use by another program; choose another port with --listen"
    return f"cannot listen at {where}: {problem.strerror or problem}"


def is_socket(path: str) -> bool:
    """Whether ``path`` is a socket file."""
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:
        return False


def _close_disk(served: ServedDisk) -> None:
    """Bring a disk to rest, then note in its record of changes that this was in order."""
    clean = True
    try:
        if not served.disk.read_only:
            served.disk.root.flush()
    except OSError as problem:
        clean = False
        log.error("disk %r cannot be flushed: %s", served.name, problem.strerror)
    served.disk.close()
    if served.tracking is not None:
        try:
            served.tracking.close(clean=clean)
        except TrackingError as problem:
            log.error("%s", problem)


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as problem:
        raise ConfigError(
            f"cannot make the directory {path}: {problem.strerror}; "
            "choose another state directory with --state"
        ) from problem


@contextmanager
def _state_lock(state: Path) -> Iterator[None]:
    """One daemon for each state directory."""
    _make_directory(state)
    try:
        fd = os.open(state / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as problem:
        raise ConfigError(
            f"cannot use the state directory {state}: {problem.strerror}; "
            "choose another with --state"
        ) from problem
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(
                f"another fleece daemon uses the state directory {state}; "
                "stop it, or choose another directory with --state"
            ) from None
        yield
    finally:
        os.close(fd)


def _make_runtime_directory(config: Config) -> None:
    """The directory of the sockets, where it is ours to make; never one that the user named."""
    runtime = paths.runtime_directory()
    sockets = [config.control, *(uri.socket for uri in config.listeners if uri.socket)]
    if any(Path(socket).parent == runtime for socket in sockets):
        _make_directory(runtime)

# SPDX-License-Identifier: Apache-2.0
"""A daemon without disks behind a real control server."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fleece.control.server import ControlServer
from fleece.errors import NotFound


def disk_of_snapshot(disk: str, name: str, consumer: str | None) -> dict[str, Any]:
    incremental = consumer == "nightly"
    return {
        "disk": disk,
        "export": f"{disk}@{name}",
        "uris": [f"nbd+unix:///{disk}%40{name}?socket=/run/fleece/nbd.sock"],
        "size": 268435456,
        "mode": "incremental" if incremental else "full",
        "reason": None if incremental else f"consumer {consumer!r} has never been here",
        "bitmap": consumer,
        "context": f"qemu:dirty-bitmap:{consumer}" if consumer else None,
        "since-epoch": 3 if incremental else None,
        "epoch": 4,
        "dirty-bytes": 1048576 if incremental else 268435456,
        "overlay": f"/overlays/{disk}@{name}.qcow2",
        "overlay-bytes": 65536,
        "cluster-size": 65536,
        "state": "active",
        "error": None,
    }


class FakeService:
    """Implements ``fleece.control.service.Service`` in memory, and notes what it was asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.snapshots: dict[str, dict[str, Any]] = {}
        self.stopped = threading.Event()

    def status(self) -> dict[str, Any]:
        return {
            "version": "0.1.0",
            "pid": 4711,
            "started": "2020-01-01T00:00:00.000000Z",
            "listeners": ["nbd+unix:///?socket=/run/fleece/nbd.sock"],
            "control": "/run/fleece/control.sock",
            "state": "/var/lib/fleece",
            "disks": [
                {
                    "name": "vm1",
                    "image": "/images/vm1.img",
                    "format": "raw",
                    "size": 268435456,
                    "read-only": False,
                    "export": "vm1",
                    "uris": ["nbd+unix:///vm1?socket=/run/fleece/nbd.sock"],
                    "clients": 2,
                    "tracking": {"generation": "g", "epoch": 4, "granularity": 65536},
                },
                {
                    "name": "iso",
                    "image": "/images/iso\x1b[31m.img",
                    "format": "qcow2",
                    "size": 1024,
                    "read-only": True,
                    "export": "iso",
                    "uris": [],
                    "clients": 0,
                    "tracking": None,
                },
            ],
            "snapshots": list(self.snapshots.values()),
            "clients": 2,
        }

    def snapshot_create(self, disks: list[str], **options: Any) -> dict[str, Any]:
        self.calls.append(("create", disks, options))
        if "nope" in disks:
            raise NotFound("there is no disk 'nope'; fleece status lists them")
        name, consumer = options["name"] or "s1", options["consumer"]
        self.snapshots[name] = {
            "name": name,
            "created": "2026-01-01T00:00:00.000000Z",
            "state": "active",
            "consumer": consumer,
            "lease-expires": None if options["lease"] is None else "2999-01-01T00:00:00.000000Z",
            "acknowledged": False,
            "drain-microseconds": 812,
            "disks": [disk_of_snapshot(disk, name, consumer) for disk in disks],
        }
        return self.snapshots[name]

    def snapshot_list(self) -> list[dict[str, Any]]:
        return list(self.snapshots.values())

    def snapshot_ack(self, name: str, consumer: str | None) -> dict[str, Any]:
        snapshot = self._find(name)
        disks = [{"disk": disk["disk"], "epoch": disk["epoch"]} for disk in snapshot["disks"]]
        return {"name": name, "consumer": consumer or snapshot["consumer"], "disks": disks}

    def snapshot_extend(self, name: str, lease: float) -> dict[str, Any]:
        self.calls.append(("extend", name, lease))
        return {**self._find(name), "lease-expires": "2999-01-01T00:00:00.000000Z"}

    def snapshot_drop(self, name: str) -> dict[str, Any]:
        self._find(name)
        del self.snapshots[name]
        return {"name": name, "freed-bytes": 65536}

    def cursor_list(self) -> list[dict[str, Any]]:
        return [{"disk": "vm1", "consumer": "nightly", "generation": "abcd", "epoch": 3}]

    def cursor_remove(self, consumer: str, disk: str | None) -> list[dict[str, Any]]:
        self.calls.append(("cursor-remove", consumer, disk))
        return self.cursor_list()

    def quit(self) -> None:
        self.stopped.set()

    def _find(self, name: str) -> dict[str, Any]:
        if name not in self.snapshots:
            raise NotFound(f"there is no snapshot {name!r}; fleece snapshot list shows them")
        return self.snapshots[name]


@contextmanager
def serving(path: str, service: Any) -> Iterator[ControlServer]:
    """A started control server."""
    server = ControlServer(path, service)
    server.start()
    try:
        yield server
    finally:
        server.stop()


@contextmanager
def connected(path: str) -> Iterator[socket.socket]:
    """A raw connection: nothing was read from it yet."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(20)
        sock.connect(path)
        yield sock

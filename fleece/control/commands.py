# SPDX-License-Identifier: Apache-2.0
"""Every command of the control connection: QEMU's own names, and ours behind ``x-fleece-``."""

from typing import Any, Final, Literal

from fleece.control import qmp
from fleece.control.registry import Registry
from fleece.control.schema import describe
from fleece.control.service import Service
from fleece.errors import InvalidArgument

REGISTRY: Final = Registry()
command = REGISTRY.command

OnCBWError = Literal["break-snapshot", "break-guest-write"]


@command("qmp_capabilities")
def qmp_capabilities(
    service: Service, *, enable: list[Literal["oob"]] | None = None
) -> dict[str, Any]:
    """End the negotiation. We offer no capability, so none can be enabled."""
    if enable:
        raise InvalidArgument(f"Capability '{enable[0]}' is not available")
    return {}


@command("query-version")
def query_version(service: Service) -> dict[str, Any]:
    """The daemon's version."""
    return qmp.version()


@command("query-commands")
def query_commands(service: Service) -> list[dict[str, Any]]:
    """The names of all commands."""
    return [{"name": known.name} for known in REGISTRY]


@command("query-qmp-schema")
def query_qmp_schema(service: Service) -> list[dict[str, Any]]:
    """Commands, their arguments, and events, in QEMU's introspection format."""
    return describe(REGISTRY)


@command("quit")
def quit_daemon(service: Service) -> None:
    """End the daemon, after this was answered."""
    service.quit()


@command("x-fleece-status")
def status(service: Service) -> dict[str, Any]:
    """The daemon, its disks, listeners and snapshots."""
    return service.status()


@command("x-fleece-snapshot-create")
def snapshot_create(
    service: Service,
    *,
    disks: list[str],
    name: str | None = None,
    consumer: str | None = None,
    lease: float | None = None,
    cluster_size: int | None = None,
    on_cbw_error: OnCBWError | None = None,
) -> dict[str, Any]:
    """Take one instant of one or more disks and export it. ``lease`` is in seconds."""
    if not disks:
        raise InvalidArgument("Parameter 'disks' is empty; name at least one disk")
    if lease is not None:
        _require_positive("lease", lease)
    return service.snapshot_create(
        disks,
        name=name,
        consumer=consumer,
        lease=lease,
        cluster_size=cluster_size,
        on_cbw_error=on_cbw_error,
    )


@command("x-fleece-snapshot-list")
def snapshot_list(service: Service) -> list[dict[str, Any]]:
    """The snapshots that live."""
    return service.snapshot_list()


@command("x-fleece-snapshot-ack")
def snapshot_ack(service: Service, *, name: str, consumer: str | None = None) -> dict[str, Any]:
    """Note that the consumer has all of the snapshot: its next one counts from here."""
    return service.snapshot_ack(name, consumer)


@command("x-fleece-snapshot-extend")
def snapshot_extend(service: Service, *, name: str, lease: float) -> dict[str, Any]:
    """Let the snapshot live ``lease`` seconds from now."""
    _require_positive("lease", lease)
    return service.snapshot_extend(name, lease)


@command("x-fleece-snapshot-drop")
def snapshot_drop(service: Service, *, name: str) -> dict[str, Any]:
    """End the snapshot and delete its overlays."""
    return service.snapshot_drop(name)


@command("x-fleece-cursor-list")
def cursor_list(service: Service) -> list[dict[str, Any]]:
    """The last checkpoint that each consumer acknowledged, per disk."""
    return service.cursor_list()


@command("x-fleece-cursor-remove")
def cursor_remove(
    service: Service, *, consumer: str, disk: str | None = None
) -> list[dict[str, Any]]:
    """Forget a consumer: its next snapshot is a full one."""
    return service.cursor_remove(consumer, disk)


def _require_positive(name: str, value: float) -> None:
    if value <= 0:
        raise InvalidArgument(f"Parameter '{name}' expects a number above 0")

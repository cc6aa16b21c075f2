# SPDX-License-Identifier: Apache-2.0
"""What the commands ask of the daemon. ``fleece.appliance`` implements it; tests fake it."""

from typing import Any, Protocol, TypeAlias

JSON: TypeAlias = bool | int | float | str | list[Any] | dict[str, Any] | None
"""A value as the control connection carries it."""


class Service(Protocol):
    """The daemon, as its commands see it.

    Every method may be called from several threads at once, answers with plain JSON values (keys
    with dashes, sizes in bytes, times in ISO 8601 and UTC), and raises
    :class:`fleece.errors.FleeceError` for what a user can understand.
    """

    def status(self) -> dict[str, Any]:
        """The daemon, its disks, listeners and snapshots."""
        ...

    def snapshot_create(
        self,
        disks: list[str],
        *,
        name: str | None,
        consumer: str | None,
        lease: float | None,
        cluster_size: int | None,
        on_cbw_error: str | None,
    ) -> dict[str, Any]:
        """Take one instant of all of ``disks``; ``lease`` in seconds, ``cluster_size`` in bytes."""
        ...

    def snapshot_list(self) -> list[dict[str, Any]]:
        """The snapshots that live, oldest first."""
        ...

    def snapshot_ack(self, name: str, consumer: str | None) -> dict[str, Any]:
        """Note that ``consumer`` (default: the snapshot's own) has all of snapshot ``name``."""
        ...

    def snapshot_extend(self, name: str, lease: float) -> dict[str, Any]:
        """Let the snapshot live ``lease`` seconds from now; the answer is the snapshot."""
        ...

    def snapshot_drop(self, name: str) -> dict[str, Any]:
        """End the snapshot and delete its overlays."""
        ...

    def cursor_list(self) -> list[dict[str, Any]]:
        """The last acknowledged checkpoint of each consumer, per disk."""
        ...

    def cursor_remove(self, consumer: str, disk: str | None) -> list[dict[str, Any]]:
        """Forget a consumer, of one disk or of all; the answer is what was forgotten."""
        ...

    def quit(self) -> None:
        """Ask the daemon to end. Returns at once; the end comes after the reply was sent."""
        ...

# SPDX-License-Identifier: Apache-2.0
"""Snapshots in words: the table of all, and what to do next with a new one."""

import shlex
from typing import Any

from fleece.cli.output import printable, relative, table
from fleece.units import format_size

Snapshot = dict[str, Any]

_HEADERS = ("SNAPSHOT", "TAKEN", "STATE", "CONSUMER", "LEASE ENDS", "DISKS", "OLD DATA")


def snapshot_table(snapshots: list[Snapshot]) -> str:
    """One row for each snapshot, and a line for each disk whose snapshot is broken."""
    rows = [
        (
            snapshot["name"],
            relative(snapshot["created"]),
            snapshot["state"] + (", acknowledged" if snapshot["acknowledged"] else ""),
            snapshot["consumer"] or "-",
            relative(snapshot["lease-expires"]),
            ", ".join(disk["disk"] for disk in snapshot["disks"]),
            format_size(sum(disk["overlay-bytes"] for disk in snapshot["disks"])),
        )
        for snapshot in snapshots
    ]
    text = table(_HEADERS, rows, right=("OLD DATA",)) if rows else "no snapshots"
    return "\n".join([text, *_broken(snapshots)])


def _broken(snapshots: list[Snapshot]) -> list[str]:
    return [
        printable(f"{disk['export']} is broken: {disk['error'] or 'no reason is known'}")
        for snapshot in snapshots
        for disk in snapshot["disks"]
        if disk["state"] == "broken"
    ]


def created_text(snapshot: Snapshot, control: str | None = None) -> str:
    """What was made, what there is to read, why in full if so, and the commands that come next.

    ``control`` is the ``--control`` that those commands need, too.
    """
    return "\n".join(
        [
            _headline(snapshot),
            "",
            _disk_table(snapshot["disks"]),
            *_reasons(snapshot["disks"]),
            "",
            "Next:",
            *(f"  {line}" for disk in snapshot["disks"] for line in _pull(disk)),
            *_afterwards(snapshot, control),
        ]
    )


def _headline(snapshot: Snapshot) -> str:
    held = snapshot["drain-microseconds"] / 1000
    lease = snapshot["lease-expires"]
    until = f"; it is dropped {relative(lease)} unless extended" if lease else ""
    name = snapshot["name"]
    return printable(f"snapshot {name} taken; writers were held for {held:.1f} ms{until}")


def _disk_table(disks: list[dict[str, Any]]) -> str:
    rows = [
        (
            disk["disk"],
            disk["mode"],
            format_size(disk["size"] if disk["mode"] == "full" else disk["dirty-bytes"]),
            format_size(disk["size"]),
            disk["export"],
        )
        for disk in disks
    ]
    headers = ("DISK", "MODE", "TO READ", "SIZE", "EXPORT")
    return table(headers, rows, right=("TO READ", "SIZE"))


def _reasons(disks: list[dict[str, Any]]) -> list[str]:
    return [printable(f"{d['disk']} in full: {d['reason']}") for d in disks if d["reason"]]


def _pull(disk: dict[str, Any]) -> list[str]:
    if not disk["uris"]:
        return [printable(f"# {disk['export']} is exported, but nobody listens for NBD")]
    uri = shlex.quote(disk["uris"][0])
    target = shlex.quote(disk["export"].replace("@", "-"))
    if disk["mode"] == "full":
        return [
            f"nbdcopy {uri} {target}.img",
            f"# or: qemu-img convert -p -f raw -O qcow2 {uri} {target}.qcow2",
        ]
    context = shlex.quote(disk["context"])
    return [
        printable(f"# {disk['disk']}: copy what this lists as dirty over the last backup"),
        f"nbdinfo --map={context} {uri}",
    ]


def _afterwards(snapshot: Snapshot, control: str | None) -> list[str]:
    option = f" --control {shlex.quote(control)}" if control else ""
    name = shlex.quote(snapshot["name"])
    drop = f"  fleece snapshot drop{option} {name}"
    if not snapshot["consumer"]:
        return [drop]
    promise = f"After the ack, the next one for {snapshot['consumer']!r} is only what changed."
    return [f"  fleece snapshot ack{option} {name}", drop, printable(promise)]

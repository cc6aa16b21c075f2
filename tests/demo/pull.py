# SPDX-License-Identifier: Apache-2.0
"""The backup side: real clients where they are installed, our own where not."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from nbdwire.client import Client, connect
from nbdwire.extents import Extent
from tests.demo.tools import DemoFailed, find, run

CHUNK = 1 << 20


def full_with_nbdcopy(uri: str, target: Path) -> str:
    """Copy all of ``uri`` to the new file ``target``; returns the name of the client used."""
    program = find("nbdcopy")
    if program is None:
        return full_with_ours(uri, target)
    run([program, uri, target])
    return "nbdcopy"


def full_with_qemu_img(uri: str, target: Path) -> str:
    """As `full_with_nbdcopy`, by ``qemu-img convert``."""
    program = find("qemu-img")
    if program is None:
        return full_with_ours(uri, target)
    run([program, "convert", "-f", "raw", "-O", "raw", uri, target])
    return "qemu-img convert"


def full_with_ours(uri: str, target: Path) -> str:
    """As `full_with_nbdcopy`, by fleece's own client; skips what reads as zeroes."""
    with connect(uri, contexts=("base:allocation",)) as client, target.open("wb") as file:
        file.truncate(client.size)
        data = (e for e in _walk(client, "base:allocation") if not e.is_zero)
        _copy(client, data, target)
    return "fleece's client"


def dirty_extents(uri: str, context: str) -> tuple[list[Extent], str]:
    """What ``context`` says is dirty, in order, and the name of the client that asked."""
    program = find("nbdinfo")
    if program is None:
        with connect(uri, contexts=(context,)) as client:
            return [e for e in _walk(client, context) if e.is_dirty], "fleece's client"
    entries = json.loads(run([program, f"--map={context}", "--json", uri]))
    every = [Extent(e["offset"], e["length"], e["type"]) for e in entries]
    return [e for e in every if e.is_dirty], f"nbdinfo --map={context}"


def increment(uri: str, extents: Sequence[Extent], target: Path) -> int:
    """Read only ``extents`` of ``uri`` and write them into ``target``; returns the bytes read."""
    with connect(uri, contexts=()) as client:
        return _copy(client, iter(extents), target)


def _walk(client: Client, context: str) -> Iterator[Extent]:
    """Every extent of the export."""
    offset = 0
    while offset < client.size:
        found = client.extents(offset, min(client.size - offset, 1 << 30), context)
        if not found:
            raise DemoFailed(f"the server said nothing about {context} at offset {offset}")
        yield from found
        offset = found[-1].end


def _copy(client: Client, extents: Iterator[Extent], target: Path) -> int:
    done = 0
    buffer = memoryview(bytearray(CHUNK))
    with target.open("r+b", buffering=0) as file:
        for extent in extents:
            for offset in range(extent.offset, extent.end, CHUNK):
                view = buffer[: min(CHUNK, extent.end - offset)]
                client.pread_into(view, offset)
                file.seek(offset)
                file.write(view)
                done += len(view)
    return done

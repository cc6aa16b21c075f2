# SPDX-License-Identifier: Apache-2.0
"""The table for people: ratios first, absolute figures only beside their ratio."""

import math
import os
import platform
from collections.abc import Sequence
from pathlib import Path

from bench.results import Row, absolute, geometric_mean
from bench.servers import OURS

MiB = 1 << 20
BEGIN = "<!-- bench: begin (written by ./run bench; text outside of the markers is kept) -->"
END = "<!-- bench: end -->"
_PROSE = "# Performance\n\nMeasured by `./run bench`.\n\n"


def _ratio(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---" + "|--:" * (len(head) - 1) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _cells(row: Row, servers: Sequence[str], peers: Sequence[str]) -> list[str]:
    ratios = [_ratio(row.ratio(peer)) for peer in peers]
    figures = [absolute(row, server) for server in servers]
    # Latency says something of the server only while nothing queues.
    p99 = [_ratio(_latency_ratio(row)) if "-d1-" in f"{row.name}-" and row.has_latency else ""]
    best = _ratio(row.ratio_to_best())
    cells = [row.name, best if best == "-" else f"**{best}**"]
    return cells + ratios + figures + p99 + [_ratio(row.cpu_ratio())]


def _latency_ratio(row: Row) -> float:
    if OURS not in row.samples or not row.peers:
        return math.nan
    return row.p99(OURS) / min(row.p99(peer) for peer in row.peers)


def table(rows: Sequence[Row]) -> str:
    """Markdown: one line for each row, all of which ran on the same servers."""
    servers = list(rows[0].samples)
    peers = rows[0].peers
    head = ["case", "ours / best", *(f"/ {peer}" for peer in peers), *servers]
    head += ["p99 / best", "CPU per GiB / best"]
    # The order of the servers in a row depends on whose turn was first; the head decides.
    return _markdown(head, [_cells(row, servers, peers) for row in rows])


def commands(rows: Sequence[Row]) -> str:
    """Markdown for rows of commands: how much faster, how much memory, and the figures."""
    programs, peers = list(rows[0].samples), rows[0].peers
    head = ["case", *(f"speed / {peer}" for peer in peers), *(f"memory / {peer}" for peer in peers)]
    head += [f"{program} {unit}" for unit in ("s", "MiB") for program in programs]
    return _markdown(head, [_command_cells(row, programs, peers) for row in rows])


def _command_cells(row: Row, programs: Sequence[str], peers: Sequence[str]) -> list[str]:
    speeds = [_ratio(row.ratio(peer)) for peer in peers]
    cells = [row.name, *(f"**{ratio}**" if ratio != "-" else ratio for ratio in speeds)]
    cells += [_ratio(row.memory_ratio(peer)) for peer in peers]
    cells += [f"{row.seconds(program):.2f}" for program in programs]
    return cells + [f"{row.peak_memory(program) / MiB:.0f}" for program in programs]


def summary(rows: Sequence[Row]) -> str:
    """How we stand over all rows: geometric means, rows ahead, CPU time, memory."""
    lines = []
    for peer in rows[0].peers:
        ratios = [row.ratio(peer) for row in rows]
        if all(map(math.isnan, ratios)):
            continue
        ahead = sum(ratio >= 1 for ratio in ratios)
        lines.append(
            f"- against {peer}: geometric mean **{geometric_mean(ratios):.2f}**, "
            f"ahead in {ahead} of {len(ratios)} rows"
        )
    for server in rows[0].samples:
        cpu = geometric_mean(row.cpu_per_gib(server) or math.nan for row in rows)
        peak = max(row.peak_memory(server) for row in rows)
        lines.append(
            f"- {server}: {cpu:.2f} CPU seconds per GiB (geometric mean), "
            f"peak memory {peak / MiB:.0f} MiB"
        )
    return "\n".join(lines) + "\n"


def machine(directory: Path, versions: dict[str, str]) -> str:
    """One paragraph: what it ran on."""
    peers = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        f"{os.cpu_count()} processors ({platform.machine()}), Linux {platform.release()}, "
        f"images on {_file_system(directory)}; {peers}.\n"
    )


def _file_system(directory: Path) -> str:
    """The type of the file system of ``directory``, from the longest mount point above it."""
    best, kind = "", "?"
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, point, name = line.split()[:3]
        inside = f"{directory.resolve()}/".startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, kind = point, name
    return kind


def write_into(path: Path, text: str) -> None:
    """Put ``text`` between the markers of ``path``; what is outside of them stays."""
    old = path.read_text() if path.exists() else _PROSE
    before, found, rest = old.partition(BEGIN)
    after = rest.partition(END)[2] if found else "\n"
    if not found and not before.endswith("\n\n"):
        before = before.rstrip("\n") + "\n\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}")

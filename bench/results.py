# SPDX-License-Identifier: Apache-2.0
"""Samples, rows of samples, and their medians and ratios."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from bench.fio import Result
from bench.servers import OURS

GiB = 1 << 30


@dataclass(frozen=True)
class Sample:
    """One run: what fio reached, the server's CPU seconds for it, its peak memory in bytes."""

    result: Result
    cpu_seconds: float
    peak_memory: int

    @property
    def cpu_per_gib(self) -> float:
        """CPU seconds of the server for each GiB moved."""
        return self.cpu_seconds * GiB / self.result.bytes


class Row:
    """All samples of one case, by the server's name."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.samples: dict[str, list[Sample]] = {}

    def add(self, server: str, sample: Sample) -> None:
        """One more run of ``server``."""
        self.samples.setdefault(server, []).append(sample)

    @property
    def peers(self) -> list[str]:
        """Every server but ours."""
        return [name for name in self.samples if name != OURS]

    def speed(self, server: str) -> float:
        """Median bytes in a second."""
        return median(s.result.bytes_per_second for s in self.samples[server])

    def operations(self, server: str) -> float:
        """Median operations in a second."""
        return median(s.result.operations_per_second for s in self.samples[server])

    def seconds(self, server: str) -> float:
        """Median time of an operation, where one comes after the other."""
        return median(1 / s.result.operations_per_second for s in self.samples[server])

    def peak_memory(self, server: str) -> int:
        """Most bytes of all runs."""
        return max(s.peak_memory for s in self.samples[server])

    def memory_ratio(self, peer: str) -> float:
        """Our peak of memory over that of ``peer``; above 1 is worse. nan if we did not run."""
        if OURS not in self.samples:
            return math.nan
        return self.peak_memory(OURS) / self.peak_memory(peer)

    @property
    def has_latency(self) -> bool:
        """Whether the client told percentiles."""
        return all(self.p99(server) > 0 for server in self.samples)

    def p99(self, server: str) -> float:
        """Median of the 99th percentiles of latency, seconds."""
        return median(s.result.p99 for s in self.samples[server])

    def cpu_per_gib(self, server: str) -> float:
        """Median CPU seconds of the server for a GiB."""
        return median(s.cpu_per_gib for s in self.samples[server])

    def ratio(self, peer: str) -> float:
        """Our speed over that of ``peer``; nan if we did not run."""
        return self.speed(OURS) / self.speed(peer) if OURS in self.samples else math.nan

    def ratio_to_best(self) -> float:
        """Our speed over that of the fastest peer."""
        return min((self.ratio(peer) for peer in self.peers), default=math.nan)

    def cpu_ratio(self) -> float:
        """Our CPU time for a GiB over the smallest of a peer; above 1 is worse."""
        if OURS not in self.samples or not self.peers:
            return math.nan
        # A peer that took less than one clock tick cannot be compared with.
        best = min(self.cpu_per_gib(peer) for peer in self.peers)
        return self.cpu_per_gib(OURS) / best if best else math.nan

    def line(self) -> str:
        """For the progress on the terminal."""
        ratio = self.ratio_to_best()
        head = f"{self.name:<30}" + ("      " if math.isnan(ratio) else f" {ratio:4.2f}x")
        speeds = (f"{name} {absolute(self, name)}" for name in self.samples)
        return head + "   " + "   ".join(speeds)

    def as_json(self) -> dict[str, Any]:
        """Everything, for ``--json``."""
        return {
            "name": self.name,
            "samples": {name: [asdict(s) for s in every] for name, every in self.samples.items()},
        }


def absolute(row: Row, server: str) -> str:
    """``213k IOPS`` for small blocks, ``4.9 GB/s`` for large ones, ``0.31 s`` for commands."""
    operations, speed = row.operations(server), row.speed(server)
    if row.name.startswith("command-"):
        return f"{row.seconds(server):.2f} s"
    if speed / operations <= 4096:
        return f"{operations / 1000:.1f}k IOPS"
    return f"{speed / 1e9:.2f} GB/s"


def geometric_mean(values: Iterable[float]) -> float:
    """Of those ``values`` that are not nan; nan if there is none."""
    logs = [math.log(value) for value in values if not math.isnan(value)]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan

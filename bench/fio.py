# SPDX-License-Identifier: Apache-2.0
"""fio's NBD engine: one job in, one result out."""

import json
from dataclasses import dataclass
from pathlib import Path

from bench.tools import BenchFailed, need, run

SEED = 20


@dataclass(frozen=True)
class Job:
    """What fio does. ``block`` and ``size`` in bytes; ``seconds`` is an upper bound.

    ``total``: stop after that many bytes instead of going round until the time is over. ``once``:
    stop when every block was touched.
    """

    pattern: str  # read, write, randread, randwrite
    block: int
    depth: int
    connections: int
    size: int
    seconds: float
    once: bool = False
    total: int = 0
    seed: int = SEED

    def arguments(self) -> list[str]:
        """The options; each connection has its own part of the disk."""
        share = self.size // self.connections
        words = [
            "--name=bench",
            "--ioengine=nbd",
            f"--rw={self.pattern}",
            f"--bs={self.block}",
            f"--iodepth={self.depth}",
            f"--numjobs={self.connections}",
            f"--size={share}",
            f"--offset_increment={share}",
            f"--runtime={int(self.seconds * 1000)}ms",
            f"--randseed={self.seed}",
            "--group_reporting",
            "--output-format=json",
        ]
        if self.total:
            words.append(f"--io_size={self.total // self.connections}")
        elif not self.once:
            words.append("--time_based")
        return words


@dataclass(frozen=True)
class Result:
    """What a job reached. ``p99`` is the 99th percentile of the completion latency in seconds."""

    bytes_per_second: float
    operations_per_second: float
    bytes: int
    p99: float


def perform(job: Job, uri: str, scratch: Path, home: Path | None = None) -> Result:
    """Run ``job`` against ``uri``; `BenchFailed` if fio or any request failed.

    ``home`` is where libnbd looks for certificates.
    """
    output = scratch / "fio.json"
    command = [need("fio"), *job.arguments(), f"--uri={uri}", f"--output={output}"]
    run(command, timeout=job.seconds + 120, home=home)
    text = output.read_text()
    outcome = json.loads(text[text.index("{\n") :])["jobs"][0]
    if outcome["error"]:
        raise BenchFailed(f"fio met error {outcome['error']} on {uri}")
    side = outcome["write" if "write" in job.pattern else "read"]
    if not side["io_bytes"]:
        raise BenchFailed(f"fio moved nothing on {uri}")
    percentile = side["clat_ns"].get("percentile", {}).get("99.000000", 0)
    return Result(float(side["bw_bytes"]), float(side["iops"]), side["io_bytes"], percentile / 1e9)

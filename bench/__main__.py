# SPDX-License-Identifier: Apache-2.0
"""Speed against the C servers, in ratios from one run: ``python bench [--quick] [--rows REGEX]``.

Exit status 0 if everything ran (whatever the ratios), 1 if something failed, 2 for a wrong
command line.
"""

import argparse
import contextlib
import json
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import certificates, commands, images, live, matrix, qcow2, report
from bench.results import Row
from bench.servers import NBDKIT, OURS, QEMU_NBD, STORAGE_DAEMON, versions
from bench.tools import BenchFailed, find, need, say

ROOT = Path(__file__).resolve().parents[1]
MiB = 1 << 20
SMALL = 256  # MiB, of an image from which only the page cache is read

C = TypeVar("C", bound=matrix.AnyCase | qcow2.ImageCase | commands.Command)

# Title and a word on what ran, by the beginning of a row's name.
TITLES = {
    "live-": (
        "Live writes under a fresh snapshot",
        "`fleece serve`; each run writes to about half of the clusters, most of them once.\n",
    ),
    "tls-": (
        "One raw image over TLS",
        "A small program that serves with `nbdwire`, the same certificates for everybody, fio as "
        "the client.\n",
    ),
    "form-": (
        "The forms of replies",
        "`fleece export -f raw`; one connection of a client of our own (`bench/lean.py`), for fio "
        "always asks for structured replies; random places. Peers of these versions have no "
        "extended headers: in those rows they answer with structured replies. No p99.\n",
    ),
    "connect-": (
        "Connections",
        "One client after another, 200 of them: it connects, lists the exports, leaves. CPU time "
        "is for a thousand million of them.\n",
    ),
    "image-": (
        "Images",
        f"qcow2 images of {qcow2.SIZE >> 20} MiB (compressed: {qcow2.PACKED_SIZE >> 20} MiB of the "
        "files of /usr/lib), clusters of 64 KiB; `fleece export` and `qemu-nbd` serve the same "
        "file, in turns. `plain`: all clusters are there, so writes go in place; `new`: writes "
        "into an empty image; `chain`: two layers, each of which has half of what is read; `top` "
        "and `subclusters`: writes into an empty image above a full one, in the second case with "
        "extended L2 entries.\n",
    ),
    "command-": (
        "Images: commands",
        "`fleece image` and `qemu-img`, start of the program included; half of the disk is holes, "
        "the other half files of /usr/lib. `large`: {large}; a quarter of the clusters is out of "
        "order.\n",
    ),
}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="./run bench", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="some rows only: about 2 minutes")
    parser.add_argument("--rows", type=re.compile, metavar="REGEX", help="rows whose name matches")
    parser.add_argument("--list", action="store_true", help="print the names of all rows")
    parser.add_argument("--only-peers", action="store_true", help="without fleece itself")
    parser.add_argument(
        "--repeat", type=int, default=0, metavar="N", help="runs per row and server"
    )
    parser.add_argument("--runtime", type=float, metavar="S", help="seconds per run")
    parser.add_argument("--size", type=int, default=1024, metavar="MIB", help="size of the images")
    parser.add_argument("--dir", type=Path, default=Path("/var/tmp"), help="where the images go")
    parser.add_argument("--json", type=Path, metavar="FILE", help="every sample, for programs")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table into FILE")
    options = parser.parse_args(argv)
    options.runtime = options.runtime or (0.7 if options.quick else 1.0)
    options.repeat = options.repeat or (2 if options.quick else 3)
    return options


def chosen_cases(options: argparse.Namespace, every: Sequence[C]) -> list[C]:
    """Those rows of ``every`` that are asked for."""
    if options.rows:
        return [case for case in every if options.rows.search(case.name)]
    return [case for case in every if case.name in matrix.QUICK or not options.quick]


def chosen_live(options: argparse.Namespace) -> list[tuple[str, int, int]]:
    """The rows of the live writes that are asked for."""
    every = list(live.CASES)
    return [c for c in every if not options.rows or options.rows.search(f"live-{c[0]}")]


def servers(options: argparse.Namespace, peers: dict[str, str]) -> list[str]:
    """Ours unless left out, and the ``peers`` (name to program) that are installed."""
    found = [name for name, program in peers.items() if find(program)]
    for name in peers.keys() - set(found):
        say(f"bench: {name} is not installed; going on without")
    return found if options.only_peers else [OURS, *found]


def run_rows(scenario: Any, cases: Sequence[Any], repeats: int) -> list[Row]:
    """Every case on a `Matrix` or `LiveWrites` that is started and stopped here."""
    try:
        scenario.start()
        return [scenario.row(case, repeats) for case in cases]
    finally:
        scenario.stop()


def measure_matrix(
    options: argparse.Namespace,
    directory: Path,
    size: int,
    every: Sequence[C],
    *,
    tls: bool = False,
) -> Iterator[list[Row]]:
    """One table: of those of ``every`` that are asked for, on images of ``size`` bytes."""
    chosen = chosen_cases(options, every)
    if not chosen:
        return
    names = servers(options, {QEMU_NBD: "qemu-nbd", NBDKIT: "nbdkit"})
    pki = certificates.create(directory / "pki") if tls else None
    scenario = matrix.Matrix(names, directory, size, options.runtime, pki)
    yield run_rows(scenario, chosen, options.repeat)


def measure_images(options: argparse.Namespace, directory: Path) -> Iterator[list[Row]]:
    """The tables of qcow2 images: served, and under the commands."""
    served, run = chosen_cases(options, qcow2.cases()), chosen_cases(options, commands.cases())
    if served:
        names = servers(options, {QEMU_NBD: "qemu-nbd"})
        scenario = qcow2.Qcow2Images(names, directory, options.runtime)
        yield run_rows(scenario, served, options.repeat)
    if run:
        names = servers(options, {commands.QEMU_IMG: commands.QEMU_IMG})
        size = options.size * MiB
        yield run_rows(
            commands.Commands(names, directory, size, large(options)), run, options.repeat
        )


def large(options: argparse.Namespace) -> images.Layout:
    """The image with many clusters: 1 TiB, and less of it with --quick."""
    return images.SMALLER if options.quick else images.LARGE


def measure(options: argparse.Namespace, directory: Path) -> list[list[Row]]:
    """The rows of all scenarios, without those that nothing was asked of."""
    size = options.size * MiB
    tables = [
        *measure_matrix(options, directory, size, matrix.cases()),
        *measure_matrix(options, directory, SMALL * MiB, matrix.tls_cases(), tls=True),
        *measure_matrix(options, directory, SMALL * MiB, matrix.form_cases()),
        *measure_matrix(options, directory, SMALL * MiB, matrix.connect_cases()),
        *measure_images(options, directory),
    ]
    if under_snapshot := chosen_live(options):
        names = servers(options, {STORAGE_DAEMON: "qemu-storage-daemon"})
        # bounded by bytes and short, so it can be afforded more often
        tables.append(
            run_rows(live.LiveWrites(names, directory, size), under_snapshot, options.repeat + 1)
        )
    return [rows for rows in tables if rows]


def text_of(tables: Sequence[Sequence[Row]], directory: Path, options: argparse.Namespace) -> str:
    """The whole report as Markdown."""
    parts = [report.machine(directory, versions())]
    parts.append(
        f"{time.strftime('%Y-%m-%d', time.gmtime())}; medians of runs in turns; images of "
        f"{options.size} MiB of random data ({SMALL} for TLS, forms and connections); unix "
        "sockets. Higher is better, except for p99 (of latency at depth 1) and CPU time.\n"
    )
    plain = f"`fleece export -f raw`; {options.runtime:g} s per run.\n"
    for rows in tables:
        kind = next((start for start in TITLES if rows[0].name.startswith(start)), "")
        title, what = TITLES.get(kind, ("One raw image, exported", plain))
        parts += [f"## {title}\n", what.format(large=large(options))]
        if kind == "command-":
            parts.append(report.commands(rows))
        else:
            parts += [report.summary(rows), report.table(rows)]
    return "\n".join(parts)


def publish(tables: list[list[Row]], options: argparse.Namespace, directory: Path) -> None:
    """Print the report and write it to where it belongs."""
    text = text_of(tables, directory, options)
    print(text)
    if options.json:
        every = [row.as_json() for rows in tables for row in rows]
        options.json.write_text(json.dumps({"versions": versions(), "rows": every}, indent=1))
    whole = not options.rows and not options.only_peers
    target = options.write or (ROOT / "docs" / "performance.md" if whole else None)
    if target is not None:
        report.write_into(target, text)
        say(f"bench: wrote {target}")


def guarded(work: Callable[[], None]) -> int:
    """Run ``work``; what may go wrong becomes one line and an exit status."""
    try:
        work()
    except (BenchFailed, OSError) as problem:
        say(f"bench: {problem}")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def main(argv: Sequence[str]) -> int:
    """Run the benchmarks; returns the exit status."""
    options = parse(argv)
    # So that the servers are ended and the images removed, as on Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if options.list:
        print("\n".join([*matrix.names(), *(f"live-{c[0]}" for c in live.CASES)]))
        return 0

    def work() -> None:
        need("fio")
        with tempfile.TemporaryDirectory(prefix="fleece-bench-", dir=options.dir) as scratch:
            directory = Path(scratch)
            tables = measure(options, directory)
            if not tables:
                raise BenchFailed("no row has such a name; --list prints them")
            publish(tables, options, directory)

    return guarded(work)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main(sys.argv[1:]))

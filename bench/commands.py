# SPDX-License-Identifier: Apache-2.0
"""``fleece image`` and ``qemu-img`` on the same images, in turns: time and peak memory.

The start of the program counts. In a row's sample an operation is one run of the command.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.fio import Result
from bench.images import LARGE, Layout, make_holed, make_large, make_real
from bench.results import Row, Sample
from bench.servers import OURS
from bench.tools import BenchFailed, need, run, say, settle

QEMU_IMG: Final = "qemu-img"


@dataclass(frozen=True)
class Command:
    """One row. ``words``: what both programs are given; names of images stand for their paths."""

    name: str
    words: str

    @property
    def images(self) -> list[str]:
        """The images that it needs, without the one that it makes."""
        return [word for word in self.words.split() if "." in word and word != "target.out"]


def cases() -> list[Command]:
    """All rows."""
    return [
        Command("command-convert-raw-qcow2", "convert -f raw -O qcow2 disk.raw target.out"),
        Command("command-convert-qcow2-raw", "convert -f qcow2 -O raw disk.qcow2 target.out"),
        Command("command-convert-compress", "convert -f raw -O qcow2 -c disk.raw target.out"),
        Command("command-convert-packed-raw", "convert -f qcow2 -O raw disk.packed target.out"),
        Command("command-compare-raw-qcow2", "compare -f raw -F qcow2 disk.raw disk.qcow2"),
        Command("command-compare-qcow2", "compare -f qcow2 -F qcow2 disk.qcow2 disk.packed"),
        Command("command-check-large", "check -f qcow2 large.qcow2"),
        Command("command-compare-large", "compare -f qcow2 -F qcow2 large.qcow2 other.large.qcow2"),
        Command("command-map-large", "map -f qcow2 --output=json large.qcow2"),
        Command("command-info", "info -f qcow2 disk.qcow2"),
        Command("command-create", "create -q -f qcow2 target.out 1G"),
    ]


class Commands:
    """Runs the rows, on images of ``size`` bytes, and on ``large`` to check and to map."""

    def __init__(
        self, names: Sequence[str], directory: Path, size: int, large: Layout = LARGE
    ) -> None:
        self._names = list(names)
        self._directory = directory / "commands"
        self._size = size
        self._large = large

    def start(self) -> None:
        """Images are made when a row asks for them."""
        self._directory.mkdir()

    def stop(self) -> None:
        """Remove the images."""
        for path in self._directory.iterdir():
            path.unlink()
        self._directory.rmdir()

    def row(self, case: Command, repeats: int) -> Row:
        """Every program ``repeats`` times, in an order that rotates."""
        row = Row(case.name)
        images = [self._image(name) for name in case.images]
        self._sample(self._names[0], case)  # its bytecode, and the images in the page cache
        for turn in range(repeats):
            start = turn % len(self._names)
            for name in self._names[start:] + self._names[:start]:
                settle(images)
                row.add(name, self._sample(name, case))
        say(row.line())
        return row

    def _sample(self, name: str, case: Command) -> Sample:
        target = self._directory / "target.out"
        target.unlink(missing_ok=True)
        words = [str(self._directory / w) if "." in w else w for w in case.words.split()]
        program = [sys.executable, "-m", "fleece", "image"] if name == OURS else [need(QEMU_IMG)]
        seconds, spent, memory = timed([*program, *words], self._environment())
        size = self._large.virtual if "large" in case.name else self._size
        return Sample(Result(size / seconds, 1 / seconds, size, 0.0), spent, memory)

    def _environment(self) -> dict[str, str]:
        """With bytecode as an installed package has it, whatever the caller thinks of that."""
        ours = {"PYTHONPYCACHEPREFIX": str(self._directory.parent / "bytecode")}
        return {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | ours

    def _image(self, name: str) -> Path:
        path = self._directory / name
        if not path.exists():
            self._makers()[name](path)
        return path

    def _makers(self) -> dict[str, Callable[[Path], None]]:
        return {
            "real.raw": lambda path: make_real(path, self._size),
            "disk.raw": lambda path: make_holed(path, self._image("real.raw")),
            "disk.qcow2": self._convert,
            "disk.packed": lambda path: self._convert(path, "-c"),
            "large.qcow2": lambda path: make_large(path, self._large),
            "other.large.qcow2": lambda path: make_large(path, self._large),
        }

    def _convert(self, path: Path, *options: str) -> None:
        words = ["convert", "-f", "raw", "-O", "qcow2", *options]
        run([need(QEMU_IMG), *words, str(self._image("disk.raw")), str(path)])


def timed(
    command: Sequence[str], environment: dict[str, str] | None = None
) -> tuple[float, float, int]:
    """Seconds, CPU seconds and peak bytes of a program that must succeed."""
    script = str(Path(__file__).with_name("timed.py"))
    done = subprocess.run(
        [sys.executable, "-I", "-S", script, *command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
        env=environment,
    )
    try:
        seconds, spent, memory, status = done.stdout.split()
    except ValueError:
        raise BenchFailed(f"{command[0]} did not run: {_last(done.stderr)}") from None
    if status != "0":
        raise BenchFailed(f"{' '.join(command)} ended with {status}: {_last(done.stderr)}")
    return float(seconds), float(spent), int(memory)


def _last(text: str) -> str:
    return (text.strip().splitlines() or ["nothing said"])[-1]

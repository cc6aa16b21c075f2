# SPDX-License-Identifier: Apache-2.0
"""``fleece image convert`` against ``qemu-img convert``, in turns, on one file system.

    python -m bench.convert DIRECTORY [SIZE_MIB] [ROUNDS]

Prints the medians in seconds and their ratio (above 1: ours is faster), process start included.
"""

import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

_WORDS: Final = b"a backup that is wrong is worse than none; "


def make_source(path: Path, mebibytes: int) -> None:
    """Half of it holes, in stretches of 1 to 8 MiB; the data half text, half noise."""
    rng = random.Random(4)
    noise, text = rng.randbytes(1 << 20), (_WORDS * 25000)[: 1 << 20]
    with path.open("wb") as file:
        file.truncate(mebibytes << 20)
        at = 0
        while at < mebibytes:
            length = min(rng.randrange(1, 9), mebibytes - at)
            for step in range(0, length, 2):
                piece = noise if (at + step) % 4 < 2 else text
                number = (at + step).to_bytes(8, "big")
                file.seek((at + step) << 20)
                file.write(
                    b"".join(number + piece[i + 8 : i + 4096] for i in range(0, 1 << 20, 4096))
                )
            at += length


def seconds(command: Sequence[str | Path], target: Path) -> float:
    """How long ``command`` takes to make ``target``."""
    target.unlink(missing_ok=True)
    start = time.perf_counter()
    subprocess.run(list(map(str, command)), check=True)
    return time.perf_counter() - start


def compare(directory: Path, mebibytes: int, rounds: int) -> None:
    """All rows."""
    ours: list[str | Path] = [sys.executable, "-m", "fleece", "image", "convert"]
    theirs: list[str | Path] = [shutil.which("qemu-img") or "qemu-img", "convert"]
    raw, cow, packed = (directory / name for name in ("a.raw", "a.qcow2", "a.packed"))
    make_source(raw, mebibytes)
    subprocess.run([*map(str, theirs), "-O", "qcow2", str(raw), str(cow)], check=True)
    subprocess.run([*map(str, theirs), "-c", "-O", "qcow2", str(raw), str(packed)], check=True)
    target = directory / "target"
    for name, flags, source in (
        ("raw to qcow2", ["-f", "raw", "-O", "qcow2"], raw),
        ("qcow2 to raw", ["-f", "qcow2", "-O", "raw"], cow),
        ("raw to raw", ["-f", "raw", "-O", "raw"], raw),
        ("qcow2 to qcow2", ["-f", "qcow2", "-O", "qcow2"], cow),
        ("compressed to raw", ["-f", "qcow2", "-O", "raw"], packed),
        ("raw to compressed", ["-f", "raw", "-O", "qcow2", "-c"], raw),
    ):
        taken: dict[str, list[float]] = {"ours": [], "qemu": []}
        for _ in range(rounds):
            taken["ours"].append(seconds([*ours, *flags, source, target], target))
            taken["qemu"].append(seconds([*theirs, *flags, source, target], target))
        mine, other = (statistics.median(taken[who]) for who in ("ours", "qemu"))
        print(f"{name:<20} ours {mine:6.2f} s  qemu-img {other:6.2f} s  ratio {other / mine:5.2f}")


def main(words: list[str]) -> None:
    """``DIRECTORY [SIZE_MIB] [ROUNDS]``."""
    with tempfile.TemporaryDirectory(dir=words[0]) as name:
        compare(Path(name), *(int(word) for word in (words[1:] + ["1024", "5"][len(words) - 1 :])))


if __name__ == "__main__":
    main(sys.argv[1:])

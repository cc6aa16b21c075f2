# SPDX-License-Identifier: Apache-2.0
"""The disk of the demo: an ext4 file system with real files and one big database file."""

import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.demo.tools import DemoFailed, need, run

DATABASE = "database.bin"
BLOCK = 4096
_SOURCES = ("stdlib", "/usr/share/doc", "/usr/share", "/usr/include")
# "logical - logical  physical - physical  length", all in blocks
_LEAF = re.compile(r"\d+ *- *\d+ +(\d+) *- *\d+ +(\d+)")
_LARGEST = 4 << 20  # a bigger file would make the tree less like one


@dataclass(frozen=True)
class Disk:
    """A raw image; ``database`` is where the database file lies: (offset, length), in bytes."""

    path: Path
    size: int
    files: int
    file_bytes: int
    database: tuple[tuple[int, int], ...]


def make(path: Path, size: int, database_bytes: int) -> Disk:
    """An image of ``size`` bytes at ``path``, filled with real files up to half of what is left."""
    tree = path.with_suffix(".tree")
    tree.mkdir()
    files, file_bytes = _copy_files(tree, (size - database_bytes) // 2)
    _write_random(tree / DATABASE, database_bytes)
    with path.open("wb") as image:
        image.truncate(size)
    mke2fs = need("mke2fs", "e2fsprogs")
    run([mke2fs, "-q", "-F", "-t", "ext4", "-b", str(BLOCK), "-d", tree, path])
    shutil.rmtree(tree)
    return Disk(path, size, files, file_bytes, _locate(path, database_bytes))


def copy_sparse(source: Path, target: Path) -> None:
    """A copy that shares blocks where the file system can, and keeps holes in any case."""
    run(["cp", "--reflink=auto", "--sparse=always", source, target])


def check(path: Path) -> tuple[int, str]:
    """Exit status (0: clean) and findings of ``e2fsck -fn``; the findings name no path."""
    command = [need("e2fsck", "e2fsprogs"), "-fn", str(path)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    return done.returncode, done.stdout.replace(str(path), "disk")


def _candidates() -> Iterator[Path]:
    """Regular files of this machine that anyone may read, in an order that does not vary."""
    for source in _SOURCES:
        top = sysconfig.get_path("stdlib") if source == "stdlib" else source
        for folder, below, names in os.walk(top):
            below.sort()
            for name in sorted(names):
                path = Path(folder, name)
                if path.is_file() and not path.is_symlink() and os.access(path, os.R_OK):
                    yield path


def _copy_files(tree: Path, budget: int) -> tuple[int, int]:
    """Copy real files until ``budget`` bytes of disk are used; returns their number and bytes."""
    count = total = 0
    for path in _candidates():
        length = path.stat().st_size
        if length > _LARGEST:
            continue
        if total + length + count * BLOCK > budget:
            break
        target = tree / "files" / path.relative_to("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            shutil.copyfile(path, target)
            count, total = count + 1, total + length
    return count, total


def _write_random(path: Path, length: int) -> None:
    with path.open("wb") as file:
        for _ in range(length >> 20):
            file.write(os.urandom(1 << 20))


def _locate(image: Path, length: int) -> tuple[tuple[int, int], ...]:
    """Where the database lies in ``image``, from debugfs's list of its extents."""
    debugfs = need("debugfs", "e2fsprogs")
    listing = run([debugfs, "-R", f"dump_extents -l /{DATABASE}", image])
    found = [(int(first), int(count)) for first, count in _LEAF.findall(listing)]
    runs = tuple((first * BLOCK, count * BLOCK) for first, count in found)
    if "Uninit" in listing or sum(size for _, size in runs) != length:
        raise DemoFailed(f"debugfs did not say where {DATABASE} lies: {listing.strip()!r}")
    return runs

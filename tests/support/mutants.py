"""Images with seeded damage, and everything that may be done to one, in one process.

``python -m tests.support.mutants --seconds 600`` goes on until something is wrong; ``--seed N``
repeats one. No peer but qemu-img, which makes the images that are damaged.
"""

import argparse
import logging
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from fleece.block.node import Node
from fleece.errors import FleeceError
from fleece.formats.checking import check_image, open_for_check
from fleece.formats.opening import open_node
from tests.support.broken import KINDS, MASK, Editor, Kind, build

if TYPE_CHECKING:
    from nbdwire.extents import Extent

SECONDS = 10
MEBIBYTES = 256
SECRET = {"s": b"geheim"}

HOSTILE = (0, 1, 2, 511, 512, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 56) - 512, (1 << 63) - 1)
HOSTILE_64 = (*HOSTILE, 1 << 62, 1 << 63, (1 << 64) - 1, (1 << 63) | 512, (1 << 62) | (1 << 61))
# offset, bytes
HEADER = (
    *((4, 4), (8, 8), (16, 4), (20, 4), (24, 8), (32, 4), (36, 4), (40, 8), (48, 8), (56, 4)),
    *((60, 4), (64, 8), (72, 8), (80, 8), (88, 8), (96, 4), (100, 4), (104, 1)),
)

SMALL: dict[str, Kind] = {
    name: Kind(**{**kind.__dict__, "size": min(kind.size, 2 << 20)}) for name, kind in KINDS.items()
}


class HangError(BaseException):
    """It took too long. No library catches it by mistake."""


class BadMutantError(Exception):
    """What a mutant did that none may do; the text has the seed."""


@dataclass(frozen=True)
class Corpus:
    """Images to be damaged: their bytes, and the structures in them as ``(offset, length)``."""

    directory: Path
    images: dict[str, bytes]
    regions: dict[str, list[tuple[int, int]]]


def corpus(directory: Path) -> Corpus:
    images, regions = {}, {}
    for name, kind in SMALL.items():
        path = build(directory / f"{name}.qcow2", kind)
        images[name] = path.read_bytes()
        regions[name] = list(_regions(Editor(path)))
        path.unlink()
    return Corpus(directory, images, regions)


def _regions(e: Editor) -> Iterator[tuple[int, int]]:
    yield 0, min(512, e.size)
    yield 100, 100
    l1_size = e.u32(36)
    yield e.l1, min(l1_size * 8, 64)
    for index in range(l1_size):
        if e.l2(index):
            yield e.l2(index), min(e.size, 512)
    yield e.table, 64
    yield e.block(), 256
    if e.u32(60):
        yield e.u64(64), 160
        yield e.u64(e.u64(64)) & MASK, 32
    with suppress(AssertionError):
        directory = e.u64(e.extension(0x23852875) + 16)
        yield directory, 96
        yield e.u64(directory), 16


def damage(rng: random.Random, data: bytearray, regions: list[tuple[int, int]]) -> str:
    """Do one to three bad things to ``data``; what they were."""
    done = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        step = rng.choice((_flip, _flip, _field, _field, _entry, _entry, _noise, _cut, _copy))
        done.append(step(rng, data, regions))
    return ", ".join(done)


def _place(rng: random.Random, regions: list[tuple[int, int]], align: int) -> int:
    offset, length = rng.choice(regions)
    return offset + rng.randrange(max(1, length // align)) * align


def _flip(rng: random.Random, data: bytearray, regions: list[tuple[int, int]]) -> str:
    at, bit = _place(rng, regions, 1), rng.randrange(8)
    if at < len(data):
        data[at] ^= 1 << bit
    return f"bit {bit} of {at:#x}"


def _value(rng: random.Random, data: bytearray, regions: list[tuple[int, int]]) -> int:
    """A hostile number, a place of something, or near the end of the file."""
    flags = rng.choice((0, 0, 1 << 63, 1 << 62, 1))
    return rng.choice(
        (
            rng.choice(HOSTILE_64),
            rng.choice(regions)[0] | flags,
            (len(data) + rng.choice((-4096, -1, 0, 512, 65536))) | flags,
        )
    ) & ((1 << 64) - 1)


def _field(rng: random.Random, data: bytearray, regions: list[tuple[int, int]]) -> str:
    at, width = rng.choice(HEADER)
    value = _value(rng, data, regions) & ((1 << 8 * width) - 1)
    if at + width <= len(data):
        data[at : at + width] = value.to_bytes(width, "big")
    return f"header field {at} = {value:#x}"


def _entry(rng: random.Random, data: bytearray, regions: list[tuple[int, int]]) -> str:
    at, value = _place(rng, regions, 8), _value(rng, data, regions)
    if at + 8 <= len(data):
        struct.pack_into(">Q", data, at, value)
    return f"word at {at:#x} = {value:#x}"


def _noise(rng: random.Random, data: bytearray, regions: list[tuple[int, int]]) -> str:
    at, length = _place(rng, regions, 8), rng.choice((8, 16, 64, 512))
    noise = rng.randbytes(length)[: max(0, len(data) - at)]
    data[at : at + len(noise)] = noise
    return f"noise at {at:#x}"


def _copy(rng: random.Random, data: bytearray, regions: list[tuple[int, int]]) -> str:
    """One structure over another."""
    (source, length), target = rng.choice(regions), rng.choice(regions)[0]
    part = data[source : source + length][: max(0, len(data) - target)]
    data[target : target + len(part)] = part
    return f"{source:#x} over {target:#x}"


def _cut(rng: random.Random, data: bytearray, regions: list[tuple[int, int]]) -> str:
    length = rng.choice((rng.randrange(len(data) + 1), _place(rng, regions, 8)))
    del data[length:]
    return f"cut at {length:#x}"


def use(path: Path, name: str, rng: random.Random) -> None:
    """Everything: read, map, check, write, repair, check again."""
    source: dict[str, Any] = {
        "driver": "qcow2",
        "file": {"driver": "file", "filename": str(path), "locking": "off"},
    }
    if name == "luks":
        source["encrypt"] = {"format": "luks", "key-secret": "s"}
    for step in (
        lambda: _read(source, rng),
        lambda: _check(path, None),
        lambda: _write(source, rng),
        lambda: _check(path, "leaks" if rng.random() < 0.2 else None),
        lambda: _check(path, "all"),
        lambda: _check(path, None),
        lambda: _read(source, rng),
    ):
        with suppress(FleeceError, OSError):
            step()


def _check(path: Path, repair: str | None) -> None:
    node, _ = open_for_check(str(path), "qcow2", writable=repair is not None)
    try:
        check_image(node, "qcow2", repair=repair, report=lambda line: None)
    finally:
        node.close()


def _places(size: int, rng: random.Random) -> list[int]:
    picked = [0, 64 << 10, max(0, size - (64 << 10)), rng.randrange(max(1, size))]
    return [place for place in picked if place < size]


def _each(calls: list[Callable[[], object]]) -> None:
    """All of them, whatever each says."""
    for call in calls:
        with suppress(OSError):
            call()


def _read(source: dict[str, Any], rng: random.Random) -> None:
    node = open_node(source, read_only=True, keys=SECRET)
    try:
        for place in _places(node.size, rng):
            length = min(96 << 10, node.size - place)
            _each([lambda p=place, n=length: node.pread_into(memoryview(bytearray(n)), p)])
            _each([lambda p=place: _walk(node, p)])
            _each([lambda p=place: node.map(p, min(1 << 20, node.size - p))])
            _each([lambda p=place, n=length: node.pread_cached(memoryview(bytearray(n)), p)])
    finally:
        node.close()


def _walk(node: Node, offset: int) -> None:
    end = min(node.size, offset + (4 << 20))
    for _ in range(2000):
        if offset >= end:
            return
        extents: list[Extent] = node.extents(offset, end - offset)
        assert extents[0].offset == offset
        assert extents[-1].end > offset
        offset = extents[-1].end


def _write(source: dict[str, Any], rng: random.Random) -> None:
    node = open_node(source, keys=SECRET)
    try:
        for place in _places(node.size, rng):
            n = min(rng.choice((512, 5000, 70 << 10)), node.size - place)
            calls: list[Callable[[], object]] = [
                lambda p=place, n=n: node.pwrite(memoryview(b"w" * n), p),
                lambda p=place, n=n: node.zero(p, n),
                lambda p=place, n=n: node.trim(p, n),
                node.flush,
            ]
            rng.shuffle(calls)
            _each(calls)
    finally:
        node.close()


@contextmanager
def _limited() -> Iterator[None]:
    def hang(number: int, frame: FrameType | None) -> None:
        raise HangError

    old = signal.signal(signal.SIGALRM, hang)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def peak() -> int:
    """MiB that this process ever used."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def run_seed(images: Corpus, seed: int, base: int) -> None:
    """One mutant; BadMutantError if it gets out of hand. ``base``: `peak` at the start."""
    rng = random.Random(seed)
    name = rng.choice(sorted(images.images))
    data = bytearray(images.images[name])
    what = damage(rng, data, images.regions[name])
    path = images.directory / f"{name}.qcow2"
    path.write_bytes(data)
    try:
        with _limited():
            use(path, name, rng)
    except HangError:
        where = "".join(traceback.format_exc().splitlines(keepends=True)[-12:])
        raise BadMutantError(
            f"seed {seed} ({name}: {what}): over {SECONDS} s in\n{where}"
        ) from None
    except Exception:
        raise BadMutantError(
            f"seed {seed} ({name}: {what}):\n{traceback.format_exc()[-1500:]}"
        ) from None
    finally:
        path.unlink(missing_ok=True)
    if peak() - base > MEBIBYTES:
        raise BadMutantError(f"seed {seed} ({name}: {what}): {peak() - base} MiB")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=None, help="only this one")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=1 << 60)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--all", action="store_true", help="do not stop at the first")
    args = parser.parse_args()
    logging.disable()
    resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
    directory = Path(tempfile.mkdtemp(prefix="mutants-"))
    failed = done = 0
    try:
        images = corpus(directory)
        base, end = peak(), time.monotonic() + args.seconds
        first = args.first if args.seed is None else args.seed
        count = args.count if args.seed is None else 1
        for seed in range(first, first + count):
            if time.monotonic() > end:
                break
            done += 1
            try:
                run_seed(images, seed, base)
            except BadMutantError as error:
                failed += 1
                base = max(base, peak() - 1)
                print(error, file=sys.stderr, flush=True)
                if not args.all:
                    break
    finally:
        shutil.rmtree(directory)
    print(f"{done} mutants, {failed} failed, peak {peak()} MiB")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

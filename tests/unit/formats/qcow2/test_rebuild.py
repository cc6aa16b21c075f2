"""References of an image are counted as QEMU counts them, and a dirty image gets new counts."""

import random
import struct
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest

from fleece.block.file import FileNode
from fleece.errors import ImageCorrupt, UnsupportedFeature
from fleece.formats.qcow2.header import Header
from fleece.formats.qcow2.image import read_header
from fleece.formats.qcow2.rebuild import rebuild
from fleece.formats.qcow2.references import References, count_references
from fleece.formats.qcow2.tally import Problem, ProblemKind, Tally
from fleece.formats.qcow2.widths import Width
from tests.support.qcow2 import CLEAN, LEAKS, assert_clean, qemu_img, qemu_io

SECRET = ("--object", "secret,id=s,data=x")
OPTIONS = [
    "refcount_bits=1",
    "refcount_bits=2",
    "refcount_bits=4",
    "refcount_bits=8",
    "refcount_bits=32",
    "refcount_bits=64",
    "cluster_size=512",
    "cluster_size=2M",
    "cluster_size=512,refcount_bits=64",
    "cluster_size=2M,refcount_bits=1",
    "extended_l2=on",
    "compression_type=zstd",
    "compat=0.10",
    "data_file=DATA",
    "data_file=DATA,data_file_raw=on",
    "luks",
]


@cache
def encrypted() -> bytes:
    """As QEMU makes it; on a busy machine it fails at times to measure its own speed."""
    options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=50"
    create = ["create", "-q", "-f", "qcow2", *SECRET, "-o", options]
    with TemporaryDirectory() as directory:
        path = Path(directory, "disk.qcow2")
        for _ in range(20):
            qemu_img(*create, path, "64M", ok=(0, 1))
            if path.exists() and path.stat().st_size > 65536:
                break
        qemu_img("snapshot", *SECRET, "--image-opts", "-c", "a", unlocked(path))
        return path.read_bytes()


def unlocked(path: Path) -> str:
    return f"driver=qcow2,encrypt.key-secret=s,file.filename={path}"


def make(tmp_path: Path, options: str) -> Path:
    """An image with all that its options allow."""
    path = tmp_path / "disk.qcow2"
    arguments = ["-o", options.replace("DATA", str(tmp_path / "data"))]
    if options == "luks":
        path.write_bytes(encrypted())
        return path
    qemu_img("create", "-q", "-f", "qcow2", *arguments, path, "64M")
    qemu_io(path, "write 0 1M", "write -z 2M 1M", "write 5M 70k")
    if "data_file" not in options:
        if options not in ("refcount_bits=2", "refcount_bits=4"):  # no room for so many users
            qemu_io(path, "write -c 10M 2M", "write -c 20M 2M", "discard 20M 64k")
        if "refcount_bits=1" not in options.split(","):
            qemu_img("snapshot", "-c", "a", path)
            qemu_io(path, "write 128k 1M")
            qemu_img("snapshot", "-c", "b", path)
    if "compat" not in options:
        qemu_img("bitmap", "--add", "--enable", path, "bm")
        qemu_io(path, "write 12k 1M", "write 40M 1M")
    return path


def is_clean(path: Path, options: str) -> None:
    if options == "luks":
        qemu_img("check", "-q", *SECRET, "--image-opts", unlocked(path))
    else:
        assert_clean(path)


@contextmanager
def counted(path: Path) -> Iterator[tuple[Header, References, list[Problem]]]:
    problems: list[Problem] = []
    with closing(FileNode(path, read_only=True, locking=False)) as file:
        header = read_header(file, "test")
        data_file = header.has_data_file
        yield (
            header,
            count_references(file, header, data_file=data_file, on_problem=problems.append),
            problems,
        )


def on_disk(path: Path, header: Header, clusters: int) -> list[int]:
    """The counts as the image has them."""
    data, width = path.read_bytes(), Width(header.refcount_order)
    per_block = header.cluster_size * 8 // width.bits
    counts = []
    for first in range(0, clusters, per_block):
        at = header.refcount_table_offset + first // per_block * 8
        (block,) = struct.unpack_from(">Q", data, at)
        part = bytes(header.cluster_size)
        if block:
            part = data[block : block + header.cluster_size].ljust(header.cluster_size, b"\0")
        counts += width.read(part, 0, min(per_block, clusters - first)).tolist()
    return counts


@pytest.mark.parametrize("options", OPTIONS)
def test_references_are_counted_as_qemu_counts_them(options: str, tmp_path: Path) -> None:
    path = make(tmp_path, options)
    is_clean(path, options)
    with counted(path) as (header, found, problems):
        assert problems == []
        assert found.counts.tolist() == on_disk(path, header, len(found.counts))
        assert (found.counts[found.tables >> header.cluster_bits] == found.table_users).all()


def ruin(path: Path, rnd: random.Random) -> None:
    """Set the dirty bit, and make the counts worthless."""
    with closing(FileNode(path, locking=False)) as file:
        header = read_header(file, "test")
        table = bytearray(8)
        file.pread_into(memoryview(table), header.refcount_table_offset)
        block = int.from_bytes(table, "big")
        junk = rnd.choice([b"\0", b"\xff", rnd.randbytes(1)]) * header.cluster_size
        file.pwrite(memoryview(junk), block)
        dirty = struct.pack(">Q", header.incompatible | 1)
        file.pwrite(memoryview(dirty), 72)


@pytest.mark.parametrize("options", [o for o in OPTIONS if "compat" not in o])
def test_a_dirty_image_gets_the_counts_that_it_needs(options: str, tmp_path: Path) -> None:
    path = make(tmp_path, options)
    before = tmp_path / "before.raw"
    if options != "luks":
        qemu_img("convert", "-O", "raw", path, before)
    ruin(path, random.Random(options))
    with closing(FileNode(path, locking=False)) as file:
        header = rebuild(file, read_header(file, "test"), "test")
    with closing(FileNode(path, locking=False)) as file:
        assert header == read_header(file, "test")
        assert not header.dirty
    is_clean(path, options)
    if options != "luks":
        qemu_img("compare", path, before)


def test_every_prefix_of_a_rebuild_can_be_rebuilt(tmp_path: Path) -> None:
    path = make(tmp_path, "cluster_size=512,refcount_bits=64")
    ruin(path, random.Random(5))
    dirty = path.read_bytes()
    done = False
    for limit in range(0, 600, 29):
        path.write_bytes(dirty)
        dying = Dying(path, locking=False)
        dying.left = limit
        with closing(dying):
            try:
                rebuild(dying, read_header(dying, "test"), "test")
                done = True
            except OSError:
                done = False
        if done:
            break
        with closing(FileNode(path, locking=False)) as file:
            assert read_header(file, "test").dirty
            rebuild(file, read_header(file, "test"), "test")
        assert_clean(path)
    assert done
    assert_clean(path)


class Dying(FileNode):
    left = 0

    def pwrite(self, buf: memoryview, offset: int, fua: bool = False) -> None:
        if not self.left:
            raise OSError(5, "gone")
        self.left -= 1
        super().pwrite(buf, offset, fua)


@dataclass
class Tables:
    """The first L2 table of an image, and its L1 table."""

    path: Path
    header: Header
    l1: int
    l2: int

    def patch(self, at: int, *words: int) -> None:
        with self.path.open("r+b") as file:
            file.seek(at)
            file.write(struct.pack(f">{len(words)}Q", *words))

    def words(self, at: int, count: int) -> tuple[int, ...]:
        return struct.unpack_from(f">{count}Q", self.path.read_bytes(), at)


def tables(tmp_path: Path, options: str = "cluster_size=64k") -> Tables:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, "64M")
    qemu_io(path, "write 0 256k")
    with closing(FileNode(path, read_only=True, locking=False)) as file:
        header = read_header(file, "test")
    (l2,) = struct.unpack_from(">Q", path.read_bytes(), header.l1_offset)
    return Tables(path, header, header.l1_offset, l2 & 0x00FFFFFFFFFFFE00)


K = ProblemKind
COPIED, PACKED = 1 << 63, 1 << 62
BAD_ENTRIES = [
    ("cluster_size=64k", (COPIED | 0x50000 | 1 << 57,), K.L2_RESERVED),
    ("cluster_size=64k", (COPIED | 0x50000 | 2,), K.L2_RESERVED),
    ("cluster_size=64k", (COPIED | 0x50200,), K.DATA_UNALIGNED),
    ("cluster_size=64k", (COPIED | 0x50201,), K.ZERO_UNALIGNED),
    ("cluster_size=64k", (COPIED | 1 << 50,), K.BEYOND_END),
    ("cluster_size=64k", (COPIED | PACKED | 0x50000,), K.COMPRESSED_COPIED),
    ("cluster_size=64k", (PACKED | 1 << 45,), K.BEYOND_END),
    ("compat=0.10", (COPIED | 0x50001,), K.ZERO_FLAG),
    ("extended_l2=on", (COPIED | 0x50001, 0), K.ZERO_FLAG),
    ("extended_l2=on", (COPIED | 0x50000, 1 << 32 | 1), K.SUBCLUSTER_BOTH),
    ("extended_l2=on", (0, 1), K.SUBCLUSTER_NO_HOST),
    ("extended_l2=on", (PACKED | 0x50000, 1), K.COMPRESSED_BITMAP),
    ("extended_l2=on", (COPIED | 0x50200, 1 << 32), K.ZERO_UNALIGNED),
    ("extended_l2=on", (COPIED | 0x50200, 1), K.DATA_UNALIGNED),
]


@pytest.mark.parametrize(("options", "words", "kind"), BAD_ENTRIES)
def test_what_is_wrong_with_an_entry_is_told_with_its_place(
    options: str, words: tuple[int, ...], kind: ProblemKind, tmp_path: Path
) -> None:
    """formats.md §1.2, §1.11."""
    it = tables(tmp_path, options)
    at = it.l2 + 8 * len(words) * 9
    it.patch(at, *words)
    with counted(it.path) as (_, _, problems):
        [problem] = [p for p in problems if p.kind == kind]
        if kind != K.BEYOND_END:
            assert (problem.at, problem.entry) == (at, words[0])
            assert problem.bitmap == (words[1] if len(words) == 2 else 0)
    before = it.path.read_bytes()
    it.patch(72, it.header.incompatible | 1)
    with closing(FileNode(it.path, locking=False)) as file, pytest.raises(ImageCorrupt):
        rebuild(file, it.header, "test")
    assert it.path.read_bytes()[80:] == before[80:]


def test_wrong_l1_entries_are_told(tmp_path: Path) -> None:
    it = tables(tmp_path)
    for entry, kind in (
        (COPIED | it.l2 | 1 << 58, K.L1_RESERVED),
        (COPIED | (it.l2 + 512), K.L1_UNALIGNED),
        (COPIED | 1 << 52, K.BEYOND_END),
    ):
        it.patch(it.l1, entry)
        with counted(it.path) as (_, _, problems):
            assert [p.kind for p in problems] == [kind]


def test_wrong_refcount_table_entries_are_told(tmp_path: Path) -> None:
    it = tables(tmp_path)
    table = it.header.refcount_table_offset
    (good,) = it.words(table, 1)
    for entry, kind in (
        (good | 4, K.REFCOUNT_RESERVED),
        (good | 0x1000, K.REFCOUNT_UNALIGNED),
        ((1 << 64) - 0x10000, K.REFCOUNT_OUTSIDE),
        (it.l2, K.REFCOUNT_SHARED),
    ):
        it.patch(table + 8, entry)
        with counted(it.path) as (_, _, problems):
            assert [(p.kind, p.index) for p in problems] == [(kind, 1)]


def test_a_table_with_many_users_is_read_once_and_counts_for_each(tmp_path: Path) -> None:
    """formats.md §12: L1 entries that all point at one L2 table."""
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=64k,refcount_bits=64", path, "2T")
    qemu_io(path, "write 0 64k")
    with closing(FileNode(path, read_only=True, locking=False)) as file:
        header = read_header(file, "test")
    it = Tables(path, header, header.l1_offset, 0)
    (l1,) = it.words(it.l1, 1)
    it.patch(it.l1, *[l1] * header.l1_size)
    (data,) = it.words(l1 & 0x00FFFFFFFFFFFE00, 1)
    it.patch((l1 & 0x00FFFFFFFFFFFE00) + 8, *[data] * 8191)
    with counted(path) as (_, found, problems):
        assert problems == []
        host = (data & 0x00FFFFFFFFFFFE00) >> 16
        assert found.counts[host] == 8192 * header.l1_size
        assert found.table_users.tolist() == [header.l1_size]


def test_more_references_than_the_width_holds_are_told(tmp_path: Path) -> None:
    it = tables(tmp_path, "refcount_bits=2")
    (data,) = it.words(it.l2, 1)
    it.patch(it.l2, *[data] * 9)
    with counted(it.path) as (header, found, problems):
        host = (data & 0x00FFFFFFFFFFFE00) >> header.cluster_bits
        assert [(p.kind, p.offset) for p in problems] == [(K.OVERFLOW, host << 16)]
        assert found.counts[host] == 3


def test_problems_without_end_are_told_in_one_from_a_limit_on(tmp_path: Path) -> None:
    it = tables(tmp_path, "cluster_size=2M")
    it.patch(it.l2, *[COPIED | 0x50200] * 32_000)
    with counted(it.path) as (_, _, problems):
        unaligned = [p for p in problems if p.kind == K.DATA_UNALIGNED]
        assert len(unaligned) < 11_000
        assert sum(p.times for p in unaligned) == 32_000


@pytest.mark.parametrize("length", [10, 70_000, 2_000_000])
def test_counts_are_those_of_a_simple_count(length: int) -> None:
    header = Header(3, 16, 0, 0, 0, 0, 0, refcount_order=5)
    rnd = np.random.default_rng(length)
    tally = Tally(header, length << 16, None)
    model = np.zeros(length, np.int64)
    for times in (1, 1, 3, 300, 70_000):
        clusters = rnd.integers(0, length, 5000)
        tally.add(clusters, times)
        np.add.at(model, clusters, times)
    tally.add(np.zeros(0, np.int64))
    assert (tally.counts == model).all()


def test_a_file_of_too_many_clusters_is_refused_without_memory(tmp_path: Path) -> None:
    header = Header(3, 9, 0, 0, 0, 0, 0)
    with pytest.raises(UnsupportedFeature, match="too many clusters"):
        Tally(header, 1 << 62, None)


def test_a_shared_cluster_that_the_disk_calls_its_own_is_not_rebuilt(tmp_path: Path) -> None:
    path = make(tmp_path, "cluster_size=64k")
    with closing(FileNode(path, locking=False)) as file:
        header = read_header(file, "test")
    it = Tables(path, header, header.l1_offset, 0)
    (l1,) = it.words(it.l1, 1)
    it.patch(it.l1, l1 | COPIED)
    l2 = l1 & 0x00FFFFFFFFFFFE00
    shared = next(
        i for i, e in enumerate(it.words(l2, 100)) if e & 0x00FFFFFFFFFFFE00 and not e & COPIED
    )
    it.patch(l2 + shared * 8, it.words(l2 + shared * 8, 1)[0] | COPIED)
    with closing(FileNode(path, locking=False)) as file:
        dirty = read_header(file, "test")
        with pytest.raises(ImageCorrupt, match=r"two tables .*image check -r all"):
            rebuild(file, dirty, "test")
    qemu_img("check", "-q", "-r", "all", path, ok=(CLEAN, LEAKS))

"""Small images of every kind by QEMU, and functions that break one thing of them each."""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.support.qcow2 import qemu_img, qemu_io

COPIED = 1 << 63
COMPRESSED = 1 << 62
MASK = 0x00FFFFFFFFFFFE00


class Editor:
    """The bytes of an image, which can be read and changed by structure. Written by `save`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = bytearray(path.read_bytes())

    def save(self) -> None:
        self.path.write_bytes(self.data)

    def u64(self, at: int) -> int:
        return int.from_bytes(self.data[at : at + 8].ljust(8, b"\0"), "big")

    def u32(self, at: int) -> int:
        return int.from_bytes(self.data[at : at + 4], "big")

    def put64(self, at: int, value: int) -> None:
        self.reach(at + 8)
        struct.pack_into(">Q", self.data, at, value)

    def put32(self, at: int, value: int) -> None:
        struct.pack_into(">I", self.data, at, value)

    def reach(self, end: int) -> None:
        self.data.extend(bytes(max(0, end - len(self.data))))

    @property
    def size(self) -> int:
        """Of a cluster."""
        return 1 << self.u32(20)

    @property
    def version(self) -> int:
        return self.u32(4)

    @property
    def entry_size(self) -> int:
        return 16 if self.version == 3 and self.u64(72) & 16 else 8

    @property
    def l1(self) -> int:
        return self.u64(40)

    @property
    def table(self) -> int:
        """Offset of the refcount table."""
        return self.u64(48)

    @property
    def width(self) -> int:
        return 1 << self.u32(96) if self.version == 3 else 16

    def l2(self, index: int = 0) -> int:
        return self.u64(self.l1 + 8 * index) & MASK

    def l2_at(self, cluster: int) -> int:
        """Where the L2 entry of guest cluster ``cluster`` is."""
        per = self.size // self.entry_size
        return self.l2(cluster // per) + cluster % per * self.entry_size

    def entry(self, cluster: int) -> int:
        return self.u64(self.l2_at(cluster))

    def set_entry(self, cluster: int, value: int) -> None:
        self.put64(self.l2_at(cluster), value)

    def host(self, cluster: int) -> int:
        return self.entry(cluster) & MASK

    def block(self, index: int = 0) -> int:
        return self.u64(self.table + 8 * index) & ~0x1FF

    def count(self, host: int) -> int:
        """The refcount of the host cluster at offset ``host``."""
        at, shift, width = self._count_place(host)
        if width < 8:
            return self.data[at] >> shift & ((1 << width) - 1)
        return int.from_bytes(self.data[at : at + width // 8], "big")

    def set_count(self, host: int, value: int) -> None:
        at, shift, width = self._count_place(host)
        if width < 8:
            mask = ((1 << width) - 1) << shift
            self.data[at] = self.data[at] & ~mask & 255 | value << shift
        else:
            self.data[at : at + width // 8] = value.to_bytes(width // 8, "big")

    def _count_place(self, host: int) -> tuple[int, int, int]:
        width, cluster = self.width, host // self.size
        per_block = self.size * 8 // width
        index, at = divmod(cluster, per_block)
        bit = at * width
        return self.block(index) + bit // 8, bit % 8, width

    def append(self, clusters: int = 1) -> int:
        """Offset of new clusters at the end, which are counted once."""
        start = -(-len(self.data) // self.size) * self.size
        self.reach(start + clusters * self.size)
        for n in range(clusters):
            self.set_count(start + n * self.size, 1)
        return start

    def extension(self, number: int) -> int:
        """Where the data of a header extension is."""
        at = self.u32(100) if self.version == 3 else 72
        while self.u32(at) != number:
            assert self.u32(at) != 0, f"no extension {number:#x}"
            at += 8 + -(-self.u32(at + 4) // 8) * 8
        return at + 8


@dataclass(frozen=True)
class Kind:
    """How to make an image: options of ``qemu-img create``, and what happens to it."""

    options: str
    size: int = 4 << 20
    backing: bool = False
    snapshots: int = 0
    bitmaps: int = 0
    compressed: bool = False
    data_file: bool = False


KINDS = {
    "v3": Kind("cluster_size=4k"),
    "v2": Kind("cluster_size=4k,compat=0.10"),
    "large": Kind("cluster_size=64k", 64 << 20),
    "tiny": Kind("cluster_size=512", 1 << 20),
    "refcount1": Kind("cluster_size=4k,refcount_bits=1"),
    "refcount2": Kind("cluster_size=4k,refcount_bits=2", snapshots=1),
    "refcount4": Kind("cluster_size=4k,refcount_bits=4", snapshots=1),
    "refcount8": Kind("cluster_size=4k,refcount_bits=8", snapshots=1),
    "refcount32": Kind("cluster_size=4k,refcount_bits=32", snapshots=1),
    "refcount64": Kind("cluster_size=4k,refcount_bits=64", snapshots=1),
    "extended": Kind("cluster_size=16k,extended_l2=on", snapshots=1),
    "snapshots": Kind("cluster_size=4k", snapshots=2),
    "snapshots2": Kind("cluster_size=4k,compat=0.10", snapshots=2),
    "compressed": Kind("cluster_size=4k", compressed=True),
    "zstd": Kind("cluster_size=4k,compression_type=zstd", compressed=True),
    "bitmaps": Kind("cluster_size=4k", bitmaps=2),
    "preallocated": Kind("cluster_size=4k,preallocation=metadata"),
    "lazy": Kind("cluster_size=4k,lazy_refcounts=on"),
    "backed": Kind("cluster_size=4k", backing=True),
    "data_file": Kind("cluster_size=4k", data_file=True),
    "luks": Kind("cluster_size=4k,encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"),
}


def build(path: Path, kind: Kind) -> Path:
    """The image ``path`` with data at the start, in the middle and at the end, and zeroes."""
    options = kind.options
    arguments: list[str | Path] = ["create", "-q", "-f", "qcow2"]
    if kind.data_file:
        options += f",data_file={path.with_suffix('.data')}"
    if kind.backing:
        base = path.with_suffix(".base")
        base.write_bytes(b"b" * kind.size)
        arguments += ["-b", base, "-F", "raw"]
    if "encrypt" in options:
        arguments += ["--object", "secret,id=s,data=geheim"]
        _create_encrypted([*arguments, "-o", options, path, str(kind.size)])
        return path
    qemu_img(*arguments, "-o", options, path, str(kind.size))
    unit = 16 << 10 if "16k" in options else 64 << 10
    end = kind.size - 2 * unit
    write = "write -c" if kind.compressed else "write"
    qemu_io(path, f"{write} -P 1 0 {unit}", f"{write} -P 2 {unit * 3} {unit}")
    qemu_io(path, f"write -P 3 {end} {unit}")
    if not path.name.startswith("v2") and "0.10" not in options:
        qemu_io(path, f"write -z {unit * 5} {unit}", f"write -P 4 {unit * 7} {unit}")
        qemu_io(path, f"write -z {unit * 7} {unit}")
    for n in range(kind.snapshots):
        qemu_img("snapshot", "-c", f"s{n}", path)
        qemu_io(path, f"write -P {5 + n} {unit * n} {unit // 2}")
    for n in range(kind.bitmaps):
        qemu_img("bitmap", "--add", path, f"b{n}")
        qemu_io(path, f"write -P {7 + n} {unit * n} {unit}")
    return path


def _create_encrypted(arguments: list[str | Path]) -> None:
    """QEMU sometimes cannot measure the CPU within so short a time."""
    for attempt in range(5):
        try:
            qemu_img(*arguments)
            return
        except AssertionError as error:
            if attempt == 4 or "CPU" not in str(error):
                raise


Break = Callable[[Editor], None]


def leak(e: Editor) -> None:
    e.append(3)


def count_too_high(e: Editor) -> None:
    e.set_count(e.host(0), e.count(e.host(0)) + 1)


def count_too_low(e: Editor) -> None:
    """One reference too many for the count, which is not 0."""
    e.set_entry(1, e.entry(0))


def count_zero(e: Editor) -> None:
    e.set_count(e.host(0), 0)


def count_of_header_zero(e: Editor) -> None:
    e.set_count(0, 0)


def all_counts_zero(e: Editor) -> None:
    block = e.block()
    e.data[block : block + e.size] = bytes(e.size)


def copied_missing(e: Editor) -> None:
    e.set_entry(0, e.entry(0) & ~COPIED)


def copied_wrong(e: Editor) -> None:
    """COPIED on data that has two references."""
    e.set_count(e.host(0), 2)
    e.set_entry(1, e.entry(0) | COPIED)


def l1_copied_missing(e: Editor) -> None:
    e.put64(e.l1, e.u64(e.l1) & ~COPIED)


def l1_reserved(e: Editor) -> None:
    e.put64(e.l1, e.u64(e.l1) | 1 << 60 | 1)


def l2_reserved(e: Editor) -> None:
    e.set_entry(0, e.entry(0) | 1 << 59)


def data_unaligned(e: Editor) -> None:
    e.set_entry(0, e.entry(0) + 512)


def zero_unaligned(e: Editor) -> None:
    """A preallocated zero cluster at a place that cannot be."""
    at = e.l2_at(0)
    if e.entry_size == 16:
        e.put64(at, e.u64(at) + 512)
        e.put64(at + 8, 0xFFFFFFFF << 32)
    else:
        e.put64(at, e.u64(at) + 512 | 1)


def data_beyond_end(e: Editor) -> None:
    e.set_entry(0, (1 << 40) | COPIED)


def l2_beyond_end(e: Editor) -> None:
    e.put64(e.l1, (1 << 40) | COPIED)


def l2_unaligned(e: Editor) -> None:
    e.put64(e.l1, e.u64(e.l1) + 512)


def l2_is_header(e: Editor) -> None:
    """Offset 0 means nothing, so this one is the first table behind it."""
    e.put64(e.l1, e.table | COPIED)


def l2_is_l1(e: Editor) -> None:
    e.put64(e.l1, e.l1 | COPIED)


def data_is_refcount_table(e: Editor) -> None:
    e.set_entry(0, e.table | COPIED)


def data_is_refcount_block(e: Editor) -> None:
    e.set_entry(0, e.block() | COPIED)


def data_is_own_table(e: Editor) -> None:
    e.set_entry(0, e.l2() | COPIED)


def l2_shared(e: Editor) -> None:
    """Two L1 entries with one table."""
    e.put64(e.l1 + 8, e.u64(e.l1))


def block_unaligned(e: Editor) -> None:
    e.put64(e.table, e.u64(e.table) + 512)


def block_reserved(e: Editor) -> None:
    e.put64(e.table, e.u64(e.table) | 8)


def block_beyond_end(e: Editor) -> None:
    e.put64(e.table + 8, -(-len(e.data) // e.size) * e.size + 16 * e.size)


def block_shared(e: Editor) -> None:
    e.put64(e.table + 8, e.u64(e.table))


def block_missing(e: Editor) -> None:
    e.put64(e.table, 0)


def dirty(e: Editor) -> None:
    e.put64(72, e.u64(72) | 1)


def dirty_and_low(e: Editor) -> None:
    dirty(e)
    e.set_count(e.host(0), 0)


def marked_corrupt(e: Editor) -> None:
    e.put64(72, e.u64(72) | 2)


def unknown_autoclear(e: Editor) -> None:
    e.put64(88, e.u64(88) | 1 << 40)


def compressed_copied(e: Editor) -> None:
    e.set_entry(0, e.entry(0) | COPIED)


def compressed_beyond_end(e: Editor) -> None:
    e.set_entry(0, e.entry(0) | 1 << 40)


def subclusters_both(e: Editor) -> None:
    e.put64(e.l2_at(0) + 8, (1 << 32) | 0xFFFFFFFF)


def subclusters_homeless(e: Editor) -> None:
    e.put64(e.l2_at(0), 0)


def snapshot_l1_unaligned(e: Editor) -> None:
    e.put64(e.u64(64), e.u64(e.u64(64)) + 512)


def snapshot_l1_beyond_end(e: Editor) -> None:
    e.put64(e.u64(64), 1 << 40)


def snapshot_l1_huge(e: Editor) -> None:
    e.put32(e.u64(64) + 8, 1 << 31)


def snapshot_extra_huge(e: Editor) -> None:
    e.put32(e.u64(64) + 36, 1 << 20)


def snapshots_beyond_end(e: Editor) -> None:
    e.put64(64, 1 << 40)


def snapshots_unaligned(e: Editor) -> None:
    e.put64(64, e.u64(64) + 512)


def bitmaps_not_valid(e: Editor) -> None:
    """A program that knows no bitmaps wrote the image."""
    e.put64(88, 0)


def bitmap_directory_garbage(e: Editor) -> None:
    at = e.u64(e.extension(0x23852875) + 16)
    e.data[at : at + 64] = b"\xff" * 64


def bitmap_table_entry_bad(e: Editor) -> None:
    directory = e.u64(e.extension(0x23852875) + 16)
    e.put64(e.u64(directory), 0x1FE)


def bitmap_count_wrong(e: Editor) -> None:
    e.put32(e.extension(0x23852875), 9)


EVERYWHERE: tuple[Break, ...] = (
    leak,
    count_zero,
    count_of_header_zero,
    copied_missing,
    l1_copied_missing,
    l1_reserved,
    l2_beyond_end,
    block_missing,
    block_shared,
    all_counts_zero,
    l2_shared,
)
WITH_DATA: tuple[Break, ...] = (
    count_too_low,
    data_beyond_end,
    data_is_refcount_table,
    data_is_own_table,
    data_is_refcount_block,
    l2_reserved,
)
WIDE: tuple[Break, ...] = (count_too_high, copied_wrong)
"""With refcounts of 2 bits at least."""
ALIGNED: tuple[Break, ...] = (data_unaligned, l2_unaligned, block_unaligned)
"""With clusters above 512 bytes."""
VERSION_3: tuple[Break, ...] = (dirty, dirty_and_low, marked_corrupt, unknown_autoclear)

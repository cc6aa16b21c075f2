"""Compressed clusters: formats.md §1.2, the hostile ones §12."""

import zlib
from random import Random

import pytest
from backports import zstd

from fleece.block.memory import MemoryNode
from fleece.formats.qcow2 import compressed

BITS = 16
SIZE = 1 << BITS


def text(size: int = SIZE) -> bytes:
    random = Random(4)
    return b"".join(b"line %d of a log\n" % random.randrange(99999) for _ in range(size))[:size]


def stored(packed: bytes, offset: int = 1000, end: int | None = None) -> tuple[MemoryNode, int]:
    """A file with the stream at ``offset``, and the entry for it."""
    node = MemoryNode(end or offset + len(packed) + 512)
    node.pwrite(memoryview(packed), offset)
    return node, compressed.entry_for(offset, len(packed), BITS)


@pytest.mark.parametrize("kind", [compressed.DEFLATE, compressed.ZSTD])
@pytest.mark.parametrize("bits", [9, 12, 16, 21])
def test_what_is_packed_is_read_again(kind: int, bits: int) -> None:
    data = text(1 << bits)
    packed = compressed.pack(data, kind, bits)
    assert packed is not None
    assert len(packed) < len(data)
    node = MemoryNode(4 << 20)
    node.pwrite(memoryview(packed), 777)
    entry = compressed.entry_for(777, len(packed), bits)
    assert compressed.read(node, entry, bits, kind) == data


@pytest.mark.parametrize("kind", [compressed.DEFLATE, compressed.ZSTD])
def test_the_short_cluster_at_the_end_of_a_disk_is_padded_with_zeroes(kind: int) -> None:
    packed = compressed.pack(b"short", kind, BITS)
    assert packed is not None
    assert compressed.unpack(packed, kind, SIZE) == b"short".ljust(SIZE, b"\0")


@pytest.mark.parametrize("kind", [compressed.DEFLATE, compressed.ZSTD])
def test_what_does_not_shrink_is_not_packed(kind: int) -> None:
    assert compressed.pack(Random(1).randbytes(SIZE), kind, BITS) is None


def test_deflate_is_written_with_the_window_of_4_kib_that_qemu_reads() -> None:
    packed = compressed.pack(text(), compressed.DEFLATE, BITS)
    assert packed is not None
    assert zlib.decompressobj(-12).decompress(packed) == text()


@pytest.mark.parametrize("kind", [compressed.DEFLATE, compressed.ZSTD])
def test_a_stream_that_is_cut_short_is_an_error(kind: int) -> None:
    packed = compressed.pack(text(), kind, BITS)
    assert packed is not None
    with pytest.raises(OSError, match="corrupt"):
        compressed.read(*stored(packed[: len(packed) // 2]), BITS, kind)


@pytest.mark.parametrize("kind", [compressed.DEFLATE, compressed.ZSTD])
def test_noise_is_an_error(kind: int) -> None:
    with pytest.raises(OSError, match="corrupt"):
        compressed.read(*stored(b"\xff" * 600), BITS, kind)


def test_zstd_frames_may_follow_each_other_in_one_cluster() -> None:
    """formats.md §1.2: loop until there is a whole cluster."""
    data = text()
    frames = zstd.compress(data[:1000]) + zstd.compress(b"") + zstd.compress(data[1000:])
    assert compressed.read(*stored(frames), BITS, compressed.ZSTD) == data


def test_the_last_zstd_frame_must_end_with_the_cluster() -> None:
    bomb = zstd.compress(bytes(64 << 20))
    with pytest.raises(OSError, match="does not end where its cluster does"):
        compressed.read(*stored(bomb), BITS, compressed.ZSTD)


def test_a_deflate_bomb_gives_one_cluster_and_no_more() -> None:
    bomb = zlib.compress(bytes(64 << 20), wbits=-15)
    assert compressed.unpack(bomb, compressed.DEFLATE, SIZE) == bytes(SIZE)


def test_a_zstd_window_above_the_limit_is_refused() -> None:
    """formats.md §1.2: cap the window."""
    parameter = zstd.CompressionParameter
    options = {parameter.window_log: 28, parameter.content_size_flag: 0}
    packer = zstd.ZstdCompressor(options=options)
    frame = packer.compress(bytes(SIZE), packer.FLUSH_BLOCK) + packer.flush()
    with pytest.raises(OSError, match="corrupt"):
        compressed.read(*stored(frame), BITS, compressed.ZSTD)


def test_a_cluster_of_empty_frames_ends_soon() -> None:
    frames = zstd.compress(b"") * (SIZE // 9)
    with pytest.raises(OSError, match="corrupt"):
        compressed.read(*stored(frames), BITS, compressed.ZSTD)


@pytest.mark.parametrize("kind", [compressed.DEFLATE, compressed.ZSTD])
def test_sectors_behind_the_end_of_the_file_are_zero_padding(kind: int) -> None:
    packed = compressed.pack(text(), kind, BITS)
    assert packed is not None
    node, entry = stored(packed, end=1000 + len(packed))
    assert compressed.read(node, entry, BITS, kind) == text()


@pytest.mark.parametrize(("offset", "length"), [(0, 1), (511, 2), (512, 512), (70000, 65535)])
def test_an_entry_tells_its_place(offset: int, length: int) -> None:
    start, room = compressed.place(compressed.entry_for(offset, length, BITS), BITS)
    assert start == offset
    assert length <= room < length + 512
    assert (start + room) % 512 == 0


def test_an_entry_has_no_room_for_an_offset_that_is_too_far() -> None:
    with pytest.raises(OSError, match="further"):
        compressed.entry_for(1 << 49, 100, 21)

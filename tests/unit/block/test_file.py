import errno
import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from threading import Event, Thread

import pytest

from fleece.block import file as file_module
from fleece.block.fallocate import PUNCH_HOLE, ZERO_RANGE
from fleece.block.file import FileNode
from fleece.block.holes import MOST_STRETCHES
from fleece.errors import ImageError, ImageInUse, NotFound
from nbdwire.constants import (
    CMD_FLAG_FAST_ZERO,
    CMD_FLAG_FUA,
    CMD_FLAG_NO_HOLE,
    STATE_HOLE,
    STATE_ZERO,
)
from nbdwire.export import ZERO_RUN
from nbdwire.extents import Extent
from tests.support.blockdev import loop_device

MiB = 1 << 20
HOLE = STATE_HOLE | STATE_ZERO


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"a" * MiB)
    return path


@pytest.fixture
def node(image: Path) -> Iterator[FileNode]:
    with closing(FileNode(image)) as opened:
        yield opened


def pread(node: FileNode, length: int, offset: int) -> bytes:
    buf = bytearray(b"\xee" * length)
    node.pread_into(memoryview(buf), offset)
    return bytes(buf)


def refusal(path: Path | str, *, read_only: bool = False) -> str:
    """The message, which must be one line that names the path and a next step."""
    with pytest.raises((ImageError, NotFound)) as caught:
        FileNode(path, read_only=read_only)
    message = str(caught.value)
    assert "\n" not in message
    assert ";" in message
    return message


def test_a_missing_image_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"there is no image .*missing\.raw; check the path"):
        FileNode(tmp_path / "missing.raw")
    (tmp_path / "file").touch()
    with pytest.raises(NotFound):
        FileNode(tmp_path / "file" / "below")


def test_what_is_no_file_or_block_device_is_named_and_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")  # opening it would wait for ever
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "sock"))
        kinds = {
            tmp_path: "it is a directory",
            tmp_path / "fifo": "it is a FIFO",
            tmp_path / "sock": "it is a socket",
            Path("/dev/null"): "it is a character device",
        }
        for path, kind in kinds.items():
            for read_only in (False, True):
                message = refusal(path, read_only=read_only)
                assert kind in message
                assert str(path) in message


@pytest.mark.parametrize(
    ("number", "read_only", "expected"),
    [
        (errno.EACCES, False, "permission denied; .*writing it, or open it read-only"),
        (errno.EACCES, True, "permission denied; run as a user with the right of reading it$"),
        (errno.EROFS, False, "read-only file system; open it read-only"),
        (errno.EMFILE, False, "too many open files; raise the limit"),
        (errno.EIO, False, "input/output error; check it"),
    ],
)
def test_each_reason_why_open_fails_has_its_next_step(
    image: Path, monkeypatch: pytest.MonkeyPatch, number: int, read_only: bool, expected: str
) -> None:
    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number), str(image))

    monkeypatch.setattr(os, "open", fail)
    message = refusal(image, read_only=read_only)
    assert re.search(f"cannot open image {re.escape(str(image))}: {expected}", message), message


def test_a_path_with_a_line_break_or_a_null_makes_one_line(tmp_path: Path) -> None:
    assert r"two\nlines" in refusal(tmp_path / "two\nlines")
    assert "null" in refusal("a\0b")


def test_a_refused_image_leaves_no_descriptor(image: Path) -> None:
    with closing(FileNode(image)):
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            with pytest.raises(ImageInUse):
                FileNode(image)
        assert len(os.listdir("/proc/self/fd")) == before


def test_the_name_is_the_path_unless_one_is_given(image: Path) -> None:
    with closing(FileNode(image, read_only=True)) as node:
        assert node.name == str(image)
    with closing(FileNode(image, name="vm1")) as node:
        assert node.name == "vm1"


def test_the_descriptor_is_not_inherited_and_blocks(node: FileNode) -> None:
    assert not os.get_inheritable(node.fileno())
    assert os.get_blocking(node.fileno())


def test_a_file_that_was_truncated_reads_as_zeroes_behind_its_end(
    node: FileNode, image: Path
) -> None:
    node.map(0, MiB)  # so that "all data" is remembered
    os.truncate(image, 5000)
    assert pread(node, 6000, 1000) == b"a" * 4000 + bytes(2000)
    assert pread(node, 100, MiB - 100) == bytes(100)
    buf = bytearray(b"\xee" * 6000)
    if not node.pread_cached(memoryview(buf), 1000):
        node.pread_into(memoryview(buf), 1000)
    assert buf == b"a" * 4000 + bytes(2000)
    assert node.map(1000, 6000)[-1][0] == ZERO_RUN
    assert node.map(8192, 100) == [(ZERO_RUN, 0, 100)]
    assert node.extents(8192, 100) == [Extent(8192, 100, HOLE)]


def test_a_short_read_or_write_of_the_kernel_is_continued(
    node: FileNode, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(call: Callable[..., int]) -> Callable[..., int]:
        def inner(fd: int, buffers: tuple[memoryview], offset: int, flags: int = 0) -> int:
            return call(fd, (buffers[0][:1000],), offset, flags)

        return inner

    monkeypatch.setattr(file_module, "preadv", short(os.preadv))
    monkeypatch.setattr(file_module, "pwritev", short(os.pwritev))
    data = os.urandom(4500)
    node.pwrite(memoryview(data), 100)
    node.pwrite(memoryview(data), 10000, True)
    assert pread(node, 4500, 100) == data
    assert image.read_bytes()[10000:14500] == data


def test_a_write_that_makes_no_progress_fails(
    node: FileNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_module, "pwritev", lambda *_: 0)
    with pytest.raises(OSError, match="no progress"):
        node.pwrite(memoryview(b"x"), 0)


def evict(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def test_a_cached_read_succeeds_once_the_page_cache_has_it(node: FileNode, image: Path) -> None:
    evict(image)
    buf = memoryview(bytearray(4096))
    if node.pread_cached(buf, 0):
        pytest.skip("this file system lives in memory, or does not forget")
    node.prefetch(0, 4096)
    node.pread_into(buf, 0)
    assert node.pread_cached(buf, 0)
    assert bytes(buf) == b"a" * 4096


def test_a_file_in_memory_is_never_probed_twice(
    node: FileNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def tmpfs(fd: int, buffers: tuple[memoryview], offset: int, flags: int = 0) -> int:
        seen.append(flags)
        if flags & os.RWF_NOWAIT:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return os.preadv(fd, buffers, offset)

    monkeypatch.setattr(file_module, "preadv", tmpfs)
    buf = memoryview(bytearray(4096))
    assert node.pread_cached(buf, 0)
    assert node.pread_cached(buf, 0)
    assert bytes(buf) == b"a" * 4096
    assert seen.count(os.RWF_NOWAIT) == 1


def test_fua_falls_back_to_a_sync_where_writes_cannot_be_stable(
    node: FileNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    syncs: list[int] = []

    def plain(fd: int, buffers: tuple[memoryview], offset: int, flags: int = 0) -> int:
        if flags:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return os.pwritev(fd, buffers, offset)

    monkeypatch.setattr(file_module, "pwritev", plain)
    monkeypatch.setattr(os, "fdatasync", syncs.append)
    node.pwrite(memoryview(b"one"), 0, True)
    node.pwrite(memoryview(b"two"), 3, True)
    assert len(syncs) == 2
    assert pread(node, 6, 0) == b"onetwo"


@pytest.mark.parametrize("verb", ["zero", "trim"])
def test_fua_of_a_verb_without_data_syncs(
    node: FileNode, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    syncs: list[int] = []
    monkeypatch.setattr(os, "fdatasync", syncs.append)
    getattr(node, verb)(0, 4096, 0)
    assert not syncs
    getattr(node, verb)(0, 4096, CMD_FLAG_FUA)
    assert len(syncs) == 1


def test_every_flush_syncs_even_while_another_is_under_way(
    node: FileNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write that ends while a sync runs is not covered by that sync: its flush needs another."""
    first_is_in, go_on = Event(), Event()
    calls: list[int] = []

    def slow(fd: int) -> None:
        calls.append(fd)
        if len(calls) == 1:
            first_is_in.set()
            assert go_on.wait(10)

    monkeypatch.setattr(os, "fdatasync", slow)
    first = Thread(target=node.flush)
    first.start()
    assert first_is_in.wait(10)
    node.pwrite(memoryview(b"late"), 0)
    node.flush()  # returns while the first still waits, so it did its own
    go_on.set()
    first.join()
    assert len(calls) == 2


def test_after_a_failed_sync_no_flush_pretends_that_all_is_well(
    node: FileNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fail)
        with pytest.raises(OSError, match="Input/output"):
            node.flush()
    with pytest.raises(OSError, match="Input/output"):
        node.flush()


def test_a_lost_page_that_a_stable_write_hears_of_fails_later_flushes_too(
    node: FileNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(fd: int, buffers: tuple[memoryview], offset: int, flags: int = 0) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(file_module, "pwritev", fail)
        with pytest.raises(OSError, match="Input/output"):
            node.pwrite(memoryview(b"x"), 0, True)
    with pytest.raises(OSError, match="Input/output"):
        node.flush()


def refuse_modes(monkeypatch: pytest.MonkeyPatch, *refused: int) -> list[int]:
    """Make fallocate answer EOPNOTSUPP for these modes; gives the list of the modes asked for."""
    asked: list[int] = []
    real = file_module.fallocate

    def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
        asked.append(mode)
        if mode in refused:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        real(fd, mode, offset, length)

    monkeypatch.setattr(file_module, "fallocate", fallocate)
    return asked


def test_zero_makes_a_hole_and_keeps_the_size(node: FileNode, image: Path) -> None:
    before = image.stat()
    node.zero(64 << 10, 512 << 10)
    node.zero(MiB - 4096, 4096)
    after = image.stat()
    assert after.st_size == before.st_size
    assert after.st_blocks <= before.st_blocks - (512 << 10) // 512
    assert Extent(64 << 10, 512 << 10, HOLE) in node.extents(0, MiB)


def test_zero_without_a_hole_keeps_the_blocks(node: FileNode, image: Path) -> None:
    before = image.stat()
    node.zero(64 << 10, 512 << 10, CMD_FLAG_NO_HOLE)
    assert pread(node, 512 << 10, 64 << 10) == bytes(512 << 10)
    assert image.stat().st_blocks >= before.st_blocks


def test_where_nothing_can_be_zeroed_fast_zeroes_are_written(
    node: FileNode, monkeypatch: pytest.MonkeyPatch, image: Path
) -> None:
    asked = refuse_modes(monkeypatch, PUNCH_HOLE, ZERO_RANGE)
    with pytest.raises(OSError, match="not supported") as caught:
        node.zero(1000, 500_000, CMD_FLAG_FAST_ZERO)
    assert caught.value.errno == errno.EOPNOTSUPP
    assert image.read_bytes() == b"a" * MiB, "a refused fast zero changes nothing"
    node.zero(1000, 500_000)
    node.trim(0, 1000)
    assert pread(node, MiB, 0) == b"a" * 1000 + bytes(500_000) + b"a" * (MiB - 501_000)
    assert asked == [PUNCH_HOLE, ZERO_RANGE], "asked for once, then known"


def test_no_hole_never_asks_for_a_hole(node: FileNode, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = refuse_modes(monkeypatch, ZERO_RANGE)
    node.zero(0, 3 * 4096, CMD_FLAG_NO_HOLE)
    assert asked == [ZERO_RANGE]
    assert pread(node, 3 * 4096, 0) == bytes(3 * 4096)


def test_an_error_of_the_storage_is_not_taken_for_a_missing_feature(
    node: FileNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(file_module, "fallocate", fail)
    for verb in (node.zero, node.trim):
        with pytest.raises(OSError, match="Input/output"):
            verb(0, 4096)


def test_extents_and_map_name_each_hole(image: Path) -> None:
    image.unlink()
    with image.open("wb") as file:
        file.truncate(MiB)
        for offset in (0, 256 << 10, 512 << 10):
            os.pwrite(file.fileno(), b"x" * 8192, offset)
    with closing(FileNode(image)) as node:
        found = node.extents(0, MiB)
        assert [extent for extent in found if not extent.is_hole] == [
            Extent(offset, 8192, 0) for offset in (0, 256 << 10, 512 << 10)
        ]
        fd = node.fileno()
        assert node.map(4096, 8192) == [(fd, 4096, 4096), (ZERO_RUN, 0, 4096)]
        assert node.extents(4096, 1) == [Extent(4096, 1, 0)]


def test_one_call_never_returns_more_extents_than_its_bound(tmp_path: Path) -> None:
    path, count = tmp_path / "holes.raw", MOST_STRETCHES // 2 + 100
    with path.open("wb") as file:
        file.truncate(count * 8192)
        for index in range(count):
            os.pwrite(file.fileno(), b"x" * 4096, index * 8192)
    with closing(FileNode(path)) as node:
        first = node.extents(0, node.size)
        assert len(first) == MOST_STRETCHES
        rest = node.extents(first[-1].end, node.size - first[-1].end)
        assert rest[0].offset == first[-1].end
        assert rest[-1].end == node.size
        assert all(extent.is_hole == bool(extent.offset % 8192) for extent in first + rest)


def test_a_closed_node_has_no_descriptor(image: Path) -> None:
    node = FileNode(image)
    node.close()
    node.close()
    assert node.fileno() == -1
    with pytest.raises(OSError, match="Bad file"):
        pread(node, 1, 0)


@pytest.mark.parametrize("sector", [512, 4096])
def test_a_block_device_is_zeroed_exactly_with_unaligned_edges(image: Path, sector: int) -> None:
    with loop_device(image, sector=sector) as device, closing(FileNode(device)) as node:
        assert node.size == MiB
        assert node.extents(0, MiB) == [Extent(0, MiB, 0)]
        model = bytearray(b"a" * MiB)
        for offset, length in ((100, 9000), (20_000, 100), (4096 * 10, 8192), (MiB - 5000, 5000)):
            for flags in (0, CMD_FLAG_NO_HOLE):
                node.pwrite(memoryview(b"b" * length), offset)
                node.zero(offset, length, flags)
                model[offset : offset + length] = bytes(length)
                assert pread(node, MiB, 0) == model
        node.trim(500_001, 50_000)
        assert pread(node, 500_001, 0) == model[:500_001]
        assert pread(node, MiB - 550_001, 550_001) == model[550_001:]
        node.flush()


def test_a_fast_zero_of_a_device_is_refused_where_the_kernel_would_write(image: Path) -> None:
    with loop_device(image) as device, closing(FileNode(device)) as node:
        for offset, length, flags in ((0, 8192, CMD_FLAG_NO_HOLE), (100, 200, 0)):
            with pytest.raises(OSError, match="not supported"):
                node.zero(offset, length, flags | CMD_FLAG_FAST_ZERO)
        assert pread(node, 8192, 0) == b"a" * 8192


def test_a_device_that_somebody_has_claimed_is_in_use(image: Path) -> None:
    with loop_device(image) as device:
        claim = os.open(device, os.O_RDWR | os.O_EXCL)  # as a mount does
        try:
            with pytest.raises(ImageInUse, match="unmount it, or open it read-only"):
                FileNode(device)
            FileNode(device, read_only=True).close()
        finally:
            os.close(claim)
        FileNode(device).close()

"""The overlay of a snapshot: what was stored is there, and nothing else, whatever happens."""

import errno
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleece.errors import FleeceError, ImageCorrupt, NotAnImage, NotFound, UnsupportedFeature
from fleece.formats.qcow2.overlay import Overlay
from nbdwire.constants import STATE_HOLE, STATE_ZERO
from nbdwire.export import ZERO_RUN
from nbdwire.extents import Extent
from tests.support.qcow2 import CountedLock, Rendezvous, in_two_threads, make, pread, qemu_img
from tests.support.threads import frequent_switches

CLUSTER = 65536
MiB = 1 << 20


def overlay(tmp_path: Path, size: int = 8 * MiB, cluster_size: int = CLUSTER) -> Overlay:
    return Overlay.create(
        tmp_path / "o.qcow2",
        size,
        backing=str(tmp_path / "disk.raw"),
        backing_format="raw",
        cluster_size=cluster_size,
    )


def reopened(old: Overlay) -> Overlay:
    old.close()
    return Overlay.open(old.path)


@settings(derandomize=True, deadline=None, max_examples=25, database=None)
@given(
    st.sampled_from([512, 4096, 65536]),
    st.integers(1, 700_000),
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 40), st.booleans()), max_size=25),
)
def test_what_was_stored_is_read_again_also_by_the_next_process(
    tmp_path_factory: Any, cluster: int, size: int, stores: list[tuple[int, int, bool]]
) -> None:
    directory = tmp_path_factory.mktemp("overlay")
    node = overlay(directory, size, cluster)
    clusters = -(-size // cluster)
    model, saved = bytearray(size), bytearray(clusters)
    rnd = random.Random(size)
    for at, length, zeroes in stores:
        first = at % clusters
        count = min(length, clusters - first)
        if any(saved[first : first + count]):
            continue
        saved[first : first + count] = b"\1" * count
        start, end = first * cluster, min((first + count) * cluster, size)
        if zeroes:
            node.store_zeroes(first, count)
        else:
            model[start:end] = rnd.randbytes(end - start)
            node.store(first, count, memoryview(model)[start:end])
    data_bytes = node.data_bytes
    for _ in range(2):
        assert node.saved_map() == saved
        assert node.data_bytes == data_bytes
        check_stored(node, model, saved)
        node = reopened(node)
    node.remove()
    shutil.rmtree(directory)


def check_stored(node: Overlay, model: bytearray, saved: bytearray) -> None:
    first = saved.find(1)
    while first >= 0:
        stop = saved.find(0, first) if 0 in saved[first:] else len(saved)
        start, end = first * node.cluster_size, min(stop * node.cluster_size, node.size)
        inset = min(7, end - start - 1)
        assert pread(node, end - start, start) == model[start:end]
        assert pread(node, end - start - inset, start + inset) == model[start + inset : end]
        position = start
        for fd, host, length in node.map(start, end - start):
            expected = model[position : position + length]
            assert (bytes(length) if fd == ZERO_RUN else os.pread(fd, length, host)) == expected
            position += length
        assert position == end
        first = saved.find(1, stop)


def test_runs_stored_one_after_the_other_are_one_run(tmp_path: Path) -> None:
    node = overlay(tmp_path)
    for first in range(0, 60, 20):
        node.store(first, 20, memoryview(b"x" * CLUSTER * 20))
    node.store_zeroes(60, 4)
    [(fd, _, length), zero] = node.map(0, 64 * CLUSTER)
    assert (fd, length) == (node.fd, 60 * CLUSTER)
    assert zero == (ZERO_RUN, 0, 4 * CLUSTER)
    assert node.extents(5, 64 * CLUSTER - 5) == [
        Extent(5, 60 * CLUSTER - 5, 0),
        Extent(60 * CLUSTER, 4 * CLUSTER, STATE_HOLE | STATE_ZERO),
    ]
    node.close()


def test_what_was_not_stored_is_an_error_and_not_data(tmp_path: Path) -> None:
    node = overlay(tmp_path)
    node.store(1, 1, memoryview(b"x" * CLUSTER))
    for verb in (node.map, node.extents, lambda at, n: pread(node, n, at)):
        with pytest.raises(OSError, match="not stored") as caught:
            verb(CLUSTER, 2 * CLUSTER)
        assert caught.value.errno == errno.EIO
    node.close()


def test_qemu_sees_the_stored_clusters_over_the_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    model = bytearray(random.Random(1).randbytes(8 * MiB))
    disk.write_bytes(model)
    node = overlay(tmp_path)
    node.store(3, 5, memoryview(b"old" * CLUSTER * 2)[: 5 * CLUSTER])
    node.store_zeroes(40, 7)
    model[3 * CLUSTER : 8 * CLUSTER] = (b"old" * CLUSTER * 2)[: 5 * CLUSTER]
    model[40 * CLUSTER : 47 * CLUSTER] = bytes(7 * CLUSTER)
    expected = tmp_path / "expected"
    expected.write_bytes(model)
    qemu_img("compare", "-U", "-f", "qcow2", "-F", "raw", node.path, expected)
    assert "o.qcow2" in qemu_img("map", "-U", node.path)
    assert '"dirty-flag": true' in qemu_img("info", "-U", "--output=json", node.path)
    copy = tmp_path / "copy.qcow2"
    shutil.copy(node.path, copy)
    node.close()
    qemu_img("check", "-r", "all", copy)
    qemu_img("check", copy)
    qemu_img("compare", "-U", "-f", "qcow2", "-F", "raw", copy, expected)


def test_the_backing_file_is_renamed_in_place(tmp_path: Path) -> None:
    for name in ("disk.raw", "newer.qcow2"):
        make(tmp_path / name, 8 * MiB)
    node = overlay(tmp_path)
    node.store(0, 1, memoryview(b"x" * CLUSTER))
    size = node.path.stat().st_size
    for name, fmt in [("newer.qcow2", "qcow2"), ("disk.raw", "raw"), ("newer.qcow2", "qcow2")]:
        node.set_backing(str(tmp_path / name), fmt)
        info = qemu_img("info", "-U", "--output=json", node.path)
        assert f'"full-backing-filename": "{tmp_path / name}"' in info
        assert f'"backing-filename-format": "{fmt}"' in info
    with pytest.raises(FleeceError, match="does not fit"):
        node.set_backing("x" * 2000, "raw")
    assert node.path.stat().st_size == size
    node = reopened(node)
    assert pread(node, CLUSTER, 0) == b"x" * CLUSTER
    node.remove()


def test_remove_deletes_the_file_and_close_leaves_it(tmp_path: Path) -> None:
    node = overlay(tmp_path)
    node.close()
    node.close()
    assert node.path.exists()
    node.remove()
    node.remove()
    assert not node.path.exists()


def test_a_broken_overlay_stays_broken(tmp_path: Path) -> None:
    node = overlay(tmp_path)
    assert not node.broken
    node.mark_broken()
    assert node.broken
    node.set_backing("other", "raw")
    node = reopened(node)
    assert node.broken
    node.remove()


def test_an_overlay_that_cannot_be_marked_is_never_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = overlay(tmp_path)
    monkeypatch.setattr(os, "pwrite", failing(errno.EIO))
    node.mark_broken()
    monkeypatch.undo()
    node.close()
    with pytest.raises(NotAnImage):
        Overlay.open(node.path)


def failing(number: int) -> Callable[..., int]:
    def pwrite(*_: Any) -> int:
        raise OSError(number, os.strerror(number))

    return pwrite


class SmallDisk:
    """``os.pwrite`` of a disk that takes ``left`` more bytes, the last ones in a short write."""

    def __init__(self, left: int) -> None:
        self.left = left
        self.pwrite = os.pwrite

    def __call__(self, fd: int, data: memoryview, offset: int) -> int:
        # What lies in the file already costs nothing: undoing must work on a full disk.
        if offset + len(data) <= self.free_up_to:
            return self.pwrite(fd, data, offset)
        if self.left == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        n = min(self.left, len(data))
        self.left -= n
        return self.pwrite(fd, data[:n], offset)

    free_up_to = 0


@pytest.mark.parametrize("left", [0, 1, 512, 4096, 4 * 4096, 4 * 4096 + 8, 4 * 4096 + 20])
def test_a_store_on_a_full_disk_leaves_nothing_published(
    left: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = overlay(tmp_path, cluster_size=4096)
    node.store(0, 2, memoryview(b"a" * 8192))
    before, data_bytes = node.saved_map(), node.data_bytes
    small = SmallDisk(left)
    monkeypatch.setattr(os, "pwrite", small)
    with monkeypatch.context() as undo:
        undo.setattr(node, "_withdraw", lambda *a: withdraw(small, node, *a))
        with pytest.raises(OSError, match="No space"):
            node.store(5, 4, memoryview(b"b" * 16384))
    monkeypatch.undo()
    assert node.saved_map() == before
    assert node.data_bytes == data_bytes
    node.store(5, 4, memoryview(b"c" * 16384))
    node = reopened(node)
    assert pread(node, 16384, 5 * 4096) == b"c" * 16384
    assert pread(node, 8192, 0) == b"a" * 8192
    node.remove()


def withdraw(small: SmallDisk, node: Overlay, first: int, length: int) -> None:
    small.free_up_to = 1 << 62
    Overlay._withdraw(node, first, length)
    small.free_up_to = 0


@pytest.mark.parametrize("left", [0, 8, 20])
def test_zeroes_on_a_full_disk_leave_nothing_published(
    left: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = overlay(tmp_path)
    small = SmallDisk(left)
    with monkeypatch.context() as undo:
        undo.setattr(os, "pwrite", small)
        undo.setattr(node, "_withdraw", lambda *a: withdraw(small, node, *a))
        with pytest.raises(OSError, match="No space"):
            node.store_zeroes(5, 4)
    assert not any(node.saved_map())
    node.remove()


class SlowlyAllocating(Overlay):
    """Meets another thread between the look at the next free place and its change."""

    together: Rendezvous | None = None
    _value = 0

    @property  # type: ignore[override]
    def _next(self) -> int:
        value = self._value
        if self.together is not None:
            self.together.meet()
        return value

    @_next.setter
    def _next(self, value: int) -> None:
        self._value = value


def two_stores(tmp_path: Path, *, real: bool) -> bool:
    """Two threads store at once; whether both find their data again."""
    node = SlowlyAllocating.create(
        tmp_path / "o.qcow2", 8 * MiB, backing="disk.raw", backing_format="raw"
    )
    lock = CountedLock(real=real)
    node._lock = lock  # type: ignore[assignment]
    node.together = Rendezvous(lock, real=real)
    node.together.armed = True
    data = [memoryview(bytes([n]) * CLUSTER) for n in (2, 3)]
    in_two_threads(lambda: node.store(0, 1, data[0]), lambda: node.store(1, 1, data[1]))
    node.together = None
    same = pread(node, 2 * CLUSTER, 0) == bytes(data[0]) + bytes(data[1])
    node.remove()
    return same


def test_two_threads_never_store_in_the_same_place(tmp_path: Path) -> None:
    assert two_stores(tmp_path, real=True)


def test_control_without_the_lock_they_store_in_the_same_place(tmp_path: Path) -> None:
    assert not two_stores(tmp_path, real=False)


def test_threads_that_store_at_once_lose_nothing(tmp_path: Path) -> None:
    node = overlay(tmp_path, 32 * MiB, 4096)

    def store(me: int) -> None:
        for first in range(me * 3, 8192 - 3, 24):
            node.store(first, 3, memoryview(struct.pack(">Q", first) * 1536))

    with frequent_switches(), ThreadPoolExecutor(8) as pool:
        list(pool.map(store, range(8)))
    node = reopened(node)
    assert node.data_bytes == sum(node.saved_map()) * 4096
    for first in range(0, 8192 - 3, 3):
        assert pread(node, 12288, first * 4096) == struct.pack(">Q", first) * 1536
    node.remove()


STORING = """
import struct, sys
from fleece.formats.qcow2.overlay import Overlay
node = Overlay.open(sys.argv[1])
print("ready", flush=True)
for first in range(0, 32768, 8):
    data = b"".join(struct.pack(">Q", n) * 512 for n in range(first, first + 8))
    node.store(first, 8, memoryview(data))
"""


@pytest.mark.parametrize("after", [1, 50, 400, 2000])
def test_what_was_published_before_a_kill_is_whole(after: int, tmp_path: Path) -> None:
    node = overlay(tmp_path, 128 * MiB, 4096)
    script = textwrap.dedent(STORING)
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(node.path)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    base = node.path.stat().st_size
    while node.path.stat().st_size < base + after * 4096 and child.poll() is None:
        os.sched_yield()
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    node = reopened(node)
    saved = node.saved_map()
    assert any(saved) or after < 8
    for first in range(len(saved)):
        if saved[first]:
            assert pread(node, 4096, first * 4096) == struct.pack(">Q", first) * 512
    free = saved.index(0)
    node.store(free, 1, memoryview(b"z" * 4096))
    assert pread(node, 4096, free * 4096) == b"z" * 4096
    node.remove()


def patched(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


def entry(value: int) -> bytes:
    return struct.pack(">Q", value)


COPIED = 1 << 63
TABLES = 3 * CLUSTER  # header, refcount table, L1 table
DATA = TABLES + CLUSTER  # one L2 table covers 512 MiB


@pytest.mark.parametrize(
    ("at", "data"),
    [
        (TABLES + 8, entry(COPIED | DATA)),  # a second user of the first cluster
        (TABLES + 8, entry(COPIED | DATA + 512)),  # inside a cluster
        (TABLES + 8, entry(COPIED | TABLES)),  # a table as data
        (TABLES + 8, entry(COPIED | 1 << 50)),  # behind the end
        (TABLES + 8, entry(DATA + CLUSTER)),  # not ours alone
        (TABLES + 8, entry(1 << 62 | DATA)),  # compressed
        (TABLES + 8, entry(2)),  # reserved
        (TABLES + 8, entry(COPIED | DATA + CLUSTER | 1)),  # zero, and data
        (2 * CLUSTER, entry(COPIED | DATA)),  # another L2 table
        (40, entry(1 << 62)),  # another L1 table
        (24, entry(1 << 60)),  # another size
        (72, entry(0)),  # not dirty: somebody has repaired it
        (72, entry(9)),  # another format
        (20, b"\0\0\0\x0c"),  # other clusters
        (0, b"KDMV"),
    ],
)
def test_an_overlay_that_is_not_as_we_left_it_is_refused(
    at: int, data: bytes, tmp_path: Path
) -> None:
    node = overlay(tmp_path)
    node.store(0, 1, memoryview(b"x" * CLUSTER))
    node.store(7, 1, memoryview(b"y" * CLUSTER))
    node.close()
    patched(node.path, at, data)
    with pytest.raises((ImageCorrupt, NotAnImage)) as caught:
        Overlay.open(node.path)
    assert "\n" not in str(caught.value)


def test_a_file_cut_short_or_of_another_make_is_refused(tmp_path: Path) -> None:
    node = overlay(tmp_path)
    node.store(0, 1, memoryview(b"x" * CLUSTER))
    node.close()
    os.truncate(node.path, DATA)
    with pytest.raises(ImageCorrupt):
        Overlay.open(node.path)
    os.truncate(node.path, 100)
    with pytest.raises((ImageCorrupt, NotAnImage)):
        Overlay.open(node.path)
    with pytest.raises(ImageCorrupt, match="not an overlay"):
        Overlay.open(make(tmp_path / "other.qcow2", 8 * MiB, lazy_refcounts=True))
    with pytest.raises(NotFound):
        Overlay.open(tmp_path / "none")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(FleeceError, match="regular file"):
        Overlay.open(tmp_path / "fifo")


def test_an_overlay_is_not_made_over_a_file_or_of_clusters_too_small(tmp_path: Path) -> None:
    node = overlay(tmp_path)
    node.close()
    with pytest.raises(FileExistsError):
        overlay(tmp_path)
    node.remove()
    with pytest.raises(UnsupportedFeature, match="too small"):
        overlay(tmp_path, 1 << 40, 512)
    with pytest.raises(UnsupportedFeature, match="cluster size"):
        overlay(tmp_path, 1 << 30, 3000)
    assert not list(tmp_path.iterdir())


def test_a_disk_of_no_bytes_has_an_overlay_too(tmp_path: Path) -> None:
    node = reopened(overlay(tmp_path, 0))
    assert node.saved_map() == bytearray()
    node.remove()

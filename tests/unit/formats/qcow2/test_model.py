"""Any operations leave an image as a bytearray would be, for us and for QEMU."""

import itertools
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fleece.block.file import FileNode
from nbdwire.constants import CMD_FLAG_FUA, CMD_FLAG_NO_HOLE, STATE_ZERO
from nbdwire.export import OPAQUE_RUN, ZERO_RUN
from tests.support.qcow2 import assert_clean, assert_same, make, opened, pread

OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["write", "write", "write", "fua", "zero", "trim", "flush", "reopen"]),
        st.integers(0, 10**9),
        st.one_of(st.integers(1, 600), st.integers(1, 200_000)),
        st.sampled_from([1, 512, 4096]),
    ),
    min_size=1,
    max_size=14,
)

# Disk and backing file (None: none) by cluster size; a backing file may end inside a cluster.
SHAPES = {
    512: (150_016, [None, 99_999, 200_000]),
    4096: (400_384, [None, 300_001, 500_000]),
    65536: (1_000_448, [None, 700_001, 2_000_000]),
}
CASES = [
    (cluster, size, backing, version)
    for cluster, (size, backings) in SHAPES.items()
    for backing in backings
    for version in (2, 3)
]


def pattern(seed: int, length: int) -> bytes:
    unit = bytes((seed * 11 + i * 7) % 255 + 1 for i in range(241))
    return (unit * (length // 241 + 1))[:length]


class Disk:
    """An image and its model, side by side."""

    def __init__(
        self, path: Path, cluster: int, size: int, backing: int | None, version: int
    ) -> None:
        self.path = path
        self.base = path.with_suffix(".base")
        old = b"" if backing is None else pattern(3, backing)
        self.base.write_bytes(old)
        self.model = bytearray(old[:size].ljust(size, b"\0"))
        self.has_backing = backing is not None
        names = {"backing": str(self.base), "backing_format": "raw"} if self.has_backing else {}
        make(path, size, cluster_size=cluster, version=version, **names)

    def run(self, operations: list[tuple[str, int, int, int]]) -> None:
        queue = iter(enumerate(operations))
        more = True
        while more:
            with ExitStack() as stack:
                base = None
                if self.has_backing:
                    base = FileNode(self.base, read_only=True, locking=False)
                node = stack.enter_context(opened(self.path, base))
                more = self._until_reopen(node, queue)
                self.check(node)

    def _until_reopen(self, node: Any, queue: Any) -> bool:
        for seed, (kind, at, length, unit) in queue:
            if kind == "reopen":
                return True
            offset = at % len(self.model) // unit * unit
            length = min(-(-length // unit) * unit, len(self.model) - offset)
            self.apply(node, kind, offset, length, seed)
        return False

    def apply(self, node: Any, kind: str, offset: int, length: int, seed: int) -> None:
        part = slice(offset, offset + length)
        if kind in ("write", "fua"):
            data = pattern(seed, length)
            node.pwrite(memoryview(data), offset, kind == "fua")
            self.model[part] = data
        elif kind == "zero":
            node.zero(offset, length, (0, CMD_FLAG_FUA, CMD_FLAG_NO_HOLE)[seed % 3])
            self.model[part] = bytes(length)
        elif kind == "trim":
            node.trim(offset, length)
            now = pread(node, length, offset)
            before = self.model[part]
            assert all(a in (0, b) for a, b in zip(now, before, strict=True)), "foreign data"
            self.model[part] = now
        else:
            node.flush()
        lead = max(0, offset - 1000)
        assert pread(node, length, lead) == self.model[lead : lead + length]

    def check(self, node: Any) -> None:
        assert pread(node, len(self.model), 0) == self.model
        cached = bytearray(len(self.model))
        if node.pread_cached(memoryview(cached), 0):
            assert cached == self.model
        check_pieces(node.extents, self.model, lambda e: (e.length, bool(e.status & STATE_ZERO)))
        check_pieces(node.map, self.model, lambda r: (r[2], r[0] == ZERO_RUN))
        check_runs(node, self.model)


def check_pieces(
    verb: Callable[[int, int], list[Any]],
    model: bytearray,
    read: Callable[[Any], tuple[int, bool]],
) -> None:
    """What ``verb`` calls zero is zero, and what it says has no gaps."""
    position = 0
    while position < len(model):
        for piece in verb(position, len(model) - position):
            length, zero = read(piece)
            assert length > 0
            assert not zero or not any(model[position : position + length])
            position += length
    assert position == len(model)


def check_runs(node: Any, model: bytearray) -> None:
    """Every run of a file holds, in full, what the disk has there."""
    import os

    position = 0
    for fd, host, length in node.map(0, len(model)):
        if fd not in (ZERO_RUN, OPAQUE_RUN):
            assert os.pread(fd, length, host) == model[position : position + length]
        position += length


@pytest.mark.parametrize(("cluster", "size", "backing", "version"), CASES)
def test_any_operations_leave_the_image_as_a_bytearray_would_be(
    cluster: int, size: int, backing: int | None, version: int, tmp_path: Path
) -> None:
    number = itertools.count()

    @settings(
        derandomize=True,
        deadline=None,
        max_examples=8,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(OPERATIONS)
    def run(operations: list[tuple[str, int, int, int]]) -> None:
        path = tmp_path / f"{next(number)}.qcow2"
        disk = Disk(path, cluster, size, backing, version)
        disk.run(operations)
        assert_clean(path)
        assert_same(path, disk.model)
        path.unlink()

    run()

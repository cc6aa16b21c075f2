"""How large an image will be. QEMU's own numbers: interop/test_image_create."""

from pathlib import Path

import pytest

from fleece.block.memory import MemoryNode
from fleece.errors import UnsupportedFeature
from fleece.formats import creating
from fleece.formats.qcow2 import measure
from fleece.formats.qcow2.create import CreateOptions
from nbdwire.constants import STATE_HOLE, STATE_ZERO
from nbdwire.extents import Extent
from tests.support.qcow2 import make, opened

KiB, MiB = 1 << 10, 1 << 20


class Patchy(MemoryNode):
    """Data in ``pieces`` (offset, length), zero elsewhere, and extents of 64 KiB at most."""

    def __init__(self, size: int, pieces: list[tuple[int, int]]) -> None:
        super().__init__(size)
        self.pieces = pieces

    def extents(self, offset: int, length: int) -> list[Extent]:
        ends = sorted({e for a, n in self.pieces for e in (a, a + n)} | {self.size})
        stop = min(offset + min(length, 64 * KiB), next(e for e in ends if e > offset))
        data = any(a <= offset < a + n for a, n in self.pieces)
        return [Extent(offset, stop - offset, 0 if data else STATE_HOLE | STATE_ZERO)]


@pytest.mark.parametrize(
    ("pieces", "clusters"),
    [
        ([], 0),
        ([(0, 1)], 1),
        ([(4095, 2)], 2),
        ([(0, 100), (200, 100), (4000, 90)], 1),
        ([(100, 4096), (8191, 1), (8192, 4096)], 3),
        ([(0, MiB)], 256),
        ([(10 * KiB, 200 * KiB)], 51),
    ],
)
def test_each_cluster_with_data_counts_once(pieces: list[tuple[int, int]], clusters: int) -> None:
    assert measure.data_bytes(Patchy(MiB, pieces), 4096) == clusters * 4096


@pytest.mark.parametrize("cluster_size", [512, 4096, 65536, 2 * MiB])
@pytest.mark.parametrize("bits", [1, 16, 64])
@pytest.mark.parametrize("size", [0, 512, 5 * MiB, 40 * MiB])
def test_a_preallocated_image_is_as_large_as_was_measured(
    tmp_path: Path, cluster_size: int, bits: int, size: int
) -> None:
    options = CreateOptions(cluster_size=cluster_size, refcount_bits=bits, preallocation="metadata")
    make(tmp_path / "x", size, **vars(options))
    measured = measure.of_qcow2(size, options)
    assert (tmp_path / "x").stat().st_size == measured.fully_allocated


def test_reserved_space_is_required() -> None:
    found = measure.of_qcow2(10 * MiB, CreateOptions(preallocation="falloc"))
    assert found.required == found.fully_allocated


def test_with_a_backing_file_all_of_the_disk_is_reckoned_with() -> None:
    options = CreateOptions(backing="b", backing_format="raw")
    found = measure.of_copy(Patchy(MiB, []), options)
    assert found.required == found.fully_allocated


def test_bitmaps_are_told_for_qcow2_only(tmp_path: Path) -> None:
    assert measure.of_copy(MemoryNode(MiB), CreateOptions()).bitmaps is None
    with opened(make(tmp_path / "x", MiB), read_only=True) as node:
        assert measure.of_copy(node, CreateOptions()).bitmaps == 0
    with opened(make(tmp_path / "y", MiB, version=2), read_only=True) as node:
        assert measure.of_copy(node, CreateOptions()).bitmaps is None


def test_a_disk_that_is_too_large_is_refused() -> None:
    with pytest.raises(UnsupportedFeature):
        measure.of_qcow2(64 << 50, CreateOptions())
    recipe = creating.recipe("raw", [], {})
    with pytest.raises(UnsupportedFeature):
        creating.measure(recipe, 1 << 63)


def test_luks_adds_its_header() -> None:
    recipe = creating.recipe("luks", ["key-secret=s"], {"s": b"x"})
    assert creating.measure(recipe, 1000).required == 1024 + 2068480

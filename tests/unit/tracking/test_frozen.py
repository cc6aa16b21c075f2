# SPDX-License-Identifier: Apache-2.0
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleece.errors import TrackingError
from fleece.tracking.epochs import EpochMap
from fleece.tracking.frozen import MAX_VIEW_EXTENTS, ChangedView, FrozenMap

GRANULE = 4096


def frozen_map() -> FrozenMap:
    changes = EpochMap.in_memory(10 * GRANULE + 5, GRANULE)
    changes.advance()
    changes.mark(2 * GRANULE, 2 * GRANULE)
    changes.mark(10 * GRANULE, 5)
    changes.advance()
    return changes.freeze()


def test_extents_are_coalesced_and_the_last_granule_is_clipped_to_the_disk() -> None:
    view = frozen_map().changed(1)
    assert view(0, 10 * GRANULE + 5) == [
        (0, 2 * GRANULE, 0),
        (2 * GRANULE, 2 * GRANULE, 1),
        (4 * GRANULE, 6 * GRANULE, 0),
        (10 * GRANULE, 5, 1),
    ]
    assert view.dirty_bytes == 2 * GRANULE + 5


def test_since_none_is_the_whole_disk_in_one_extent() -> None:
    frozen = frozen_map()
    assert frozen.changed(None)(3, 9 * GRANULE) == [(3, 9 * GRANULE, 1)]
    assert frozen.dirty_bytes(None) == 10 * GRANULE + 5
    assert frozen.dirty_bytes(2) == 0


def test_whoever_has_a_later_instant_needs_all_of_an_earlier_one() -> None:
    assert frozen_map().dirty_bytes(3) == 10 * GRANULE + 5


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.lists(st.booleans(), min_size=1, max_size=40), st.data())
def test_any_range_is_covered_exactly_and_says_of_each_byte_what_its_granule_is(
    granules: list[bool], data: st.DataObject
) -> None:
    size = len(granules) * GRANULE - data.draw(st.integers(0, GRANULE - 1))
    offset = data.draw(st.integers(0, size - 1))
    length = data.draw(st.integers(1, size - offset))
    extents = ChangedView(bytes(granules), size, GRANULE)(offset, length)
    position = offset
    for extent in extents:
        assert extent.offset == position
        position = extent.end
        inside = granules[extent.offset // GRANULE : (extent.end - 1) // GRANULE + 1]
        assert set(inside) == {extent.is_dirty}
    assert position == offset + length
    assert all(a.status != b.status for a, b in pairwise(extents))


def test_one_call_answers_no_more_than_the_limit_and_the_next_one_goes_on() -> None:
    bits = b"\0\1" * MAX_VIEW_EXTENTS
    view = ChangedView(bits, len(bits) * GRANULE, GRANULE)
    first = view(0, view.size)
    assert len(first) == MAX_VIEW_EXTENTS
    rest = view(first[-1].end, view.size - first[-1].end)
    assert len(rest) == MAX_VIEW_EXTENTS
    assert rest[-1].end == view.size


def test_a_frozen_map_is_the_same_after_it_was_saved_and_loaded(tmp_path: Path) -> None:
    frozen, path = frozen_map(), tmp_path / "vm1@s1.map"
    frozen.save(path)
    frozen.save(path, durable=True)
    loaded = FrozenMap.load(path)
    for name in FrozenMap.__slots__:
        assert getattr(loaded, name) == getattr(frozen, name)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.integers(0, 4000), st.integers(1, 255), st.booleans())
def test_a_torn_or_changed_file_is_refused(
    tmp_path_factory: pytest.TempPathFactory, where: int, change: int, cut: bool
) -> None:
    path = tmp_path_factory.mktemp("frozen") / "map"
    frozen_map().save(path)
    data = bytearray(path.read_bytes())
    where %= len(data)
    if cut:
        del data[where:]
    else:
        data[where] ^= change
    path.write_bytes(data)
    with pytest.raises(TrackingError, match="is damaged"):
        FrozenMap.load(path)


def test_a_map_that_cannot_be_loaded_or_saved_is_a_tracking_error(tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match="No such file"):
        FrozenMap.load(tmp_path / "missing")
    with pytest.raises(TrackingError, match="No such file"):
        frozen_map().save(tmp_path / "missing" / "map")

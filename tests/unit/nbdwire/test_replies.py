import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdwire.errors import ProtocolError
from nbdwire.pending import MAX_PIECES, Coverage

MODEST = settings(derandomize=True, deadline=None, max_examples=300)
SIZE = 40

pieces = st.tuples(st.integers(0, SIZE - 1), st.integers(1, 12)).map(
    lambda x: (x[0], min(x[0] + x[1], SIZE))
)


@MODEST
@given(st.lists(pieces, max_size=30), st.integers(0, 1000))
def test_coverage_agrees_with_a_bytearray(added: list[tuple[int, int]], base: int) -> None:
    model, coverage = bytearray(SIZE), Coverage(base)
    for start, stop in added:
        if any(model[start:stop]):
            with pytest.raises(ProtocolError, match="twice"):
                coverage.add(base + start, base + stop)
            return
        coverage.add(base + start, base + stop)
        model[start:stop] = b"\1" * (stop - start)
        assert coverage.front == base + (model + b"\0").index(0)


@MODEST
@given(st.permutations(range(12)))
def test_pieces_in_any_order_cover_the_whole(order: list[int]) -> None:
    coverage = Coverage(0)
    for piece in order:
        coverage.add(piece * 10, piece * 10 + 10)
    assert coverage.front == 120


def test_the_number_of_loose_pieces_is_bounded() -> None:
    coverage = Coverage(0)
    for piece in range(MAX_PIECES):
        coverage.add(2 * piece + 1, 2 * piece + 2)
    with pytest.raises(ProtocolError, match="too many pieces"):
        coverage.add(2 * MAX_PIECES + 1, 2 * MAX_PIECES + 2)

import random

import pytest

from fleece.block.zeroes import is_zero, split, zero_runs


@pytest.mark.parametrize("length", [1, 511, 4095, 4096, 5000, 1 << 16, 200_000])
@pytest.mark.parametrize("block", [512, 4096])
def test_the_parts_cover_the_buffer_and_say_rightly_what_is_zero(length: int, block: int) -> None:
    rng = random.Random(length + block)
    for _ in range(20):
        data = bytearray(length)
        for _ in range(rng.randrange(6)):
            data[rng.randrange(length)] = 1
        parts = list(split(memoryview(data), block))
        assert [start for start, _, _ in parts[1:]] == [stop for _, stop, _ in parts[:-1]]
        assert (parts[0][0], parts[-1][1]) == (0, length)
        for start, stop, zero in parts:
            blocks = [not any(data[i : min(i + block, stop)]) for i in range(start, stop, block)]
            assert set(blocks) == {zero}


def test_block_0_means_that_all_is_data() -> None:
    assert list(split(memoryview(bytes(9)), 0)) == [(0, 9, False)]


def test_a_block_of_which_only_a_byte_in_the_middle_is_set_is_data() -> None:
    data = bytearray(8192)
    data[4096 + 777] = 1
    assert list(zero_runs(memoryview(data), 4096)) == [(0, 4096)]


def test_nothing_is_zero() -> None:
    assert is_zero(memoryview(b""))
    assert not is_zero(memoryview(bytes(70_000) + b"\1" + bytes(9)))

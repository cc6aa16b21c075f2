import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleece import units
from fleece.units import GiB, KiB, MiB, TiB

MODEST = settings(derandomize=True, deadline=None, max_examples=200)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4096", 4096),
        ("0", 0),
        ("64k", 64 * KiB),
        ("64K", 64 * KiB),
        ("64KiB", 64 * KiB),
        ("512M", 512 * MiB),
        ("1.5G", 3 * GiB // 2),
        ("1.5 GiB", 3 * GiB // 2),
        (" 2t ", 2 * TiB),
        ("1P", 1024 * TiB),
        ("1E", 1 << 60),
        ("7b", 7),
        ("3 kb", 3 * KiB),
    ],
)
def test_a_size_is_read_in_powers_of_1024(text: str, expected: int) -> None:
    assert units.parse_size(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "k", "-1", "1x", "1kk", "one", "1e3", ".5k", "1.k", "0x10", "1 2", "½", "nan", "9" * 400],
)
def test_what_is_no_size_says_how_to_write_one(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a size; write it like 64k, 512M or 1\.5G"):
        units.parse_size(text)


@given(st.integers(0, 1 << 62))
@MODEST
def test_every_whole_number_of_bytes_is_read_exactly(count: int) -> None:
    assert units.parse_size(str(count)) == count


@given(st.integers(0, 1 << 13), st.sampled_from("kMGTP"))
@MODEST
def test_every_whole_number_of_units_is_read_exactly(count: int, unit: str) -> None:
    assert units.parse_size(f"{count}{unit}") == count << 10 * ("kMGTP".index(unit) + 1)


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (65536, "64 KiB"),
        (1610612736, "1.5 GiB"),
        (MiB - 1, "1 MiB"),
        (1 << 60, "1 EiB"),
        (1 << 72, "4096 EiB"),
    ],
)
def test_a_size_is_written_for_people(count: int, expected: str) -> None:
    assert units.format_size(count) == expected


@given(st.integers(0, 1 << 62))
@MODEST
def test_what_is_written_can_be_read_and_is_right_to_a_thousandth(count: int) -> None:
    assert abs(units.parse_size(units.format_size(count)) - count) <= count / 20
    assert len(units.format_size(count)) <= len("1023.9 KiB")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90),
        ("30s", 30),
        ("250ms", 0.25),
        ("15m", 900),
        ("1h", 3600),
        ("1.5d", 129600),
        ("1W", 604800),
        (" 2 h ", 7200),
    ],
)
def test_a_duration_is_seconds(text: str, seconds: float) -> None:
    assert units.parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "h", "-1h", "1y", "1h30m", "inf", "1us"])
def test_what_is_no_duration_says_how_to_write_one(text: str) -> None:
    with pytest.raises(ValueError, match="is not a duration; write it like 30s, 15m, 1h or 7d"):
        units.parse_duration(text)


@given(st.integers(0, 1 << 62), st.integers(0, 40).map(lambda bits: 1 << bits))
@MODEST
def test_alignment_is_the_nearest_multiple_on_each_side(value: int, unit: int) -> None:
    down, up = units.align_down(value, unit), units.align_up(value, unit)
    assert down <= value <= up
    assert down % unit == up % unit == 0
    assert up - down == (unit if value % unit else 0)


def test_powers_of_two() -> None:
    found = [number for number in range(-4, 70) if units.is_power_of_two(number)]
    assert found == [1, 2, 4, 8, 16, 32, 64]

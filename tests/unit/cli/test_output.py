# SPDX-License-Identifier: Apache-2.0
import pytest

from fleece.cli import output


def test_columns_are_aligned_and_lines_end_where_their_text_ends() -> None:
    text = output.table(
        ("NAME", "SIZE", "X"), [("a", "10 MiB", ""), ("long", "1 B", "é")], ["SIZE"]
    )
    assert text.splitlines() == ["NAME    SIZE  X", "a     10 MiB", "long     1 B  é"]


def test_what_could_command_a_terminal_is_written_out() -> None:
    assert output.printable("a\x1b[31m\nb\udcffé") == "a\\x1b[31m\\nb\\udcffé"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (-5, "0 s"),
        (59.4, "59 s"),
        (60, "1 min"),
        (61, "1 min 1 s"),
        (3600, "1 h"),
        (7500, "2 h 5 min"),
        (90061, "1 d 1 h"),
        (86400 * 400, "400 d"),
    ],
)
def test_durations_show_their_two_largest_units(seconds: float, text: str) -> None:
    assert output.duration(seconds) == text


def test_moments_are_told_from_now() -> None:
    now = output.seconds_of("2026-11-23T18:44:15.500000Z")
    assert now % 1 == 0.5
    assert output.relative("2026-11-23T18:43:15.500000Z", now) == "1 min ago"
    assert output.relative("2026-11-23T19:43:15.500000Z", now) == "in 59 min"
    assert output.relative("2026-11-23T18:44:15Z", now) == "now"
    assert output.relative(None) == "-"
    assert output.relative("some day", now) == "some day"


def test_seconds_are_counted_in_utc() -> None:
    assert output.seconds_of("1970-01-02T00:00:00Z") == 86400


def test_headings_are_bold_only_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert output.bold("x") == "x"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert output.bold("x") == "\033[1mx\033[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert output.bold("x") == "x"

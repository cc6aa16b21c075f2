# SPDX-License-Identifier: Apache-2.0
import json
import threading
from pathlib import Path

import pytest

from fleece.errors import InvalidArgument, TrackingError
from fleece.tracking import cursors
from fleece.tracking.cursors import Cursor, CursorStore, check_consumer


def store(tmp_path: Path) -> CursorStore:
    return CursorStore(tmp_path / "vm1.cursors")


def test_an_acknowledged_cursor_is_there_after_a_restart(tmp_path: Path) -> None:
    cursor = Cursor("nightly", "g", 7)
    assert store(tmp_path).acknowledge(cursor, "g") == cursor
    assert store(tmp_path).get("nightly") == cursor
    assert store(tmp_path).get("weekly") is None


def test_an_older_checkpoint_acknowledged_later_does_not_move_the_cursor_back(
    tmp_path: Path,
) -> None:
    cursors = store(tmp_path)
    cursors.acknowledge(Cursor("nightly", "g", 7), "g")
    assert cursors.acknowledge(Cursor("nightly", "g", 5), "g").epoch == 7
    assert store(tmp_path).get("nightly") == Cursor("nightly", "g", 7)


def test_a_checkpoint_of_an_earlier_generation_does_not_replace_one_of_this(
    tmp_path: Path,
) -> None:
    cursors = store(tmp_path)
    assert cursors.acknowledge(Cursor("a", "old", 90), "new").generation == "old"
    assert cursors.acknowledge(Cursor("a", "new", 2), "new").epoch == 2
    assert cursors.acknowledge(Cursor("a", "old", 91), "new") == Cursor("a", "new", 2)


def test_cursors_are_listed_by_name_and_removed_one_by_one(tmp_path: Path) -> None:
    cursors = store(tmp_path)
    for name in ("b", "a", "c"):
        cursors.acknowledge(Cursor(name, "g", 1), "g")
    assert cursors.remove("b")
    assert not cursors.remove("b")
    assert [cursor.consumer for cursor in store(tmp_path).list()] == ["a", "c"]


@pytest.mark.parametrize("name", ["a", "x" * 200, "büro nachts", "a:b", "*", ".."])
def test_printable_names_are_allowed(name: str) -> None:
    check_consumer(name)


@pytest.mark.parametrize(
    "name", ["", "x" * 201, "a/b", "a\0b", "a\nb", "a\x7f", "\u2028", "\ud800"]
)
def test_other_names_are_refused_before_anything_is_stored(name: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"name of a consumer|consumer has 1 to"):
        store(tmp_path).acknowledge(Cursor(name, "g", 1), "g")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"version": 2, "cursors": []}',
        '{"version": 1}',
        '{"version": 1, "cursors": {}}',
        '{"version": 1, "cursors": [1]}',
        '{"version": 1, "cursors": [{"consumer": "a", "generation": "g"}]}',
        '{"version": 1, "cursors": [{"consumer": "a", "generation": "g", "epoch": "1"}]}',
        '{"version": 1, "cursors": [{"consumer": "a", "generation": "g", "epoch": true}]}',
        "[" * 100_000,
        "\xff",
    ],
)
def test_a_damaged_file_means_no_cursors_and_a_reason_and_can_be_written_again(
    text: str, tmp_path: Path
) -> None:
    (tmp_path / "vm1.cursors").write_text(text, encoding="latin-1")
    cursors = store(tmp_path)
    assert cursors.list() == []
    assert "damaged" in (cursors.problem or "")
    cursors.acknowledge(Cursor("a", "g", 1), "g")
    assert store(tmp_path).problem is None


def test_a_cursor_that_cannot_be_stored_does_not_move(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = store(tmp_path)
    kept.acknowledge(Cursor("a", "g", 1), "g")

    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cursors, "replace_file", full)
    with pytest.raises(TrackingError, match="No space left on device; nothing was changed"):
        kept.acknowledge(Cursor("a", "g", 2), "g")
    assert kept.get("a") == Cursor("a", "g", 1)


def acknowledge_from_threads(kept: CursorStore) -> None:
    threads = [
        threading.Thread(target=kept.acknowledge, args=(Cursor(f"c{n}", "g", 1), "g"))
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_consumers_that_acknowledge_at_once_are_all_stored(tmp_path: Path) -> None:
    acknowledge_from_threads(store(tmp_path))
    assert len(store(tmp_path).list()) == 8


def test_without_the_lock_consumers_that_acknowledge_at_once_would_be_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the test above: all of them start from the same cursors."""

    class NoLock:
        def __enter__(self) -> None:
            pass

        def __exit__(self, *_: object) -> None:
            pass

    kept, meeting = store(tmp_path), threading.Barrier(8)

    def write_together(path: Path, data: bytes) -> None:
        meeting.wait()

    monkeypatch.setattr(kept, "_lock", NoLock())
    monkeypatch.setattr(cursors, "replace_file", write_together)
    acknowledge_from_threads(kept)
    assert len(kept.list()) == 1


def test_the_file_is_json_that_a_person_can_read(tmp_path: Path) -> None:
    store(tmp_path).acknowledge(Cursor("nightly", "g", 7), "g")
    document = json.loads((tmp_path / "vm1.cursors").read_text())
    assert document == {
        "version": 1,
        "cursors": [{"consumer": "nightly", "generation": "g", "epoch": 7}],
    }

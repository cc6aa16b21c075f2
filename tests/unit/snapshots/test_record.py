"""The records of snapshots: replaced whole, dropped without space, and never believed blindly."""

import errno
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from fleece.errors import SnapshotError
from fleece.snapshots import record as module
from fleece.snapshots.record import ACTIVE, CREATING, DROPPED, Part, Record, Records


def part(**changes: Any) -> Part:
    fields: dict[str, Any] = {
        "disk": "a",
        "image": "/images/a.img",
        "inode": [1, 2],
        "overlay": "/overlays/a@s.qcow2",
        "size": 1 << 20,
        "cluster_size": 65536,
        "policy": "break-snapshot",
        "map_file": "/state/a@s.map",
        "epoch": 3,
        "generation": "g",
        "since": {"nightly": 1, "new": None},
        "reasons": {"new": "never came"},
    }
    return Part(**{**fields, **changes})


def record(name: str = "s", serial: int = 1, **changes: Any) -> Record:
    fields: dict[str, Any] = {
        "name": name,
        "serial": serial,
        "created": 1.5,
        "boot_id": "boot",
        "phase": ACTIVE,
        "consumer": "nightly",
        "lease_expires": None,
        "parts": [part()],
        "acknowledged": ["nightly"],
    }
    return Record(**{**fields, **changes})


def test_a_record_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    records = Records(tmp_path)
    odd = part(image="/images/\udcff.img", overlay="/o/ü\n.qcow2", map_file=None, epoch=None)
    saved = record(lease_expires=12.25, parts=[part(), odd])
    records.save(saved)
    assert records.load() == [saved]
    assert odd.files == [Path("/o/ü\n.qcow2")]


def test_records_come_back_in_the_order_of_their_serial_numbers(tmp_path: Path) -> None:
    records = Records(tmp_path)
    for name, serial in (("c", 2), ("a", 10), ("b", 1)):
        records.save(record(name, serial))
    assert [found.name for found in records.load()] == ["b", "c", "a"]


def test_saving_again_replaces_and_removing_twice_is_harmless(tmp_path: Path) -> None:
    records = Records(tmp_path)
    one = record(phase=CREATING)
    records.save(one)
    one.phase = ACTIVE
    records.save(one)
    assert [found.phase for found in records.load()] == [ACTIVE]
    records.remove(one)
    records.remove(one)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("phase", [CREATING, ACTIVE])
def test_dropping_is_a_rename_that_takes_no_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    records = Records(tmp_path)
    one = record(phase=phase)
    records.save(one)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "replace_file", full)
    records.drop(one)
    assert one.phase == DROPPED
    assert [found.phase for found in records.load()] == [DROPPED]
    records.remove(one)
    assert records.load() == []


def test_a_record_that_cannot_be_saved_leaves_the_old_one_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = Records(tmp_path)
    one = record(lease_expires=1.0)
    records.save(one)
    one.lease_expires = 2.0

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("fleece.tracking.atomic._write", full)
    with pytest.raises(SnapshotError, match=r"cannot record snapshot 's' in .*No space.*--state"):
        records.save(one)
    assert [found.lease_expires for found in records.load()] == [1.0]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_record_that_cannot_be_renamed_is_not_dropped(tmp_path: Path) -> None:
    one = record()
    with pytest.raises(SnapshotError, match=r"cannot drop snapshot 's'.*No such file"):
        Records(tmp_path).drop(one)
    assert one.phase == ACTIVE


def test_the_time_of_a_record_is_a_heartbeat(tmp_path: Path) -> None:
    records = Records(tmp_path)
    one = record()
    assert records.touched(one) == 0
    records.touch(one, 5)  # not there: not an error
    records.save(one)
    records.touch(one, 123_456_789_000)
    assert records.touched(one) == 123_456_789_000


def damaged() -> list[tuple[str, bytes]]:
    good = asdict(record())
    without = {key: value for key, value in good.items() if key != "serial"}
    return [
        ("empty", b""),
        ("torn", json.dumps(good).encode()[:-40]),
        ("not UTF-8", b"\xff\xfe"),
        ("a list", b"[]"),
        ("a string", b'"s"'),
        ("null", b"null"),
        ("deep", b"[" * 100_000),
        ("no serial", json.dumps(without).encode()),
        ("of the future", json.dumps({**good, "colour": "red"}).encode()),
        ("a serial that is text", json.dumps({**good, "serial": "1"}).encode()),
        ("a name that is none", json.dumps({**good, "name": None}).encode()),
        ("parts that are none", json.dumps({**good, "parts": None}).encode()),
        ("a part that is none", json.dumps({**good, "parts": [None]}).encode()),
        (
            "a part of another kind",
            json.dumps({**good, "parts": [{**asdict(part()), "size": "big"}]}).encode(),
        ),
    ]


@pytest.mark.parametrize(("what", "data"), damaged(), ids=[what for what, _ in damaged()])
def test_a_damaged_record_is_told_left_where_it_is_and_hides_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, what: str, data: bytes
) -> None:
    records = Records(tmp_path)
    records.save(record("good", 2))
    bad = tmp_path / "s.snapshot.json"
    bad.write_bytes(data)
    assert [found.name for found in records.load()] == ["good"]
    assert bad.read_bytes() == data
    [line] = [entry.getMessage() for entry in caplog.records]
    assert line.startswith(f"cannot read the snapshot record {bad}: ")
    assert "\n" not in line


def test_a_record_under_another_name_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records = Records(tmp_path)
    records.save(record("s"))
    (tmp_path / "s.snapshot.json").rename(tmp_path / "t.snapshot.json")
    assert records.load() == []
    assert "is one of 's'" in caplog.text


def test_what_a_killed_process_was_writing_is_removed(tmp_path: Path) -> None:
    records = Records(tmp_path)
    records.save(record())
    for name in (".s.snapshot.json.tmp", ".t.snapshot.json.tmp", ".a@t.map.tmp"):
        (tmp_path / name).write_bytes(b"torn")
    assert [found.name for found in records.load()] == ["s"]
    assert [path.name for path in tmp_path.iterdir()] == ["s.snapshot.json"]

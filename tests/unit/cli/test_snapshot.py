# SPDX-License-Identifier: Apache-2.0
import os
from pathlib import Path

import pytest

from tests.support.control import FakeService
from tests.unit.cli.conftest import Run


def test_create_hands_everything_to_the_daemon(run: Run, service: FakeService) -> None:
    words = "snapshot create vm1 vm2 --name n --consumer c --lease 1h --cluster-size 4k"
    assert run(*words.split(), "--on-cbw-error", "break-guest-write").status == 0
    ((_, disks, options),) = service.calls
    assert disks == ["vm1", "vm2"]
    assert options == {
        "name": "n",
        "consumer": "c",
        "lease": 3600.0,
        "cluster_size": 4096,
        "on_cbw_error": "break-guest-write",
    }


def test_a_full_snapshot_says_why_and_how_to_copy_it(run: Run, service: FakeService) -> None:
    result = run("snapshot", "create", "vm1", "--consumer", "new", "--lease", "1h")
    assert (result.status, result.err) == (0, "")
    lines = [line.strip() for line in result.out.splitlines()]
    assert lines[0].startswith("snapshot s1 taken; writers were held for 0.8 ms; it is dropped in ")
    assert "vm1   full  256 MiB  256 MiB  vm1@s1" in lines
    assert "vm1 in full: consumer 'new' has never been here" in lines
    uri = "'nbd+unix:///vm1%40s1?socket=/run/fleece/nbd.sock'"
    assert f"nbdcopy {uri} vm1-s1.img" in lines
    assert f"# or: qemu-img convert -p -f raw -O qcow2 {uri} vm1-s1.qcow2" in lines
    assert "fleece snapshot ack s1" in lines
    assert "fleece snapshot drop s1" in lines


def test_an_incremental_snapshot_says_how_to_list_what_changed(
    run: Run, service: FakeService
) -> None:
    result = run("snapshot", "create", "vm1", "--consumer", "nightly")
    lines = [line.strip() for line in result.out.splitlines()]
    assert "vm1   incremental    1 MiB  256 MiB  vm1@s1" in lines
    uri = "'nbd+unix:///vm1%40s1?socket=/run/fleece/nbd.sock'"
    assert f"nbdinfo --map=qemu:dirty-bitmap:nightly {uri}" in lines
    assert "nbdcopy" not in result.out
    assert "in full" not in result.out


def test_a_snapshot_for_nobody_needs_no_ack(run: Run, service: FakeService) -> None:
    result = run("snapshot", "create", "vm1")
    assert "ack" not in result.out
    assert "fleece snapshot drop s1" in result.out


def test_the_next_commands_carry_the_control_socket_that_was_named(
    run: Run, service: FakeService, tmp_path: Path
) -> None:
    path = tmp_path / "control.sock"
    result = run("snapshot", "create", "vm1", "--consumer", "c", "--control", str(path))
    assert f"fleece snapshot ack --control {path} s1" in result.out
    assert f"fleece snapshot drop --control {path} s1" in result.out


def test_an_export_without_a_listener_is_told(run: Run, service: FakeService) -> None:
    run("snapshot", "create", "vm1")
    made = service.snapshots["s1"]
    made["disks"][0]["uris"] = []
    service.snapshot_create = lambda *args, **options: made  # type: ignore[method-assign]
    result = run("snapshot", "create", "vm1")
    assert "# vm1@s1 is exported, but nobody listens for NBD" in result.out


def test_create_as_json(run: Run, service: FakeService) -> None:
    result = run("snapshot", "create", "vm1", "--json")
    assert result.json == service.snapshots["s1"]
    assert result.err == ""


def test_an_error_of_the_daemon_keeps_its_code_and_status(run: Run, service: FakeService) -> None:
    result = run("snapshot", "create", "nope", "--json")
    assert result.status == 4
    text = "there is no disk 'nope'; fleece status lists them"
    assert result.json == {"error": "not-found", "message": text}
    assert result.err == f"fleece: {text}\n"
    assert run("snapshot", "create", "vm1", "--lease", "0").status == 62


def test_a_name_that_is_not_unicode_is_refused(run: Run, service: FakeService) -> None:
    result = run("snapshot", "create", os.fsdecode(b"\xff"))
    assert result.status == 62
    assert result.err == "fleece: Parameter 'disks[0]' is not valid Unicode text\n"


def test_list(run: Run, service: FakeService) -> None:
    assert run("snapshot", "list").out == "no snapshots\n"
    assert run("snapshot", "list", "--json").json == []
    run("snapshot", "create", "vm1", "vm2", "--consumer", "nightly", "--lease", "1h")
    heading, row = run("snapshot", "list").out.splitlines()
    assert " ".join(heading.split()) == "SNAPSHOT TAKEN STATE CONSUMER LEASE ENDS DISKS OLD DATA"
    assert row.split()[0] == "s1"
    assert "nightly" in row
    assert row.endswith("vm1, vm2   128 KiB")
    assert len(run("snapshot", "list", "--json").json) == 1


def test_ack(run: Run, service: FakeService) -> None:
    run("snapshot", "create", "vm1", "--consumer", "c")
    text = "consumer 'c' has snapshot s1: vm1 up to epoch 4\n"
    assert run("snapshot", "ack", "s1").out == text
    other = run("snapshot", "ack", "s1", "--consumer", "d", "--json").json
    assert other == {"name": "s1", "consumer": "d", "disks": [{"disk": "vm1", "epoch": 4}]}


def test_extend(run: Run, service: FakeService) -> None:
    run("snapshot", "create", "vm1")
    result = run("snapshot", "extend", "s1", "--lease", "90m")
    assert service.calls[-1] == ("extend", "s1", 5400.0)
    assert result.out.startswith("snapshot s1 is dropped in ")
    assert run("snapshot", "extend", "s1", "--lease", "1", "--json").json["name"] == "s1"


def test_drop_drops_all_that_it_can(run: Run, service: FakeService) -> None:
    for name in ("a", "b", "c"):
        run("snapshot", "create", "vm1", "--name", name)
    result = run("snapshot", "drop", "a", "gone", "b")
    assert result.status == 4
    assert result.out == "dropped snapshot a, 64 KiB freed\ndropped snapshot b, 64 KiB freed\n"
    assert result.err == "fleece: there is no snapshot 'gone'; fleece snapshot list shows them\n"
    assert list(service.snapshots) == ["c"]


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_drop_as_json_is_one_value_whatever_happens(
    run: Run, service: FakeService, bad: int
) -> None:
    run("snapshot", "create", "vm1", "--name", "a")
    result = run("snapshot", "drop", "a", *["gone"] * bad, "--json")
    dropped = [{"name": "a", "freed-bytes": 65536}]
    if bad:
        assert result.status == 4
        assert result.json["error"] == "not-found"
        assert result.json["dropped"] == dropped
        assert result.err.count("\n") == bad
    else:
        assert (result.status, result.json, result.err) == (0, dropped, "")

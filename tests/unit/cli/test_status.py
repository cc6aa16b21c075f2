# SPDX-License-Identifier: Apache-2.0
from tests.support.control import FakeService
from tests.unit.cli.conftest import Run


def test_status_in_words(run: Run, service: FakeService) -> None:
    result = run("status")
    assert (result.status, result.err) == (0, "")
    lines = result.out.splitlines()
    assert lines[0].startswith("fleece 0.1.0, process 4711, up ")
    assert "listening  nbd+unix:///?socket=/run/fleece/nbd.sock" in lines
    vm1 = "vm1   raw               256 MiB        2  64 KiB, epoch 4  /images/vm1.img"
    assert vm1 in lines
    assert (
        "iso   qcow2, read-only    1 KiB        0  off              /images/iso\\x1b[31m.img"
        in lines
    )
    assert "SNAPSHOT" not in result.out
    assert "\x1b" not in result.out


def test_status_shows_snapshots_and_why_one_is_broken(run: Run, service: FakeService) -> None:
    run("snapshot", "create", "vm1", "--name", "s1")
    service.snapshots["s1"]["state"] = "broken"
    service.snapshots["s1"]["disks"][0].update(state="broken", error="no space left for old data")
    result = run("status")
    assert "s1        " in result.out
    assert "broken" in result.out
    assert "vm1@s1 is broken: no space left for old data" in result.out


def test_status_as_json_is_what_the_daemon_said(run: Run, service: FakeService) -> None:
    result = run("status", "--json")
    assert result.json == service.status()
    assert result.err == ""

# SPDX-License-Identifier: Apache-2.0
import sys
from pathlib import Path

import pytest

from bench import commands, qcow2, report
from bench.fio import Result
from bench.images import Layout, make_holed, make_large, make_real
from bench.results import Row, Sample, absolute
from bench.tools import BenchFailed
from tests.support.tools import require

MiB = 1 << 20


def command_row(**samples: tuple[float, int]) -> Row:
    made = Row("command-check-large")
    for name, (seconds, memory) in samples.items():
        made.add(name, Sample(Result(8 / seconds, 1 / seconds, 8, 0.0), 0.1, memory * MiB))
    return made


def test_a_row_of_commands_shows_speed_and_memory_before_the_figures() -> None:
    row = command_row(**{"fleece": (0.5, 30), "qemu-img": (1.0, 20)})
    line = report.commands([row]).splitlines()[2]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == ["command-check-large", "**2.00**", "1.50", "0.50", "1.00", "30", "20"]


def test_without_us_the_commands_of_the_peer_are_still_a_table() -> None:
    line = report.commands([command_row(**{"qemu-img": (1.0, 20)})]).splitlines()[2]
    assert line.split("|")[1:4] == [" command-check-large ", " - ", " - "]


def test_the_figure_of_a_command_is_its_time_however_short() -> None:
    assert absolute(command_row(fleece=(0.004, 8)), "fleece") == "0.00 s"
    assert absolute(command_row(fleece=(1.234, 8)), "fleece") == "1.23 s"


def test_rows_that_allocate_end_instead_of_going_round() -> None:
    for case in qcow2.cases():
        words = case.job(1.0).arguments()
        assert ("--time_based" in words) != case.allocates
        assert not case.allocates or case.writes


def test_the_rows_of_images_have_names_of_their_own() -> None:
    names = [case.name for case in qcow2.cases()]
    assert len(names) == len(set(names)) == 19
    assert "image-deflate-read-64k-d8" in names


def test_a_command_needs_the_images_that_it_names_but_not_its_target() -> None:
    case = commands.Command("x", "convert -f raw -O qcow2 disk.raw target.out")
    assert case.images == ["disk.raw"]


def test_a_program_is_timed_and_one_that_fails_is_told_of() -> None:
    seconds, spent, memory = commands.timed([sys.executable, "-S", "-c", "print(1)"])
    assert 0 < seconds < 60
    assert 0 < spent < 60
    assert MiB < memory < 200 * MiB
    with pytest.raises(BenchFailed, match="ended with 3: no luck"):
        commands.timed(
            [sys.executable, "-c", "import sys; print('no luck', file=sys.stderr); sys.exit(3)"]
        )
    with pytest.raises(BenchFailed, match="did not run"):
        commands.timed(["/nowhere/at/all"])


def test_data_as_disks_have_it_has_the_size_asked_for_and_can_be_compressed(tmp_path: Path) -> None:
    make_real(tmp_path / "real", 9 * MiB)
    make_holed(tmp_path / "holed", tmp_path / "real")
    real, holed = (tmp_path / "real").read_bytes(), (tmp_path / "holed").read_bytes()
    assert len(real) == len(holed) == 9 * MiB
    assert holed[: 4 * MiB] == real[: 4 * MiB]
    assert not any(holed[4 * MiB : 8 * MiB])
    assert holed[8 * MiB :] == real[8 * MiB :]
    assert len(set(real)) > 100


def test_the_image_with_many_clusters_is_one_that_qemu_finds_no_fault_with(tmp_path: Path) -> None:
    path = tmp_path / "large.qcow2"
    make_large(path, Layout(4 << 30, 9000))
    seconds, _, _ = commands.timed([require("qemu-img"), "check", "-f", "qcow2", str(path)])
    assert seconds > 0

# SPDX-License-Identifier: Apache-2.0
import math
from pathlib import Path

import pytest

from bench import live, matrix, report
from bench.fio import Job, Result
from bench.results import Row, Sample, geometric_mean

MB = 1_000_000


def sample(speed: float, cpu: float = 1.0) -> Sample:
    return Sample(Result(speed, speed / 4096, 1 << 30, 0.001), cpu, 32 << 20)


def row(**speeds: list[float]) -> Row:
    made = Row("randread-4k-d1-c1-cached")
    for name, every in speeds.items():
        for speed in every:
            made.add(name, sample(speed))
    return made


def test_the_ratio_is_that_of_the_medians_to_the_fastest_peer() -> None:
    made = row(fleece=[90 * MB, 200 * MB, 210 * MB], slow=[50 * MB], fast=[160 * MB, 160 * MB])
    assert made.ratio("slow") == 4.0
    assert made.ratio("fast") == 1.25
    assert made.ratio_to_best() == 1.25
    assert made.peers == ["slow", "fast"]


def test_without_us_there_is_no_ratio_and_still_a_table() -> None:
    made = row(peer=[50 * MB])
    assert math.isnan(made.ratio_to_best())
    assert "12.2k IOPS" in report.table([made])


def test_the_table_shows_the_ratio_before_the_figures() -> None:
    line = report.table([row(fleece=[200 * MB], peer=[100 * MB])]).splitlines()[2]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:3] == ["randread-4k-d1-c1-cached", "**2.00**", "2.00"]


def test_the_summary_counts_the_rows_in_which_we_lead() -> None:
    rows = [row(fleece=[200 * MB], peer=[100 * MB]), row(fleece=[50 * MB], peer=[100 * MB])]
    assert "geometric mean **1.00**, ahead in 1 of 2 rows" in report.summary(rows)


def test_a_geometric_mean_leaves_out_what_is_unknown() -> None:
    assert geometric_mean([2.0, 8.0, math.nan]) == pytest.approx(4.0)
    assert math.isnan(geometric_mean([]))


def test_the_report_replaces_only_what_is_between_its_markers(tmp_path: Path) -> None:
    path = tmp_path / "docs" / "performance.md"
    report.write_into(path, "first")
    path.write_text(path.read_text() + "\nWhat a person wrote.\n")
    report.write_into(path, "second")
    text = path.read_text()
    assert "first" not in text
    assert text.count(report.BEGIN) == text.count(report.END) == 1
    assert text.endswith("\nWhat a person wrote.\n")
    assert text.startswith("# Performance\n")


def test_the_matrix_has_every_combination_once_and_quick_is_part_of_it() -> None:
    names = [case.name for case in matrix.cases()]
    assert len(names) == len(set(names)) == 4 * 4 * 3 * 2 * 2
    assert set(matrix.QUICK) <= set(matrix.names())
    assert len(matrix.names()) == len(set(matrix.names()))


def test_connections_get_parts_of_the_disk_that_do_not_overlap() -> None:
    words = Job("write", 4096, 8, 4, 1 << 30, 1.0).arguments()
    assert f"--size={1 << 28}" in words
    assert f"--offset_increment={1 << 28}" in words


def test_live_writes_stay_within_half_of_the_clusters(tmp_path: Path) -> None:
    size = 1 << 30
    scenario = live.LiveWrites((), tmp_path, size)
    for _, block, depth in live.CASES:
        job = scenario.job(block, depth, 0)
        assert job.total // job.block * max(1, block // live.CLUSTER) == size // live.CLUSTER // 2

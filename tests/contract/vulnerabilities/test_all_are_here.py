# SPDX-License-Identifier: Apache-2.0
"""Every known vulnerability of an NBD server or client has its test in this folder."""

from pathlib import Path

import pytest

KNOWN = [
    "2005-3534",
    "2011-0530",
    "2011-1925",
    "2013-6410",
    "2013-7441",
    "2015-0847",
    "2017-2630",
    "2017-7539",
    "2017-9524",
    "2017-10664",
    "2017-15118",
    "2017-15119",
    "2019-14842",
    "2019-14850",
    "2019-14851",
    "2020-10761",
    "2021-3716",
    "2021-20286",
    "2022-0485",
    "2022-26495",
    "2022-26496",
    "2023-5215",
    "2023-5871",
    "2024-7383",
    "2024-7409",
    "2025-14946",
    "2025-47711",
    "2025-47712",
]
WITHOUT_ID = [
    "no_id_nbdkit_cow",
    "no_id_nbdkit_1_34_a_hang_up",
    "no_id_nbdkit_1_46_zeroing",
    "no_id_nbdkit_fast_zero",
    "no_id_nbd_server_3_27_zeroing",
    "no_id_status_that_is_not_aligned",
]


@pytest.mark.parametrize("name", [number.replace("-", "_") for number in KNOWN] + WITHOUT_ID)
def test_each_is_in_the_name_of_a_test(name: str) -> None:
    here = Path(__file__).parent
    lines = [line for path in here.glob("test_*.py") for line in path.read_text().splitlines()]
    assert any(name in line for line in lines if line.startswith("def test_"))

# SPDX-License-Identifier: Apache-2.0
"""The demo's oracle: it must find the instant, and must not be satisfied by anything else."""

import random
from pathlib import Path

import pytest

from tests.demo import model
from tests.demo.model import Window
from tests.demo.tools import DemoFailed
from tests.demo.writer import SECTOR, STRIPE, Write, stripes

SIZE = 64 * SECTOR


def write(sector: int, count: int, seed: int | None, issued: float = 0.0) -> Write:
    entry = Write(sector * SECTOR, count * SECTOR, seed)
    entry.issued, entry.acknowledged = issued, issued + 0.5
    return entry


def log_of(first: int, last: int, count: int, number: int) -> list[Write]:
    """Writes one after the other within the sectors [first, last); every fifth wipes the last."""
    dice = random.Random(number)
    log: list[Write] = []
    for step in range(count):
        if step % 5 == 4:
            log.append(Write(log[-1].offset, log[-1].length, None))
        else:
            at = dice.randrange(first, last - 3)
            log.append(Write(at * SECTOR, dice.randint(1, 3) * SECTOR, dice.getrandbits(64)))
        log[-1].issued, log[-1].acknowledged = step + number / 10, step + number / 10 + 0.05
    return log


class Case:
    """A base image, two logs, and the image as it is after a prefix of each of them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.base = directory / "base"
        self.base.write_bytes(random.Random(7).randbytes(SIZE))
        self.logs = [log_of(0, 32, 40, 1), log_of(32, 64, 40, 2)]

    def pulled(self, cut: tuple[int, int]) -> Path:
        content = bytearray(self.base.read_bytes())
        for log, count in zip(self.logs, cut, strict=True):
            for entry in log[:count]:
                content[entry.offset : entry.offset + entry.length] = entry.data()
        path = self.directory / "pulled"
        path.write_bytes(content)
        return path

    def prove(self, pulled: Path, low: tuple[int, int], high: tuple[int, int]) -> model.Instant:
        target = self.directory / "model"
        target.unlink(missing_ok=True)
        return model.prove(pulled, self.base, self.logs, Window(low, high), target)


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


def test_every_instant_within_the_window_is_found_exactly(case: Case) -> None:
    for steps in range(10, 31):
        pulled = case.pulled((steps, steps))
        instant = case.prove(pulled, (10, 10), (30, 30))
        assert instant.cut == (steps, steps)
        assert instant.path.read_bytes() == pulled.read_bytes()


def test_an_instant_outside_of_the_window_is_refused(case: Case) -> None:
    for cut in ((9, 10), (31, 30)):
        with pytest.raises(DemoFailed):
            case.prove(case.pulled(cut), (10, 10), (30, 30))


def test_a_write_that_is_only_half_there_is_refused(case: Case) -> None:
    pulled = case.pulled((20, 20))
    torn = next(w for w in case.logs[0][20:] if w.seed is not None and w.length > SECTOR)
    content = bytearray(pulled.read_bytes())
    content[torn.offset : torn.offset + SECTOR] = torn.data()[:SECTOR]
    pulled.write_bytes(content)
    with pytest.raises(DemoFailed):
        case.prove(pulled, (10, 10), (40, 40))


def test_one_wrong_byte_anywhere_is_refused(case: Case) -> None:
    for at in range(0, SIZE, SECTOR - 1):
        pulled = case.pulled((20, 20))
        content = bytearray(pulled.read_bytes())
        content[at] ^= 1
        pulled.write_bytes(content)
        with pytest.raises(DemoFailed):
            case.prove(pulled, (15, 15), (25, 25))


def test_a_pulled_image_that_is_too_short_is_refused(case: Case) -> None:
    pulled = case.pulled((20, 20))
    pulled.write_bytes(pulled.read_bytes()[:-SECTOR])
    with pytest.raises(DemoFailed):
        case.prove(pulled, (15, 15), (25, 25))


def test_writers_that_are_seen_at_different_times_are_no_instant(case: Case) -> None:
    with pytest.raises(DemoFailed, match="no instant"):
        case.prove(case.pulled((12, 25)), (10, 10), (30, 30))


def test_what_was_in_flight_together_may_be_seen_in_any_order(tmp_path: Path) -> None:
    case = Case(tmp_path)
    case.logs = [[write(1, 1, 1, issued=0.0)], [write(40, 1, 2, issued=0.1)]]
    for cut in ((0, 0), (0, 1), (1, 0), (1, 1)):
        assert case.prove(case.pulled(cut), (0, 0), (1, 1)).cut == cut


def test_stripes_cover_the_extents_once() -> None:
    extents = [(4096, 2 * STRIPE + 512), (9 * STRIPE, 100)]
    pieces = stripes(extents)
    assert [length for _, length in pieces] == [STRIPE, STRIPE, 512, 100]
    assert pieces[1][0] == 4096 + STRIPE

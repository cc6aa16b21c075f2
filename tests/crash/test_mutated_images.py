"""DESIGN §7, formats.md §12: no image, however damaged, may hurt whoever opens it."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import mutants
from tests.support.mutants import BadMutantError, Corpus, corpus, peak, run_seed

SEEDS = 2000
PARTS = 8


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Corpus]:
    logging.disable()  # every second mutant is marked corrupt, and that is logged
    try:
        yield corpus(tmp_path_factory.mktemp("mutants"))
    finally:
        logging.disable(logging.NOTSET)


@pytest.mark.parametrize("part", range(PARTS))
def test_no_damaged_image_makes_a_traceback_a_hang_or_a_glutton(images: Corpus, part: int) -> None:
    """formats.md §12; repeat one with: python -m tests.support.mutants --seed N."""
    base = peak()
    failures = []
    for seed in range(part * SEEDS // PARTS, (part + 1) * SEEDS // PARTS):
        try:
            run_seed(images, seed, base)
        except BadMutantError as error:
            failures.append(str(error))
    assert not failures, "\n".join(failures)


def test_a_mutant_that_raises_something_else_is_told_with_its_seed(
    images: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: Path, name: str, rng: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(mutants, "use", broken)
    with pytest.raises(BadMutantError, match="seed 7 "):
        run_seed(images, 7, peak())


def test_a_mutant_that_hangs_is_stopped(images: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    def hanging(path: Path, name: str, rng: object) -> None:
        while True:
            pass

    monkeypatch.setattr(mutants, "use", hanging)
    monkeypatch.setattr(mutants, "SECONDS", 0.05)
    with pytest.raises(BadMutantError, match=r"over 0\.05 s"):
        run_seed(images, 1, peak())


def test_a_mutant_that_takes_too_much_memory_is_told(
    images: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    def greedy(path: Path, name: str, rng: object) -> None:
        pass

    monkeypatch.setattr(mutants, "use", greedy)
    with pytest.raises(BadMutantError, match="MiB"):
        run_seed(images, 1, peak() - mutants.MEBIBYTES - 1)

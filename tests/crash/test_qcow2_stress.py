"""Several threads write, zero, trim, flush and read one image at once: no byte is ever wrong.

FLEECE_SEED=N: other requests; FLEECE_SOAK=N: N times as many.
"""

import os
import random
from pathlib import Path

import pytest

from fleece.formats.qcow2 import freespace, pending
from tests.support import stress
from tests.support.threads import frequent_switches

ROUNDS = int(os.environ.get("FLEECE_SOAK", "1"))


@pytest.mark.parametrize("name", stress.IMAGES)
def test_threads_that_share_clusters_never_spoil_each_others_bytes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(freespace, "GRACE", 0.0)  # space is used again as soon as it may be
    for number in range(ROUNDS):
        seed = stress.seed_of(name) + number
        rnd = random.Random(seed)
        monkeypatch.setattr(pending, "MOST", rnd.choice([4, 1024]))
        directory = tmp_path / str(number)
        directory.mkdir()
        image = stress.IMAGES[name](directory, rnd)
        try:
            with frequent_switches():
                stress.run(image, seed, threads=rnd.choice([4, 6, 8]), steps=60)
        except (AssertionError, OSError) as error:
            raise AssertionError(f"{name}, seed {seed}: {error}") from error

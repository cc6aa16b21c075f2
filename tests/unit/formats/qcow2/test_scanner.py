# SPDX-License-Identifier: Apache-2.0
import random
import struct

import pytest

from fleece.formats.qcow2 import constants as c
from fleece.formats.qcow2 import entries
from fleece.formats.qcow2.entries import ClusterRun, SubclusterScanner

SIZE = 65536
_BITMAPS = (0, c.ALL_ALLOCATED, c.ALL_ZERO, 0x0000_00F0_0000_0F0F, 0x8000_0000_0000_0001)


def table_of(seed: int, count: int) -> bytes:
    """Extended entries that often go on from each other, as those of a disk do."""
    rng, words = random.Random(seed), []
    host = SIZE
    for _ in range(count):
        host += SIZE if rng.random() < 0.7 else 5 * SIZE
        if rng.random() < 0.1:
            words += [c.COMPRESSED | host, 0]
            continue
        flag = c.COPIED if rng.random() < 0.8 else 0
        words += [host | flag, rng.choice(_BITMAPS[:2] if rng.random() < 0.7 else _BITMAPS)]
    return struct.pack(f">{len(words)}Q", *words)


@pytest.mark.parametrize("seed", range(20))
def test_few_extended_entries_are_decoded_as_many_are(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    data = table_of(seed, 40)
    scanner = SubclusterScanner(SIZE)
    for _ in range(20):
        index = rng.randrange(40 * 32 - 1)
        count = rng.randrange(1, 40 * 32 - index + 1)
        found: dict[int, list[ClusterRun]] = {0: [], 1 << 20: []}
        for limit, runs in found.items():
            monkeypatch.setattr(entries, "_VECTOR_FROM", limit)
            scanner.scan(runs, data, index, count)
        assert found[0] == found[1 << 20]
        assert sum(run.units for run in found[0]) == count

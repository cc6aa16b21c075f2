# SPDX-License-Identifier: Apache-2.0
"""Memory that is taken where it is used, and given back."""

import re
from pathlib import Path

from nbdwire.pages import give_back, pages

SIZE = 64 << 20


def resident() -> int:
    """Bytes of this process."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) << 10


def test_pages_take_memory_when_they_are_used_and_none_when_given_back() -> None:
    before = resident()
    buffer = pages(SIZE)
    assert resident() - before < SIZE // 4
    view = memoryview(buffer)
    view[:] = b"x" * SIZE
    assert resident() - before > SIZE // 2
    give_back(buffer)
    assert resident() - before < SIZE // 4
    assert len(view) == SIZE
    assert bytes(view[-4:]) == bytes(4)
    view[:4] = b"used"
    assert bytes(buffer[:5]) == b"used\0"

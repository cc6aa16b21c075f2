"""What the rules for the transmission phase are tried on: every form, both of the server's loops.

An export that is ``blocking`` is served by `nbdwire.followers`, any other by `nbdwire.worker`.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdwire.uri import NBDURI
from tests.support.faulty import Hooked, striped
from tests.support.nbdraw import FORMS, Raw, connected
from tests.support.serving import serving

SIZE = 4 << 20
CONTEXTS = ("base:allocation", "qemu:dirty-bitmap:a", "qemu:dirty-bitmap:b")


@pytest.fixture(params=sorted(FORMS))
def form(request: pytest.FixtureRequest) -> dict[str, bool]:
    return FORMS[request.param]


@pytest.fixture(params=[False, True], ids=["worker", "followers"])
def node(request: pytest.FixtureRequest) -> Hooked:
    """4 MiB of zeroes that cannot be told from data."""
    return Hooked(SIZE, blocking=request.param)


@pytest.fixture
def where(tmp_path: Path, node: Hooked) -> Iterator[NBDURI]:
    dirty = {CONTEXTS[1]: striped(1000, 65536), CONTEXTS[2]: striped(7, 4096)}
    with serving(tmp_path, node, contexts=dirty) as (_, uri):
        yield uri


@pytest.fixture
def client(where: NBDURI, form: dict[str, bool]) -> Iterator[Raw]:
    """In transmission, with all contexts where there can be any."""
    wanted = () if form == FORMS["simple"] else CONTEXTS
    with connected(where, contexts=wanted, **form) as client:
        yield client

# SPDX-License-Identifier: Apache-2.0
"""No byte is ever wrong: random requests through our client to our server, over real storage.

FLEECE_SEED is the seed (``./run soak SECONDS`` tries many), FLEECE_SOAK makes the rounds longer.
"""

import os
import random
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fleece.block.file import FileNode
from fleece.formats import open_image
from fleece.formats.qcow2.create import CreateOptions, create
from nbdwire.pool import Pool, connect_pool
from nbdwire.tls import ClientTLS, ServerTLS
from nbdwire.uri import NBDURI
from tests.support import certificates
from tests.support.certificates import Pki
from tests.support.faulty import Hooked
from tests.support.nodes import make_file
from tests.support.serving import serving
from tests.support.snapshots import Rig, read
from tests.support.storm import Storm, overlapping

SEED = int(os.environ.get("FLEECE_SEED", "20261123"))
SOAK = min(int(os.environ.get("FLEECE_SOAK", "1")), 20)
SIZE = (16 << 20) + 12_345
REQUESTS = 4500 * SOAK
CONNECTIONS = 4

FORMS: dict[str, dict[str, bool]] = {
    "simple": {"extended": False, "structured": False},
    "structured": {"extended": False},
    "extended": {},
}
# kind of disk, form of requests and replies, TLS: each pair of two at least once
CASES = [
    ("raw", "simple", False),
    ("raw", "structured", True),
    ("raw", "extended", False),
    ("followers", "structured", False),
    ("followers", "extended", True),
    ("qcow2", "structured", False),
    ("qcow2", "extended", True),
    ("live", "extended", False),
    ("live", "structured", True),
]
NAMES = [f"{kind}-{form}-{'tls' if tls else 'plain'}" for kind, form, tls in CASES]


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return certificates.create(tmp_path_factory.mktemp("pki"))


@dataclass
class Target:
    """``export`` is served, ``node`` is looked at afterwards; ``rig`` takes snapshots of it."""

    export: Any
    node: Any
    rig: Rig | None = None
    instants: list[tuple[Any, bytes]] = field(default_factory=list)

    def snapshot(self, model: bytearray) -> None:
        if self.rig is not None:
            self.instants.append((self.rig.snapshot(), bytes(model)))


@contextmanager
def target(kind: str, directory: Path) -> Iterator[Target]:
    if kind == "qcow2":
        create(directory / "disk.qcow2", SIZE, CreateOptions(cluster_size=16384))
        with closing(open_image(directory / "disk.qcow2", "qcow2")) as node:
            yield Target(node, node)
    elif kind == "followers":
        slow = Hooked(SIZE, blocking=True)
        yield Target(slow, slow)
    else:
        with closing(FileNode(make_file(directory, SIZE))) as file:
            if kind == "raw":
                yield Target(file, file)
                return
            rig = Rig(directory, file, cluster_size=16384)
            yield Target(rig.disk, file, rig)
            rig.close()


@contextmanager
def connections(
    where: NBDURI, form: str, trust: ClientTLS | None, count: int = CONNECTIONS
) -> Iterator[Pool]:
    options: dict[str, Any] = dict(FORMS[form])
    if trust is not None:
        options["tls"] = trust.upgrade
    with connect_pool(where.with_export("disk"), count, **options) as pool:
        assert len(pool.clients) == count
        assert (pool.session.extended, pool.session.structured) == (
            form == "extended",
            form != "simple",
        )
        yield pool


def secured(pki: Pki, tls: bool) -> tuple[dict[str, Any], ClientTLS | None]:
    """(what the server needs, what the client needs)"""
    if not tls:
        return {}, None
    server = ServerTLS("required", certificates=pki.both, verify_peer=False)
    return {"tls": server}, ClientTLS(certificates=pki.both, hostname="localhost")


@pytest.mark.parametrize(("kind", "form", "tls"), CASES, ids=NAMES)
def test_hundreds_of_random_requests_in_flight_leave_what_the_model_says(
    kind: str, form: str, tls: bool, tmp_path: Path, pki: Pki
) -> None:
    options, trust = secured(pki, tls)
    rng = random.Random(f"{SEED} {kind} {form} {tls}")
    with target(kind, tmp_path) as disk, serving(tmp_path, disk.export, **options) as (_, where):
        with connections(where, form, trust) as pool:
            model = bytearray(pool.size)
            storm = Storm(pool, model, rng)
            for _ in range(3):
                disk.snapshot(model)
                storm.run(REQUESTS // 3)
            print(f"{storm.most} in flight")
            assert storm.most > 20, "that was no storm"  # hundreds, where the server is not faster
            assert pool.pread(pool.size, 0) == model, f"FLEECE_SEED={SEED}"
        assert read(disk.node, 0, len(model)) == model
        for view, old in disk.instants:
            assert read(view, 0, len(old)) == old, f"a snapshot has changed: FLEECE_SEED={SEED}"


@pytest.mark.parametrize("kind", ["raw", "qcow2", "live", "followers"])
def test_where_requests_overlap_each_block_is_one_of_those_written(
    kind: str, tmp_path: Path
) -> None:
    rng = random.Random(f"{SEED} {kind}")
    with target(kind, tmp_path) as disk, serving(tmp_path, disk.export) as (_, where):
        disk.snapshot(bytearray(SIZE))
        with connections(where, "extended", None) as pool:
            overlapping(pool, rng, blocks=48, requests=600 * SOAK)
        for view, old in disk.instants:
            assert read(view, 0, len(old)) == old


class Lossy(Hooked):
    """Loses the last byte of some writes."""

    def pwrite(self, buf: memoryview, offset: int, fua: bool = False) -> None:
        super().pwrite(buf[:-1] if offset % 97 == 0 else buf, offset, fua)


def test_the_control_a_disk_that_loses_a_byte_now_and_then_is_found_out(tmp_path: Path) -> None:
    with (
        serving(tmp_path, Lossy(SIZE)) as (_, where),
        connections(where, "extended", None) as pool,
    ):
        storm = Storm(pool, bytearray(SIZE), random.Random(1))
        with pytest.raises(AssertionError, match="not what was written"):
            storm.run(REQUESTS)

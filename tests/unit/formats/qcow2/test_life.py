"""The life of an image: anything that can be done to it, in any order, against a bytearray.

For each cluster size and refcount width. QEMU checks and reads the image at random moments.
"""

import os
import random
from pathlib import Path

import pytest

from fleece.block.file import FileNode
from fleece.errors import FleeceError
from fleece.formats.committing import commit, empty
from fleece.formats.qcow2 import snapshots
from fleece.formats.qcow2.create import CreateOptions, create
from fleece.formats.qcow2.image import Qcow2Node
from fleece.formats.qcow2.resize import resize
from nbdwire.constants import CMD_FLAG_NO_HOLE
from tests.support.qcow2 import assert_clean, assert_same, pread, qemu_img

SEED = os.environ.get("FLEECE_SEED", "1")
MOST = 1_500_000

SHAPES = [
    (cluster, bits, extended)
    for cluster, extended in [(512, False), (4096, False), (65536, False), (1 << 21, False)]
    for bits in (1, 2, 4, 8, 16, 32, 64)
] + [(16384, 16, True), (65536, 4, True)]

VERBS = (
    ["write"] * 8 + ["zero", "keep", "trim", "flush", "reopen", "resize", "commit"]
    + ["create", "create", "apply", "delete", "look"]
)  # fmt: skip


class Life:
    """An image over a raw base, and what all of it should hold."""

    def __init__(self, directory: Path, cluster: int, bits: int, extended: bool) -> None:
        self.rnd = random.Random(f"{SEED} {cluster} {bits} {extended}")
        self.base = directory / "base.raw"
        self.path = directory / "disk.qcow2"
        content = self.rnd.randbytes(700_416)
        self.base.write_bytes(content)
        options = CreateOptions(
            cluster_size=cluster,
            refcount_bits=bits,
            extended_l2=extended,
            backing=str(self.base),
            backing_format="raw",
        )
        create(self.path, 1_000_448, options)
        self.disk = bytearray(content.ljust(1_000_448, b"\0"))
        self.saved: dict[bytes, bytes] = {}
        self.bits = bits
        self.node = self.open()

    def open(self) -> Qcow2Node:
        base = FileNode(self.base, locking=False)
        return Qcow2Node(FileNode(self.path, locking=False), backing=base)

    def step(self) -> None:
        verb = self.rnd.choice(VERBS)
        getattr(self, verb)()
        low = self.rnd.randrange(len(self.disk))
        length = min(20_000, len(self.disk) - low)
        same = pread(self.node, length, low) == self.disk[low : low + length]
        assert same, f"after {verb}"

    def _range(self) -> tuple[int, int]:
        offset = self.rnd.randrange(len(self.disk))
        length = min(self.rnd.choice([1, 700, 4096, 70_000]), len(self.disk) - offset)
        return offset, length

    def write(self) -> None:
        offset, length = self._range()
        data = self.rnd.randbytes(length)
        self.node.pwrite(memoryview(data), offset, self.rnd.random() < 0.1)
        self.disk[offset : offset + length] = data

    def zero(self, flags: int = 0) -> None:
        offset, length = self._range()
        self.node.zero(offset, length, flags)
        self.disk[offset : offset + length] = bytes(length)

    def keep(self) -> None:
        self.zero(CMD_FLAG_NO_HOLE)

    def trim(self) -> None:
        offset, length = self._range()
        self.node.trim(offset, length)
        now = pread(self.node, length, offset)
        before = self.disk[offset : offset + length]
        assert all(a in (0, b) for a, b in zip(now, before, strict=True)), "foreign data"
        self.disk[offset : offset + length] = now

    def flush(self) -> None:
        self.node.flush()
        assert_clean(self.path)

    def reopen(self) -> None:
        self.node.close()
        self.look()
        self.node = self.open()

    def look(self) -> None:
        """What QEMU says."""
        if not self.node._closed:
            self.node.flush()
        assert_clean(self.path)
        assert_same(self.path, self.disk)

    def resize(self) -> None:
        size = self.rnd.randrange(512, MOST) & ~511
        resize(self.node, size, shrink=True)
        self.disk = self.disk[:size].ljust(size, b"\0")

    def commit(self) -> None:
        if self.saved:
            return  # the snapshots' view of the base would change
        base = self.node.backing
        assert base is not None
        commit(self.node, base)
        empty(self.node)

    def create(self) -> None:
        if self.bits == 1:
            self.fail_to_share()
        elif len(self.saved) < min(2, self.bits - 1):  # `apply` needs one reference more
            name = snapshots.create(self.node, "s").identity
            self.saved[name] = bytes(self.disk)

    def fail_to_share(self) -> None:
        """No cluster can have two users, and nothing is changed by trying."""
        self.write()
        if self.disk == bytes(len(self.disk)):
            return
        try:
            made = snapshots.create(self.node, "one")
        except FleeceError:
            return
        snapshots.delete(self.node, made.identity)  # there was nothing to share

    def apply(self) -> None:
        if self.saved:
            which = self.rnd.choice(sorted(self.saved))
            snapshots.apply(self.node, which)
            self.disk = bytearray(self.saved[which])

    def delete(self) -> None:
        if self.saved:
            which = self.rnd.choice(sorted(self.saved))
            snapshots.delete(self.node, which)
            del self.saved[which]

    def end(self) -> None:
        self.node.close()
        self.look()
        for which, content in self.saved.items():
            old = self.path.with_suffix(".old")
            qemu_img("convert", "-l", which.decode(), "-O", "raw", self.path, old)
            got = old.read_bytes()
            # QEMU shows a snapshot at the size of now.
            size = min(len(got), len(content))
            assert got[:size] == content[:size]


@pytest.mark.parametrize(("cluster", "bits", "extended"), SHAPES)
def test_whatever_is_done_to_an_image_it_holds_what_it_should(
    tmp_path: Path, cluster: int, bits: int, extended: bool
) -> None:
    life = Life(tmp_path, cluster, bits, extended)
    for _ in range(40):
        life.step()
    life.end()

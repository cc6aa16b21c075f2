"""formats.md §1.8: a repair that ends half way leaves an image that can be repaired."""

import shutil
from pathlib import Path

import pytest

from fleece.block.file import FileNode
from fleece.block.node import Filter
from fleece.formats.qcow2.check import ALL, Current, check, read_damaged
from tests.support import broken
from tests.support.broken import KINDS, Break, Editor, build
from tests.support.qcow2 import qemu_img

POWER = "the power went"

CASES: dict[str, tuple[str, tuple[Break, ...]]] = {
    "counts to lower and to raise": ("snapshots", (broken.leak, broken.count_too_low)),
    "counts to make anew": ("v3", (broken.leak, broken.block_missing)),
    "flags": ("refcount8", (broken.copied_missing, broken.l1_copied_missing, broken.dirty)),
    "an entry": ("extended", (broken.zero_unaligned, broken.leak, broken.marked_corrupt)),
    "a snapshot table": ("snapshots", (broken.snapshot_extra_huge, broken.leak)),
    "stale bitmaps": ("bitmaps", (broken.bitmaps_not_valid, broken.count_too_low)),
}


class Dying(Filter):
    """Fails for ever after ``writes`` writes."""

    def __init__(self, child: FileNode, writes: int) -> None:
        super().__init__(child.name, child)
        self.left = writes

    def pwrite(self, buf: memoryview, offset: int, fua: bool = False) -> None:
        if self.left <= 0:
            raise OSError(5, POWER)
        self.left -= 1
        self.next.pwrite(buf, offset, fua)


def _repair(path: Path, writes: int) -> bool:
    """Repair with so many writes at most; whether that was enough."""
    file = FileNode(path, locking=False)
    try:
        check(Dying(file, writes), read_damaged(Current(file)), name="it", repair=ALL)
    except OSError as error:
        if error.strerror != POWER:
            raise
        return False
    finally:
        file.close()
    return True


@pytest.mark.parametrize("case", list(CASES))
def test_a_repair_that_dies_at_any_write_can_be_repeated(case: str, tmp_path: Path) -> None:
    name, ways = CASES[case]
    image = build(tmp_path / "image.qcow2", KINDS[name])
    editor = Editor(image)
    for how in ways:
        how(editor)
    editor.save()
    whole, torn = tmp_path / "whole.qcow2", tmp_path / "torn.qcow2"
    shutil.copy(image, whole)
    assert _repair(whole, 1 << 30)
    for writes in range(100):
        shutil.copy(image, torn)
        if _repair(torn, writes):
            break
        assert _repair(torn, 1 << 30)
        qemu_img("check", "-f", "qcow2", torn)
        qemu_img("compare", "-f", "qcow2", "-F", "qcow2", torn, whole)
    assert 0 < writes < 100

"""``fleece image check`` and ``qemu-img check`` on the same images, sound and broken ones."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fleece.cli.main import main
from tests.support import broken
from tests.support.broken import KINDS, Break, Editor, build
from tests.support.qcow2 import qemu_img
from tests.support.tools import require

SOME = ("v2", "tiny", "refcount1", "refcount2", "refcount64", "extended", "snapshots")
PLAIN = ("v3", "v2", "large", "refcount4", "refcount8", "refcount32", "extended", "preallocated")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("corpus")
    return {name: build(directory / f"{name}.qcow2", kind) for name, kind in KINDS.items()}


@pytest.fixture
def image(corpus: dict[str, Path], tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    return _copy(corpus, request.param, tmp_path)


def _copy(corpus: dict[str, Path], name: str, tmp_path: Path) -> Path:
    target = tmp_path / f"{name}.qcow2"
    shutil.copy(corpus[name], target)
    return target


def _broken(corpus: dict[str, Path], name: str, how: Break, tmp_path: Path) -> Path:
    path = _copy(corpus, name, tmp_path)
    editor = Editor(path)
    how(editor)
    editor.save()
    return path


def ours(
    capsys: pytest.CaptureFixture[str], path: Path, *options: str
) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    status = main(["image", "check", "-f", "qcow2", "--output", "json", *options, str(path)])
    out = capsys.readouterr().out
    return status, json.loads(out) if out else {}


def theirs(path: Path, *options: str) -> tuple[int, dict[str, Any]]:
    source = ["-f", "qcow2", str(path)]
    if path.name == "luks.qcow2":
        named = f"driver=qcow2,file.filename={path},encrypt.key-secret=s"
        source = ["--object", "secret,id=s,data=geheim", "--image-opts", named]
    command = [require("qemu-img"), "check", "--output=json", *options, *source]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    found = json.loads(done.stdout) if done.stdout else {}
    found.pop("filename", None)
    return done.returncode, found | ({"filename": str(path)} if found else {})


def _after(found: dict[str, Any]) -> dict[str, Any]:
    """Without the end: where a repair puts new tables is its own affair."""
    return {key: value for key, value in found.items() if key != "image-end-offset"}


def _agree(capsys: pytest.CaptureFixture[str], path: Path) -> None:
    """Both programs say the same before and after each kind of repair, and leave the same disk."""
    expected = theirs(path)
    assert ours(capsys, path) == expected
    for repair in ("leaks", "all"):
        mine = path.with_name(f"{repair}-{path.name}")
        his = path.with_name(f"{repair}-his-{path.name}")
        shutil.copy(path, mine)
        shutil.copy(path, his)
        status, found = ours(capsys, mine, "-r", repair)
        expected_status, expected_found = theirs(his, "-r", repair)
        found.pop("filename", None)
        expected_found.pop("filename", None)
        assert (status, _after(found)) == (expected_status, _after(expected_found)), repair
        if status != 1:
            assert theirs(mine)[0] == status, "QEMU finds what we left"
        if repair == "all" and status == 0 and expected_status == 0:
            qemu_img("compare", "-f", "qcow2", "-F", "qcow2", mine, his)


@pytest.mark.parametrize("name", [name for name in KINDS if name != "luks"])
def test_a_sound_image_has_the_same_figures(
    corpus: dict[str, Path], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _agree(capsys, _copy(corpus, name, tmp_path))


def test_an_encrypted_image_needs_no_password_to_be_checked(
    corpus: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert ours(capsys, corpus["luks"]) == theirs(corpus["luks"])


def _cases() -> Iterator[tuple[str, Break]]:
    # Every way to break something, of as many kinds of image as the time allows.
    for number, how in enumerate((*broken.EVERYWHERE, *broken.WITH_DATA)):
        yield "v3", how
        for step in (0, 3, 5):
            yield SOME[(number + step) % len(SOME)], how
    for name in PLAIN:
        yield from ((name, how) for how in broken.WIDE)
        yield name, broken.data_unaligned
    for name in ("v3", "lazy", "backed", "bitmaps"):
        yield from ((name, how) for how in broken.VERSION_3)
        yield name, broken.zero_unaligned
    yield "extended", broken.zero_unaligned
    for name in ("compressed", "zstd"):
        yield name, broken.compressed_copied
        yield name, broken.compressed_beyond_end
        yield name, broken.leak
        yield name, broken.count_of_header_zero
    for name in ("data_file", "bitmaps", "preallocated"):
        yield name, broken.leak
        yield name, broken.all_counts_zero
    yield "data_file", broken.copied_missing
    yield "bitmaps", broken.bitmaps_not_valid
    yield "snapshots", broken.snapshot_l1_unaligned
    yield "snapshots", broken.snapshot_l1_beyond_end
    yield "snapshots2", broken.snapshot_l1_unaligned


@pytest.mark.parametrize(("name", "how"), list(_cases()), ids=lambda v: getattr(v, "__name__", v))
def test_a_broken_image_is_judged_and_repaired_as_by_qemu(
    corpus: dict[str, Path],
    name: str,
    how: Break,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """formats.md §1.11"""
    _agree(capsys, _broken(corpus, name, how, tmp_path))


# What QEMU cannot check or repair, or where it does harm, and we do better.
BETTER: dict[str, tuple[str, Break, int, int]] = {
    "refcount block inside a cluster": ("snapshots", broken.block_unaligned, 1, 0),
    "refcount block behind the end": ("v3", broken.block_beyond_end, 2, 0),
    "snapshot table inside a cluster": ("refcount4", broken.snapshots_unaligned, 1, 0),
    "snapshot entry without an end": ("refcount4", broken.snapshot_extra_huge, 1, 0),
    "snapshot table behind the end": ("snapshots2", broken.snapshots_beyond_end, 1, 0),
    "L1 table as its own L2 table": ("v3", broken.l2_is_l1, 2, 1),
    "L2 table inside a cluster": ("v3", broken.l2_unaligned, 2, 2),
    "subcluster with and without data": ("extended", broken.subclusters_both, 2, 2),
    "subclusters without a cluster": ("extended", broken.subclusters_homeless, 2, 2),
    "snapshot with a huge L1 table": ("snapshots", broken.snapshot_l1_huge, 2, 2),
    "bitmap table with reserved bits": ("bitmaps", broken.bitmap_table_entry_bad, 2, 2),
    "bitmap directory of garbage": ("bitmaps", broken.bitmap_directory_garbage, 1, 1),
    "number of bitmaps wrong": ("bitmaps", broken.bitmap_count_wrong, 1, 1),
}


@pytest.mark.parametrize("case", list(BETTER))
def test_damage_that_qemu_gives_up_on_has_a_known_end(
    corpus: dict[str, Path], case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, how, before, after = BETTER[case]
    path = _broken(corpus, name, how, tmp_path)
    assert ours(capsys, path)[0] == before
    assert ours(capsys, path, "-r", "all")[0] == after
    if after == 0:
        qemu_img("check", "-f", "qcow2", path)


def test_an_unknown_autoclear_feature_costs_no_snapshot(
    corpus: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """QEMU 7.2 forgets the snapshots when ``check -r`` clears such a bit; formats.md §1.1"""
    path = _broken(corpus, "snapshots", broken.unknown_autoclear, tmp_path)
    assert ours(capsys, path, "-r", "all")[0] == 0
    assert Editor(path).u64(88) == 0
    assert "s0" in qemu_img("snapshot", "-l", path)


def test_bitmaps_that_are_not_valid_are_forgotten_before_their_clusters_are_freed(
    corpus: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """formats.md §1.5"""
    path = _broken(corpus, "bitmaps", broken.bitmaps_not_valid, tmp_path)
    assert ours(capsys, path)[0] == 3
    assert ours(capsys, path, "-r", "leaks")[0] == 0
    with pytest.raises(AssertionError, match="no extension"):
        Editor(path).extension(0x23852875)


@pytest.mark.parametrize("repair", ["leaks", "all"])
def test_marks_go_when_nothing_is_left(
    corpus: dict[str, Path], repair: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """formats.md §1.8"""
    path = _broken(corpus, "v3", broken.marked_corrupt, tmp_path)
    assert ours(capsys, path, "-r", repair)[0] == 0
    assert Editor(path).u64(72) == 0


def test_the_human_output_is_that_of_qemu(
    corpus: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for how in (broken.leak, broken.count_too_low, broken.copied_missing):
        path = _broken(corpus, "snapshots", how, tmp_path)
        copy = path.with_suffix(".copy")
        shutil.copy(path, copy)
        capsys.readouterr()
        assert main(["image", "check", "-r", "all", str(path)]) == 0
        expected = qemu_img("check", "-r", "all", copy).splitlines()
        assert capsys.readouterr().out.splitlines()[:-1] == expected[:-1]


def test_raw_images_cannot_be_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(4096))
    assert main(["image", "check", str(path)]) == 63
    assert "does not support checks" in capsys.readouterr().err
    qemu_img("check", "-f", "raw", path, ok=(63,))


def test_what_is_no_image_cannot_be_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "disk").write_bytes(bytes(4096))
    assert main(["image", "check", "-f", "qcow2", str(tmp_path / "disk")]) == 1
    assert main(["image", "check", str(tmp_path / "missing")]) == 1
    assert main(["image", "check", "-r", "some", str(tmp_path / "disk")]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_quiet_says_nothing_and_progress_ends_its_line(
    corpus: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["image", "check", "-q", str(corpus["v3"])]) == 0
    assert capsys.readouterr() == ("", "")
    assert main(["image", "check", "-p", str(corpus["v3"])]) == 0
    assert "(100.00/100%)\r\n" in capsys.readouterr().out


def test_options_instead_of_a_filename(
    corpus: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    named = f"driver=qcow2,file.driver=file,file.filename={corpus['v3']}"
    assert main(["image", "check", "--image-opts", named]) == 0
    assert "No errors" in capsys.readouterr().out

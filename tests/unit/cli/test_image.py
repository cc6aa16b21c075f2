"""``fleece image``: the group, what its commands share, and pictures. tests/interop has more."""

import argparse
import base64
import io
import os
import re
import subprocess
import sys
import xml.dom.minidom
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fleece.cli.arguments import Parser
from fleece.cli.image import COMMANDS, LazyCommands, common, picture
from fleece.cli.main import build_parser
from fleece.errors import ImageCorrupt, UsageError
from fleece.formats.mapping import DATA, OFFSET, PRESENT, ZERO, Batch
from tests.support.qcow2 import make, opened
from tests.unit.cli.conftest import Run

SIZE = 1 << 20


def script(text: str, *words: str) -> "subprocess.CompletedProcess[str]":
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run(
        [sys.executable, "-c", text, *words], env=env, capture_output=True, text=True
    )


def test_help_lists_every_command_and_imports_none() -> None:
    done = script(
        "import sys\nfrom fleece.cli.main import main\nmain(['image', '--help'])\n"
        "assert 'numpy' not in sys.modules\n"
        "assert 'fleece.cli.image.map' not in sys.modules"
    )
    assert done.returncode == 0, done.stderr
    for name, (_, text) in COMMANDS.items():
        assert re.search(rf"(?m)^ +{name} +{re.escape(text)}$", done.stdout)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example_and_without_numpy(name: str) -> None:
    done = script(
        "import sys\nfrom fleece.cli.main import main\nstatus = main(['image', *sys.argv[1:]])\n"
        "assert status == 0\nassert 'numpy' not in sys.modules",
        *(name, "--help"),
    )
    assert done.returncode == 0, done.stderr
    assert f"usage: fleece image {name}" in done.stdout
    assert f"example:\n  fleece image {name}" in done.stdout


def test_info_starts_without_numpy(tmp_path: Path) -> None:
    path = make(tmp_path / "i.qcow2", SIZE)
    done = script(
        "import sys\nfrom fleece.cli.main import main\nstatus = main(['image', *sys.argv[1:]])\n"
        "assert status == 0\nassert 'numpy' not in sys.modules",
        *("info", str(path)),
    )
    assert done.returncode == 0, done.stderr


def test_all_commands_can_be_loaded_for_the_reference() -> None:
    parser = build_parser()
    groups = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    image = groups[0].choices["image"]
    lazy = next(a for a in image._actions if isinstance(a, LazyCommands))
    lazy.load_all()
    assert list(lazy.choices) == list(COMMANDS)
    assert [child.metavar for child in lazy._choices_actions] == list(COMMANDS)
    assert all(isinstance(child, Parser) for child in lazy.choices.values())


def test_a_wrong_command_line_of_a_command_is_1_as_in_qemu_img(run: Run) -> None:
    """formats.md §11: 2 says "they cannot be opened" or "corruptions" there."""
    for words in (["info"], ["info", "--nonsense", "x"], ["compare", "x"], ["map"]):
        result = run("image", *words)
        assert result.status == 1, words
        assert result.err.count("\n") == 1
        assert f"fleece image {words[0]} --help" in result.err
    assert run("image", "nonsense").status == 2


def _bad(directory: Path) -> dict[str, Path]:
    good = make(directory / "good.qcow2", SIZE).read_bytes()
    paths = {
        "missing": directory / "missing",
        "directory": directory,
        "fifo": directory / "fifo",
        "empty": directory / "empty",
        "garbage": directory / "garbage",
        "truncated": directory / "truncated",
        "header-only": directory / "header-only",
    }
    os.mkfifo(paths["fifo"])
    paths["empty"].touch()
    paths["garbage"].write_bytes(bytes(range(256)) * 100)
    paths["truncated"].write_bytes(good[:100])
    paths["header-only"].write_bytes(good[:512])
    return paths


@pytest.mark.parametrize("command", ["info", "map", "compare"])
def test_bad_input_is_one_line_and_qemus_status(command: str, run: Run, tmp_path: Path) -> None:
    for name, path in _bad(tmp_path).items():
        words = [str(path)] * (2 if command == "compare" else 1)
        flags = ["-f", "qcow2"]
        result = run("image", command, *flags, *words)
        assert result.status == (2 if command == "compare" else 1), name
        assert result.err.startswith("fleece: ")
        assert result.err.count("\n") == 1, result.err
        assert "Traceback" not in result.err
        as_json = run("image", command, "--json", *flags, *words)
        assert as_json.status == result.status
        assert f"fleece: {as_json.json['message']}\n" == result.err


def test_names_of_an_image_cannot_command_the_terminal(run: Run, tmp_path: Path) -> None:
    """formats.md §12: QEMU prints escapes of names as they are."""
    path = make(tmp_path / "i.qcow2", SIZE, backing="base\x1b[31m\nx", backing_format="raw")
    data = path.read_bytes().replace(b"base\x1b[31m\nx", b"base\x1b[31m\n\xff")
    path.write_bytes(data)
    result = run("image", "info", str(path))
    assert result.status == 0
    assert "backing file: base\\x1b[31m\\n\\xff (actual" in result.out
    for words in (["info", "--json"], ["info", "--backing-chain"], ["map"]):
        result = run("image", *words, str(path))
        assert all(c.isprintable() for c in result.out.replace("\n", "") + result.err[:-1])


def test_info_opens_nothing_that_the_image_names(run: Run, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    path = make(tmp_path / "i.qcow2", SIZE, backing="fifo", backing_format="raw")
    result = run("image", "info", "--json", str(path))
    assert result.json["backing-filename"] == "fifo"
    chain = run("image", "info", "--backing-chain", str(path))
    assert (chain.status, "not a regular file" in chain.err) == (1, True)


def test_a_chain_that_never_ends_is_told(run: Run, tmp_path: Path) -> None:
    make(tmp_path / "a", SIZE, backing="b", backing_format="qcow2")
    make(tmp_path / "b", SIZE, backing="a", backing_format="qcow2")
    result = run("image", "info", "--backing-chain", str(tmp_path / "a"))
    assert (result.status, "comes back" in result.err) == (1, True)


def test_the_policy_of_the_command_line_reaches_the_chain(run: Run, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "base").write_bytes(b"x" * SIZE)
    path = make(tmp_path / "home" / "i", SIZE, backing="../base", backing_format="raw")
    for words, status in (
        ([], 1),
        (["--allow-backing", str(tmp_path)], 0),
        (["--allow-backing", "any"], 0),
        (["--allow-backing", "none"], 1),
    ):
        assert run("image", "map", *words, str(path)).status == status
        assert run("image", "info", "--backing-chain", *words, str(path)).status == status


def secrets(*objects: str) -> dict[str, bytes]:
    return common.secrets(argparse.Namespace(objects=list(objects)))


def test_secrets_come_from_the_line_or_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_bytes(b"raw\n\xff")
    packed = tmp_path / "packed"
    packed.write_bytes(base64.b64encode(b"abc") + b"\n")
    assert secrets(
        "secret,id=a,data=x,,y",
        f"secret,id=b,file={file}",
        f"secret,id=c,format=base64,file={packed}",
        "qom-type=secret,id=d,data=eA==,format=base64",
    ) == {"a": b"x,y", "b": b"raw\n\xff", "c": b"abc", "d": b"x"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("secret,data=x", "has no id"),
        ("secret,id=a", "needs data= or file="),
        ("secret,id=a,data=x,file=y", "one of the two"),
        ("secret,id=a,file=/nonexistent/x", "No such file"),
        ("secret,id=a,file=/dev/zero", "too long"),
        ("secret,id=a,data=*,format=base64", "not base64"),
        ("secret,id=a,dat=x", "did you mean 'data'"),
        ("tls-creds,id=a", "no object 'tls-creds'"),
    ],
)
def test_a_secret_that_cannot_be_is_refused_without_being_shown(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        secrets(text)


def test_progress_is_qemus_line(capsys: pytest.CaptureFixture[str]) -> None:
    with common.Progress(True) as progress:
        progress(512, 1024)
        progress(1024, 1024)
    out = capsys.readouterr().out
    assert out.startswith("    (0.00/100%)\r")
    assert out.endswith("    (100.00/100%)\r\n")
    with common.Progress(False) as progress:
        progress(1, 2)
    assert capsys.readouterr().out == ""
    with pytest.raises(OSError, match="x"), common.Progress(True) as progress:
        raise OSError("x")
    assert "100.00" not in capsys.readouterr().out
    assert not common.progress(argparse.Namespace(progress=True, quiet=True))._wanted
    assert common.progress(argparse.Namespace(progress=True, json=False))._wanted


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ImageCorrupt("x: broken"), "fleece: x: broken\n"),
        (OSError(5, "Input/output error", "disk"), "fleece: disk: Input/output error\n"),
        (MemoryError(), "fleece: there is not enough memory for this\n"),
    ],
)
def test_errors_of_a_command_are_one_line_and_its_status(
    error: Exception, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: argparse.Namespace) -> int:
        raise error

    assert common.run_as_qemu(argparse.Namespace(json=False), fail) == 1
    assert common.run_as_qemu(argparse.Namespace(), fail, 7) == 7
    assert capsys.readouterr().err == line * 2


def test_nodes_are_closed_in_any_case(tmp_path: Path) -> None:
    class Node:
        def __init__(self, problem: str | None = None) -> None:
            self.closed, self.problem = 0, problem

        def close(self) -> None:
            self.closed += 1
            if self.problem:
                raise OSError(self.problem)

    nodes: list[Any] = [Node("first"), Node("second"), Node()]
    with pytest.raises(OSError, match="first"), common.closing_all(*nodes):
        pass
    assert [node.closed for node in nodes] == [1, 1, 1]


# Pictures


def batch(*entries: tuple[int, int], stop: int) -> Batch:
    starts = np.array([start for start, _ in entries], np.int64)
    codes = np.array([code for _, code in entries], np.uint16)
    return Batch(starts, codes, starts, stop)


OWN, BELOW = DATA | PRESENT | OFFSET, DATA | PRESENT | OFFSET | 1 << 8
HOLE, ZEROED = ZERO, ZERO | PRESENT
ENTRIES = ((0, OWN), (1024, HOLE), (4096, BELOW), (5120, ZEROED))


def test_a_cell_shows_the_topmost_data_in_it() -> None:
    whole = batch(*ENTRIES, stop=8192)
    grid = picture.Grid([whole], 0, 8192, 8)
    assert grid.kinds() == [0, *[picture.HOLE] * 3, 1, *[picture.ZERO] * 3]
    assert grid.totals() == {0: 1024, 1: 1024, picture.ZERO: 3072, picture.HOLE: 3072}
    assert grid.fullness() == [1, 0, 0, 0, 1, 0, 0, 0]
    coarse = picture.Grid([whole], 0, 8192, 1)
    assert (coarse.kinds(), coarse.fullness()) == ([0], [0.25])
    parts = [batch(*ENTRIES[:2], stop=4096), batch(*ENTRIES[2:], stop=8192)]
    assert picture.Grid(parts, 0, 8192, 8).kinds() == grid.kinds()
    assert picture.Grid(parts, 0, 8192, 3).totals() == grid.totals()


def test_shares_of_cells_add_up_for_any_cut() -> None:
    rng = np.random.default_rng(5)
    starts = np.unique(np.append(0, rng.integers(0, 10**6, 300)))
    codes = rng.choice([OWN, BELOW, HOLE, ZEROED, 7 << 8 | OWN], len(starts)).astype(np.uint16)
    whole = Batch(starts, codes, starts, 10**6)
    expected = np.zeros(10**6, np.int64)
    for start, stop, code in zip(starts, [*starts[1:], 10**6], codes, strict=True):
        expected[start:stop] = (code & DATA != 0) and (code & ZERO == 0)
    for cells in (1, 7, 100, 1900):
        grid = picture.Grid([whole], 0, 10**6, cells)
        edges = grid.edges.tolist()
        shares = [expected[a:b].mean() for a, b in pairwise(edges)]
        assert grid.fullness() == pytest.approx(shares)


def test_a_picture_in_text_is_as_wide_as_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    out = io.StringIO()
    picture.print_text([batch(*ENTRIES, stop=8192)], 0, 8192, out)
    lines = out.getvalue().splitlines()
    assert lines[0].endswith("00······11------")
    assert max(map(len, lines[:2])) <= 60
    assert lines[-4:] == [
        "0 data of the image itself: 1 KiB (12.5 %)",
        "1 data of backing file 1: 1 KiB (12.5 %)",
        "- zeroes: 3 KiB (37.5 %)",
        "· nothing, reads as zeroes: 3 KiB (37.5 %)",
    ]
    assert "\033" not in out.getvalue()


def test_a_terminal_with_colour_gets_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = Terminal()
    picture.print_text([batch(*ENTRIES, stop=8192)], 0, 8192, out)
    assert "\033[38;5;33m█" in out.getvalue()
    assert out.getvalue().splitlines()[0].endswith("\033[0m")
    monkeypatch.setenv("NO_COLOR", "1")
    out = Terminal()
    picture.print_text([batch(*ENTRIES, stop=8192)], 0, 8192, out)
    assert "\033" not in out.getvalue()


def test_a_picture_as_svg_is_a_document(run: Run, tmp_path: Path) -> None:
    path = make(tmp_path / "a<b>&.qcow2", SIZE)
    with opened(path) as node:
        node.pwrite(memoryview(b"x" * 65536), 65536)
    target = tmp_path / "out.svg"
    assert run("image", "map", "--picture", str(target), str(path)).status == 0
    text = target.read_text()
    document = xml.dom.minidom.parseString(text)
    assert str(path) in document.getElementsByTagName("title")[0].firstChild.data
    assert "data of the image itself: 64 KiB (6.2 %)" in text
    assert len(document.getElementsByTagName("rect")) > 20
    assert str(tmp_path) in run("image", "map", "--picture", f"{tmp_path}/no/x.svg", str(path)).err


def test_picture_may_stand_before_the_image(run: Run, tmp_path: Path) -> None:
    path = make(tmp_path / "i.qcow2", SIZE)
    first = run("image", "map", "--picture", str(path))
    assert first.status == 0
    assert first.out == run("image", "map", str(path), "--picture").out
    result = run("image", "map", "--picture", "x.png", str(path))
    assert (result.status, "FILE.svg" in result.err) == (1, True)


def test_an_empty_disk_has_a_picture(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for words in (["--picture"], ["--picture", str(tmp_path / "x.svg")]):
        assert run("image", "map", str(tmp_path / "empty"), *words).status == 0

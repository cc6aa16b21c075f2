"""The command lines of the tools: statuses, one-line errors, help with an example."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path

import pytest

from nbdwire.client import connect
from nbdwire.tools.main import main, parser, say
from nbdwire.tools.options import human, size
from nbdwire.tools.progress import Progress

ROOT = Path(__file__).resolve().parents[4]
COMMAND = [sys.executable, "-m", "nbdwire"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "nbd")}


@contextmanager
def serve(*arguments: str | Path) -> Iterator[dict[str, object]]:
    """``python -m nbdwire serve``; what it says about itself. It must end well."""
    command = [*COMMAND, "serve", "--json", *map(str, arguments)]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            text = ""
            while not text.endswith("\n}\n"):
                line = process.stdout.readline()
                assert line, "the server has ended"
                text += line
            yield json.loads(text)
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0


@pytest.mark.parametrize("verb", ["info", "list", "map", "copy", "serve"])
def test_every_tool_has_help_with_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([verb, "--help"])
    assert caught.value.code == 0
    assert f"example: python -m nbdwire {verb} " in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["frobnicate"],
        ["info"],
        ["info", "http://localhost/"],
        ["info", "--timeout", "nan", "nbd://localhost"],
        ["info", "--timeout", "-1", "nbd://localhost"],
        ["info", "--can", "fly", "nbd://localhost"],
        ["info", "--can", "trim", "--size", "nbd://localhost"],
        ["copy", "http://a", "b"],
        ["copy", "a", "nbd+carrier-pigeon://b"],
        ["serve", "--memory", "16E"],
        ["copy", "a"],
        ["copy", "a", "b", "--request-size", "1"],
        ["copy", "a", "b", "--request-size", "10x"],
        ["copy", "a", "b", "--connections", "0"],
        ["copy", "a", "-", "--target-is-zero"],
        ["serve"],
        ["serve", "file", "--memory", "1M"],
    ],
)
def test_a_wrong_command_line_is_status_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert told.startswith("nbdwire")
    assert " --help tells more" in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "nbd+unix:///?socket=/nowhere/s"], "cannot connect to nbd+unix:///?socket="),
        (["info", "nbd+unix:///?socket=/nowhere/s"], "; no server has made that socket"),
        (["copy", "/proc/version", "/nowhere/b"], "/proc/version: "),
        (["serve", "--memory", "1M", "--listen", "nbd://192.0.2.1:1"], "choose an address of this"),
        (["copy", "/nowhere/a", "/nowhere/b"], "/nowhere/a: No such file or directory"),
        (["copy", "/", "/nowhere/b"], "/: neither a regular file nor a block device"),
        (["copy", "/dev/null", "/nowhere/b"], "neither a regular file nor a block device"),
        (["serve", "/nowhere/a"], "/nowhere/a: No such file or directory"),
    ],
)
def test_what_goes_wrong_is_one_line_and_status_1(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith(f"nbdwire {arguments[0]}: ")
    assert message in err


def test_a_file_is_served_as_it_is(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(b"x" * 4096 + bytes(1 << 20))
    with serve(image, "--socket", tmp_path / "s", "-n", "disk", "-d", "a disk") as facts:
        assert facts["size"] == image.stat().st_size
        with connect(str(facts["uri"])) as client:
            assert client.session.description == "a disk"
            assert client.pread(5000, 0) == b"x" * 4096 + bytes(904)
            client.pwrite(b"new", 5000)
            client.zero(0, 4096)
            client.flush()
    assert image.read_bytes()[:6000] == bytes(5000) + b"new" + bytes(997)


def test_a_read_only_file_is_not_written(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(b"x" * 4096)
    with (
        serve(image, "-r", "--socket", tmp_path / "s") as facts,
        connect(str(facts["uri"])) as client,
    ):
        assert client.read_only
        assert client.pread(4096, 0) == b"x" * 4096


def test_info_list_and_map_tell_the_same_as_the_client(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serve("--memory", "1M", "--socket", tmp_path / "s", "-n", "disk") as facts:
        uri = str(facts["uri"])
        with connect(uri) as client:
            client.pwrite(b"x" * 65536, 65536)
        assert main(["info", uri]) == 0
        assert "export-size: 1048576 (1M)" in capsys.readouterr().out
        assert main(["info", "--size", uri]) == 0
        assert capsys.readouterr().out == "1048576\n"
        assert main(["info", "--json", uri]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["exports"][0]["export-name"] == "disk"
        assert told["exports"][0]["contexts"] == ["base:allocation"]
        assert main(["list", uri]) == 0
        assert capsys.readouterr().out == "disk\n"
        assert main(["list", "--json", uri]) == 0
        assert json.loads(capsys.readouterr().out)["exports"] == told["exports"]
        assert main(["map", uri]) == 0
        words = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert words == [
            ["0", "65536", "3", "hole,zero"],
            ["65536", "65536", "0", "data"],
            ["131072", "917504", "3", "hole,zero"],
        ]
        assert main(["map", "--totals", "--json", uri]) == 0
        assert [row["size"] for row in json.loads(capsys.readouterr().out)] == [65536, 983040]
        assert main(["map", "--context", "x:y", uri]) == 1
        assert "no metadata context 'x:y'; it has: 'base:allocation'" in capsys.readouterr().err
        assert main(["map", "--context", "all", uri]) == 0
        assert [line.split() for line in capsys.readouterr().out.splitlines()] == words
        assert main(["info", uri.replace("/disk?", "/nope?")]) == 1
        assert "see: python -m nbdwire list URI" in capsys.readouterr().err
        assert main(["info", uri.replace("nbd+unix", "nbds+unix")]) == 1
        assert "an nbd:// URI asks for no TLS" in capsys.readouterr().err


def test_info_answers_a_question_with_its_exit_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serve("--memory", "1M", "-r", "--socket", tmp_path / "s") as facts:
        uri = str(facts["uri"])
        for question in ("flush", "multi-conn", "connect", "read", "structured", "extended"):
            assert main(["info", "--can", question, uri]) == 0
        assert main(["info", "--can", "write", uri]) == 3
        assert main(["info", "--is", "read-only", uri]) == 0
        assert main(["info", "--is", "tls", uri]) == 3
        assert capsys.readouterr().out == ""
        assert main(["info", "--is", "tls", "--json", uri]) == 3
        assert json.loads(capsys.readouterr().out) == {"tls": False}
        assert main(["info", "--size", "--json", uri]) == 0
        assert json.loads(capsys.readouterr().out)["export-size"] == 1 << 20


@pytest.mark.parametrize("target", [True, False])
def test_an_interrupted_copy_ends_with_130_and_one_line(tmp_path: Path, target: bool) -> None:
    """With a server that has stopped to answer, in the middle of a copy."""
    image = tmp_path / "image"
    image.write_bytes(b"x" * (128 << 20))
    words = [*COMMAND, "serve", "--socket", str(tmp_path / "s")]
    words += ["--memory", "128M"] if target else [str(image)]
    uri = f"nbd+unix:///?socket={tmp_path / 's'}"
    ends = [str(image), uri] if target else [uri, str(tmp_path / "out")]
    with subprocess.Popen(words, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        server.stdout.readline()
        copy = subprocess.Popen(
            [*COMMAND, "copy", "--progress", "--request-size", "4k", *ends],
            env=ENVIRONMENT, stderr=subprocess.PIPE, text=True,
            # A shell that runs the tests in the background lets them ignore it.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip
        try:
            assert copy.stderr is not None
            assert copy.stderr.readline().startswith(" 10 %")
            server.send_signal(signal.SIGSTOP)
            copy.send_signal(signal.SIGINT)
            rest = copy.communicate(timeout=20)[1]
        finally:
            server.send_signal(signal.SIGCONT)
            server.terminate()
            copy.kill()
            copy.communicate()
    assert copy.returncode == 130
    assert rest.splitlines()[-1] == "nbdwire copy: interrupted; the target is incomplete"
    assert "Traceback" not in rest


@pytest.mark.parametrize(
    ("text", "number"), [("0", 0), ("512", 512), ("64k", 65536), ("1G", 1 << 30), ("2t", 2 << 40)]
)
def test_sizes_have_units(text: str, number: int) -> None:
    assert size(text) == number


def test_numbers_for_people() -> None:
    assert [human(n) for n in (0, 1023, 1024, 1536, 1 << 40)] == ["0", "1023", "1K", "1.5K", "1T"]


def test_an_error_is_one_line_whatever_it_says() -> None:
    assert say(OSError(5, "a\nb", "file")) == "file: a b"
    assert say(ValueError()) == "ValueError"


def test_progress_is_a_few_lines_where_there_is_no_terminal() -> None:
    out = StringIO()
    progress = Progress(1000, out)
    for done in range(0, 1001, 5):
        progress(done)
    progress.end()
    lines = out.getvalue().splitlines()
    assert [line.split()[0] for line in lines] == [str(n) for n in range(10, 101, 10)]


def test_the_parser_knows_all_tools() -> None:
    assert all(verb in parser().format_help() for verb in ("info", "list", "map", "copy", "serve"))

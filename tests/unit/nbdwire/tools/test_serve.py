"""``serve`` with several files, places and TLS; the other tools as its clients."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nbdwire.tools.main import main
from tests.support.certificates import Pki, create

ROOT = Path(__file__).resolve().parents[4]
COMMAND = [sys.executable, "-m", "nbdwire", "serve", "--json"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "nbd")}
DATA = os.urandom(1 << 20) + bytes(1 << 20)


@contextlib.contextmanager
def serve(*arguments: str | Path) -> Iterator[dict[str, Any]]:
    words = [*COMMAND, *map(str, arguments)]
    with subprocess.Popen(words, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as process:
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


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return create(tmp_path_factory.mktemp("pki") / "pki")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(DATA)
    return path


def tls_uri(place: Path, certificates: Path, export: str = "") -> str:
    return (
        f"nbds+unix:///{export}?socket={place}&tls-certificates={certificates}"
        "&tls-hostname=localhost"
    )


def test_several_files_are_several_exports_in_several_places(
    tmp_path: Path, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "a=b"
    other.write_bytes(bytes(4096))
    places = ["--socket", tmp_path / "s", "--listen", "nbd://127.0.0.1:0"]
    with serve("-r", f"one={image}", f"two={other}", *places) as facts:
        assert [x["name"] for x in facts["exports"]] == ["one", "two"]
        assert [x["size"] for x in facts["exports"]] == [len(DATA), 4096]
        for export in facts["exports"]:
            assert export["read-only"] is True
            assert len(export["uris"]) == 2
            for uri in export["uris"]:
                assert main(["info", "--size", uri]) == 0
                assert capsys.readouterr().out == f"{export['size']}\n"
    with serve(other, "--export", "x", "--socket", tmp_path / "t") as facts:
        assert [x["name"] for x in facts["exports"]] == ["x"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["a", "b"], "write NAME=PATH for each file"),
        (["x=/a", "x=/b"], "write NAME=PATH for each file"),
        (["a", "--tls", "required"], "needs --tls-certificates DIR or --tls-psk FILE"),
        (["a", "--tls", "off", "--tls-psk", "k"], "takes neither"),
        (["a", "--tls-psk", "k", "--tls-certificates", "d"], "only one of the two"),
        (["a", "--tls-psk", "k", "--tls-verify-peer"], "needs --tls-certificates"),
    ],
)
def test_a_command_line_that_contradicts_itself(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["serve", *arguments])
    assert caught.value.code == 2
    assert text in capsys.readouterr().err


def test_certificates_that_are_not_there_are_one_line(
    image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", str(image), "--tls-certificates", str(tmp_path)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "cert" in lines[0]


@pytest.mark.parametrize("mode", ["allowed", "required"])
def test_every_tool_works_over_tls(
    mode: str, tmp_path: Path, image: Path, pki: Pki, capsys: pytest.CaptureFixture[str]
) -> None:
    place, back = tmp_path / "s", tmp_path / "back"
    options = ["--tls", mode, "--tls-certificates", pki.both, "--tls-verify-peer"]
    with serve(image, "-n", "disk", "--socket", place, *options) as facts:
        assert str(facts["uri"]).startswith("nbds+unix" if mode == "required" else "nbd+unix")
        uri = tls_uri(place, pki.both, "disk")
        assert main(["info", "--json", uri]) == 0
        assert json.loads(capsys.readouterr().out)["TLS"] is True
        assert main(["list", "--json", uri]) == 0
        assert json.loads(capsys.readouterr().out)["exports"][0]["export-name"] == "disk"
        assert main(["map", "--json", uri]) == 0
        assert sum(x["length"] for x in json.loads(capsys.readouterr().out)) == len(DATA)
        assert main(["copy", "--json", "--progress", uri, str(back)]) == 0
        done = capsys.readouterr()
        assert json.loads(done.out)["size"] == len(DATA)
        assert "100 %" in done.err
        assert main(["copy", str(back), uri]) == 0
        plain = main(["info", "--size", f"nbd+unix:///disk?socket={place}"])
        told = capsys.readouterr()
        assert plain == (mode == "required")
        assert ("TLS" in told.err) == (mode == "required")
        stranger = main(["info", tls_uri(place, pki.no_client, "disk")])
        assert stranger == 1
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert back.read_bytes() == DATA == image.read_bytes()

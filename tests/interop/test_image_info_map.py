"""``fleece image info`` and ``map`` against qemu-img's, over the corpus."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.corpus import NAMES, OBJECT, Image
from tests.support.qcow2 import qemu_img
from tests.support.tools import require


def ours(*words: str | Path, cwd: Path | None = None) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "fleece", "image", *map(str, words)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, timeout=60)


def theirs(*words: str | Path, cwd: Path | None = None) -> "subprocess.CompletedProcess[str]":
    command = [require("qemu-img"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=60)


def in_process(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    from fleece.cli.main import main

    status = main(["image", *map(str, words)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize("name", NAMES)
def test_info_is_qemus_field_by_field(
    name: str, corpus: dict[str, Image], capsys: pytest.CaptureFixture[str]
) -> None:
    """formats.md §11: the schema of ``info --output=json``."""
    image = corpus[name]
    expected = json.loads(theirs("info", "--output=json", *image.arguments).stdout)
    status, out, _ = in_process(capsys, "info", "--output", "json", *image.arguments)
    assert status == 0
    found = json.loads(out)
    if image.options:  # the order of the members in json:{...} is nobody's promise
        for info in (found, expected):
            info["filename"] = json.loads(info["filename"].removeprefix("json:"))
    assert found == expected
    if image.options:
        return
    expected_text = theirs("info", *image.arguments).stdout
    assert in_process(capsys, "info", *image.arguments)[:2] == (0, expected_text)


@pytest.mark.parametrize("name", ["chain", "backing-shorter", "v3"])
def test_info_of_a_chain_is_qemus(
    name: str, corpus: dict[str, Image], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--backing-chain", *corpus[name].arguments]
    expected = json.loads(theirs("info", "--output=json", *words).stdout)
    assert json.loads(in_process(capsys, "info", "--output=json", *words)[1]) == expected
    assert in_process(capsys, "info", *words)[1] == theirs("info", *words).stdout


def test_names_are_put_together_as_qemu_does(corpus: dict[str, Image]) -> None:
    place = corpus["chain"].path.parent
    for source, cwd in [
        ("image.qcow2", place),
        ("./image.qcow2", place),
        ("chain/image.qcow2", place.parent),
        ("../chain/image.qcow2", place),
    ]:
        words = ["info", "--output=json", "--backing-chain", source]
        assert json.loads(ours(*words, cwd=cwd).stdout) == json.loads(
            theirs(*words, cwd=cwd).stdout
        )
        words = ["map", source]
        assert ours(*words, cwd=cwd).stdout == theirs(*words, cwd=cwd).stdout


@pytest.mark.parametrize("name", NAMES)
def test_map_is_qemus_byte_for_byte(
    name: str, corpus: dict[str, Image], capsys: pytest.CaptureFixture[str]
) -> None:
    """formats.md §11: ``map --output=json``, one entry in a line."""
    image = corpus[name]
    for words in (
        ["map", "--output=json", *image.arguments],
        ["map", "--output=json", "-s", "100", "--max-length", "1M", *image.arguments],
        ["map", "--output=json", "--start-offset=1100k", *image.arguments],
        ["map", "--output=json", "-s", "16T", *image.arguments],
        ["map", *image.arguments],
    ):
        expected = theirs(*words)
        status, out, _ = in_process(capsys, *words)
        assert (status, out) == (expected.returncode, expected.stdout), words


def test_a_map_of_more_tables_than_fit_into_one_batch_is_qemus(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=512", path, "64M")
    words = [f"write -P 1 {offset} {length}" for offset, length in _scattered()]
    commands = [word for command in words for word in ("-c", command)]
    subprocess.run([require("qemu-io"), "-f", "qcow2", *commands, path], check=True, stdout=-3)
    for start in ("0", "33M"):
        arguments = ["map", "--output=json", "-s", start, str(path)]
        assert ours(*arguments).stdout == theirs(*arguments).stdout


def _scattered() -> list[tuple[int, int]]:
    return [((number * 7919 * 512) % (64 << 20), 512 * (number % 5 + 1)) for number in range(300)]


def test_compressed_clusters_are_told_on_request(
    corpus: dict[str, Image], capsys: pytest.CaptureFixture[str]
) -> None:
    """formats.md §11: the key ``compressed`` is there since QEMU 8.2."""
    words = ["map", "--output=json", "--compressed", *corpus["compressed"].arguments]
    found = json.loads(in_process(capsys, *words)[1])
    assert {entry["compressed"] for entry in found} == {True, False}
    assert all(entry["data"] and "offset" not in entry for entry in found if entry["compressed"])


def test_a_key_is_not_needed_to_see_where_things_are(
    corpus: dict[str, Image], capsys: pytest.CaptureFixture[str]
) -> None:
    image = corpus["luks"]
    with_key = in_process(capsys, "map", "--output=json", *image.arguments)
    assert in_process(capsys, "map", "--output=json", image.path) == with_key
    info: dict[str, Any] = json.loads(in_process(capsys, "info", "--json", image.path)[1])
    assert info["format-specific"]["data"]["encrypt"]["format"] == "luks"


def test_options_that_say_which_disk_it_is_make_a_json_name(
    corpus: dict[str, Image], capsys: pytest.CaptureFixture[str]
) -> None:
    source = f"driver=raw,offset=65536,file.driver=file,file.filename={corpus['v3'].path}"
    expected = json.loads(theirs("info", "--output=json", "--image-opts", source).stdout)
    found = json.loads(in_process(capsys, "info", "--json", "--image-opts", source)[1])
    names = [json.loads(one.pop("filename").removeprefix("json:")) for one in (expected, found)]
    assert found == expected
    assert {**names[0], "offset": int(names[0]["offset"])} == names[1]


def test_an_nbd_export_is_shown_as_qemu_shows_it(
    corpus: dict[str, Image], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.support.threads import wait_until

    socket = tmp_path / "s"
    command = [require("qemu-nbd"), "-t", "-r", "-x", "a", "-k", str(socket), "-f", "qcow2"]
    with subprocess.Popen([*command, str(corpus["v3"].path)]) as server:
        try:
            wait_until(socket.exists)
            for source in (
                f"nbd+unix:///a?socket={socket}",
                f"nbd:unix:{socket}:exportname=a",
                f'json:{{"driver":"raw","file":{{"driver":"nbd","path":"{socket}","export":"a"}}}}',
            ):
                words = ["info", "--output=json", source]
                assert json.loads(in_process(capsys, *words)[1]) == json.loads(
                    theirs(*words).stdout
                )
                words = ["map", "--output=json", source]
                assert in_process(capsys, *words)[1] == theirs(*words).stdout
        finally:
            server.terminate()


def test_a_writer_is_respected_unless_sharing_is_forced(
    corpus: dict[str, Image], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fleece.formats import open_image

    path = tmp_path / "image.qcow2"
    path.write_bytes(corpus["v3"].path.read_bytes())
    node = open_image(path, "qcow2")
    try:
        status, _, err = in_process(capsys, "info", path)
        assert (status, "in use" in err) == (theirs("info", path).returncode, True)
        assert in_process(capsys, "info", "-U", path)[1] == theirs("info", "-U", path).stdout
    finally:
        node.close()


def test_the_corpus_has_a_secret_that_qemu_takes(corpus: dict[str, Image]) -> None:
    assert theirs("check", *OBJECT, "--image-opts", corpus["luks"].source).returncode == 0

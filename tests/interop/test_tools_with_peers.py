"""``python -m nbdwire copy|list|info`` with the servers and the copy program that others use."""

import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from nbdwire.client import connect
from tests.support import peers
from tests.support.tools import require

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "nbdwire"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "nbd")}
SIZE = 24 << 20


def tool(*arguments: str | Path, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], env=ENVIRONMENT, input=stdin, capture_output=True,
        timeout=60,
    )  # fmt: skip


def sparse_image(path: Path, seed: int = 1) -> bytes:
    """Data, holes, and zeroes that are data; its size is no multiple of a sector."""
    rng = random.Random(seed)
    with path.open("wb") as file:
        file.truncate(SIZE + 3 * 512)
        for _ in range(25):
            file.seek(rng.randrange(SIZE // 4096) * 4096)
            file.write(rng.randbytes(rng.choice([512, 4096, 300_000])))
        file.seek(1 << 20)
        file.write(bytes(1 << 20))
    return path.read_bytes()


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--synchronous"],
        ["--connections", "4", "--allocated"],
        ["--request-size", "1M", "--requests", "3", "--sparse", "0"],
    ],
)
def test_a_copy_between_servers_is_the_same_disk(tmp_path: Path, options: list[str]) -> None:
    data = sparse_image(tmp_path / "source")
    target = tmp_path / "target"
    target.write_bytes(b"\xff" * len(data))
    with (
        peers.qemu_nbd(tmp_path / "source", tmp_path / "a", "-r") as source_uri,
        peers.nbdkit(tmp_path / "b", "file", str(target)) as target_uri,
    ):
        done = tool("copy", *options, "--json", source_uri, target_uri)
        assert done.returncode == 0, done.stderr
        facts = json.loads(done.stdout)
        assert facts["size"] == len(data)
        assert facts["written"] + facts["zeroed"] == len(data)
        assert facts["read"] < len(data) // 2  # the holes were not read
    assert target.read_bytes() == data
    sparse = target.stat().st_blocks * 512 < len(data) // 2
    assert sparse == ("--allocated" not in options)


def test_our_copy_and_nbdcopy_make_the_same_file(tmp_path: Path) -> None:
    data = sparse_image(tmp_path / "source")
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    with peers.qemu_nbd(tmp_path / "source", tmp_path / "a", "-r") as uri:
        subprocess.run([require("nbdcopy"), uri, str(theirs)], check=True)
        assert tool("copy", uri, ours).returncode == 0
    assert ours.read_bytes() == theirs.read_bytes() == data
    # Sparse as theirs, within what one block of 64 KiB per stretch of data can cost.
    assert ours.stat().st_blocks * 512 <= theirs.stat().st_blocks * 512 + 30 * 65536


def test_files_and_streams_can_be_copied_too(tmp_path: Path) -> None:
    data = sparse_image(tmp_path / "source")
    with peers.nbdkit(tmp_path / "b", "memory", str(len(data))) as uri:
        assert tool("copy", tmp_path / "source", uri).returncode == 0
        assert tool("copy", "--requests", "4", uri, "-").stdout == data
        assert tool("copy", uri, tmp_path / "file").returncode == 0
        assert (tmp_path / "file").read_bytes() == data
        other = data[::-1]
        assert tool("copy", "-", uri, stdin=other).returncode == 0
        assert tool("copy", uri, "-").stdout == other
        assert tool("copy", "-", tmp_path / "file", stdin=b"short").returncode == 0
        assert (tmp_path / "file").read_bytes() == b"short"
        too_long = tool("copy", "-", uri, stdin=other + b"x")
        assert too_long.returncode == 1
        assert b"has only" in too_long.stderr


def test_a_target_that_is_smaller_is_refused_and_not_touched(tmp_path: Path) -> None:
    sparse_image(tmp_path / "source")
    with peers.nbdkit(tmp_path / "b", "memory", str(SIZE)) as uri:
        done = tool("copy", tmp_path / "source", uri)
        assert done.returncode == 1
        assert b"the target is too small" in done.stderr
        assert done.stderr.count(b"\n") == 1
        assert tool("map", uri).stdout.split() == [b"0", str(SIZE).encode(), b"3", b"hole,zero"]
    with peers.nbdkit(tmp_path / "c", "-r", "memory", str(SIZE * 2)) as uri:
        done = tool("copy", tmp_path / "source", uri)
        assert (done.returncode, b"read-only" in done.stderr) == (1, True)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (["error-pread=EIO", "error-pread-rate=1%"], b"cannot read "),
        (["error-pwrite=ENOSPC", "error-pwrite-rate=10%"], b"cannot write "),
        (["error-zero=EIO", "error-zero-rate=100%"], b"cannot zero "),
    ],
)
def test_an_error_of_the_server_is_never_ignored(
    tmp_path: Path, error: list[str], message: bytes
) -> None:
    """CVE-2022-0485: nbdcopy overlooked them."""
    rng = random.Random(2)
    (tmp_path / "source").write_bytes(rng.randbytes(8 << 20) + bytes(8 << 20))
    arguments = ["--filter=error", "memory", "16M", *error]
    with peers.nbdkit(tmp_path / "b", *arguments) as uri:
        reading = error[0].startswith("error-pread")
        ends = (uri, tmp_path / "t") if reading else (tmp_path / "source", uri)
        done = tool("copy", "--request-size", "16k", "--sparse", "64k", *ends)
        if reading:  # an empty disk has nothing to be read
            with connect(uri) as client:
                client.pwrite(rng.randbytes(16 << 20), 0)
            done = tool("copy", "--request-size", "16k", *ends)
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.count(b"\n") == 1
    assert b" at offset " in done.stderr


def test_a_server_that_is_killed_ends_the_copy(tmp_path: Path) -> None:
    options = ["--filter=delay", "--filter=noextents", "memory", "64M", "delay-read=50ms"]
    path = tmp_path / "b"
    command = [require("nbdkit"), "-f", "-U", str(path), *options]
    with peers.running(command) as server:
        peers.wait_for_socket(path, server)
        copy = subprocess.Popen(
            [*COMMAND, "copy", "--progress", f"nbd+unix:///?socket={path}", str(tmp_path / "t")],
            env=ENVIRONMENT, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert copy.stderr is not None
        assert copy.stderr.readline().strip().startswith(b"10 %")  # it is well under way
        server.kill()
        rest = copy.communicate(timeout=30)[1]
    assert copy.returncode == 1
    assert rest.splitlines()[-1].startswith(b"nbdwire copy: cannot ")
    assert b"Traceback" not in rest


def test_servers_that_can_do_little_are_copied_all_the_same(tmp_path: Path) -> None:
    data = random.Random(5).randbytes(3 << 20) + bytes(1 << 20)
    (tmp_path / "source").write_bytes(data)
    (tmp_path / "target").write_bytes(b"\xff" * len(data))
    poor = ["-n", "--mask-handshake=0", "--no-sr", "--filter=nozero", "--filter=noextents"]
    with (
        peers.nbdkit(tmp_path / "a", *poor, "file", str(tmp_path / "source")) as source,
        peers.nbdkit(
            tmp_path / "b", *poor, "file", str(tmp_path / "target"), "zeromode=none"
        ) as target,
    ):
        assert tool("copy", source, target).returncode == 0
    assert (tmp_path / "target").read_bytes() == data


def test_a_target_that_reads_as_zeroes_is_not_zeroed(tmp_path: Path) -> None:
    data = sparse_image(tmp_path / "source")
    options = ["--filter=error", "memory", str(len(data)), "error-zero=EIO", "error-zero-rate=100%"]
    with peers.nbdkit(tmp_path / "b", *options) as uri:
        assert tool("copy", tmp_path / "source", uri).returncode == 1
        assert tool("copy", "--target-is-zero", tmp_path / "source", uri).returncode == 0
        assert hashlib.sha256(tool("copy", uri, "-").stdout).digest() == (
            hashlib.sha256(data).digest()
        )


def test_info_agrees_with_nbdinfo(tmp_path: Path) -> None:
    sparse_image(tmp_path / "source")
    nbdinfo = require("nbdinfo")
    with peers.qemu_nbd(tmp_path / "source", tmp_path / "a", "-x", "disk", "-D", "text") as uri:
        uri = uri.replace("unix:///", "unix:///disk")
        theirs = json.loads(subprocess.check_output([nbdinfo, "--json", uri]))["exports"][0]
        ours = json.loads(tool("info", "--json", uri).stdout)["exports"][0]
        assert set(theirs) - set(ours) <= {"content"}  # which nbdinfo asks the program file
        same = set(theirs) & set(ours) - {"uri", "export-size-str"}
        assert {"export-size", "is_read_only", "can_trim", "contexts", "description"} <= same
        assert {key: ours[key] for key in same} == {key: theirs[key] for key in same}
        listed = json.loads(tool("list", "--json", uri).stdout)["exports"]
        assert [export["export-name"] for export in listed] == ["disk"]
        their_map = json.loads(subprocess.check_output([nbdinfo, "--map", "--json", uri]))
        assert json.loads(tool("map", "--json", uri).stdout) == their_map


def test_map_tells_the_same_as_nbdinfo_of_every_context(tmp_path: Path) -> None:
    image, nbdinfo = tmp_path / "disk.qcow2", require("nbdinfo")
    qemu_img, qemu_io = require("qemu-img"), require("qemu-io")
    subprocess.run([qemu_img, "create", "-q", "-f", "qcow2", image, "64M"], check=True)
    for command in ("write 1M 1M", "write -z 4M 64k"):
        subprocess.run([qemu_io, "-c", command, image], check=True, capture_output=True)
    for name in ("b0", "b1"):
        subprocess.run([qemu_img, "bitmap", "--add", image, name], check=True)
        subprocess.run([qemu_io, "-c", "write 3M 128k", image], check=True, capture_output=True)
    options = ["-r", "-A", "-B", "b0", "-B", "b1"]
    names = ["base:allocation", "qemu:allocation-depth"]
    names += ["qemu:dirty-bitmap:b0", "qemu:dirty-bitmap:b1"]
    with peers.qemu_nbd(image, tmp_path / "a", *options, fmt="qcow2") as uri:
        theirs = {
            name: json.loads(subprocess.check_output([nbdinfo, f"--map={name}", "--json", uri]))
            for name in names
        }
        everything = json.loads(tool("map", "--json", "--context", "all", uri).stdout)
        assert everything == theirs
        for name in names:
            assert json.loads(tool("map", "--json", "--context", name, uri).stdout) == theirs[name]
        some = json.loads(tool("map", "--json", "--context", "qemu:", uri).stdout)
        assert set(some) == set(names[1:])
        assert tool("info", "--can", "trim", uri).returncode == 3
        assert subprocess.run([nbdinfo, "--can", "trim", uri], check=False).returncode == 2


def test_a_target_without_room_is_named_with_the_offset(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(random.Random(6).randbytes(4 << 20))
    filters = ["--filter=error", "memory", "4M", "error-pwrite=ENOSPC", "error-pwrite-rate=100%"]
    with peers.nbdkit(tmp_path / "b", *filters) as uri:
        done = tool("copy", tmp_path / "source", uri)
    assert done.returncode == 1
    assert done.stderr.count(b"\n") == 1
    assert b" at offset " in done.stderr
    assert b"No space left on device; make room there" in done.stderr

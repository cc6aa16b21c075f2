"""The clients that others use against our server: the same bytes, the same status, both ways."""

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fleece.block.file import FileNode
from nbdwire.server import Server
from nbdwire.uri import NBDURI
from tests.support.faulty import striped
from tests.support.peers import nbdkit
from tests.support.serving import noise, serving
from tests.support.tools import require

SIZE = 24 << 20
DATA = noise(8 << 20)
"""What the disk holds at 0 and at 16 MiB; the rest is a hole."""

DIRTY = "qemu:dirty-bitmap:nightly"
GRANULE = 64 << 10
EXPECTED = DATA + bytes(8 << 20) + DATA


@dataclass(frozen=True)
class Served:
    image: Path
    server: Server
    where: NBDURI
    tcp: NBDURI

    def uri(self, export: str = "disk") -> str:
        return str(self.where.with_export(export))


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    """A sparse file, read-write as "disk" and, from another file, read-only as "frozen"."""
    image, frozen = tmp_path / "image", tmp_path / "frozen"
    for path in (image, frozen):
        with path.open("wb") as file:
            file.truncate(SIZE)
            file.write(DATA)
            file.seek(16 << 20)
            file.write(DATA)
    node, reader = FileNode(image), FileNode(frozen, read_only=True)
    contexts = {DIRTY: striped(100, GRANULE), "qemu:dirty-bitmap:weekly": striped(9, 1 << 20)}
    with serving(tmp_path, node, contexts=contexts) as (server, where):
        server.add("frozen", reader, description="a snapshot", contexts=contexts)
        tcp = server.listen("nbd://127.0.0.1:0")
        yield Served(image, server, where, tcp)
    node.close()
    reader.close()


def run(*command: str | Path, cwd: Path | None = None) -> str:
    """The program's standard output; it must end well, and say nothing of an error."""
    words = [require(str(command[0])), *map(str, command[1:])]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, cwd=cwd)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


def test_nbdinfo_shows_what_an_export_can_do(served: Served) -> None:
    (shown,) = json.loads(run("nbdinfo", "--json", served.uri()))["exports"]
    assert shown["export-size"] == SIZE
    assert shown["is_read_only"] is False
    for able in ("multi_conn", "fua", "trim", "zero", "fast_zero", "flush", "cache", "df"):
        assert shown[f"can_{able}"] is True, able
    assert shown["contexts"] == ["base:allocation", DIRTY, "qemu:dirty-bitmap:weekly"]
    assert shown["block_size_maximum"] == 32 << 20
    (frozen,) = json.loads(run("nbdinfo", "--json", served.uri("frozen")))["exports"]
    assert frozen["is_read_only"] is True
    assert frozen["can_trim"] is frozen["can_zero"] is False


def test_nbdinfo_lists_the_exports(served: Served) -> None:
    exports = json.loads(run("nbdinfo", "--list", "--json", str(served.tcp)))["exports"]
    assert {e["export-name"]: e.get("description") for e in exports} == {
        "disk": None,
        "frozen": "a snapshot",
    }


def test_nbdinfo_maps_the_allocation(served: Served) -> None:
    found = json.loads(run("nbdinfo", "--map", "--json", served.uri()))
    assert [(e["offset"], e["length"], e["type"]) for e in found] == [
        (0, 8 << 20, 0),
        (8 << 20, 8 << 20, 3),
        (16 << 20, 8 << 20, 0),
    ]


@pytest.mark.parametrize(("context", "granule"), [("nightly", GRANULE), ("weekly", 1 << 20)])
def test_nbdinfo_maps_a_dirty_bitmap(served: Served, context: str, granule: int) -> None:
    name = f"qemu:dirty-bitmap:{context}"
    found = json.loads(run("nbdinfo", f"--map={name}", "--json", served.uri("frozen")))
    assert [(e["offset"], e["length"], e["type"]) for e in found] == [
        (offset, granule, offset // granule % 2) for offset in range(0, SIZE, granule)
    ]


def test_qemu_img_reads_maps_and_compares(served: Served, tmp_path: Path) -> None:
    uri = served.uri("frozen")
    assert json.loads(run("qemu-img", "info", "--output=json", uri))["virtual-size"] == SIZE
    copy = tmp_path / "copy"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", uri, copy)
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", uri, copy)
    found = json.loads(run("qemu-img", "map", "--output=json", "-f", "raw", uri))
    assert [(e["start"], e["length"], e["zero"], e["data"]) for e in found] == [
        (0, 8 << 20, False, True),
        (8 << 20, 8 << 20, True, False),
        (16 << 20, 8 << 20, False, True),
    ]


def test_qemu_img_sees_a_dirty_bitmap_as_the_absence_of_data(served: Served) -> None:
    """The way in which backup programs read one: x-dirty-bitmap of QEMU's client."""
    where, name = served.where.socket, DIRTY
    image = f"driver=nbd,export=frozen,server.type=unix,server.path={where},x-dirty-bitmap={name}"
    found = json.loads(run("qemu-img", "map", "--output=json", "--image-opts", image))
    dirty = [(e["start"], e["length"]) for e in found if not e["data"]]
    assert dirty == [(start, GRANULE) for start in range(GRANULE, SIZE, 2 * GRANULE)]


def test_qemu_img_writes_a_whole_disk(served: Served, tmp_path: Path) -> None:
    source = tmp_path / "source"
    content = noise(3 << 20, 7) + bytes(9 << 20) + noise(12 << 20, 8)
    source.write_bytes(content)
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", source, served.uri())
    assert served.image.read_bytes() == content


def test_qemu_io_writes_zeroes_discards_and_flushes(served: Served) -> None:
    commands = [
        "write -P 0xab 1000 70000",
        "write -f -P 0xcd 512 512",
        "write -z 4096 8192",
        "write -z -u 65536 4096",
        "write -z -n 8k 1k",
        "discard 16M 1M",
        "flush",
        "read -P 0xab 1024 3072",
        "read -P 0 4096 8192",
        "read -P 0xcd 512 512",
        "read -v 0 512",
    ]
    words = [word for command in commands for word in ("-c", command)]
    shown = run("qemu-io", "-f", "raw", *words, served.uri())
    assert "error" not in shown.lower()
    assert "failed" not in shown.lower()
    expected = bytearray(EXPECTED)
    expected[1000:71000] = b"\xab" * 70000
    expected[512:1024] = b"\xcd" * 512
    expected[4096:12288] = bytes(8192)
    expected[65536:69632] = bytes(4096)
    assert served.image.read_bytes()[: 16 << 20] == expected[: 16 << 20]


def test_qemu_io_is_refused_by_a_read_only_export(served: Served) -> None:
    command = [require("qemu-io"), "-f", "raw", "-c", "write 0 512", served.uri("frozen")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "Permission denied" in done.stderr


@pytest.mark.parametrize("options", [[], ["--connections=1"], ["--no-extents"], ["--synchronous"]])
def test_nbdcopy_copies_both_ways(served: Served, tmp_path: Path, options: list[str]) -> None:
    copy = tmp_path / "copy"
    run("nbdcopy", *options, served.uri("frozen"), copy)
    assert copy.read_bytes() == EXPECTED
    content = noise(5 << 20, 3) + bytes(SIZE - (6 << 20)) + noise(1 << 20, 4)
    copy.write_bytes(content)
    run("nbdcopy", "--flush", *options, copy, served.uri())
    assert served.image.read_bytes() == content


def test_nbdcopy_copies_from_one_export_to_another(served: Served) -> None:
    served.image.write_bytes(bytes(SIZE))
    run("nbdcopy", "--connections=4", "--requests=64", served.uri("frozen"), served.uri())
    assert served.image.read_bytes() == EXPECTED


def test_nbdkit_in_front_of_us_passes_everything_on(served: Served, tmp_path: Path) -> None:
    with nbdkit(tmp_path / "front", "nbd", f"uri={served.uri()}") as uri:
        run("qemu-io", "-f", "raw", "-c", "write -P 1 5000 9000", "-c", "write -z 0 4k", uri)
        assert run("nbdinfo", "--size", uri).strip() == str(SIZE)
        copy = tmp_path / "copy"
        run("nbdcopy", uri, copy)
    assert copy.read_bytes() == served.image.read_bytes()
    assert copy.read_bytes()[4096:14000] == EXPECTED[4096:5000] + b"\1" * 9000


def test_fio_verifies_its_random_writes(served: Served, tmp_path: Path) -> None:
    command = [
        "fio",
        "--name=verify",
        "--ioengine=nbd",
        f"--uri={served.uri()}",
        "--rw=randwrite",
        "--bssplit=4k/40:1k/10:64k/40:256k/10",
        "--iodepth=16",
        f"--size={SIZE}",
        "--io_size=16m",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--output-format=json",
    ]
    out = run(*command, cwd=tmp_path)
    (job,) = json.loads(out[out.index("{") :])["jobs"]
    assert job["error"] == 0
    assert job["write"]["total_ios"] > 100
    assert job["read"]["total_ios"] > 100


def test_nbd_client_and_qemu_nbd_list_our_exports(served: Served) -> None:
    listed = run("nbd-client", "-l", "127.0.0.1", str(served.tcp.port))
    assert listed.splitlines()[-2:] == ["disk", "frozen: a snapshot"]
    shown = run("qemu-nbd", "--list", "-k", served.where.socket)
    assert "exports available: 2" in shown
    assert "export: 'frozen'" in shown
    assert f"size:  {SIZE}" in shown
    assert "base:allocation" in shown


def libnbd(served: Served, script: str) -> Any:
    """What ``script`` prints, as JSON. It has ``uri``, and a handle ``h`` that is not connected."""
    python = "/usr/bin/python3"
    header = f"import json, nbd\nuri = {served.uri()!r}\nh = nbd.NBD()\n"
    probe = subprocess.run([python, "-I", "-c", "import nbd"], capture_output=True)
    if probe.returncode:
        require("python3 with libnbd's module (Debian: python3-libnbd)")
    command = [python, "-I", "-c", header + script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("structured", [False, True])
def test_libnbd_reads_and_writes_with_and_without_chunks(served: Served, structured: bool) -> None:
    script = f"""
h.set_request_structured_replies({structured})
h.connect_uri(uri)
kinds = []
def chunk(data, offset, status, error):
    kinds.append([offset, len(data), status])
    return 0
found = h.pread_structured(2 << 20, 7 << 20, chunk)
h.pwrite(b"abc" * 1000, 12345, nbd.CMD_FLAG_FUA)
h.zero(3000, 12345 + 100, nbd.CMD_FLAG_NO_HOLE)
h.zero(1 << 20, 16 << 20, nbd.CMD_FLAG_FAST_ZERO)
h.trim(4096, 0); h.cache(1 << 20, 0); h.flush()
again = h.pread(3200, 12345)
one = lambda data, offset, status, error: pieces.append(status)
pieces = []
if h.can_df():
    h.pread_structured(2 << 20, 7 << 20, one, nbd.CMD_FLAG_DF)
print(json.dumps([h.get_structured_replies_negotiated(), bytes(found[:5]).hex(),
                  bytes(again[:110]).hex(), bytes(again[-100:]).hex(), kinds, pieces]))
"""
    negotiated, head, written, zeroed, kinds, pieces = libnbd(served, script)
    assert negotiated is structured
    assert bytes.fromhex(head) == EXPECTED[7 << 20 :][:5]
    assert bytes.fromhex(written) == (b"abc" * 34)[:100] + bytes(10)
    assert bytes.fromhex(zeroed) == DATA[12345 + 3100 : 12345 + 3200]
    if structured:
        assert kinds == [[7 << 20, 1 << 20, 1], [8 << 20, 1 << 20, 2]]
        assert pieces == [1]
    else:
        assert (len(kinds), pieces) == (1, [])


def test_libnbd_gets_the_status_of_several_contexts_at_once(served: Served) -> None:
    script = f"""
for name in ("base:allocation", {DIRTY!r}, "qemu:dirty-bitmap:weekly", "qemu:dirty-bitmap:nope"):
    h.add_meta_context(name)
h.connect_uri(uri)
found = {{}}
def extents(context, offset, entries, error):
    found.setdefault(context, []).append([offset, len(entries) // 2, sum(entries[::2])])
    return 0
h.block_status({SIZE}, 0, extents)
h.block_status(1 << 20, 100, extents, nbd.CMD_FLAG_REQ_ONE)
print(json.dumps([found, h.can_meta_context("qemu:dirty-bitmap:nope")]))
"""
    found, nope = libnbd(served, script)
    assert nope is False
    assert found == {
        "base:allocation": [[0, 3, SIZE], [100, 1, 1 << 20]],
        DIRTY: [[0, SIZE // GRANULE, SIZE], [100, 1, GRANULE - 100]],
        "qemu:dirty-bitmap:weekly": [[0, 24, SIZE], [100, 1, (1 << 20) - 100]],
    }


def test_libnbd_keeps_hundreds_of_requests_in_flight(served: Served) -> None:
    script = """
import random
h.connect_uri(uri)
rng, done, size, model = random.Random(5), [], 4096, {}
def finished(error):
    done.append(error.value)
    return 1
for index in range(400):
    data = nbd.Buffer.from_bytearray(bytearray(rng.randbytes(size)))
    model[index] = data.to_bytearray()
    h.aio_pwrite(data, index * size, finished)
most = h.aio_in_flight()
while h.aio_in_flight():
    h.poll(-1)
reads = [nbd.Buffer(size) for _ in range(400)]
for index, buffer in enumerate(reads):
    h.aio_pread(buffer, index * size, finished)
while h.aio_in_flight():
    h.poll(-1)
same = all(reads[index].to_bytearray() == data for index, data in model.items())
print(json.dumps([most, len(done), sum(done), same]))
"""
    most, count, errors, same = libnbd(served, script)
    assert most > 100
    assert (count, errors, same) == (800, 0, True)


def test_libnbd_is_told_the_errors_of_the_specification(served: Served) -> None:
    script = """
h.set_strict_mode(0)
h.connect_uri(uri)
found = []
for verb, *args in [
    ("pread", 512, h.get_size()), ("pwrite", b"x" * 512, h.get_size()), ("pread", 33 << 20, 0),
    ("zero", 1 << 20, h.get_size() - 1), ("trim", 1, h.get_size()), ("pread", 512, 0, 1 << 4),
    ("block_status", 512, 0, lambda *_: 0),
]:
    try:
        getattr(h, verb)(*args)
        found.append([verb, None])
    except nbd.Error as error:
        found.append([verb, error.errno])
h.pread(512, 0)
print(json.dumps(found))
"""
    assert libnbd(served, script) == [
        ["pread", "EINVAL"],
        ["pwrite", "ENOSPC"],
        ["pread", "EINVAL"],
        ["zero", "ENOSPC"],
        ["trim", "EINVAL"],
        ["pread", "EINVAL"],
        ["block_status", "EINVAL"],
    ]

"""Other people's clients on the daemon's exports, live and frozen, raw and qcow2 disks."""

import json
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.daemon import Daemon, daemon
from tests.support.tools import require

SIZE = 16 << 20
CLUSTER = 65536
CONTEXT = "qemu:dirty-bitmap:nightly"

# Where there is data at the first instant; the rest are holes.
DATA = ((0, 1 << 20), (4 << 20, 1 << 20), (SIZE - CLUSTER, CLUSTER))
# What the guest changes between the instants: unaligned, over data and holes, and a zero.
WRITES = ((100_001, 7000), ((6 << 20) + 5, 300_000), (SIZE - 700, 700))
ZERO = ((4 << 20) + CLUSTER, 3 * CLUSTER)


class Frozen:
    """A daemon with a disk and two instants of it; ``one`` and ``two`` are what they hold."""

    def __init__(self, daemon: Daemon, fmt: str) -> None:
        self.daemon = daemon
        self.fmt = fmt
        dice = random.Random(fmt)
        model = bytearray(SIZE)
        with daemon.client("vm") as guest:
            for offset, length in DATA:
                model[offset : offset + length] = data = dice.randbytes(length)
                guest.pwrite(data, offset)
            self.one = bytes(model)
            daemon.ask("snapshot-create", disks=["vm"], name="one", consumer="nightly")
            daemon.ask("snapshot-ack", name="one")
            for offset, length in WRITES:
                model[offset : offset + length] = data = dice.randbytes(length)
                guest.pwrite(data, offset)
            guest.zero(*ZERO)
            model[ZERO[0] : sum(ZERO)] = bytes(ZERO[1])
            self.two = bytes(model)
            daemon.ask("snapshot-create", disks=["vm"], name="two", consumer="nightly")
            for offset in (0, 5 << 20, 12 << 20):  # so that the second has saved something, too
                guest.pwrite(b"later" * 30_000, offset)
                model[offset : offset + 150_000] = b"later" * 30_000
        self.live = bytes(model)

    def uri(self, export: str) -> str:
        return self.daemon.uri(export)

    def instants(self) -> list[tuple[str, bytes]]:
        return [("vm@one", self.one), ("vm@two", self.two), ("vm", self.live)]


@pytest.fixture(scope="module", params=["raw", "qcow2"])
def frozen(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Frozen]:
    directory = tmp_path_factory.mktemp(request.param)
    image = directory / "vm.img"
    make(image, request.param)
    with daemon(directory, {"vm": f"{image},format={request.param}"}) as made:
        yield Frozen(made, request.param)
        assert "fault of this program" not in made.log.read_text()
        made.ask("snapshot-drop", name="one")
        made.ask("snapshot-drop", name="two")
        assert made.left() == set()
        assert made.end() == 0
    check(image, request.param)


def make(image: Path, fmt: str, size: int = SIZE) -> None:
    command = [require("qemu-img"), "create", "-q", "-f", fmt, str(image), str(size)]
    subprocess.run(command, check=True)


def check(image: Path, fmt: str) -> None:
    if fmt == "qcow2":
        run("qemu-img", "check", "-q", str(image))


def run(program: str, *words: object, **options: Any) -> str:
    done = subprocess.run(
        [require(program), *map(str, words)], capture_output=True, text=True, timeout=60, **options
    )
    assert done.returncode == 0, f"{program} {words}: {done.stdout}{done.stderr}"
    return done.stdout


# nbdinfo


def test_nbdinfo_tells_what_a_snapshot_is(frozen: Frozen) -> None:
    [export] = json.loads(run("nbdinfo", "--json", frozen.uri("vm@two")))["exports"]
    assert export["export-name"] == "vm@two"
    assert export["export-size"] == SIZE
    assert export["is_read_only"] is True
    assert export["can_multi_conn"] is True
    assert set(export["contexts"]) >= {"base:allocation", CONTEXT}
    assert "disk vm as it was at" in export["description"]


def test_nbdinfo_tells_what_a_live_disk_is(frozen: Frozen) -> None:
    [export] = json.loads(run("nbdinfo", "--json", frozen.uri("vm")))["exports"]
    assert export["is_read_only"] is False
    for can in ("can_flush", "can_fua", "can_trim", "can_zero", "can_fast_zero", "can_cache"):
        assert export[can] is True
    assert CONTEXT not in export["contexts"]


def test_nbdinfo_lists_every_export(frozen: Frozen) -> None:
    listed = json.loads(run("nbdinfo", "--list", "--json", frozen.uri("")))["exports"]
    assert [export["export-name"] for export in listed] == ["vm", "vm@one", "vm@two"]


def test_the_map_of_nbdinfo_is_that_of_the_instant(frozen: Frozen) -> None:
    """P6, P7: nothing that was data is called zero, and what was a hole is found."""
    for export, instant in frozen.instants():
        extents = json.loads(run("nbdinfo", "--map", "--json", frozen.uri(export)))
        assert sum(extent["length"] for extent in extents) == SIZE
        for extent in extents:
            if extent["type"] & 2:
                part = instant[extent["offset"] : extent["offset"] + extent["length"]]
                assert not any(part), f"{export}: data called zero at {extent['offset']}"
        assert sum(e["length"] for e in extents if e["type"] & 2) > SIZE // 4


def test_the_dirty_map_of_nbdinfo_covers_every_difference_and_not_much_more(
    frozen: Frozen,
) -> None:
    out = run("nbdinfo", f"--map={CONTEXT}", "--json", frozen.uri("vm@two"))
    patched = bytearray(frozen.one)
    dirty = [extent for extent in json.loads(out) if extent["type"] & 1]
    for extent in dirty:
        part = slice(extent["offset"], extent["offset"] + extent["length"])
        patched[part] = frozen.two[part]
    assert patched == frozen.two
    changed = sum(length for _, length in WRITES) + ZERO[1]
    assert sum(extent["length"] for extent in dirty) <= changed + 2 * CLUSTER * (len(WRITES) + 1)


# qemu-img


def test_qemu_img_converts_and_compares_every_export(frozen: Frozen, tmp_path: Path) -> None:
    for number, (export, instant) in enumerate(frozen.instants()):
        raw, qcow2 = tmp_path / f"{number}.raw", tmp_path / f"{number}.qcow2"
        run("qemu-img", "convert", "-f", "raw", "-O", "raw", frozen.uri(export), raw)
        assert raw.read_bytes() == instant
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", frozen.uri(export), qcow2)
        run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", qcow2, frozen.uri(export))


def test_qemu_img_map_finds_the_holes_of_the_instant(frozen: Frozen) -> None:
    for export, instant in frozen.instants():
        command = ("map", "--output=json", "-f", "raw", frozen.uri(export))
        entries = json.loads(run("qemu-img", *command))
        assert sum(entry["length"] for entry in entries) == SIZE
        for entry in entries:
            if entry["zero"]:
                assert not any(instant[entry["start"] : entry["start"] + entry["length"]])
        assert any(entry["zero"] for entry in entries)


def test_qemu_finds_the_dirty_bitmap(frozen: Frozen) -> None:
    """QEMU's own way: the bitmap as the block status of the image."""
    options = f"driver=nbd,server.type=unix,server.path={frozen.daemon.socket},export=vm@two"
    source = f"{options},x-dirty-bitmap={CONTEXT}"
    entries = json.loads(run("qemu-img", "map", "--output=json", "--image-opts", source))
    patched = bytearray(frozen.one)
    for entry in entries:
        if not entry["data"]:  # so QEMU shows what is dirty
            part = slice(entry["start"], entry["start"] + entry["length"])
            patched[part] = frozen.two[part]
    assert patched == frozen.two


# nbdcopy


@pytest.mark.parametrize("options", [[], ["--synchronous"], ["--connections=1", "--requests=1"]])
def test_nbdcopy_pulls_every_export(frozen: Frozen, tmp_path: Path, options: list[str]) -> None:
    for number, (export, instant) in enumerate(frozen.instants()):
        target = tmp_path / str(number)
        run("nbdcopy", *options, frozen.uri(export), target)
        assert target.read_bytes() == instant


def test_nbdcopy_restores_through_the_live_export_under_a_snapshot(
    tmp_path: Path,
) -> None:
    """The other way round: a whole disk is overwritten, and the instant of before it stays."""
    for fmt in ("raw", "qcow2"):
        directory = tmp_path / fmt
        directory.mkdir()
        image, source = directory / "vm.img", directory / "source"
        make(image, fmt)
        new = bytearray(random.Random(1).randbytes(SIZE))
        new[3 << 20 : 9 << 20] = bytes(6 << 20)
        source.write_bytes(new)
        with daemon(directory, {"vm": f"{image},format={fmt}"}) as made:
            with made.client("vm") as guest:
                guest.pwrite(b"old" * 1_000_000, 1 << 20)
            old = made.read("vm")
            made.ask("snapshot-create", disks=["vm"], name="s")
            run("nbdcopy", "--flush", source, made.uri("vm"))
            assert made.read("vm") == new
            assert made.read("vm@s") == old
            made.ask("snapshot-drop", name="s")
            assert made.end() == 0
        check(image, fmt)
        run("qemu-img", "compare", "-f", fmt, "-F", "raw", image, source)


# libnbd's Python module

LIBNBD = """
import json, sys
import nbd
h = nbd.NBD()
h.add_meta_context("base:allocation")
h.add_meta_context(sys.argv[2])
h.connect_uri(sys.argv[1])
found = {"size": h.get_size(), "read-only": h.is_read_only(),
         "dirty": h.can_meta_context(sys.argv[2]), "extents": {}}
position = 0
def note(context, offset, entries, error):
    global covered
    at = offset
    for length, status in zip(entries[::2], entries[1::2]):
        found["extents"].setdefault(context, []).append([at, length, status])
        at += length
    covered = max(covered, at) if context == "base:allocation" else covered
while position < h.get_size():
    covered = position
    h.block_status(h.get_size() - position, position, note)
    position = covered
try:
    h.pwrite(b"x", 0)
    found["write"] = "done"
except nbd.Error as error:
    found["write"] = error.errno or "refused"
chunks = []
def chunk(data, offset, status, error):
    chunks.append([offset, len(data), status])
data = h.pread_structured(1 << 20, 4 << 20, chunk)
found["read"] = bytes(data).hex()
found["chunks"] = sum(length for _, length, _ in chunks)
h.shutdown()
print(json.dumps(found))
"""


def test_libnbd_reads_status_and_data_of_a_snapshot(frozen: Frozen) -> None:
    python = Path("/usr/bin/python3")
    if subprocess.run([python, "-c", "import nbd"], capture_output=True).returncode:
        require("python3-libnbd")
    env = {"PATH": "/usr/bin:/bin"}
    words = ["-c", LIBNBD, frozen.uri("vm@two"), CONTEXT]
    out = subprocess.run([python, *words], capture_output=True, text=True, env=env, timeout=60)
    assert out.returncode == 0, out.stderr
    found = json.loads(out.stdout)
    assert (found["size"], found["read-only"], found["dirty"]) == (SIZE, True, True)
    assert found["write"] != "done"
    assert bytes.fromhex(found["read"]) == frozen.two[4 << 20 : 5 << 20]
    patched = bytearray(frozen.one)
    for offset, length, status in found["extents"][CONTEXT]:
        if status & 1:
            patched[offset : offset + length] = frozen.two[offset : offset + length]
    assert patched == frozen.two


# fio


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_fio_verifies_what_it_wrote_under_a_snapshot_that_stays_exact(
    tmp_path: Path, fmt: str
) -> None:
    image = tmp_path / "vm.img"
    make(image, fmt)
    with daemon(tmp_path, {"vm": f"{image},format={fmt}"}) as made:
        with made.client("vm") as guest:
            guest.pwrite(random.Random(5).randbytes(SIZE // 2), 0)
        before = made.read("vm")
        made.ask("snapshot-create", disks=["vm"], name="s", cluster_size=4096)
        fio(made.uri("vm"), tmp_path, "--rw=randwrite", "--bsrange=512-128k", "--bs_unaligned=1")
        assert made.read("vm@s") == before
        fio(made.uri("vm"), tmp_path, "--rw=randtrimwrite", "--bs=16k")
        assert made.read("vm@s") == before
        assert made.end() == 0
    check(image, fmt)


def test_fio_verifies_a_snapshot_while_the_live_disk_is_overwritten(tmp_path: Path) -> None:
    """fio writes, an instant is taken, and fio verifies that while a guest destroys it."""
    image = tmp_path / "vm.img"
    make(image, "raw")
    pattern = ("--rw=write", "--bs=32k")
    with daemon(tmp_path, {"vm": f"{image},format=raw"}) as made:
        fio(made.uri("vm"), tmp_path, *pattern, "--do_verify=0")
        made.ask("snapshot-create", disks=["vm"], name="s")
        reader = subprocess.Popen(
            fio_command(made.uri("vm@s"), *pattern, "--verify_only=1", "--loops=4"),
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        with made.client("vm") as guest:
            for offset in random.Random(6).sample(range(0, SIZE, CLUSTER), SIZE // CLUSTER):
                guest.pwrite(b"destroyed" * 7000, min(offset, SIZE - 63_000))
        out, _ = reader.communicate(timeout=60)
        assert reader.returncode == 0, out
        fio(made.uri("vm@s"), tmp_path, *pattern, "--verify_only=1")
        assert made.end() == 0


def fio_command(uri: str, *options: str) -> list[str]:
    return [
        *(require("fio"), "--name=job", "--ioengine=nbd", f"--uri={uri}", f"--size={SIZE}"),
        *("--iodepth=8", "--verify=crc32c", "--verify_fatal=1", "--randseed=7"),
        *options,
    ]


def fio(uri: str, directory: Path, *options: str) -> None:
    run(fio_command(uri)[0], *fio_command(uri, *options)[1:], cwd=directory)

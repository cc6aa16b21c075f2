"""`fleece image create`, `measure` and `amend` beside qemu-img; ciphers and streams both ways."""

import io
import json
import subprocess
from collections.abc import Iterator
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import pytest

from fleece.block.file import FileNode
from fleece.cli.main import main
from fleece.formats.qcow2 import compressed, keyslots, luks
from fleece.formats.qcow2.crypt import EncryptedNode
from fleece.formats.qcow2.image import Qcow2Node, read_header
from tests.support.qcow2 import opened, pread, qemu_img, qemu_io
from tests.support.tools import require

MiB = 1 << 20
SECRET = "secret,id=s,data=open sesame"
PASSPHRASE = b"open sesame"
LUKS = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=50"
VOLATILE = ("actual-size", "uuid", "iters", "master-key-iters", "children")


def fleece(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """In this process, as if it were a program of its own."""
    words, out, err = ["image", *map(str, arguments)], io.StringIO(), io.StringIO()
    with chdir(cwd), redirect_stdout(out), redirect_stderr(err):
        status = main(words)
    return subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())


def qemu(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    words = [require("qemu-img"), *map(str, arguments)]
    for _ in range(20):
        done = subprocess.run(words, capture_output=True, text=True, cwd=cwd, timeout=60)
        if "accurate CPU usage" not in done.stderr:  # formats.md §1.7: it fails sometimes
            break
    return done


def told(value: Any) -> Any:
    """Without what differs from image to image."""
    if isinstance(value, dict):
        return {k: told(v) for k, v in value.items() if k not in VOLATILE}
    return [told(v) for v in value] if isinstance(value, list) else value


CREATED = [
    ("", "8M"),
    ("", "1000"),
    ("cluster_size=512", "1M"),
    ("cluster_size=2M", "1T"),
    ("cluster_size=1k,refcount_bits=1", "5M"),
    ("refcount_bits=64", "8M"),
    ("compat=0.10", "8M"),
    ("compat=1.1,lazy_refcounts=on", "8M"),
    ("extended_l2=on", "8M"),
    ("compression_type=zstd", "8M"),
    ("data_file=d1", "8M"),
    ("data_file=d2,data_file_raw=on", "8M"),
    ("preallocation=metadata", "8M"),
    ("preallocation=metadata,extended_l2=on", "8M"),
    ("preallocation=metadata,compat=0.10", "8M"),
    ("preallocation=falloc", "8M"),
    ("preallocation=full", "3000000"),
    ("nocow=on", "8M"),
    (LUKS, "8M"),
]


@pytest.mark.parametrize(("options", "size"), CREATED)
def test_a_new_image_is_the_one_that_qemu_makes(tmp_path: Path, options: str, size: str) -> None:
    """Same words on standard output, same `info`, a clean `check`, the same metadata."""
    found: list[Any] = []
    for run, name in ((fleece, "ours"), (qemu, "theirs")):
        (tmp_path / name).mkdir()
        words = ["create", "--object", SECRET, "-f", "qcow2"]
        words += ["-o", options] if options else []
        done = run(*words, "x", size, cwd=tmp_path / name)
        assert done.returncode == 0, done.stderr
        info = json.loads(qemu("info", "--output=json", "x", cwd=tmp_path / name).stdout)
        data = (tmp_path / name / "x").read_bytes()
        found.append((done.stdout.replace("iter-time=50 ", ""), told(info), data))
    (our_words, our_info, ours), (their_words, their_info, theirs) = found
    assert sorted(our_words.split()) == sorted(their_words.split())
    assert our_info == their_info
    if "encrypt" not in options and "allocation=f" not in options:
        assert ours[: len(theirs)] == theirs
    opts = "driver=qcow2,file.filename=x"
    opts += ",encrypt.key-secret=s" if "encrypt" in options else ""
    arguments = ["check", "--object", SECRET, "--image-opts", opts]
    assert qemu(*arguments, cwd=tmp_path / "ours").returncode == 0


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ("cluster_size=3000", "1M"),
        ("foo=bar", "1M"),
        ("compat=0.9", "1M"),
        ("compat=0.10,lazy_refcounts=on", "1M"),
        ("refcount_bits=3", "1M"),
        ("", "64P"),
        ("", "9E"),
        ("", "abc"),
        ("data_file_raw=on", "1M"),
        ("encrypt.format=luks", "1M"),
        ("encrypt.format=luks,encrypt.key-secret=zz", "1M"),
        ("backing_file=no,backing_fmt=raw", "1M"),
        ("backing_fmt=raw", "1M"),
        ("size=4M", "8M"),
    ],
)
def test_what_qemu_refuses_is_refused_with_the_same_status(
    tmp_path: Path, options: str, size: str
) -> None:
    words = ["create", "-f", "qcow2", *(["-o", options] if options else []), "x", size]
    ours, theirs = fleece(*words, cwd=tmp_path), qemu(*words, cwd=tmp_path)
    assert ours.returncode == theirs.returncode == 1
    assert len(ours.stderr.splitlines()) == 1
    assert "Traceback" not in ours.stderr


def test_the_size_is_that_of_the_backing_file(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(bytes(3_000_000))
    words = ["create", "-f", "qcow2", "-b", "base", "-F", "raw", "x"]
    done = fleece(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    info = json.loads(qemu("info", "--output=json", "x", cwd=tmp_path).stdout)
    assert info["virtual-size"] == 3_000_320
    assert info["backing-filename"] == "base"
    missing = fleece("create", "-f", "qcow2", "-b", "base", "y", cwd=tmp_path)
    assert missing.returncode == 1
    unsafe = ["create", "-u", "-f", "qcow2", "-b", "none", "-F", "raw", "y", "1M"]
    assert fleece(*unsafe, cwd=tmp_path).returncode == 0


MEASURED = [
    *("--size 1G", "-O qcow2 --size 1G"),
    f"-O qcow2 -o {LUKS} --size 1G",
    *("-O qcow2 -o cluster_size=512 --size 1G", "-O qcow2 -o refcount_bits=64 --size 1T"),
    *("-O qcow2 -o extended_l2=on --size 1T", "-O qcow2 -o preallocation=full --size 1T"),
    *("-O qcow2 raw", "-O raw raw", "-O qcow2 -o cluster_size=4k raw"),
    *("-O qcow2 -o cluster_size=2M raw", "-O qcow2 -o backing_file=b,backing_fmt=raw raw"),
    *("-O qcow2 bitmaps", "-O qcow2 -o cluster_size=512 bitmaps", "-O qcow2 overlay"),
    *("-O qcow2 packed", "-O qcow2 -o extended_l2=on packed", "-O qcow2 old"),
    *("-O qcow2 --size 0", "-O qcow2 --size 1000", "-O qcow2", "--size 1G raw"),
    *("-O foo --size 1G", "--size 100E", "-O qcow2 -o foo=1 raw", "-O qcow2 --size 64P"),
]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sources")
    raw = bytearray(10 * MiB)
    raw[7 * 65536 : 10 * 65536] = Random(1).randbytes(3 * 65536)
    raw[7_168_000:7_171_072] = b"x" * 3072
    (path / "plain").write_bytes(raw)
    # With its holes, as `measure` sees them.
    qemu_img("convert", "-O", "raw", path / "plain", path / "raw")
    qemu_img("create", "-q", "-f", "qcow2", path / "bitmaps", "10M")
    qemu_img("bitmap", "--add", path / "bitmaps", "b0")
    qemu_img("bitmap", "--add", "-g", "512", path / "bitmaps", "a-longer-name")
    qemu_img("create", "-q", "-f", "qcow2", "-b", "raw", "-F", "raw", path / "overlay", "20M")
    qemu_img("convert", "-c", "-O", "qcow2", path / "raw", path / "packed")
    qemu_img("create", "-q", "-f", "qcow2", "-o", "compat=0.10", path / "old", "10000000")
    return path


@pytest.mark.parametrize("arguments", MEASURED)
def test_the_numbers_of_measure_are_qemus(sources: Path, arguments: str) -> None:
    words = ["measure", "--output=json", "--object", SECRET, *arguments.split()]
    ours, theirs = fleece(*words, cwd=sources), qemu(*words, cwd=sources)
    assert ours.returncode == theirs.returncode
    if theirs.returncode == 0:
        assert json.loads(ours.stdout) == json.loads(theirs.stdout)
    else:
        assert len(ours.stderr.splitlines()) == 1


def test_measure_for_people_has_qemus_lines(sources: Path) -> None:
    words = ["measure", "-O", "qcow2", "bitmaps"]
    assert fleece(*words, cwd=sources).stdout == qemu(*words, cwd=sources).stdout


SPECS = [
    "cipher-alg=aes-256,cipher-mode=xts,ivgen-alg=plain64,hash-alg=sha256",
    "cipher-alg=aes-128,cipher-mode=xts,ivgen-alg=plain64,hash-alg=sha1",
    "cipher-alg=aes-256,cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=sha256,hash-alg=sha512",
    "cipher-alg=aes-256,cipher-mode=ctr,ivgen-alg=plain64,hash-alg=sha384",
]


@pytest.mark.parametrize(("spec", "maker"), [*product(SPECS, ("ours",)), (SPECS[2], "theirs")])
def test_luks_files_are_read_and_written_both_ways(tmp_path: Path, spec: str, maker: str) -> None:
    path = tmp_path / "x.luks"
    run = fleece if maker == "ours" else qemu
    options = f"key-secret=s,iter-time=50,{spec}"
    words = ["create", "--object", SECRET, "-f", "luks", "-o", options, path, "1M"]
    done = run(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    _qemu_io(f"driver=luks,file.filename={path},key-secret=s", "write -P 0x5a 1000 100000")
    node = luks.open_luks(FileNode(path), PASSPHRASE)
    assert pread(node, 100000, 1000) == b"\x5a" * 100000
    node.pwrite(memoryview(b"\x33" * 70001), 50001)
    node.close()
    _qemu_io(
        f"driver=luks,file.filename={path},key-secret=s",
        "read -P 0x33 50001 70001",
        "read -P 0x5a 1000 49001",
    )


def _qemu_io(options: str, *commands: str) -> None:
    words = [require("qemu-io"), "--object", SECRET, "--image-opts", options]
    words += [part for command in commands for part in ("-c", command)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "failed" not in done.stdout, done.stdout


@pytest.mark.parametrize("maker", ["ours", "theirs"])
def test_an_encrypted_qcow2_image_is_read_and_written_both_ways(tmp_path: Path, maker: str) -> None:
    path = tmp_path / "x.qcow2"
    run = fleece if maker == "ours" else qemu
    words = ["create", "--object", SECRET, "-f", "qcow2", "-o", LUKS, path, "4M"]
    done = run(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    options = f"driver=qcow2,file.filename={path},encrypt.key-secret=s"
    _qemu_io(options, "write -P 0x5a 1000 100000", "write -z 1M 64k")
    with _encrypted(path) as node:
        assert pread(node, 100000, 1000) == b"\x5a" * 100000
        assert pread(node, 1000, MiB) == bytes(1000)
        node.pwrite(memoryview(b"\x33" * 70001), 2_000_001)
    _qemu_io(
        options,
        "read -P 0x33 2000001 70001",
        "read -P 0 1999000 1001",
        "read -P 0 2070002 5000",
        "read -P 0x5a 1000 100000",
    )
    assert qemu("check", "--object", SECRET, "--image-opts", options, cwd=tmp_path).returncode == 0


@contextmanager
def _encrypted(path: Path) -> Iterator[Qcow2Node]:
    file = FileNode(path)
    header = read_header(file, "x")
    key = luks.open_key(file, header, PASSPHRASE, "x")
    node = Qcow2Node(file, data_file=EncryptedNode(file, key), header=header)
    try:
        yield node
    finally:
        node.close()


def test_a_passphrase_that_we_add_opens_the_image_in_qemu(tmp_path: Path) -> None:
    path = tmp_path / "x.qcow2"
    words = ["create", "-q", "--object", SECRET, "-f", "qcow2", "-o", LUKS, path, "1M"]
    assert fleece(*words, cwd=tmp_path).returncode == 0
    file = FileNode(path)
    where = luks.place(read_header(file, "x"), "x")
    keyslots.add(file, where, PASSPHRASE, b"other", "x", iteration_ms=1)
    keyslots.remove(file, where, "x", passphrase=PASSPHRASE)
    file.close()
    opts = f"driver=qcow2,file.filename={path},encrypt.key-secret=s"
    other = ["check", "--object", "secret,id=s,data=other", "--image-opts", opts]
    assert qemu(*other, cwd=tmp_path).returncode == 0
    assert qemu("check", "--object", SECRET, "--image-opts", opts, cwd=tmp_path).returncode == 1


@pytest.mark.parametrize(
    ("kind", "cluster_size"), [*product(("zlib", "zstd"), ("4k", "64k", "2M"))]
)
def test_compressed_clusters_are_read_as_qemu_wrote_them(
    tmp_path: Path, kind: str, cluster_size: str
) -> None:
    random = Random(2)
    lines = b"".join(b"%d of many lines\n" % random.randrange(9999) for _ in range(150_000))
    (tmp_path / "raw").write_bytes(lines)
    options = f"compression_type={kind},cluster_size={cluster_size}"
    path = tmp_path / "x.qcow2"
    qemu_img("convert", "-c", "-O", "qcow2", "-o", options, tmp_path / "raw", path)
    with opened(path, read_only=True) as node:
        assert pread(node, len(lines), 0) == lines


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
def test_qemu_reads_the_clusters_that_we_pack(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.qcow2"
    made = fleece(
        *("create", "-f", "qcow2", "-o", f"compression_type={kind}", path, "1M"), cwd=tmp_path
    )
    assert made.returncode == 0, made.stderr
    data = b"".join(b"line %d\n" % n for n in range(9000))[:65536]
    packed = compressed.pack(data, ("zlib", "zstd").index(kind), 16)
    assert packed is not None
    l2, where = 0x40000, 0x50123
    with path.open("r+b") as file:
        file.seek(0x30000)
        file.write((l2 | 1 << 63).to_bytes(8, "big"))
        file.seek(l2)
        file.write(compressed.entry_for(where, len(packed), 16).to_bytes(8, "big"))
        file.truncate(0x50000)
        file.seek(where)
        file.write(packed)
        file.seek(0x20000)
        file.write(b"\0\1" * 6)
    assert qemu("check", path, cwd=tmp_path).returncode == 0
    out = tmp_path / "out"
    qemu_img("convert", "-O", "raw", path, out)
    assert out.read_bytes() == data.ljust(MiB, b"\0")


@pytest.mark.parametrize(
    "options",
    ["compat=0.10", "compat=1.1,lazy_refcounts=on", "refcount_bits=64", "refcount_bits=8"],
)
def test_an_amended_image_is_what_qemu_makes_of_it(tmp_path: Path, options: str) -> None:
    found: list[Any] = []
    for run, name in ((fleece, "ours"), (qemu, "theirs")):
        (tmp_path / name).mkdir()
        path = tmp_path / name / "x"
        qemu_img("create", "-q", "-f", "qcow2", path, "4M")
        qemu_io(path, "write -P 7 0 1M", "write -z 500k 128k")
        done = run("amend", "-f", "qcow2", "-o", options, "x", cwd=tmp_path / name)
        assert done.returncode == 0, done.stderr
        assert qemu("check", "x", cwd=tmp_path / name).returncode == 0
        found.append(told(json.loads(qemu("info", "--output=json", "x", cwd=path.parent).stdout)))
    assert found[0] == found[1]
    qemu_img("compare", tmp_path / "ours" / "x", tmp_path / "theirs" / "x")


@pytest.mark.parametrize(
    "options", ["cluster_size=4k", "foo=1", "data_file=x", "backing_file=y", "refcount_bits=3"]
)
def test_what_qemu_does_not_amend_is_not_amended(tmp_path: Path, options: str) -> None:
    qemu_img("create", "-q", "-f", "qcow2", tmp_path / "x", "4M")
    for run in (fleece, qemu):
        assert run("amend", "-f", "qcow2", "-o", options, "x", cwd=tmp_path).returncode == 1


@pytest.mark.parametrize("command", ["create", "measure", "amend"])
def test_the_help_has_an_example_and_the_options_are_listed(tmp_path: Path, command: str) -> None:
    assert "example:" in fleece(command, "--help", cwd=tmp_path).stdout
    fmt = {"create": ["-f", "qcow2"], "measure": ["-O", "qcow2"], "amend": []}[command]
    listed = fleece(command, *fmt, "-o", "help", cwd=tmp_path)
    assert listed.returncode == 0
    assert "refcount_bits" in listed.stdout

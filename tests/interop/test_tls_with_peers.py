"""TLS with the programs of others: our server with their clients, our client with their servers."""

import contextlib
import json
import os
import re
import socket
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from fleece.block.file import FileNode
from nbdwire.client import connect, list_exports
from nbdwire.errors import NBDError, NegotiationError, TLSError, TLSRequired
from nbdwire.server import Server
from nbdwire.tls import ServerTLS
from nbdwire.tools.main import main
from nbdwire.uri import NBDURI, parse
from tests.support.certificates import Pki, create
from tests.support.peers import nbdkit, qemu_nbd
from tests.support.serving import noise
from tests.support.threads import wait_until
from tests.support.tools import require

SIZE = 12 << 20
DATA = noise(4 << 20) + bytes(4 << 20) + noise(4 << 20, 2)


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return create(tmp_path_factory.mktemp("pki") / "pki")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(DATA)
    return path


@dataclass(frozen=True)
class Served:
    server: Server
    tls: ServerTLS
    unix: NBDURI
    tcp: NBDURI
    certificates: Path

    def uri(self, directory: Path | None = None, *, tcp: bool = True, **params: str) -> str:
        """For libnbd and for us: the same parameters."""
        where = self.tcp if tcp else self.unix
        pairs = {"tls-certificates": str(directory or self.certificates), **params}
        name = () if tcp else (("tls-hostname", "localhost"),)
        return str(replace(where, export="disk", tls=True, params=(*name, *pairs.items())))


class Blocking:
    """The same node, served by several threads (`nbdwire.followers`)."""

    blocking = True

    def __init__(self, node: FileNode) -> None:
        self._node = node

    def __getattr__(self, name: str) -> Any:
        return getattr(self._node, name)


@contextlib.contextmanager
def serving(
    directory: Path, image: Path, tls: ServerTLS, certificates: Path, *, blocking: bool = False
) -> Iterator[Served]:
    node = FileNode(image)
    try:
        with Server(tls=tls) as server:
            server.add("disk", Blocking(node) if blocking else node)
            server.add("secret", node, tls_required=True)
            unix = server.listen(NBDURI(socket=str(directory / "nbd.sock")))
            tcp = server.listen(NBDURI(host="127.0.0.1", port=0))
            yield Served(server, tls, unix, tcp, certificates)
    finally:
        node.close()


@pytest.fixture(params=["worker", "followers"])
def served(
    request: pytest.FixtureRequest, tmp_path: Path, image: Path, pki: Pki
) -> Iterator[Served]:
    """TLS is required, and clients must show a certificate."""
    tls = ServerTLS("required", certificates=pki.both, verify_peer=True)
    blocking = request.param == "followers"
    with serving(tmp_path, image, tls, pki.both, blocking=blocking) as found:
        yield found


def run(*command: str | Path, fails: bool = False) -> str:
    """What the program prints."""
    words = [require(str(command[0])), *map(str, command[1:])]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert (done.returncode != 0) == fails, f"{words}: {done.stdout}{done.stderr}"
    return done.stderr if fails else done.stdout


def credentials(directory: Path, *more: str) -> list[str]:
    properties = ["tls-creds-x509", "id=tls0", f"dir={directory}", "endpoint=client", *more]
    return ["--object", ",".join(properties)]


def image_options(where: NBDURI, export: str = "disk") -> str:
    return (
        f"driver=nbd,host={where.host},port={where.port},export={export},tls-creds=tls0"
        if not where.socket
        else f"driver=nbd,path={where.socket},export={export},tls-creds=tls0,tls-hostname=localhost"
    )


# Our server


@pytest.mark.parametrize("tcp", [True, False])
def test_nbdinfo_sees_an_encrypted_export(served: Served, tcp: bool) -> None:
    shown = json.loads(run("nbdinfo", "--json", served.uri(tcp=tcp)))
    assert shown["TLS"] is True
    assert shown["exports"][0]["export-size"] == SIZE
    listed = json.loads(run("nbdinfo", "--list", "--json", served.uri(tcp=tcp)))
    assert {export["export-name"] for export in listed["exports"]} == {"disk", "secret"}


@pytest.mark.parametrize("tcp", [True, False])
def test_nbdcopy_reads_and_writes_through_tls(served: Served, tmp_path: Path, tcp: bool) -> None:
    copy = tmp_path / "copy"
    run("nbdcopy", served.uri(tcp=tcp), copy)
    assert copy.read_bytes() == DATA
    other = noise(2 << 20, 3) + bytes(8 << 20) + noise(2 << 20, 4)
    copy.write_bytes(other)
    run("nbdcopy", "--flush", copy, served.uri(tcp=tcp))
    run("nbdcopy", served.uri(tcp=tcp), tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == other


@pytest.mark.parametrize("tcp", [True, False])
def test_qemu_img_reads_and_writes_through_tls(
    served: Served, tmp_path: Path, pki: Pki, tcp: bool
) -> None:
    where = served.tcp if tcp else served.unix
    options = image_options(where)
    creds = credentials(pki.both)
    copy = tmp_path / "copy.qcow2"
    run("qemu-img", "convert", *creds, "--image-opts", options, "-O", "qcow2", copy)
    run("qemu-img", "convert", "-O", "raw", copy, tmp_path / "raw")
    assert (tmp_path / "raw").read_bytes() == DATA
    (tmp_path / "raw").write_bytes(DATA[::-1])
    source = f"driver=file,filename={tmp_path / 'raw'}"
    run(
        "qemu-img", "convert", *creds, "-n", "--image-opts", "--target-image-opts", source, options
    )  # fmt: skip
    run("nbdcopy", served.uri(tcp=tcp), tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == DATA[::-1]


def test_qemu_io_checks_what_it_writes_through_tls(served: Served, pki: Pki) -> None:
    run(
        "qemu-io", *credentials(pki.both), "--image-opts",
        "-c", "write -P 0xa5 65536 3M", "-c", "write -z 1M 64k", "-c", "discard 2M 64k",
        "-c", "flush", "-c", "read -P 0xa5 65536 960k", "-c", "read -P 0 1M 64k",
        image_options(served.tcp),
    )  # fmt: skip


def test_fio_verifies_through_tls(
    tmp_path: Path, image: Path, pki: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its URI cannot say where certificates are, so here the client needs none."""
    monkeypatch.chdir(tmp_path)
    with serving(tmp_path, image, ServerTLS(certificates=pki.both), pki.both) as served:
        uri = replace(served.unix, export="disk", tls=True)
        run(
            "fio", "--name=v", "--ioengine=nbd", f"--uri={uri}", "--rw=randrw", "--size=8m",
            "--bsrange=4k-256k", "--iodepth=16", "--verify=crc32c", "--verify_fatal=1",
            "--output=fio.log",
        )  # fmt: skip


@pytest.mark.parametrize("directory", ["no_client", "wrong_authority", "expired"])
def test_nbdinfo_with_the_wrong_certificates_is_refused(
    served: Served, pki: Pki, directory: str
) -> None:
    run("nbdinfo", served.uri(getattr(pki, directory)), fails=True)


@pytest.mark.parametrize("directory", ["wrong_name", "expired", "wrong_authority"])
def test_nbdinfo_refuses_a_server_that_is_not_who_it_should_be(
    tmp_path: Path, image: Path, pki: Pki, directory: str
) -> None:
    tls = ServerTLS(certificates=getattr(pki, directory))
    with serving(tmp_path, image, tls, pki.both) as served:
        assert "certificate" in run("nbdinfo", served.uri(), fails=True)


def test_qemu_img_without_tls_or_with_the_wrong_authority_is_refused(
    served: Served, pki: Pki
) -> None:
    plain = run("qemu-img", "info", str(replace(served.tcp, export="disk", tls=False)), fails=True)
    assert "TLS" in plain
    run(
        "qemu-img", "info", *credentials(pki.wrong_authority),
        "--image-opts", image_options(served.tcp), fails=True,
    )  # fmt: skip


def test_where_tls_is_allowed_the_plain_see_the_plain(
    tmp_path: Path, image: Path, pki: Pki
) -> None:
    """nbd.md §9, SELECTIVETLS."""
    with serving(tmp_path, image, ServerTLS("allowed", certificates=pki.both), pki.both) as served:
        plain = replace(served.tcp, tls=False)
        assert json.loads(run("nbdinfo", "--json", str(plain.with_export("disk"))))["TLS"] is False
        run("nbdinfo", str(plain.with_export("secret")), fails=True)
        with pytest.raises(TLSRequired):
            connect(plain.with_export("secret"))
        secret = str(parse(served.uri()).with_export("secret"))
        assert json.loads(run("nbdinfo", "--json", secret))["TLS"] is True
        copy = tmp_path / "copy"
        run("nbdcopy", secret, copy)
        assert copy.read_bytes() == DATA


def s_client(served: Served, *options: str | Path) -> subprocess.Popen[bytes]:
    """Openssl's client. NBD's part before STARTTLS is ours to play: it knows nothing of it."""
    relay = socket.create_server(("127.0.0.1", 0))

    def carry() -> None:
        near, _ = relay.accept()
        far = socket.create_connection((served.tcp.host, served.tcp.port))
        far.sendall(bytes.fromhex("00000003") + b"IHAVEOPT" + bytes.fromhex("0000000500000000"))
        received = b""
        while len(received) < 18 + 20:
            received += far.recv(38 - len(received))
        back = threading.Thread(target=_pass_on, args=(far, near))
        back.start()
        _pass_on(near, far)
        back.join()
        for sock in (near, far, relay):
            sock.close()

    threading.Thread(target=carry, daemon=True).start()
    command = [require("openssl"), "s_client", "-connect", f"127.0.0.1:{relay.getsockname()[1]}"]
    return subprocess.Popen(
        [*command, *map(str, options)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def _pass_on(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)


def _until(process: subprocess.Popen[bytes], text: bytes) -> bytes:
    """What it has printed, up to ``text``."""
    seen = b""
    assert process.stdout is not None
    while text not in seen:
        part = os.read(process.stdout.fileno(), 1 << 16)
        assert part, seen
        seen += part
    return seen


@contextlib.contextmanager
def openssl_session(served: Served, version: str) -> Iterator[subprocess.Popen[bytes]]:
    directory = served.certificates
    with s_client(
        served, version, "-CAfile", directory / "ca-cert.pem", "-verify_return_error",
        "-cert", directory / "client-cert.pem", "-key", directory / "client-key.pem",
    ) as process:  # fmt: skip
        try:
            _until(process, b"Verify return code: 0")
            yield process
        finally:
            process.kill()


def test_renegotiation_is_refused(served: Served) -> None:
    with openssl_session(served, "-tls1_2") as process:
        assert process.stdin is not None
        process.stdin.write(b"R\n")
        process.stdin.flush()
        seen = _until(process, b"RENEGOTIATING") if process.stdout else b""
        assert process.stdout is not None
        seen += process.stdout.read()
    assert b"no renegotiation" in seen


def test_new_keys_are_made_when_a_client_asks_for_them(served: Served) -> None:
    """TLS 1.3 key updates, with and without one in return; then NBD goes on."""
    with openssl_session(served, "-tls1_3") as process:
        assert process.stdin is not None
        for command in (b"K\n", b"k\n", b"K\n"):
            process.stdin.write(command)
            process.stdin.flush()
            _until(process, b"KEYUPDATE")
        process.stdin.write(b"IHAVEOPT" + bytes.fromhex("0000000200000000"))  # ABORT
        process.stdin.flush()
        seen = _until(process, bytes.fromhex("0003e889045565a9"))
        assert process.stdout is not None
        seen += process.stdout.read()
    assert bytes.fromhex("000000020000000100000000") in seen
    assert b"closed" in seen


@pytest.mark.parametrize("version", ["-tls1", "-tls1_1"])
def test_older_versions_are_refused(served: Served, version: str) -> None:
    with s_client(served, version, "-cipher", "ALL:@SECLEVEL=0") as process:
        seen, _ = process.communicate(timeout=30)
    assert process.returncode != 0
    assert re.search(rb"alert protocol version|unsupported protocol|no protocols", seen), seen


def test_new_certificates_are_taken_up_while_clients_are_connected(
    tmp_path: Path, image: Path, pki: Pki
) -> None:
    directory = tmp_path / "certificates"
    directory.mkdir()

    def install(source: Path) -> None:
        for path in source.iterdir():
            (directory / path.name).write_bytes(path.read_bytes())

    install(pki.both)
    tls = ServerTLS(certificates=directory)
    with serving(tmp_path, image, tls, pki.both) as served, connect(served.uri()) as old:
        install(pki.wrong_authority)
        tls.reload()
        assert "certificate" in run("nbdinfo", served.uri(), fails=True)
        assert "TLS" in run("nbdinfo", served.uri(pki.wrong_authority))
        assert old.pread(4096, 0) == DATA[:4096]
        (directory / "server-key.pem").write_text("damaged")
        with pytest.raises(TLSError):
            tls.reload()
        assert "TLS" in run("nbdinfo", served.uri(pki.wrong_authority))
        assert old.pread(4096, 4096) == DATA[4096:8192]


def test_our_client_and_server_understand_each_other(served: Served) -> None:
    for tcp in (True, False):
        with connect(served.uri(tcp=tcp)) as client:
            assert client.pread(SIZE, 0) == DATA
            block = noise(1 << 20, 9)
            client.pwrite(block, 123)
            client.flush()
            assert client.pread(1 << 20, 123) == block
            client.pwrite(DATA[123 : 123 + (1 << 20)], 123)
        assert {name for name, _ in list_exports(served.uri(tcp=tcp))} == {"disk", "secret"}
    wait_until(lambda: served.server.clients() == 0)


# Our client


@contextlib.contextmanager
def their_server(kind: str, image: Path, listen: Path, directory: Path) -> Iterator[NBDURI]:
    """Another's server; it wants a certificate of its clients."""
    if kind == "qemu-nbd":
        creds = f"tls-creds-x509,id=tls0,dir={directory},endpoint=server,verify-peer=on"
        running = qemu_nbd(image, listen, "--object", creds, "--tls-creds", "tls0")
    else:
        running = nbdkit(
            listen, "--tls=require", f"--tls-certificates={directory}", "--tls-verify-peer",
            "file", str(image),
        )  # fmt: skip
    with running:
        yield NBDURI(socket=str(listen), tls=True)


def to(where: NBDURI, directory: Path, hostname: str = "localhost") -> NBDURI:
    return replace(where, params=(("tls-certificates", str(directory)), ("tls-hostname", hostname)))


@pytest.mark.parametrize("kind", ["qemu-nbd", "nbdkit"])
def test_our_client_speaks_tls_with_other_servers(
    kind: str, tmp_path: Path, image: Path, pki: Pki
) -> None:
    with their_server(kind, image, tmp_path / "their.sock", pki.both) as where:
        with connect(to(where, pki.both)) as client:
            assert client.size == SIZE
            assert client.pread(SIZE, 0) == DATA
            block = noise(3 << 20, 7)
            client.pwrite(block, 1 << 20)
            client.flush()
            assert client.pread(3 << 20, 1 << 20) == block
            assert sum(extent.length for extent in client.extents(0, SIZE)) <= SIZE
        assert image.read_bytes() == DATA[: 1 << 20] + block + DATA[4 << 20 :]
        assert [name for name, _ in list_exports(to(where, pki.both))] == [""]


@pytest.mark.parametrize("kind", ["qemu-nbd", "nbdkit"])
def test_our_copy_speaks_tls_with_other_servers(
    kind: str, tmp_path: Path, image: Path, pki: Pki, capsys: pytest.CaptureFixture[str]
) -> None:
    back = tmp_path / "back"
    with their_server(kind, image, tmp_path / "their.sock", pki.both) as where:
        uri = str(to(where, pki.both))
        assert main(["copy", "--json", uri, str(back)]) == 0
        assert json.loads(capsys.readouterr().out)["size"] == SIZE
        assert back.read_bytes() == DATA
        back.write_bytes(DATA[::-1])
        assert main(["copy", str(back), uri]) == 0
    assert image.read_bytes() == DATA[::-1]


@pytest.mark.parametrize("kind", ["qemu-nbd", "nbdkit"])
@pytest.mark.parametrize(
    ("directory", "hostname", "said"),
    [
        ("both", "elsewhere.example", "Hostname mismatch"),
        ("wrong_authority", "localhost", "no authority that is trusted here has signed it"),
        ("no_client", "localhost", ""),
    ],
)
def test_our_client_tells_why_tls_with_another_server_fails(
    kind: str, directory: str, hostname: str, said: str, tmp_path: Path, image: Path, pki: Pki
) -> None:
    listen = tmp_path / "their.sock"
    with their_server(kind, image, listen, pki.both) as where:
        with pytest.raises(NBDError) as caught:
            connect(to(where, getattr(pki, directory), hostname))
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)
        with pytest.raises(NegotiationError, match="TLS"):
            connect(replace(where, tls=False))


def test_an_nbds_uri_never_ends_in_plain_text(tmp_path: Path, image: Path, pki: Pki) -> None:
    """nbd.md §14: nbds MUST fail without TLS."""
    with qemu_nbd(image, tmp_path / "plain.sock") as plain:
        where = replace(parse(plain), tls=True)
        with pytest.raises(NegotiationError):
            connect(to(where, pki.both))

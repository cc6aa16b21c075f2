"""What other people's clients say when our server refuses them: they are told, and do not hang."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from fleece.block.memory import MemoryNode
from nbdwire.access import parse
from nbdwire.server import Server
from nbdwire.uri import NBDURI
from tests.support.nbdraw import connected
from tests.support.tools import require

SIZE = 1 << 20

PROGRAMS = pytest.mark.parametrize(
    "program",
    [
        ("nbdinfo", "URI"),
        ("nbdcopy", "URI", "null:"),
        ("qemu-img", "info", "URI"),
        ("qemu-io", "-r", "-f", "raw", "-c", "read 0 512", "URI"),
        ("fio", "--name=x", "--ioengine=nbd", "--uri=URI", "--rw=read", "--size=64k"),
    ],
    ids=lambda program: program[0],
)


LIBNBD = {"nbdinfo": "server replied with error", "nbdcopy": "server policy prevents", "fio": "nbd"}
"""libnbd keeps the server's message to itself; what its programs say instead."""


@dataclass(frozen=True)
class Outcome:
    status: int
    text: str


def run(program: tuple[str, ...], uri: object) -> Outcome:
    words = [require(program[0]), *(word.replace("URI", str(uri)) for word in program[1:])]
    done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
    return Outcome(done.returncode, done.stdout + done.stderr)


@pytest.fixture
def where(tmp_path: Path) -> Iterator[NBDURI]:
    address = NBDURI(socket=str(tmp_path / "nbd.sock"))
    with Server(address, max_connections=1) as server:
        server.add("disk", MemoryNode(SIZE))
        server.add("theirs", MemoryNode(SIZE), access=parse("uid:4294967294"))
        yield address


@PROGRAMS
def test_a_client_above_the_limit_is_told(where: NBDURI, program: tuple[str, ...]) -> None:
    """nbd.md (c) 7: with qemu-nbd it hangs."""
    with connected(where) as client:
        client.in_step()
        refused = run(program, where.with_export("disk"))
        assert refused.status != 0
        assert LIBNBD.get(program[0], "too many clients") in refused.text


@PROGRAMS
def test_a_client_that_no_rule_allows_is_told(where: NBDURI, program: tuple[str, ...]) -> None:
    refused = run(program, where.with_export("theirs"))
    assert refused.status != 0
    assert LIBNBD.get(program[0], "no rule allows you") in refused.text


def test_a_listener_with_two_addresses_serves_real_clients(tmp_path: Path) -> None:
    with Server("nbd://[::]:0") as server:
        server.add("disk", MemoryNode(SIZE))
        port = server.listeners[0].port
        for host in ("127.0.0.1", "[::1]"):
            found = run(("nbdinfo", "--size", "URI"), f"nbd://{host}:{port}/disk")
            assert (found.status, found.text.strip()) == (0, str(SIZE))


def test_an_abstract_socket_serves_real_clients() -> None:
    name = f"\0fleece-interop-{os.getpid()}"
    with Server(NBDURI(socket=name)) as server:
        server.add("disk", MemoryNode(SIZE))
        nbdsh = ("/usr/bin/python3", "-c", f"""
import nbd, socket
sock = socket.socket(socket.AF_UNIX)
sock.connect({name!r})
h = nbd.NBD()
h.set_export_name("disk")
h.connect_socket(sock.detach())
print(h.get_size())
""")  # fmt: skip
        require("nbdsh")
        found = run(nbdsh, "")
        assert (found.status, found.text.strip()) == (0, str(SIZE))


def test_socket_activation_as_libnbd_does_it(tmp_path: Path) -> None:
    """It starts our server with a listening socket at descriptor 3, as systemd would."""
    require("nbdsh")
    root = Path(__file__).resolve().parents[2]
    (tmp_path / "server.py").write_text(
        f"""
import sys, threading
sys.path[:0] = [{str(root)!r}, {str(root / "nbd")!r}]
from fleece.block.memory import MemoryNode
from nbdwire.listeners import inherited
from nbdwire.server import Server
server = Server(default="disk")
server.add("disk", MemoryNode({SIZE}))
for item in inherited():
    server.listen(item.socket)
threading.Event().wait()
"""
    )
    client = f"""
import nbd, sys
h = nbd.NBD()
h.connect_systemd_socket_activation([sys.argv[1], {str(tmp_path / "server.py")!r}])
h.pwrite(b"x" * 512, 0)
print(h.get_size(), h.pread(512, 0) == b"x" * 512)
"""
    found = run(("/usr/bin/python3", "-c", client, sys.executable), "")
    assert (found.status, found.text.strip()) == (0, f"{SIZE} True")

# SPDX-License-Identifier: Apache-2.0
"""The requests that brought other servers down (nbd.md, table of vulnerabilities)."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from fleece.block import file as file_module
from fleece.block.file import FileNode
from fleece.block.memory import MemoryNode
from fleece.formats import open_image
from fleece.formats.qcow2.create import CreateOptions, create
from nbdwire import constants as c
from nbdwire.extents import Extent
from nbdwire.uri import NBDURI
from tests.support import nbdraw as raw
from tests.support import peers
from tests.support.hostile import memory_below, unharmed, vanish
from tests.support.nbdraw import FORMS, connected
from tests.support.serving import noise
from tests.support.snapshots import ArrayNode, Rig, read

ROOT = Path(__file__).resolve().parents[3]
MIB, GIB = 1 << 20, 1 << 30
SIZE = 64 * MIB
FORM = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
MOST = 0xFFFFFFFF


@FORM
def test_cve_2005_3534_and_2011_0530_no_request_is_longer_than_what_is_there_for_it(
    tmp_path: Path, form: dict[str, Any]
) -> None:
    """nbd-server: the request's length was believed, and its fixed buffer overrun."""
    wide = 2**63 if form.get("extended") else MOST
    with (
        unharmed(tmp_path, MemoryNode(8 * GIB)) as (_, where),
        memory_below(40 * MIB),
        connected(where, **form) as client,
    ):
        for length in (c.MAX_PAYLOAD + 1, 1 << 31, MOST, wide, 2 * wide - 1 if wide > MOST else 5):
            reply = client.ask(raw.READ, 0, length)
            assert (reply.error == 0) == (length == 5), length
        assert client.ask(raw.READ, 2**64 - 1, 2).error == c.NBD_EINVAL
        client.in_step()


@FORM
def test_cve_2005_3534_a_write_that_is_too_long_is_neither_believed_nor_kept(
    tmp_path: Path, form: dict[str, Any]
) -> None:
    """Its payload is consumed and the request refused, or the connection ends; nothing between."""
    node, payload = MemoryNode(SIZE), b"W" * (c.MAX_PAYLOAD + 1)
    with unharmed(tmp_path, node) as (_, where):
        for length in (c.MAX_PAYLOAD + 1, MOST):
            with memory_below(40 * MIB), connected(where, **form) as client:
                head = client.make(raw.WRITE, 0, length)
                with suppress(BrokenPipeError, ConnectionResetError, EOFError):
                    client.send(head)
                    client.send(payload)
                    if length == c.MAX_PAYLOAD + 1:
                        assert client.reply().error == c.NBD_EINVAL
                        client.in_step()
        assert node.extents(0, SIZE) == [Extent(0, SIZE, c.STATE_HOLE | c.STATE_ZERO)]


@contextmanager
def process(directory: Path) -> Iterator[tuple[subprocess.Popen[bytes], NBDURI]]:
    """``python -m nbdwire serve``, which must end in good order when it is told to."""
    listen = directory / "nbd.sock"
    command = [sys.executable, "-m", "nbdwire", "serve", "--memory", "64M", "--socket", str(listen)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "nbd")}
    child = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        peers.wait_for_socket(listen, child)
        yield child, NBDURI(socket=str(listen))
        if child.poll() is None:
            child.send_signal(signal.SIGTERM)
        assert child.communicate(timeout=20)[1] == b""
        assert child.returncode == 0
    finally:
        child.kill()
        child.communicate()


def test_cve_2015_0847_signals_that_rain_on_a_busy_server_do_not_lock_it(tmp_path: Path) -> None:
    """nbd-server: its handler of SIGCHLD did what a handler must not. Ours has no handlers."""
    with process(tmp_path) as (child, where), connected(where, "") as client:
        for number in range(200):
            for kind in (signal.SIGCHLD, signal.SIGWINCH, signal.SIGURG, signal.SIGCONT):
                child.send_signal(kind)
            assert client.write(number * 4096, noise(4096, number)) == 0
        assert client.read(199 * 4096, 4096) == noise(4096, 199)
        for _ in range(50):
            child.send_signal(signal.SIGTERM)  # many at once: it still ends as it should
        child.wait(20)


def test_cve_2017_10664_a_client_that_closes_does_not_kill_the_server_with_sigpipe(
    tmp_path: Path,
) -> None:
    """qemu-nbd: writing to a client that was gone was the end of the process."""
    with process(tmp_path) as (child, where):
        for index in range(60):
            with connected(where, "") as client:
                client.send(b"".join(client.make(raw.READ, 0, 16 * MIB) for _ in range(3)))
                vanish(client.sock) if index % 2 else client.sock.close()
        assert child.poll() is None
        with connected(where, "") as client:
            client.in_step()


@pytest.mark.parametrize("blocking", [False, True], ids=["worker", "followers"])
@FORM
def test_no_id_nbdkit_1_34_a_hang_up_in_the_middle_of_a_reply_is_an_event_not_a_fault(
    tmp_path: Path, form: dict[str, Any], blocking: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """no id: nbdkit's raw_send_socket met an assertion when the client hung up (1.32.5 too)."""
    node = MemoryNode(SIZE)
    node.blocking = blocking
    node.pwrite(memoryview(noise(4 * MIB)), 0)
    with unharmed(tmp_path, node) as (_, where):
        for index in range(30):
            with connected(where, **form) as client:
                kinds = [client.make(raw.READ, 0, 4 * MIB) for _ in range(4)]
                client.send(b"".join(kinds))
                client.take(1 + index * 4001)
                if index % 3:
                    vanish(client.sock)
    assert [record for record in caplog.records if record.levelno > 30] == []


class Boastful(MemoryNode):
    """A plugin that tells of more than it was asked about."""

    def extents(self, offset: int, length: int) -> list[Extent]:
        return [Extent(offset, self.size - offset + GIB, 0)]


@pytest.mark.parametrize("blocking", [False, True], ids=["worker", "followers"])
@pytest.mark.parametrize("extended", [False, True], ids=["structured", "extended"])
def test_cve_2025_47711_the_largest_status_of_a_plugin_that_says_more_than_it_was_asked(
    tmp_path: Path, extended: bool, blocking: bool
) -> None:
    """nbdkit < 1.44: an assertion failed at length 2^32 - 1."""
    for kind in (Boastful, MemoryNode):
        node = kind(6 * GIB)
        node.blocking = blocking
        with (
            unharmed(tmp_path, node) as (_, where),
            connected(where, extended=extended, contexts=["base:allocation"]) as client,
        ):
            for offset in (0, 1, 6 * GIB - MOST):
                for length in (MOST, MOST - 1, MOST - 511, 1 << 31, (1 << 31) - 1):
                    reply = client.ask(raw.STATUS, offset, length)
                    assert reply.error in (0, c.NBD_EIO)
                    for extents in reply.statuses().values() if not reply.error else ():
                        assert extents[0][0] > 0
                        assert sum(size for size, _ in extents) <= 6 * GIB + GIB - offset
                        assert extended or max(size for size, _ in extents) <= MOST
            client.in_step()


@pytest.mark.parametrize("extended", [False, True], ids=["structured", "extended"])
def test_cve_2025_47712_and_no_id_status_that_is_not_aligned_to_the_block_size(
    tmp_path: Path, extended: bool
) -> None:
    """nbdkit's filters blocksize (< 1.44) and blocksize-policy (no id, 1.48 notes): assertions.

    The first rounded a length near 2^32 in 32 bits.
    """
    with unharmed(tmp_path, MemoryNode(6 * GIB)) as (server, where):
        for minimum in (512, 4096, 65536):
            name = f"blocks of {minimum}"
            server.add(name, MemoryNode(6 * GIB), minimum_block=minimum, preferred_block=65536)
            options: dict[str, Any] = {"extended": extended, "contexts": ["base:allocation"]}
            with connected(where, name, **options) as client:
                for offset in (0, 1, minimum - 1, minimum, minimum + 1):
                    for length in (1, minimum - 1, MOST, MOST - 1, (1 << 32) - minimum + 1):
                        assert client.ask(raw.STATUS, offset, length).error == c.NBD_EINVAL
                assert client.ask(raw.STATUS, minimum, (1 << 32) - minimum).error == 0
                assert client.ask(raw.READ, minimum, minimum).error == 0
            server.remove(name)


def test_no_id_nbdkit_cow_a_client_cannot_make_an_overlay_larger_than_the_disk(
    tmp_path: Path,
) -> None:
    """no id: an untrusted client could fill nbdkit's copy-on-write overlay without end."""
    old = noise(4 * MIB)
    (tmp_path / "disk.img").write_bytes(old)
    rig = Rig(tmp_path, ArrayNode(old))
    view = rig.snapshot()
    with unharmed(tmp_path, rig.disk) as (server, where):
        server.add("snapshot", view)
        with connected(where) as live, connected(where, "snapshot") as frozen:
            for round_ in range(6):
                for offset in range(0, 4 * MIB, 128 << 10):
                    assert live.write(offset, noise(100 << 10, round_)) == 0
                    assert live.ask(raw.ZEROES, offset + 5000, 1000).error == 0
            assert frozen.write(0, b"mine") == c.NBD_EPERM
            assert frozen.read(0, 4 * MIB) == old
        (overlay,) = tmp_path.glob("s1*.qcow2")
        assert overlay.stat().st_blocks * 512 < len(old) + MIB
    assert read(view, 0, 4 * MIB) == old
    rig.drop(view)


def zeroed(node: FileNode | MemoryNode, where: NBDURI, marks: list[int], **form: Any) -> None:
    """WRITE_ZEROES over all ``marks``; none of them may be left, nor what is outside be gone."""
    first, last = marks[0], marks[-1]
    for mark in (first - 1, *marks, last + 1):
        node.pwrite(memoryview(b"!"), mark)
    with connected(where, **form) as client:
        reply = client.ask(raw.ZEROES, first, last - first + 1)
        if reply.error:  # refused as a whole is honest too
            assert reply.error in (c.NBD_EINVAL, c.NBD_EOVERFLOW)
            assert all(client.read(mark, 1) == b"!" for mark in marks)
            return
        assert [client.read(mark, 1) for mark in marks] == [b"\0"] * len(marks)
        assert client.read(first - 1, 1) == client.read(last + 1, 1) == b"!"


@FORM
def test_no_id_nbd_server_3_27_zeroing_of_4_gib_zeroes_4_gib(
    tmp_path: Path, form: dict[str, Any]
) -> None:
    """no id, measured: nbd-server said that it had, and had not."""
    path = tmp_path / "disk"
    path.touch()
    os.truncate(path, 5 * GIB)
    file = FileNode(path)
    for node in (file, MemoryNode(5 * GIB)):
        with unharmed(tmp_path, node) as (_, where):
            for length in (MOST, MOST - 1) + ((1 << 32,) if form.get("extended") else ()):
                zeroed(node, where, [1, MIB, 1 << 31, length], **form)
    file.close()


@pytest.mark.parametrize("form", [FORMS["structured"], FORMS["extended"]])
def test_no_id_nbdkit_1_46_zeroing_more_than_64_mib_goes_on_to_the_end(
    tmp_path: Path, form: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """no id: where a file system cannot zero, 64 MiB were written and the rest showed old data."""

    def cannot(*_: object) -> None:
        raise OSError(95, "as on NFS")

    monkeypatch.setattr(file_module, "fallocate", cannot)
    path = tmp_path / "disk"
    path.touch()
    os.truncate(path, 160 * MIB)
    node = FileNode(path)
    marks = [4095, 64 * MIB, 64 * MIB + 1, 100 * MIB, 128 * MIB, 150 * MIB + 3]
    with unharmed(tmp_path, node) as (_, where):
        zeroed(node, where, marks, **form)
        with connected(where, **form) as client:
            assert client.read(marks[0], 1) == b"\0", "it was not refused"
    node.close()


def test_no_id_nbdkit_fast_zero_though_not_offered_is_refused(tmp_path: Path) -> None:
    """no id, measured: nbdkit 1.32 and 1.48 met an assertion and died."""
    with unharmed(tmp_path, MemoryNode(SIZE)) as (server, where):
        server.add("read-only", MemoryNode(SIZE), read_only=True)
        for export in ("disk", "read-only"):
            with connected(where, export) as client:
                offered = bool(client.session.flags & c.TFLAG_SEND_FAST_ZERO)
                assert offered == (export == "disk")
                for kind in (raw.READ, raw.TRIM, raw.FLUSH, raw.CACHE, raw.STATUS):
                    error = client.ask(kind, 0, 0 if kind == raw.FLUSH else 512, raw.FAST_ZERO)
                    assert error.error in (c.NBD_EINVAL, c.NBD_EPERM)
                reply = client.ask(raw.ZEROES, 0, 4096, raw.FAST_ZERO)
                allowed = (0, c.NBD_ENOTSUP) if offered else (c.NBD_EINVAL, c.NBD_EPERM)
                assert reply.error in allowed
                client.in_step()


def test_the_same_large_requests_on_qcow2(tmp_path: Path) -> None:
    """CVE-2025-47711, and zeroing of 4 GiB (no id): the format's clusters are one more rounding."""
    create(tmp_path / "d.qcow2", 5 * GIB, CreateOptions(cluster_size=65536))
    node = open_image(tmp_path / "d.qcow2", "qcow2")
    with (
        unharmed(tmp_path, node) as (_, where),
        connected(where, contexts=["base:allocation"]) as client,
    ):
        for mark in (0, 1, MIB, 4 * GIB - 2, 4 * GIB):
            assert client.write(mark, b"!") == 0
        assert client.ask(raw.ZEROES, 1, MOST).error == 0
        for mark, byte in ((0, b"!"), (1, b"\0"), (MIB, b"\0"), (4 * GIB - 2, b"\0")):
            assert client.read(mark, 1) == byte
        assert client.read(4 * GIB, 1) == b"!"
        for offset in (0, 1, GIB):
            (extents,) = client.ask(raw.STATUS, offset, MOST).statuses().values()
            assert sum(length for length, _ in extents) <= 5 * GIB - offset
    node.close()

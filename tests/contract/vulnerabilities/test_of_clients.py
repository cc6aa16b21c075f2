# SPDX-License-Identifier: Apache-2.0
"""What hostile or broken servers did to other clients (nbd.md, table of vulnerabilities)."""

import random
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from fleece.block.memory import MemoryNode
from fleece.block.remote import RemoteNode
from fleece.errors import UsageError
from nbdwire import codec
from nbdwire import constants as c
from nbdwire.client import Client, connect, describe, list_contexts, list_exports
from nbdwire.errors import (
    ConnectionClosed,
    NBDError,
    NegotiationError,
    ProtocolError,
    RequestError,
    TLSError,
    URIError,
)
from nbdwire.pool import connect_pool
from nbdwire.tls import ClientTLS, ServerTLS
from nbdwire.tools.main import main
from nbdwire.uri import NBDURI, parse
from tests.support import certificates
from tests.support.faulty import Hooked
from tests.support.hostile import GREETING, answer, descriptors, memory_below
from tests.support.scripted import EXTENDED, SIZE, STRUCTURED, answering, ok
from tests.support.scripted import serving as scripted
from tests.support.serving import noise, serving
from tests.support.threads import wait_until
from tests.support.tls import outcome

MIB = 1 << 20
OLDSTYLE = (
    b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53" + (1 << 20).to_bytes(8, "big") + bytes(4 + 124)
)
NO_EXTRAS = answer(c.OPT_EXTENDED_HEADERS, c.REP_ERR_UNSUP) + answer(
    c.OPT_STRUCTURED_REPLY, c.REP_ERR_UNSUP
)
INFO = codec.INFO_EXPORT.pack(c.INFO_EXPORT, 1 << 20, c.TFLAG_HAS_FLAGS)


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Whatever a server does, the client leaves no thread and no descriptor behind."""
    threads, files = threading.active_count(), descriptors()
    yield
    wait_until(lambda: (threading.active_count(), descriptors()) == (threads, files))


@contextmanager
def saying(path: Path, *speeches: bytes, endless: bytes = b"") -> Iterator[NBDURI]:
    """A server that makes one speech to each client; the last one goes on with ``endless``."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(20)

        def speak() -> None:
            for number, speech in enumerate(speeches, 1):
                client, _ = listener.accept()
                with client, suppress(OSError):
                    client.settimeout(20)
                    client.sendall(speech)
                    while endless and number == len(speeches):
                        client.sendall(endless)
                    client.shutdown(socket.SHUT_WR)
                    while client.recv(65536):
                        pass

        thread = threading.Thread(target=speak)
        thread.start()
        yield NBDURI(socket=str(path), export="disk")
        thread.join(20)
        assert not thread.is_alive()


ASKING: dict[str, Callable[[NBDURI], object]] = {
    "connect": connect,
    "list": list_exports,
    "contexts": list_contexts,
    "describe": describe,
}


@pytest.mark.parametrize("length", [1 << 20, 1 << 31, 0xFFFFFFFF])
@pytest.mark.parametrize("ask", ASKING.values(), ids=ASKING)
def test_cve_2017_2630_a_reply_longer_than_any_may_be_is_not_taken_in(
    tmp_path: Path, ask: Callable[[NBDURI], object], length: int
) -> None:
    """QEMU: the reply to LIST was skipped into a buffer on the stack, whatever its length."""
    for number, before in ((c.OPT_LIST, b""), (c.OPT_GO, NO_EXTRAS), (c.OPT_INFO, NO_EXTRAS)):
        head = answer(number, c.REP_SERVER)[:-4] + length.to_bytes(4, "big")
        speech = GREETING + before + head
        with (
            saying(tmp_path / f"s{number}", speech, endless=bytes(65536)) as uri,
            memory_below(20 * MIB),
            pytest.raises(ProtocolError) as caught,
        ):
            ask(uri)
        assert "\n" not in str(caught.value)


def test_cve_2017_2630_a_list_without_end_is_given_up(tmp_path: Path) -> None:
    """The same with replies that are short, and never end."""
    entry = answer(c.OPT_LIST, c.REP_SERVER, b"\0\0\x10\0" + b"x" * 4096)
    with (
        saying(tmp_path / "s", GREETING, endless=entry) as uri,
        memory_below(80 * MIB),
        pytest.raises(ProtocolError, match="without end"),
    ):
        list_exports(uri)


@pytest.mark.parametrize("tls", [False, True])
def test_cve_2019_14842_an_oldstyle_server_is_refused_with_tls_and_without(
    tmp_path: Path, tls: bool
) -> None:
    """libnbd: under TLS "require" an oldstyle server was used in plain text."""
    pki = certificates.create(tmp_path / "pki") if tls else None
    trust = ClientTLS(certificates=pki.both, hostname="localhost").upgrade if pki else None
    for greeting in (OLDSTYLE, GREETING[:-2] + b"\0\0"):
        with saying(tmp_path / str(len(greeting)), greeting) as uri:
            expected = NBDError if tls or greeting == OLDSTYLE else ConnectionClosed
            with pytest.raises(expected) as caught:
                connect(uri, tls=trust)
            if greeting == OLDSTYLE:
                assert "old" in str(caught.value)


def test_cve_2019_14842_a_server_that_refuses_starttls_gets_no_request(tmp_path: Path) -> None:
    refusal = answer(c.OPT_STARTTLS, c.REP_ERR_UNSUP)
    pki = certificates.create(tmp_path / "pki")
    trust = ClientTLS(certificates=pki.both, hostname="localhost").upgrade
    with (
        saying(tmp_path / "s", GREETING + refusal) as uri,
        pytest.raises(NegotiationError, match="STARTTLS"),
    ):
        connect(uri, tls=trust)


@pytest.mark.parametrize("number", [c.OPT_GO, c.OPT_INFO])
def test_cve_2021_20286_a_server_may_die_at_every_byte_of_go_and_info(
    tmp_path: Path, number: int
) -> None:
    """libnbd: an assertion failed when the connection ended in nbd_opt_go or nbd_opt_info."""
    whole = GREETING + NO_EXTRAS + answer(number, c.REP_INFO, INFO) + answer(number, c.REP_ACK)
    begin = len(GREETING + NO_EXTRAS)
    ask = connect if number == c.OPT_GO else describe
    speeches = [whole[:cut] for cut in range(begin, len(whole))]
    with saying(tmp_path / "s", *speeches) as uri:
        for _ in speeches:
            with pytest.raises(ConnectionClosed) as caught:
                ask(uri)
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("connections", [1, 4])
def test_cve_2022_0485_no_error_of_a_copy_is_overlooked(
    tmp_path: Path, connections: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """nbdcopy: failed reads and writes were taken for done, and the copy for good."""
    rng = random.Random(485)
    for verb in ("pread_into", "pread_cached", "pwrite", "flush"):
        node = Hooked(8 * MIB)
        node.pwrite(memoryview(noise(8 * MIB)), 0)
        fatal = rng.randrange(1, 8) * MIB

        def hook(buf: object = None, offset: int = fatal, *_: object, at: int = fatal) -> None:
            if not isinstance(buf, memoryview) or offset <= at < offset + len(buf):
                raise OSError(5, "a bad sector")

        if verb == "pread_cached":
            node.before["pread_into"] = hook
        node.before[verb] = hook
        file = tmp_path / f"{verb}.img"
        file.write_bytes(noise(8 * MIB, 2))
        with serving(tmp_path, node) as (_, where):
            uri = str(where.with_export("disk"))
            ends = [uri, str(file)] if verb.startswith("pread") else [str(file), uri]
            options = ["--connections", str(connections)]
            assert main(["copy", *options, *ends]) == 1, verb
        said = capsys.readouterr().err
        assert said.startswith("nbdwire copy: cannot ")
        assert "bad sector" in said
        assert said.count("\n") == 1
        assert "Traceback" not in said


@pytest.mark.parametrize("size", [1 << 63, (1 << 63) + 1, (1 << 64) - 1])
@pytest.mark.parametrize("number", [c.OPT_GO, c.OPT_INFO])
def test_cve_2023_5215_a_size_of_2_to_63_and_more_is_refused(
    tmp_path: Path, size: int, number: int
) -> None:
    """libnbd: the size became negative, and callers took it for an error, or for a length."""
    info = codec.INFO_EXPORT.pack(c.INFO_EXPORT, size, c.TFLAG_HAS_FLAGS)
    speech = GREETING + NO_EXTRAS + answer(number, c.REP_INFO, info) + answer(number, c.REP_ACK)
    with (
        saying(tmp_path / "s", speech) as uri,
        pytest.raises(ProtocolError, match="impossible size"),
    ):
        (connect if number == c.OPT_GO else describe)(uri)


def test_cve_2023_5215_we_do_not_advertise_such_a_size(tmp_path: Path) -> None:
    class Huge(MemoryNode):
        pass

    for size in (1 << 63, (1 << 64) - 1):
        with serving(tmp_path, MemoryNode(MIB)) as (server, where):
            with suppress(ValueError):
                server.add("huge", Huge(size))
            with pytest.raises(NBDError):
                connect(where.with_export("huge"))
            connect(where.with_export("disk")).close()


def status(cookie: int, *descriptors: tuple[int, int], context: int = 1) -> bytes:
    body = context.to_bytes(4, "big") + len(descriptors).to_bytes(4, "big")
    body += b"".join(n.to_bytes(8, "big") + f.to_bytes(8, "big") for n, f in descriptors)
    head = c.EXTENDED_REPLY_MAGIC.to_bytes(4, "big") + (1).to_bytes(2, "big")
    head += c.REPLY_BLOCK_STATUS_EXT.to_bytes(2, "big") + cookie.to_bytes(8, "big")
    return head + bytes(8) + len(body).to_bytes(8, "big") + body


@pytest.mark.parametrize(
    "descriptors",
    [
        [(4096, 1 << 63)],
        [(4096, (1 << 64) - 1)],
        [(1 << 63, 0)],
        [((1 << 64) - 1, 0)],
        [(4096, 0), ((1 << 64) - 4096, 0)],
        [(0, 0)],
    ],
)
def test_cve_2023_5871_status_of_64_bits_is_an_answer_or_an_error_never_a_crash(
    descriptors: list[tuple[int, int]],
) -> None:
    """libnbd: flags of 64 bits met an assertion made for 32."""
    with answering(lambda cookie: [status(cookie, *descriptors)], EXTENDED) as client:
        found = outcome(lambda: client.extents(0, SIZE))
        if isinstance(found, Exception):
            assert isinstance(found, (ProtocolError, RequestError)), found
            return
        assert found[0].offset == 0
        assert sum(extent.length for extent in found) <= SIZE
        assert all(extent.length > 0 for extent in found)


def test_cve_2024_7383_a_certificate_is_verified_with_its_authority_name_and_dates(
    tmp_path: Path,
) -> None:
    """libnbd: the server's certificate was not fully verified."""
    pki = certificates.create(tmp_path / "pki")
    trust = ClientTLS(certificates=pki.both, hostname="localhost").upgrade
    for shown in (pki.wrong_authority, pki.wrong_name, pki.expired, pki.both):
        tls = ServerTLS("required", certificates=shown, verify_peer=False)
        with serving(tmp_path, MemoryNode(MIB), tls=tls) as (_, where):
            if shown == pki.both:  # the control
                connect(where.with_export("disk"), tls=trust).close()
                continue
            with pytest.raises(TLSError) as caught:
                connect(where.with_export("disk"), tls=trust)
            assert "\n" not in str(caught.value)


def test_cve_2025_14946_no_part_of_a_uri_becomes_an_option_of_a_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """libnbd: the host of nbd+ssh://-oProxyCommand=... was given to ssh. We have no ssh."""

    def started(*words: object, **_: object) -> None:
        raise AssertionError(f"a program was started: {words}")

    monkeypatch.setattr("subprocess.Popen.__init__", started)
    monkeypatch.setattr("os.system", started)
    for text in (
        "nbd+ssh://-oProxyCommand=touch%20x/disk",
        "nbds+ssh://host/disk",
        "nbd+exec:///?command=touch",
    ):
        for opening in (connect, connect_pool, parse):
            with pytest.raises(URIError):
                opening(text)
        with pytest.raises(UsageError):
            RemoteNode(text)
        with pytest.raises(SystemExit) as caught:
            main(["info", text])
        assert caught.value.code == 2
        said = capsys.readouterr().err
        assert "Traceback" not in said
    with pytest.raises((OSError, NBDError)):
        connect("nbd://-oProxyCommand=touch/disk", timeout=5)


def test_the_control_an_honest_server_is_spoken_to(tmp_path: Path) -> None:
    with scripted(ok, STRUCTURED) as (client, _):
        assert isinstance(client, Client)
        client.flush()
    with serving(tmp_path, MemoryNode(MIB)) as (_, where):
        assert [name for name, _ in list_exports(where)] == ["disk"]

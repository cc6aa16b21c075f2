"""The protocol's section "Block size constraints": our server."""

import errno
from pathlib import Path

import pytest

from fleece.block.null import NullNode
from nbdwire.negotiate import ExportInfo
from nbdwire.server import Server
from nbdwire.uri import NBDURI
from tests.support.faulty import Hooked
from tests.support.nbdraw import CACHE, FLUSH, FORMS, READ, STATUS, TRIM, WRITE, ZEROES, connected
from tests.support.serving import noise, serving

MOST = 32 << 20
BLOCK = 4096


@pytest.mark.parametrize(
    ("least", "preferred", "most"),
    [
        (0, 4096, MOST),
        (3, 4096, MOST),
        (131072, 131072, MOST),
        (1, 256, MOST),
        (1, 5000, MOST),
        (4096, 512, MOST),
        (1, 4096, 2048),
        (1, 4096, 1 << 32),
    ],
)
def test_sizes_that_must_not_be_told_are_refused(least: int, preferred: int, most: int) -> None:
    """nbd.md §10: min a power of 2 <= 65536; preferred one >= max(min, 512); max >= preferred."""
    with pytest.raises(ValueError, match=r"minimum block|preferred block|maximum payload"):
        ExportInfo("disk", 1 << 20, 1, "", least, preferred, most)


def test_a_size_that_is_no_multiple_of_the_block_is_refused() -> None:
    """nbd.md §10: the export size SHOULD be a multiple of min: here it must."""
    with Server() as server, pytest.raises(ValueError, match="no multiple of its block"):
        server.add("disk", Hooked(10_000), minimum_block=BLOCK)


def test_the_defaults_hold_without_negotiation(
    tmp_path: Path, node: Hooked, form: dict[str, bool]
) -> None:
    """nbd.md §10: min 1, max payload >= 2^25: a client that asked for nothing may use it."""
    big = Hooked(MOST + 1, blocking=node.blocking)
    with serving(tmp_path, big) as (_, uri), connected(uri, **form) as client:
        assert client.write(1, noise(MOST)) == 0
        assert client.read(1, MOST) == noise(MOST)
        assert client.read(MOST, 1) == noise(MOST)[-1:]


@pytest.mark.parametrize("kind", [READ, WRITE, TRIM, CACHE, ZEROES, STATUS])
@pytest.mark.parametrize(
    ("offset", "length"), [(1, BLOCK), (0, 1), (BLOCK, 512), (BLOCK // 2, BLOCK)]
)
def test_an_unaligned_request_is_refused_cleanly(
    tmp_path: Path, node: Hooked, form: dict[str, bool], kind: int, offset: int, length: int
) -> None:
    """nbd.md §10, §12: unaligned request against min > 1: EINVAL, cleanly."""
    wanted = () if form == FORMS["simple"] else ("base:allocation",)
    with serving(tmp_path, Hooked(512)) as (server, uri):
        server.add("blocks", node, minimum_block=BLOCK)
        with connected(uri, "blocks", contexts=wanted, **form) as client:
            payload = noise(length) if kind == WRITE else b""
            assert client.ask(kind, offset, length, 0, payload).error == errno.EINVAL
            assert client.ask(FLUSH).error == 0
            assert client.read(0, BLOCK) == bytes(BLOCK)


@pytest.mark.parametrize("kind", [TRIM, ZEROES, CACHE])
def test_requests_without_payload_may_be_larger_than_the_maximum(
    tmp_path: Path, form: dict[str, bool], kind: int
) -> None:
    """nbd.md §10, §6: TRIM, WRITE_ZEROES: larger than max payload: done, no disconnect."""
    with serving(tmp_path, NullNode(8 << 30)) as (_, uri), connected(uri, **form) as client:
        assert client.ask(kind, 0, 0xFFFF_FFFF).error == 0
        assert client.ask(kind, 512, MOST + 512).error == 0
        client.in_step()


@pytest.mark.parametrize("length", [MOST + 1, MOST + (1 << 20), 49 << 20])
def test_a_read_above_the_maximum_is_refused_in_step(
    tmp_path: Path, node: Hooked, form: dict[str, bool], length: int
) -> None:
    """nbd.md §10, §13: READ > max payload: EINVAL or EOVERFLOW, in sync."""
    with serving(tmp_path, NullNode(1 << 30)) as (_, uri), connected(uri, **form) as client:
        assert client.ask(READ, 0, length).error in (errno.EINVAL, errno.EOVERFLOW)
        client.in_step()


@pytest.mark.parametrize("length", [8193, 1 << 20, MOST])
def test_a_payload_up_to_32_mib_is_no_attack_whatever_was_advertised(
    tmp_path: Path, node: Hooked, form: dict[str, bool], length: int
) -> None:
    """nbd.md §10: a payload <= 32 MiB above the advertised maximum: an error, no disconnect."""
    with serving(tmp_path, Hooked(512)) as (server, uri):
        server.add("small", node, maximum_payload=8192)
        with connected(uri, "small", **form) as client:
            assert client.write(0, bytes(length)) != 0
            assert client.write(0, noise(8192)) == 0
            assert client.read(0, 8192) == noise(8192)


def test_every_size_of_an_export_can_be_used_to_its_last_byte(
    tmp_path: Path, form: dict[str, bool]
) -> None:
    """nbd.md §10: the size is told as it is, not rounded (qemu: down to 512)."""
    for size in (1, 511, 513, 4097):
        directory = tmp_path / str(size)
        directory.mkdir()
        with serving(directory, Hooked(size)) as (_, uri), connected(uri, **form) as client:
            assert client.session.size == size
            assert client.write(0, noise(size)) == 0
            assert client.read(0, size) == noise(size)
            assert client.ask(READ, size - 1, 2).error == errno.EINVAL


def test_an_empty_export_answers(tmp_path: Path, form: dict[str, bool]) -> None:
    """nbd.md §10: a size of 0 is legal; every range is past its end."""
    with (
        Server() as server,
    ):
        server.add("disk", Hooked(0))
        uri = server.listen(NBDURI(socket=str(tmp_path / "empty.sock")))
        with connected(uri, **form) as client:
            assert client.ask(READ, 0, 1).error == errno.EINVAL
            assert client.write(0, b"x") == errno.ENOSPC
            assert client.ask(FLUSH).error == 0

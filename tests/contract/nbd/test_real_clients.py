"""What real clients send, as bytes: a server must like it. (The real ones are in tests/interop.)"""

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdwire.server import Server
from nbdwire.uri import NBDURI
from tests.support import haggling as h
from tests.support.faulty import Hooked, striped
from tests.support.haggling import BASE, haggling, info, meta, option

SIZE = 1 << 20
DIRTY = "qemu:dirty-bitmap:nightly"


@pytest.fixture
def where(tmp_path: Path) -> Iterator[NBDURI]:
    with Server() as server:
        for name in ("disk", "other"):
            server.add(name, Hooked(SIZE), contexts={DIRTY: striped(100, 4096)})
        yield server.listen(NBDURI(socket=str(tmp_path / "nbd.sock")))


def names(replies: list[h.Reply]) -> list[str]:
    return [data[4:].decode() for _, kind, data in replies if kind == h.META]


def infos(replies: list[h.Reply]) -> list[int]:
    return [int.from_bytes(data[:2]) for _, kind, data in replies if kind == h.REP_INFO]


def test_libnbd(where: NBDURI) -> None:
    """nbd.md §15: EXTENDED_HEADERS, STRUCTURED_REPLY, SET_META, GO with all infos."""
    with haggling(where) as client:
        assert client.outcome(option(h.EXTENDED)) == h.ACK
        assert client.outcome(option(h.STRUCTURED)) == h.EXT_REQD
        assert names(client.ask(meta(h.SET_META, "disk", BASE))) == [BASE]
        told = client.ask(info(h.GO, "disk", h.BLOCK_SIZE, h.NAME, h.DESCRIPTION))
        assert sorted(infos(told)) == [0, 1, 2, 3]
        # nbdcopy: 128 MiB of zeroes at a time are above this disk, but never a disconnect
        client.send(struct.pack(">IHHQQQ", 0x21E41C71, 0, 6, 1, 0, 128 << 20))
        assert client.take(32)[:4] == struct.pack(">I", 0x6E8A278C)


def test_libnbd_without_extended_headers(where: NBDURI) -> None:
    """nbd.md §15: an older libnbd starts with STRUCTURED_REPLY."""
    with haggling(where) as client:
        assert client.outcome(option(h.STRUCTURED)) == h.ACK
        assert names(client.ask(meta(h.SET_META, "disk", BASE, DIRTY))) == [BASE, DIRTY]
        assert infos(client.ask(info(h.GO, "disk", h.BLOCK_SIZE))) == [0, 3]


def test_nbdinfo_list(where: NBDURI) -> None:
    """nbd.md §15: nbdinfo --list: LIST, then one connection per export."""
    with haggling(where) as client:
        listed = client.ask(option(h.LIST))[:-1]
        found = [data[4:].decode() for _, _, data in listed]
        assert client.outcome(option(h.ABORT)) == h.ACK
    for name in found:
        with haggling(where) as client:
            assert client.outcome(option(h.EXTENDED)) == h.ACK
            assert names(client.ask(meta(h.LIST_META, name))) == [BASE, DIRTY]
            assert client.outcome(info(h.INFO, name, h.BLOCK_SIZE)) == h.ACK
            assert client.outcome(option(h.ABORT)) == h.ACK


def test_qemu(where: NBDURI) -> None:
    """nbd.md §15: EXTENDED_HEADERS or STRUCTURED_REPLY, SET_META, GO + BLOCK_SIZE."""
    for first in (h.EXTENDED, h.STRUCTURED):
        with haggling(where) as client:
            assert client.outcome(option(first)) == h.ACK
            assert names(client.ask(meta(h.SET_META, "disk", BASE))) == [BASE]
            assert infos(client.ask(info(h.GO, "disk", h.BLOCK_SIZE))) == [0, 3]


def test_qemu_with_a_bitmap_in_place_of_the_allocation(where: NBDURI) -> None:
    """nbd.md §15: x-dirty-bitmap: exactly the one context that was asked for."""
    with haggling(where) as client:
        client.ask(option(h.STRUCTURED))
        assert names(client.ask(meta(h.SET_META, "disk", DIRTY))) == [DIRTY]


def test_qemu_nbd_list(where: NBDURI) -> None:
    """nbd.md §15: --list: LIST, then INFO and LIST_META per export on the same connection."""
    with haggling(where) as client:
        assert client.outcome(option(h.STRUCTURED)) == h.ACK
        for _, _, data in client.ask(option(h.LIST))[:-1]:
            name = data[4:].decode()
            assert client.outcome(info(h.INFO, name, 0, 1, 2, 3)) == h.ACK
            for queries in ((), ("qemu:",)):
                assert client.outcome(meta(h.LIST_META, name, *queries)) == h.ACK
        assert client.outcome(option(h.ABORT)) == h.ACK


@pytest.mark.parametrize("go", [True, False])
def test_nbd_client_and_the_linux_kernel(where: NBDURI, go: bool) -> None:
    """nbd.md §15: GO with fallback to EXPORT_NAME; simple replies only; several connections."""
    for _ in range(4):
        with haggling(where) as client:
            if go:
                assert client.outcome(info(h.GO, "disk", h.BLOCK_SIZE)) == h.ACK
            else:
                client.send(option(h.EXPORT_NAME, b"disk"))
                assert client.take(10)[:8] == SIZE.to_bytes(8)
            for kind, length, data in ((0, 4096, 4096), (3, 0, 0), (4, 4096, 0)):
                client.send(struct.pack(">IHHQQI", 0x25609513, 0, kind, 5, 0, length))
                assert client.take(16 + data)[:16] == struct.pack(">IIQ", 0x67446698, 0, 5)


def test_ovirt_imageio(where: NBDURI) -> None:
    """nbd.md §15: no NO_ZEROES, LIST_META of bitmaps, SET of two or three, GO with no infos."""
    with haggling(where, h.FIXED) as client:
        assert client.outcome(option(h.STRUCTURED)) == h.ACK
        assert names(client.ask(meta(h.LIST_META, "disk", "qemu:dirty-bitmap:"))) == [DIRTY]
        chosen = meta(h.SET_META, "disk", BASE, "qemu:allocation-depth", DIRTY)
        assert names(client.ask(chosen)) == [BASE, DIRTY]
        assert infos(client.ask(info(h.GO, "disk"))) == [0], "it would believe any block size"
        client.send(struct.pack(">IHHQQI", 0x25609513, 0, 7, 5, 0, SIZE))
        magic, _, kind, cookie, length = struct.unpack(">IHHQI", client.take(20))
        assert (magic, kind, cookie) == (0x668E33EF, 5, 5)
        assert len(client.take(length)) == length

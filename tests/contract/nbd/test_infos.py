"""The protocol's sections on INFO and GO, and on the transmission flags: our server."""

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from fleece.block.memory import MemoryNode
from fleece.block.null import NullNode
from nbdwire.server import Server
from nbdwire.uri import NBDURI
from tests.support import haggling as h
from tests.support.haggling import Haggler, haggling, info, meta, option

(
    HAS_FLAGS,
    READ_ONLY,
    FLUSH,
    FUA,
    ROTATIONAL,
    TRIM,
    ZEROES,
    DF,
    MULTI,
    RESIZE,
    CACHE,
    FAST,
    FILTER,
) = (1 << bit for bit in range(13))
SIZE = 1 << 20


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server(default="disk") as server:
        server.add("disk", MemoryNode(SIZE), description="a disk")
        server.add("fixed", MemoryNode(512), read_only=True)
        server.add("vast", NullNode((1 << 63) - 512))
        server.add("empty", MemoryNode(0))
        server.add(
            "blocks",
            MemoryNode(SIZE),
            minimum_block=4096,
            preferred_block=65536,
            maximum_payload=1 << 20,
        )
        server.add("strict", MemoryNode(SIZE), minimum_block=512, block_size_required=True)
        server.listen(NBDURI(socket=str(tmp_path / "nbd.sock")))
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[Haggler]:
    with haggling(server.listeners[0]) as client:
        yield client


def infos(client: Haggler, message: bytes) -> dict[int, bytes]:
    """The payloads by type; each came once, and EXPORT was among them."""
    *found, last = client.ask(message)
    assert last[1:] == (h.ACK, b"")
    kinds = [int.from_bytes(data[:2]) for _, _, data in found]
    assert {kind for _, kind, _ in found} == {h.REP_INFO}
    assert kinds.count(0) == 1
    assert len(set(kinds)) == len(kinds)
    return {int.from_bytes(data[:2]): data[2:] for _, _, data in found}


def flags(client: Haggler, name: str = "disk") -> int:
    return int(struct.unpack(">QH", infos(client, info(h.INFO, name))[0])[1])


def test_the_infos_have_the_shapes_of_the_table(client: Haggler) -> None:
    """nbd.md §4: EXPORT 12 bytes, BLOCK_SIZE 14, NAME and DESCRIPTION strings, as in LIST."""
    told = infos(client, info(h.INFO, "disk", h.NAME, h.DESCRIPTION, h.BLOCK_SIZE))
    assert len(told[0]) == 10
    assert told[h.NAME] == b"disk"
    assert told[h.DESCRIPTION] == b"a disk"
    assert struct.unpack(">III", told[h.BLOCK_SIZE]) == (1, 4096, 32 << 20)


@pytest.mark.parametrize("wanted", [(), (0,), (h.NAME,), (h.BLOCK_SIZE,), (3, 2, 1, 0)])
@pytest.mark.parametrize("name", ["disk", "", "fixed", "nope"])
def test_go_answers_as_the_info_before_it(
    client: Haggler, name: str, wanted: tuple[int, ...]
) -> None:
    """nbd.md §3: GO gives the same answer as a directly preceding identical INFO."""
    first = [reply[1:] for reply in client.ask(info(h.INFO, name, *wanted))]
    assert [reply[1:] for reply in client.ask(info(h.GO, name, *wanted))] == first


def test_no_zeroes_follow_a_go(server: Server) -> None:
    """nbd.md §3: GO: transmission at once; never 124 zeroes, whatever the flags."""
    with haggling(server.listeners[0], h.FIXED) as client:
        assert client.outcome(info(h.GO)) == h.ACK
        client.send(struct.pack(">IHHQQI", 0x25609513, 0, 3, 9, 0, 0))
        assert client.take(16) == struct.pack(">IIQ", 0x67446698, 0, 9)


def test_requests_may_follow_go_in_one_segment(client: Haggler) -> None:
    """nbd.md §3: GO+ACK: what follows the option is a request already."""
    client.send(info(h.GO) + struct.pack(">IHHQQI", 0x25609513, 0, 3, 9, 0, 0))
    assert client.replies(h.GO)[-1][1] == h.ACK
    assert client.take(16) == struct.pack(">IIQ", 0x67446698, 0, 9)


def test_a_failed_go_leaves_the_haggling_alive(client: Haggler) -> None:
    """nbd.md §3: a failed GO leaves haggling alive, and its state too."""
    client.ask(option(h.STRUCTURED))
    assert client.outcome(info(h.GO, "nope")) == h.UNKNOWN
    assert flags(client) & DF
    assert client.outcome(info(h.GO, "fixed")) == h.ACK


def test_many_infos_are_told_once_and_unknown_ones_not_at_all(client: Haggler) -> None:
    """nbd.md §3: 2000 duplicates must not be amplified; unknown info types MUST be ignored."""
    wanted = [h.NAME, h.BLOCK_SIZE, 77, 0xFFFF] * 500
    assert set(infos(client, info(h.INFO, "disk", *wanted))) == {0, h.NAME, h.BLOCK_SIZE}


def test_nothing_is_told_that_was_not_asked_for(client: Haggler) -> None:
    """nbd.md §3, §10: no reliance on infos that were not asked for: block sizes among them."""
    for name in ("disk", "blocks"):
        assert set(infos(client, info(h.INFO, name))) == {0}


@pytest.mark.parametrize("number", [h.INFO, h.GO])
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0\0",
        b"\0\0\0\0",
        b"\0\0\0\0\0",
        b"\0\0\0\5disk\0\0",
        b"\0\0\0\4disk\0\1",
        b"\0\0\0\4disk\0\1\0",
        b"\0\0\0\4disk\0\0\0\3",
        b"\0\0\0\4disk\xff\xff" + b"\0\3" * 3,
        b"\xff\xff\xff\xffdisk\0\0",
        b"\x7f\xff\xff\xffdisk\0\0",
    ],
)
def test_lengths_that_do_not_add_up_are_invalid(client: Haggler, number: int, data: bytes) -> None:
    """nbd.md §3: INFO and GO: too few or too many bytes: ERR_INVALID, and stay in sync."""
    assert client.outcome(option(number, data)) == h.INVALID
    client.in_step()


def test_an_export_offers_what_it_can_do(client: Haggler) -> None:
    """nbd.md §5: HAS_FLAGS always; DF and FAST_ZERO only where they belong; 13-15 zero."""
    assert flags(client) == HAS_FLAGS | FLUSH | FUA | TRIM | ZEROES | MULTI | CACHE | FAST
    assert flags(client, "fixed") == HAS_FLAGS | READ_ONLY | FLUSH | FUA | MULTI | CACHE
    for name in ("disk", "fixed", "blocks"):
        assert not flags(client, name) & (RESIZE | ROTATIONAL | 0xE000)


def test_df_is_offered_once_there_are_chunks(server: Server) -> None:
    """nbd.md §5: SEND_DF only after structured replies or extended headers."""
    for number in (h.STRUCTURED, h.EXTENDED):
        with haggling(server.listeners[0]) as client:
            assert not flags(client) & DF
            client.ask(option(number))
            assert flags(client) & DF


def test_the_status_filter_is_offered_with_extended_headers_and_contexts(client: Haggler) -> None:
    """nbd.md §5, §8: BLOCK_STATUS_PAYLOAD only after ext headers, and if contexts were set."""
    client.ask(option(h.STRUCTURED))
    client.ask(meta(h.SET_META, "disk", h.BASE))
    assert not flags(client) & FILTER
    client.ask(option(h.EXTENDED))
    assert flags(client) & FILTER
    assert not flags(client, "fixed") & FILTER, "contexts of another export do not count"
    client.ask(meta(h.SET_META, "disk"))
    assert not flags(client) & FILTER


@pytest.mark.parametrize(("name", "size"), [("vast", (1 << 63) - 512), ("empty", 0)])
def test_sizes_are_exact(client: Haggler, name: str, size: int) -> None:
    """nbd.md §4: INFO_EXPORT tells the size in 64 bits."""
    assert int.from_bytes(infos(client, info(h.GO, name))[0][:8]) == size


def test_block_sizes_are_told_to_those_who_ask(client: Haggler) -> None:
    """nbd.md §10: minimum, preferred and maximum as the export has them."""
    told = infos(client, info(h.GO, "blocks", h.BLOCK_SIZE))[h.BLOCK_SIZE]
    assert struct.unpack(">III", told) == (4096, 65536, 1 << 20)


def test_an_export_may_insist_on_block_sizes(client: Haggler) -> None:
    """nbd.md §4: ERR_BLOCK_SIZE_REQD only if they were not asked for; INFO_BLOCK_SIZE first."""
    for number in (h.INFO, h.GO):
        told = client.ask(info(number, "strict", h.NAME))
        assert [reply for _, reply, _ in told] == [h.REP_INFO, h.SIZE_REQD]
        assert told[0][2][:6] == struct.pack(">HI", h.BLOCK_SIZE, 512)
    assert client.outcome(info(h.GO, "strict", h.BLOCK_SIZE)) == h.ACK


def test_no_other_export_insists_on_anything(client: Haggler) -> None:
    """nbd.md §4, §8: servers SHOULD NOT insist on block sizes or on extended headers."""
    assert client.outcome(info(h.GO, "blocks")) == h.ACK

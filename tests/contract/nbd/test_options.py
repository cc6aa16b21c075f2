"""The protocol's sections "Option types" and "Option reply types": our server."""

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from fleece.block.memory import MemoryNode
from nbdwire.server import Server
from nbdwire.uri import NBDURI
from tests.support import haggling as h
from tests.support.faulty import striped
from tests.support.haggling import Haggler, haggling, info, meta, option

SIZE = 1 << 20
DIRTY = "qemu:dirty-bitmap:a"
WIDE = "x-wide:clock"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server(default="disk") as server:
        server.add(
            "disk",
            MemoryNode(SIZE),
            description="the first",
            contexts={DIRTY: striped(10, 4096), WIDE: striped(10, 4096)},
            wide_contexts=[WIDE],
        )
        server.add("other", MemoryNode(512))
        server.listen(NBDURI(socket=str(tmp_path / "nbd.sock")))
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[Haggler]:
    with haggling(server.listeners[0]) as client:
        yield client


def contexts(client: Haggler, message: bytes) -> list[tuple[int, str]]:
    """(id, name) of the replies to a LIST_META or SET_META that must succeed."""
    *found, last = client.ask(message)
    assert last[1:] == (h.ACK, b"")
    assert {kind for _, kind, _ in found} <= {h.META}
    return [(int.from_bytes(data[:4]), data[4:].decode()) for _, _, data in found]


def transmits(client: Haggler, extended: bool = False) -> bool:
    """Whether requests are answered now."""
    if extended:
        client.send(struct.pack(">IHHQQQ", 0x21E41C71, 0, 0, 9, 0, 1))
        return client.take(32 + 8 + 1)[:4] == struct.pack(">I", 0x6E8A278C)
    client.send(struct.pack(">IHHQQI", 0x25609513, 0, 3, 9, 0, 0))
    return client.take(16) == struct.pack(">IIQ", 0x67446698, 0, 9)


@pytest.mark.parametrize("name", [b"disk", b""])
def test_export_name_enters_transmission(client: Haggler, name: bytes) -> None:
    """nbd.md §3: EXPORT_NAME: size, flags without DF; the empty name is the default export."""
    client.send(option(h.EXPORT_NAME, name))
    size, flags = struct.unpack(">QH", client.take(10))
    assert size == SIZE
    assert not flags & 1 << 7
    assert transmits(client)


def test_export_name_offers_df_behind_structured_replies(client: Haggler) -> None:
    """nbd.md §3: EXPORT_NAME: SEND_DF clear unless structured."""
    assert client.outcome(option(h.STRUCTURED)) == h.ACK
    client.send(option(h.EXPORT_NAME, b"disk"))
    assert struct.unpack(">QH", client.take(10))[1] & 1 << 7


@pytest.mark.parametrize("name", [b"nope", b"x" * 4097, b"disk\0x", b"disk\0", b"\xff", b"Disk"])
def test_export_name_says_no_by_closing(client: Haggler, name: bytes) -> None:
    """nbd.md §3: EXPORT_NAME has no error reply: close, and send nothing."""
    client.send(option(h.EXPORT_NAME, name))
    assert client.closed() == b""


def test_export_name_behind_extended_headers_closes(client: Haggler) -> None:
    """nbd.md §3, §8: EXPORT_NAME after extended headers is illegal: close, send nothing."""
    assert client.outcome(option(h.EXTENDED)) == h.ACK
    client.send(option(h.EXPORT_NAME, b"disk"))
    assert client.closed() == b""


@pytest.mark.parametrize("data", [b"", b"bye", b"\0" * 60000])
def test_abort_is_acknowledged_and_ends_the_connection(client: Haggler, data: bytes) -> None:
    """nbd.md §3: ABORT: data SHOULD be ignored; the server MUST ACK, then close."""
    assert client.ask(option(h.ABORT, data)) == [(h.ABORT, h.ACK, b"")]
    assert client.closed() == b""


def test_a_client_that_aborts_need_not_read_the_answer(server: Server) -> None:
    """nbd.md §3: ABORT: tolerate the client closing unread."""
    for _ in range(50):
        with haggling(server.listeners[0]) as client:
            client.send(option(h.LIST) * 20 + option(h.ABORT))
    with haggling(server.listeners[0]) as client:
        client.in_step()


def test_list_tells_names_and_descriptions_in_order(client: Haggler) -> None:
    """nbd.md §3, §4: LIST: one SERVER reply each (length, name, description), then ACK."""
    assert client.ask(option(h.LIST)) == [
        (h.LIST, h.SERVER, b"\0\0\0\4diskthe first"),
        (h.LIST, h.SERVER, b"\0\0\0\5other"),
        (h.LIST, h.ACK, b""),
    ]


def test_a_hidden_list_is_refused_by_policy(tmp_path: Path) -> None:
    """nbd.md §3: LIST may be refused with ERR_POLICY; the exports are there all the same."""
    with Server(hide_exports=True) as server:
        server.add("disk", MemoryNode(512))
        with haggling(server.listen(NBDURI(socket=str(tmp_path / "hidden.sock")))) as client:
            assert client.outcome(option(h.LIST)) == h.POLICY
            assert client.outcome(info(h.GO)) == h.ACK


@pytest.mark.parametrize("number", [h.LIST, h.STARTTLS, h.STRUCTURED, h.EXTENDED])
@pytest.mark.parametrize("length", [1, 4, 65536])
def test_data_where_none_belongs_is_invalid(client: Haggler, number: int, length: int) -> None:
    """nbd.md §3: LIST, STARTTLS, STRUCTURED_REPLY, EXTENDED_HEADERS with data: ERR_INVALID."""
    assert client.outcome(option(number, b"x" * length)) == h.INVALID
    client.in_step()
    _, kind, data = client.ask(info(h.INFO))[0]
    assert kind == h.REP_INFO
    assert not int.from_bytes(data[10:12]) & 1 << 7, "it must not be negotiated"


@pytest.mark.parametrize("number", [0, h.PEEK, 12, 99, 0x8000_0000, 0xFFFF_FFFF])
@pytest.mark.parametrize("length", [0, 1, 4096, 65536])
def test_an_unknown_option_is_unsupported(client: Haggler, number: int, length: int) -> None:
    """nbd.md §3, §13: PEEK_EXPORT and unknown options: ERR_UNSUP, the data is skipped."""
    assert client.outcome(option(number, b"I" * length)) == h.UNSUP
    client.in_step()


def test_the_errors_say_why_and_never_repeat_what_was_sent(client: Haggler) -> None:
    """nbd.md §4: messages are UTF-8 of at most 4096 bytes, without NUL or the client's words."""
    for message in (
        info(h.GO, "zzzz" * 1024),
        info(h.GO, b"zzzz\0"),
        info(h.INFO, b"\xffzzzz"),
        option(99, b"zzzz"),
        option(h.LIST, b"zzzz"),
        option(h.STARTTLS),
        meta(h.SET_META, "disk", "zzzz:zzzz"),
        meta(h.LIST_META, "zzzz"),
    ):
        _, kind, text = client.ask(message)[-1]
        assert h.is_error(kind)
        assert 0 < len(text) <= 4096
        assert "\0" not in text.decode()
        assert b"zzzz" not in text


def test_structured_replies_are_refused_behind_extended_headers(client: Haggler) -> None:
    """nbd.md §3: STRUCTURED_REPLY after extended headers: ERR_EXT_HEADER_REQD; they stay."""
    assert client.outcome(option(h.EXTENDED)) == h.ACK
    assert client.outcome(option(h.STRUCTURED)) == h.EXT_REQD
    assert client.outcome(info(h.GO)) == h.ACK
    assert transmits(client, extended=True)


def test_extended_headers_win_whatever_came_before(client: Haggler) -> None:
    """nbd.md §8: they take precedence over structured replies, and do not need them."""
    assert client.outcome(option(h.STRUCTURED)) == h.ACK
    assert client.outcome(option(h.EXTENDED)) == h.ACK
    assert client.outcome(info(h.GO)) == h.ACK
    assert transmits(client, extended=True)


@pytest.mark.parametrize("first", [(), (h.STRUCTURED,), (h.EXTENDED,)])
def test_list_meta_tells_all_contexts_with_the_id_0(client: Haggler, first: tuple[int]) -> None:
    """nbd.md §3: LIST_META_CONTEXT: no query means all; id 0; no state is needed or changed."""
    for number in first:
        assert client.outcome(option(number)) == h.ACK
    wide = [(0, WIDE)] if first == (h.EXTENDED,) else []
    expected = [(0, h.BASE), (0, DIRTY), *wide]
    assert contexts(client, meta(h.LIST_META, "disk")) == expected


def test_set_meta_gives_each_context_an_id_of_its_own(client: Haggler) -> None:
    """nbd.md §3: SET_META_CONTEXT: one reply for each selected context, unique ids."""
    client.ask(option(h.STRUCTURED))
    found = contexts(client, meta(h.SET_META, "disk", DIRTY, h.BASE))
    assert sorted(name for _, name in found) == [h.BASE, DIRTY]
    assert len({number for number, _ in found}) == 2
    assert contexts(client, meta(h.SET_META, "disk")) == []


def test_set_meta_before_any_chunks_is_invalid(client: Haggler) -> None:
    """nbd.md §3: SET_META_CONTEXT before structured replies: ERR_INVALID."""
    assert client.outcome(meta(h.SET_META, "disk", h.BASE)) == h.INVALID
    client.in_step()


def test_a_wide_context_needs_extended_headers(client: Haggler) -> None:
    """nbd.md §8: contexts with 64-bit status: ERR_EXT_HEADER_REQD; base: never needs them."""
    client.ask(option(h.STRUCTURED))
    assert client.outcome(meta(h.SET_META, "disk", WIDE)) == h.EXT_REQD
    assert client.outcome(meta(h.LIST_META, "disk", WIDE)) == h.EXT_REQD
    assert contexts(client, meta(h.SET_META, "disk", h.BASE)) == [(1, h.BASE)]
    client.ask(option(h.EXTENDED))
    assert contexts(client, meta(h.SET_META, "disk", WIDE)) == [(1, WIDE)]


@pytest.mark.parametrize("number", [h.LIST_META, h.SET_META])
@pytest.mark.parametrize(
    "query", [b"", b"nocolon", b"base:", b"base:nope", b"nope:nope", b"base:Allocation", b"base"]
)
def test_queries_that_name_nothing_are_ignored(client: Haggler, number: int, query: bytes) -> None:
    """nbd.md §11: unknown namespaces and leaves MUST be ignored; matching is exact."""
    client.ask(option(h.STRUCTURED))
    expected = [h.BASE] if number == h.LIST_META and query == b"base:" else []
    found = contexts(client, meta(number, "disk", query))
    assert [name for _, name in found] == expected


def test_a_query_that_is_there_often_selects_once(client: Haggler) -> None:
    """nbd.md §11: duplicate queries select once (nbdkit: twice, with the same id)."""
    client.ask(option(h.STRUCTURED))
    assert contexts(client, meta(h.SET_META, "disk", *[h.BASE] * 500)) == [(1, h.BASE)]
    assert len(contexts(client, meta(h.LIST_META, "disk", h.BASE, "base:", h.BASE))) == 1


@pytest.mark.parametrize("number", [h.LIST_META, h.SET_META])
def test_contexts_of_an_export_that_is_not_there_are_unknown(client: Haggler, number: int) -> None:
    """nbd.md §11: unknown export: ERR_UNKNOWN (nbdkit ACKs)."""
    client.ask(option(h.STRUCTURED))
    assert client.outcome(meta(number, "nope", h.BASE)) == h.UNKNOWN
    client.in_step()


@pytest.mark.parametrize("number", [h.LIST_META, h.SET_META])
@pytest.mark.parametrize(
    "data",
    [
        b"\0\0\0\4disk\0\0\0\1\0\0\0\x10base:allocation",
        b"\0\0\0\4disk\0\0\0\1\0\0\0\x0fbase:allocationX",
        b"\0\0\0\4disk\0\0\0\2\0\0\0\x0fbase:allocation",
        b"\0\0\0\4disk\0\0\0\0\0\0\0\x0fbase:allocation",
        b"\0\0\0\5disk\0\0\0\0",
        b"\xff\xff\xff\xffdisk\0\0\0\0",
        b"\0\0\0\4disk\0\0\0\1\0\0\x10\1" + b"q" * 4097,
        b"\0\0\0\4disk\xff\xff\xff\xff" + b"\0\0\0\0" * 100,
    ],
)
def test_lengths_that_do_not_add_up_are_invalid(client: Haggler, number: int, data: bytes) -> None:
    """nbd.md §11: any length beyond the option, and trailing bytes: MUST be ERR_INVALID."""
    client.ask(option(h.STRUCTURED))
    assert client.outcome(option(number, data)) == h.INVALID
    client.in_step()

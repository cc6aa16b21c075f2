"""The protocol's sections "Request message", "Command flags", "Request types": our server."""

import errno
import struct
import threading
from pathlib import Path

import pytest

from nbdwire.errors import to_wire
from nbdwire.uri import NBDURI
from tests.support.faulty import Hooked, hanging
from tests.support.nbdraw import (
    CACHE,
    DF,
    DISC,
    FAST_ZERO,
    FLUSH,
    FUA,
    NO_HOLE,
    PAYLOAD_LEN,
    READ,
    REQ_ONE,
    STATUS,
    TRIM,
    WRITE,
    ZEROES,
    Raw,
    connected,
)
from tests.support.serving import noise, serving
from tests.support.threads import wait_for

SIZE = 4 << 20
EVERY = (READ, WRITE, FLUSH, TRIM, CACHE, ZEROES, STATUS)
LEGAL = {
    READ: FUA | DF,
    WRITE: FUA,
    FLUSH: FUA,
    TRIM: FUA,
    CACHE: FUA,
    ZEROES: FUA | NO_HOLE | FAST_ZERO,
    STATUS: FUA | REQ_ONE,
}


def legal(kind: int, client: Raw) -> int:
    """The flags of the table that this client may set."""
    return LEGAL[kind] if client.session.structured else LEGAL[kind] & ~DF


def kinds_of(client: Raw) -> list[int]:
    """The commands that succeed: block status only where contexts could be selected."""
    return [kind for kind in EVERY if kind != STATUS or client.session.contexts]


def ask(client: Raw, kind: int, flags: int = 0, offset: int = 0, length: int = 4096) -> int:
    """The error of the reply to a request that has the payload it must have."""
    payload = bytes(length) if kind == WRITE else b""
    if kind == FLUSH:
        offset = length = 0
    return client.ask(kind, offset, length, flags, payload).error


def test_every_command_works_with_each_flag_that_it_knows(client: Raw) -> None:
    """nbd.md §6: the table of commands and their legal flags."""
    for kind in kinds_of(client):
        for bit in range(5):
            if legal(kind, client) & 1 << bit:
                assert ask(client, kind, 1 << bit) == 0, (kind, bit)
        assert ask(client, kind, legal(kind, client)) == 0


def test_a_misplaced_or_unknown_flag_is_refused_in_step(client: Raw, node: Hooked) -> None:
    """nbd.md §6, §12: unknown or misplaced flag: EINVAL before the backend sees it."""
    for verb in ("pread_into", "pwrite", "zero", "trim", "flush", "extents"):
        node.fail(verb, AssertionError("it must not be asked"))
    for kind in EVERY:
        for bit in range(16):
            if bit == 5 or legal(kind, client) & 1 << bit:
                continue
            assert ask(client, kind, 1 << bit) == errno.EINVAL, (kind, bit)
    node.before.clear()
    client.in_step()


def test_fua_is_taken_by_every_command(client: Raw) -> None:
    """nbd.md §6: SEND_FUA was offered, so the bit MUST be accepted on every command."""
    assert [ask(client, kind, FUA) for kind in kinds_of(client)] == [0] * len(kinds_of(client))


def test_a_write_with_fua_is_stable_before_its_answer(client: Raw, node: Hooked) -> None:
    """nbd.md §6: FUA is answered only after the write is stable."""
    seen: list[object] = []
    node.before["pwrite"] = lambda *args: seen.append(bool(args[2]) if len(args) > 2 else False)
    assert client.write(0, b"x" * 10, FUA) == 0
    assert client.write(0, b"x" * 10) == 0
    assert seen == [True, False]


def test_a_flush_waits_for_the_storage_and_fails_with_it(client: Raw, node: Hooked) -> None:
    """nbd.md §6: FLUSH: all writes replied to before must be stable, or it says they are not."""
    count: list[int] = []
    node.before["flush"] = lambda: count.append(1)
    assert client.write(0, b"x") == 0
    assert ask(client, FLUSH) == 0
    assert ask(client, FLUSH) == 0, "no shortcut: each flush reaches the storage"
    assert len(count) == 2
    node.fail("flush", OSError(errno.EIO, "the disk is gone"))
    assert ask(client, FLUSH) == errno.EIO


def test_a_flush_on_one_connection_is_for_the_writes_of_all(where: NBDURI, node: Hooked) -> None:
    """nbd.md §5: CAN_MULTI_CONN: FLUSH covers every write that was replied to, on any."""
    order: list[str] = []
    node.before["pwrite"] = lambda *_: order.append("write")
    node.before["flush"] = lambda: order.append("flush")
    with connected(where) as one, connected(where) as two:
        assert one.write(0, b"seen") == 0
        assert two.ask(FLUSH).error == 0
        assert two.read(0, 4) == b"seen"
    assert order == ["write", "flush"]


def test_zeroes_read_back_as_zeroes_whatever_the_flags(client: Raw) -> None:
    """nbd.md §6: WRITE_ZEROES must read back zero; NO_HOLE MUST be supported with it."""
    data = noise(10_000)
    for flags in (0, NO_HOLE, FUA, NO_HOLE | FUA):
        assert client.write(0, data) == 0
        assert client.ask(ZEROES, 1, 9_998, flags).error == 0
        assert client.read(0, 10_000) == data[:1] + bytes(9_998) + data[-1:]


def test_a_slow_fast_zero_is_refused_and_changes_nothing(client: Raw, node: Hooked) -> None:
    """nbd.md §6: FAST_ZERO: ENOTSUP at once unless faster than writing, contents untouched."""
    assert client.write(0, noise(4096)) == 0
    node.fail("zero", OSError(errno.EOPNOTSUPP, "not fast"))
    assert ask(client, ZEROES, FAST_ZERO) == to_wire(errno.EOPNOTSUPP)
    assert ask(client, ZEROES) == errno.EINVAL, "never ENOTSUP without the flag"
    node.before.clear()
    assert client.read(0, 4096) == noise(4096)


def test_fast_zero_that_was_not_offered_is_refused_and_survived(
    tmp_path: Path, node: Hooked, form: dict[str, bool]
) -> None:
    """nbd.md §6: FAST_ZERO not advertised: an error (nbdkit 1.32 aborts the whole server)."""
    with serving(tmp_path, Hooked(4096)) as (server, uri):
        server.add("fixed", node, read_only=True)
        with connected(uri, "fixed", **form) as client:
            assert not client.session.flags & 1 << 11
            assert client.ask(ZEROES, 0, 4096, FAST_ZERO).error == errno.EINVAL
            client.in_step()


def test_cache_works_unadvertised_flags_do_not(client: Raw) -> None:
    """nbd.md §6: CACHE: unknown flags MUST be rejected."""
    assert client.ask(CACHE, 0, SIZE).error == 0
    assert client.ask(CACHE, 0, 1, NO_HOLE).error == errno.EINVAL


@pytest.mark.parametrize("kind", [8, 9, 255, 0x8000, 0xFFFF])
def test_resize_and_unknown_commands_are_refused(client: Raw, kind: int) -> None:
    """nbd.md §6, §12: RESIZE is nobody's; unknown command: EINVAL."""
    assert client.ask(kind, 0, 4096).error == errno.EINVAL
    client.in_step()


def test_a_refused_write_still_has_its_payload(client: Raw) -> None:
    """nbd.md §6: an error reply to WRITE still means: consume the payload."""
    requests = bytes(range(256)) * 16
    assert client.write(SIZE, requests) == errno.ENOSPC
    assert client.write(0, requests, NO_HOLE) == errno.EINVAL
    client.in_step()


@pytest.mark.parametrize("flags", [0, 0xFFFF & ~PAYLOAD_LEN, PAYLOAD_LEN])
def test_disc_ends_the_connection_without_a_reply(client: Raw, flags: int) -> None:
    """nbd.md §6: DISC: no reply; close even if the fields hold junk."""
    client.send(client.form(DISC, 0xFFFF_FFFF_FFFF, 0xFFFF_FFFF, flags=flags, cookie=5))
    assert client.sock.recv(100) == b""


def test_disc_lets_outstanding_requests_end(client: Raw, node: Hooked) -> None:
    """nbd.md §6: DISC: carry out what is outstanding, and answer it."""
    with hanging(node, "flush") as stuck:
        client.send(client.make(FLUSH) + client.form(DISC))
        wait_for(stuck.entered)
    assert client.reply().error == 0
    assert client.sock.recv(100) == b""


def test_cookies_are_opaque_and_may_be_used_again(client: Raw) -> None:
    """nbd.md §6: cookies are 64-bit values, reusable when not in flight."""
    for cookie in (0, 1, 0x8000_0000_0000_0000, 0xFFFF_FFFF_FFFF_FFFF, 0, 0):
        client.send(client.form(FLUSH, cookie=cookie))
        assert client.reply().cookie == cookie


def test_requests_of_one_cookie_are_each_answered(client: Raw) -> None:
    """nbd.md §6: a client that gives one cookie twice gets two answers, and no more."""
    client.send(client.form(FLUSH, cookie=7) * 3)
    assert [client.reply().cookie for _ in range(3)] == [7] * 3
    client.in_step()


@pytest.mark.parametrize("magic", [0x12560953, 0x96744668, 0x25609514, 0, 0x67446698, 0x49484156])
def test_every_other_magic_drops_the_connection(client: Raw, magic: int) -> None:
    """nbd.md §6, §13: reserved and wrong magics: drop; never resync to a later request."""
    wrong = struct.pack(">I", magic) + client.form(READ, 0, 1)[4:]
    assert client.is_dropped_for(wrong + client.form(READ, 0, 1))


def test_the_magic_of_the_other_form_drops_the_connection(client: Raw) -> None:
    """nbd.md §8: extended requests if and only if they were negotiated."""
    other = 0x25609513 if client.session.extended else 0x21E41C71
    assert client.is_dropped_for(struct.pack(">I", other) + client.form(READ, 0, 1)[4:])


def test_replies_to_many_requests_all_come(client: Raw) -> None:
    """nbd.md §6: any order: each cookie is answered once."""
    asked = {cookie << 8 for cookie in range(200)}
    client.send(b"".join(client.form(FLUSH, cookie=cookie) for cookie in asked))
    assert {client.reply().cookie for _ in asked} == asked
    client.in_step()


def test_another_client_is_served_while_a_request_takes_its_time(
    where: NBDURI, node: Hooked
) -> None:
    """nbd.md §6: any interleaving: one connection never waits for the requests of another."""
    answered = threading.Event()
    with (
        hanging(node, "flush") as stuck,
        connected(where) as slow,
        connected(where) as quick,
    ):
        slow.send(slow.make(FLUSH))
        wait_for(stuck.entered)
        assert quick.read(0, 100) == bytes(100)
        answered.set()
        stuck.go_on.set()
        assert slow.reply().error == 0
    assert answered.is_set()

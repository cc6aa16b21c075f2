# SPDX-License-Identifier: Apache-2.0
"""A lane's reader and writer of an export, with a server of a few lines."""

import errno
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from nbdwire import constants as c
from nbdwire.client import Client
from nbdwire.codec import REQUEST, SIMPLE_REPLY
from nbdwire.negotiate_client import ClientSession
from nbdwire.tools.ends import CopyFailed
from nbdwire.tools.nbdends import NbdReader, NbdWriter

SIZE = 1 << 20
DATA = bytes(range(1, 256)) * (SIZE // 255 + 1)


class Peer:
    """The server's end of a plain connection with simple replies."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def requests(self, count: int) -> list[tuple[int, int, int, int]]:
        """(kind, cookie, offset, length) of each; a write's payload is read too."""
        found = []
        for _ in range(count):
            head = self.sock.recv(REQUEST.size, socket.MSG_WAITALL)
            _, _, kind, cookie, offset, length = REQUEST.unpack(head)
            if kind == c.CMD_WRITE:
                assert self.sock.recv(length, socket.MSG_WAITALL) == DATA[offset : offset + length]
            found.append((kind, cookie, offset, length))
        return found

    def reply(self, request: tuple[int, int, int, int], error: int = 0) -> None:
        kind, cookie, offset, length = request
        self.sock.sendall(SIMPLE_REPLY.pack(c.SIMPLE_REPLY_MAGIC, error, cookie))
        if kind == c.CMD_READ and not error:
            self.sock.sendall(DATA[offset : offset + length])


@contextmanager
def connected(
    flags: int = c.TFLAG_HAS_FLAGS, contexts: tuple[tuple[int, str], ...] = ()
) -> Iterator[tuple[Client, Peer]]:
    ours, theirs = socket.socketpair()
    ours.settimeout(None)
    theirs.settimeout(10)
    with theirs, Client(ours, ClientSession("", SIZE, flags, contexts=contexts)) as client:
        yield client, Peer(theirs)


def test_replies_in_any_order_reach_the_pieces_that_were_asked_for() -> None:
    """nbd.md: replies may come in any order. Short and long pieces share the buffers."""
    lengths = [100, 20_000, 7, 4096]
    with connected() as (client, peer):
        reader = NbdReader("disk", client, 4)
        for turn in range(3):
            offset, asked = turn * 1000, []
            for length in lengths[turn:] + lengths[:turn]:
                reader.ask(offset, length)
                asked.append((offset, length))
                offset += length
            for request in reversed(peer.requests(4)):
                peer.reply(request)
            for offset, length in asked:
                assert bytes(reader.take()) == DATA[offset : offset + length]


def test_replies_in_order_use_one_buffer() -> None:
    with connected() as (client, peer):
        reader = NbdReader("disk", client, 4)
        for number in range(4):
            reader.ask(number * 4096, 4096)
        buffers = set()
        for request in peer.requests(4):
            peer.reply(request)
            buffers.add(id(reader.take().obj))
        assert len(buffers) == 1


def test_a_read_that_fails_is_named_with_its_offset() -> None:
    with connected() as (client, peer):
        reader = NbdReader("disk", client, 2)
        reader.ask(0, 10)
        reader.ask(4096, 20)
        good, bad = peer.requests(2)
        peer.reply(bad, errno.EIO)
        peer.reply(good)
        assert bytes(reader.take()) == DATA[:10]
        with pytest.raises(CopyFailed, match=r"^cannot read 20 bytes at offset 4096 of disk: "):
            reader.take()


def test_a_server_that_goes_away_fails_the_read_and_the_next_request() -> None:
    with connected() as (client, peer):
        reader = NbdReader("disk", client, 2)
        reader.ask(512, 10)
        peer.requests(1)
        peer.sock.close()
        with pytest.raises(CopyFailed, match=r"^cannot read 10 bytes at offset 512 of disk: "):
            reader.take()
        with pytest.raises(CopyFailed, match=r"^cannot read 10 bytes at offset 1024 of disk: "):
            reader.ask(1024, 10)


def test_a_connection_that_is_lost_cannot_tell_where_the_data_are() -> None:
    """Only a server that answers may be taken for one that does not know."""
    with connected(contexts=((1, c.CONTEXT_BASE_ALLOCATION),)) as (client, peer):
        reader = NbdReader("disk", client, 2)
        peer.sock.close()
        with pytest.raises(CopyFailed, match=r"^cannot ask disk where its data are: "):
            reader.extents(0, SIZE)


def test_no_acknowledgement_of_a_write_goes_unchecked() -> None:
    """CVE-2022-0485: each error is told, with the offset of its own request."""
    done: list[tuple[int, bool]] = []
    with connected(c.TFLAG_HAS_FLAGS | c.TFLAG_SEND_WRITE_ZEROES) as (client, peer):
        writer = NbdWriter("disk", client, 3, lambda length, zero: done.append((length, zero)))
        writer.write(memoryview(DATA)[:100], 0)
        writer.write(memoryview(DATA)[100:300], 100)
        writer.zero(300, 50, False)
        assert done == []
        first, second, third = peer.requests(3)
        assert third[0] == c.CMD_WRITE_ZEROES
        peer.reply(third)
        peer.reply(second, errno.ENOSPC)
        peer.reply(first)
        with pytest.raises(
            CopyFailed, match=r"^cannot write 200 bytes at offset 100 of disk: No sp"
        ):
            writer.drain()
        assert done == [(100, False)]
        writer.drain()
        assert done == [(100, False), (50, True)]


def test_zeroes_are_written_where_the_server_cannot_make_them() -> None:
    done: list[tuple[int, bool]] = []
    with connected() as (client, peer):
        writer = NbdWriter("disk", client, 3, lambda length, zero: done.append((length, zero)))
        writer.zero(512, 300_000, False)
        total = 0
        while total < 300_000:
            head = peer.sock.recv(REQUEST.size, socket.MSG_WAITALL)
            _, _, kind, cookie, offset, length = REQUEST.unpack(head)
            assert (kind, offset) == (c.CMD_WRITE, 512 + total)
            assert not any(peer.sock.recv(length, socket.MSG_WAITALL))
            peer.reply((kind, cookie, offset, length))
            total += length
        writer.drain()
        assert total == 300_000 == sum(length for length, zero in done if zero)

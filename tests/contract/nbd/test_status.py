"""The protocol's section "Metadata querying" in the transmission phase: our server."""

import errno
import itertools
import struct
from pathlib import Path

import pytest

from nbdwire.extents import Extent
from nbdwire.server import Server
from nbdwire.uri import NBDURI
from tests.support import haggling as h
from tests.support.faulty import Hooked, striped
from tests.support.haggling import haggling, info, meta, option
from tests.support.nbdraw import FORMS, FUA, REQ_ONE, STATUS, Raw, connected, request
from tests.support.serving import noise, serving

SIZE = 4 << 20
BASE, A, B = "base:allocation", "qemu:dirty-bitmap:a", "qemu:dirty-bitmap:b"
CHUNKED = {name: form for name, form in FORMS.items() if name != "simple"}
Extents = list[tuple[int, int]]


@pytest.fixture(params=sorted(CHUNKED))
def form(request: pytest.FixtureRequest) -> dict[str, bool]:
    return CHUNKED[request.param]


def statuses(client: Raw, offset: int, length: int, flags: int = 0) -> dict[str, Extents]:
    """Context -> extents of a BLOCK_STATUS that must succeed."""
    reply = client.ask(STATUS, offset, length, flags)
    assert reply.error == 0, reply
    names = dict(client.session.contexts)
    return {names[number]: found for number, found in reply.statuses().items()}


def check_shape(extents: Extents, length: int) -> None:
    """What must hold without REQ_ONE; ours never runs past the request."""
    assert extents
    assert all(size > 0 for size, _ in extents)
    assert sum(size for size, _ in extents) <= length
    assert all(one[1] != two[1] for one, two in itertools.pairwise(extents))


@pytest.mark.parametrize(
    ("offset", "length"), [(0, SIZE), (0, 1), (SIZE - 1, 1), (65535, 2), (1, SIZE - 2), (512, 4096)]
)
def test_every_selected_context_gets_one_chunk(client: Raw, offset: int, length: int) -> None:
    """nbd.md §11: exactly one status chunk per selected id; lengths > 0; within the request."""
    found = statuses(client, offset, length)
    assert sorted(found) == [BASE, A, B]
    for extents in found.values():
        check_shape(extents, length)


def test_the_status_is_that_of_the_bytes(client: Raw, node: Hooked) -> None:
    """nbd.md §11: base:allocation: bit 0 HOLE, bit 1 ZERO; ZERO must be true, no other bit."""
    assert client.write(1 << 20, noise(1 << 20)) == 0
    position = 0
    for size, status in statuses(client, 0, SIZE)[BASE]:
        assert status & ~3 == 0
        if status & 2:
            assert client.read(position, size) == bytes(size)
        position += size
    assert position == SIZE


def test_a_bitmap_has_one_bit(client: Raw) -> None:
    """nbd.md §11: qemu:dirty-bitmap: bit 0 DIRTY, reserved bits 0; neighbours are joined."""
    assert statuses(client, 0, SIZE)[A] == [(65536, i % 2) for i in range(64)]


@pytest.mark.parametrize("offset", [0, 1, 65535, 65536, SIZE - 1])
def test_req_one_gives_one_extent_within_the_request(client: Raw, offset: int) -> None:
    """nbd.md §11: REQ_ONE: exactly one extent, no longer than the request."""
    for length in {1, 512, SIZE - offset}:
        if offset + length > SIZE:
            continue
        for extents in statuses(client, offset, length, REQ_ONE | FUA).values():
            assert len(extents) == 1
            assert 0 < extents[0][0] <= length


def test_what_lies_past_the_end_is_refused(client: Raw) -> None:
    """nbd.md §11: past the end: EINVAL; the end itself is within."""
    assert client.ask(STATUS, SIZE - 1, 2).error == errno.EINVAL
    assert client.ask(STATUS, SIZE, 1).error == errno.EINVAL
    assert client.ask(STATUS, 0, 0).error == errno.EINVAL
    assert statuses(client, 0, SIZE)


def test_an_export_that_tells_little_at_a_time_is_asked_again(client: Raw) -> None:
    """nbd.md §11: at least one extent; coalesced; many per call (context b tells 7 at a time)."""
    assert len(statuses(client, 0, SIZE)[B]) == SIZE // 4096


def test_more_extents_than_a_chunk_may_have_are_cut(tmp_path: Path, form: dict[str, bool]) -> None:
    """nbd.md §11: at most 2^20 extents in a chunk; fewer than asked is fine."""
    node, size = Hooked(512), 1 << 30
    node.size = size  # type: ignore[misc]
    contexts = {A: striped(100_000, 512)}
    with (
        serving(tmp_path, node, contexts=contexts) as (_, uri),
        connected(uri, contexts=[A], **form) as client,
    ):
        found = statuses(client, 0, size)[A]
    assert 1 << 16 <= len(found) <= 1 << 17
    assert {size for size, _ in found} == {512}


def one_extent(status: int) -> Hooked:
    """8 GiB of one status."""

    class Vast(Hooked):
        def extents(self, offset: int, length: int) -> list[Extent]:
            return [Extent(offset, length, status)]

    node = Vast(512)
    node.size = 8 << 30  # type: ignore[misc]
    return node


def test_lengths_above_32_bits_are_clipped_or_whole(tmp_path: Path, form: dict[str, bool]) -> None:
    """nbd.md §11: compact extents: clip to 2^32 - 512, not 2^32 - 1; 64 bits need no clipping."""
    length = 8 << 30 if form.get("extended") else 0xFFFF_FFFF
    with (
        serving(tmp_path, one_extent(0)) as (_, uri),
        connected(uri, contexts=[BASE], **form) as client,
    ):
        expected = length if form.get("extended") else (1 << 32) - 512
        assert statuses(client, 0, length)[BASE] == [(expected, 0)]
        assert statuses(client, 0, length, REQ_ONE)[BASE] == [(expected, 0)]


def test_borders_are_multiples_of_the_minimum_block(tmp_path: Path, form: dict[str, bool]) -> None:
    """nbd.md §11, §10: extents are multiples of the minimum block."""
    with Server() as server:
        server.add("disk", Hooked(SIZE), minimum_block=4096, contexts={A: striped(99, 1000)})
        uri = server.listen(NBDURI(socket=str(tmp_path / "blocks.sock")))
        with connected(uri, contexts=[BASE, A], **form) as client:
            for extents in statuses(client, 8192, 65536).values():
                assert all(size % 4096 == 0 for size, _ in extents)


def test_without_a_context_there_is_no_status(where: NBDURI, form: dict[str, bool]) -> None:
    """nbd.md §11: BLOCK_STATUS only if the last SET gave a context; else EINVAL."""
    with connected(where, **form) as client:
        assert client.ask(STATUS, 0, 512).error == errno.EINVAL
        client.in_step()


BAD_LAST = {
    "none": meta(h.SET_META, "disk"),
    "nothing matches": meta(h.SET_META, "disk", "base:nope"),
    "a wildcard": meta(h.SET_META, "disk", "base:"),
    "invalid": option(h.SET_META, b"junk"),
    "unknown export": meta(h.SET_META, "nope", BASE),
    "another export": meta(h.SET_META, "other", BASE),
}


@pytest.mark.parametrize("last", BAD_LAST)
def test_the_last_selection_counts(where: NBDURI, tmp_path: Path, last: str) -> None:
    """nbd.md §3, §11: SET replaces the set, also when it fails; it must name GO's export."""
    with Server() as server:
        server.add("disk", Hooked(4096))
        server.add("other", Hooked(4096))
        uri = server.listen(NBDURI(socket=str(tmp_path / "last.sock")))
        with haggling(uri) as client:
            client.ask(option(h.STRUCTURED))
            assert client.outcome(meta(h.SET_META, "disk", BASE)) == h.ACK
            client.ask(BAD_LAST[last])
            assert client.outcome(info(h.GO)) == h.ACK
            client.send(request(STATUS, 0, 512, cookie=1))
            magic, done, kind, _, length = struct.unpack(">IHHQI", client.take(20))
            assert (magic, done, kind) == (0x668E33EF, 1, 0x8001)
            assert client.take(length)[:4] == b"\0\0\0\x16"


def test_a_failing_context_fails_the_request(client: Raw, node: Hooked) -> None:
    """nbd.md §11, §12: a status that cannot be had is an error, and no half of an answer."""
    node.fail("extents", OSError(errno.EIO, "cannot tell"))
    reply = client.ask(STATUS, 0, SIZE)
    assert (reply.error, len(reply.chunks)) == (errno.EIO, 1)
    node.before.clear()
    assert statuses(client, 0, SIZE)

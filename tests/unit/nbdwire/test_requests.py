"""What a request means: its flags, its limits, its errors. No socket."""

import errno
import itertools
import struct

import pytest

from fleece.block.memory import MemoryNode
from fleece.block.null import NullNode
from nbdwire import constants as c
from nbdwire.errors import to_wire
from nbdwire.extents import Extent
from nbdwire.requests import Requests, legal_flags
from nbdwire.status import collect, walk
from tests.support.faulty import Hooked, striped
from tests.support.nbdraw import (
    CACHE,
    DF,
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
)

SIZE = 64 << 20
BASE, DIRTY = "base:allocation", "qemu:dirty-bitmap:x"
WRITABLE = c.TFLAG_SEND_DF | c.TFLAG_SEND_FAST_ZERO
LEGAL = {
    READ: FUA | DF,
    WRITE: FUA,
    FLUSH: FUA,
    TRIM: FUA,
    CACHE: FUA,
    ZEROES: FUA | NO_HOLE | FAST_ZERO,
    STATUS: FUA | REQ_ONE,
}


def make(flags: int = WRITABLE, *, structured: bool = True, contexts: bool = True) -> Requests:
    return Requests(
        size=SIZE,
        flags=flags,
        structured=structured,
        contexts=((1, BASE), (2, DIRTY)) if contexts else (),
        functions={DIRTY: striped(1000, 1 << 20)},
    )


@pytest.mark.parametrize("kind", sorted(LEGAL))
def test_exactly_the_flags_of_the_specification_are_taken(kind: int) -> None:
    requests = make()
    for bits in itertools.product([0, 1], repeat=7):
        flags = sum(bit << place for place, bit in enumerate(bits))
        expected = errno.EINVAL if flags & ~LEGAL[kind] else 0
        assert requests.check(kind, flags, 0, 4096) == expected, (kind, flags)


def test_the_upper_flag_bits_are_refused_for_every_command() -> None:
    requests = make()
    for kind, bit in itertools.product(LEGAL, range(5, 16)):
        assert requests.check(kind, 1 << bit, 0, 4096) == errno.EINVAL
    assert PAYLOAD_LEN == 1 << 5


def test_flags_that_were_not_offered_are_refused() -> None:
    requests = make(0)
    assert requests.check(READ, DF, 0, 1) == errno.EINVAL
    assert requests.check(ZEROES, FAST_ZERO, 0, 1) == errno.EINVAL
    assert requests.check(ZEROES, NO_HOLE | FUA, 0, 1) == 0


def test_the_table_of_flags_is_not_shared_between_connections() -> None:
    legal_flags(WRITABLE)
    assert not legal_flags(0)[c.CMD_READ] & DF


@pytest.mark.parametrize("kind", [2, 8, 9, 0xFF, 0xFFFF])
def test_a_command_that_nobody_knows_is_refused(kind: int) -> None:
    assert make().check(kind, 0, 0, 1) == errno.EINVAL


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (READ, errno.EINVAL),
        (TRIM, errno.EINVAL),
        (CACHE, errno.EINVAL),
        (STATUS, errno.EINVAL),
        (WRITE, errno.ENOSPC),
        (ZEROES, errno.ENOSPC),
    ],
)
@pytest.mark.parametrize(
    ("offset", "length"), [(SIZE - 1, 2), (SIZE, 1), (1 << 63, 1), ((1 << 64) - 1, 0xFFFFFFFF)]
)
def test_what_runs_past_the_end_is_refused(
    kind: int, expected: int, offset: int, length: int
) -> None:
    assert make().check(kind, 0, offset, length) == expected


@pytest.mark.parametrize("kind", sorted(set(LEGAL) - {FLUSH}))
def test_the_last_byte_is_within_and_no_bytes_are_refused(kind: int) -> None:
    requests = make()
    assert requests.check(kind, 0, SIZE - 1, 1) == 0
    assert requests.check(kind, 0, 0, 0) == errno.EINVAL
    assert requests.check(kind, 0, SIZE, 0) == errno.EINVAL


def test_a_flush_may_say_anything_in_its_range() -> None:
    assert make().check(FLUSH, 0, 1 << 63, 0xFFFFFFFF) == 0


def test_data_is_limited_to_32_mib_and_the_rest_is_not() -> None:
    requests, most = make(), c.MAX_PAYLOAD
    for kind in (READ, WRITE):
        assert requests.check(kind, 0, 0, most) == 0
        assert requests.check(kind, 0, 0, most + 1) == errno.EINVAL
    assert requests.check(READ, DF, 0, most + 1) == errno.EOVERFLOW
    for kind in (TRIM, CACHE, ZEROES, STATUS):
        assert requests.check(kind, 0, 0, SIZE) == 0


def test_a_read_only_export_refuses_what_changes_it_with_eperm() -> None:
    requests = make(c.TFLAG_READ_ONLY)
    for kind in (WRITE, TRIM, ZEROES):
        assert requests.check(kind, 0, 0, 1) == errno.EPERM
    for kind in (READ, CACHE, STATUS, FLUSH):
        assert requests.check(kind, 0, 0, 1) == 0


def test_block_status_needs_a_context() -> None:
    assert make(contexts=False).check(STATUS, 0, 0, 1) == errno.EINVAL


def test_an_error_is_a_chunk_with_its_text_where_chunks_were_negotiated() -> None:
    chunk = make().error(7, 0, errno.ENOSPC)
    text = b"No space left on device"
    assert chunk == struct.pack(">IHHQIIH", 0x668E33EF, 1, 0x8001, 7, 6 + len(text), 28, 23) + text
    assert make(structured=False).error(7, 0, errno.ENOSPC) == struct.pack(
        ">IIQ", 0x67446698, 28, 7
    )


def error_of(reply: bytes) -> tuple[int, bytes]:
    assert struct.unpack_from(">HH", reply, 4) == (1, 0x8001)
    error, length = struct.unpack_from(">IH", reply, 20)
    assert len(reply) == 26 + length
    return error, reply[26:]


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        (OSError(errno.EIO, "the disk broke"), (5, b"the disk broke")),
        (OSError(errno.EROFS, "x"), (1, b"x")),
        (OSError(errno.EDQUOT, "x"), (28, b"x")),
        (OSError(errno.EHOSTUNREACH, "x"), (5, b"x")),
        (OSError("no number"), (5, b"Input/output error")),
        (TimeoutError(), (5, b"Input/output error")),
        (ValueError("secret"), (5, b"internal error")),
        (OSError(errno.EIO, "\udc80" * 5000 + "é"), None),
    ],
)
def test_what_a_verb_raises_becomes_a_legal_error(
    problem: Exception, expected: tuple[int, bytes] | None
) -> None:
    node = Hooked(SIZE)
    node.fail("trim", problem)
    reply = error_of(make().execute(node, TRIM, 0, 1, 0, 4096))
    if expected is None:
        assert reply[0] == to_wire(errno.EIO)
        assert len(reply[1]) <= 4096
        reply[1].decode()
    else:
        assert reply == expected


def test_enotsup_is_said_to_a_fast_zero_and_to_nothing_else() -> None:
    node = Hooked(SIZE)
    for verb in ("zero", "trim", "flush"):
        node.fail(verb, OSError(errno.EOPNOTSUPP, "no"))
    assert error_of(make().execute(node, ZEROES, FAST_ZERO, 1, 0, 1))[0] == c.NBD_ENOTSUP
    for kind in (ZEROES, TRIM, FLUSH):
        assert error_of(make().execute(node, kind, FUA, 1, 0, 1))[0] == c.NBD_EINVAL


def test_cache_asks_for_the_range_and_an_export_that_cannot_is_no_error() -> None:
    class Plain:
        pass

    asked: list[tuple[int, int]] = []
    node = Hooked(SIZE)
    node.before["prefetch"] = lambda *args: asked.append(args)
    assert make().execute(node, CACHE, 0, 1, 5, 6) == struct.pack(">IIQ", 0x67446698, 0, 1)
    assert asked == [(5, 6)]
    assert make().execute(Plain(), CACHE, 0, 1, 5, 6)[4:8] == bytes(4)  # type: ignore[arg-type]


def test_a_context_that_the_export_does_not_have_is_never_answered_with_the_allocation() -> None:
    with pytest.raises(KeyError):
        Requests(size=1, flags=0, structured=True, contexts=((1, DIRTY),), functions={})


def statuses(reply: bytes) -> list[tuple[int, int, list[tuple[int, int]]]]:
    """(flags, context id, extents) of each chunk."""
    found = []
    while reply:
        flags, kind, _, length = struct.unpack_from(">HHQI", reply, 4)
        assert kind == 5
        body, reply = reply[20 : 20 + length], reply[20 + length :]
        (number,) = struct.unpack_from(">I", body)
        found.append((flags, number, list(struct.iter_unpack(">II", body[4:]))))
    return found  # type: ignore[return-value]


def test_every_context_gets_one_chunk_and_the_last_is_done() -> None:
    node = MemoryNode(SIZE)
    node.pwrite(memoryview(b"x"), 65536)
    reply = make().execute(node, STATUS, 0, 9, 0, 2 << 20)
    assert statuses(reply) == [
        (0, 1, [(65536, 3), (65536, 0), ((2 << 20) - 131072, 3)]),
        (1, 2, [(1 << 20, 0), (1 << 20, 1)]),
    ]


def test_req_one_gives_one_extent_as_long_as_its_status_lasts() -> None:
    requests = make()
    reply = requests.execute(NullNode(SIZE), STATUS, REQ_ONE, 9, 100, 8 << 20)
    (_, _, base), (_, _, dirty) = statuses(reply)
    assert len(base) == len(dirty) == 1
    assert base[0][0] == 8 << 20
    assert dirty == [((1 << 20) - 100, 0)]


def test_the_longest_compact_status_is_a_multiple_of_512_below_4_gib() -> None:
    """nbd.md §11."""
    requests = Requests(size=1 << 50, flags=0, structured=True, contexts=((1, BASE),), functions={})
    reply = requests.execute(NullNode(1 << 50), STATUS, 0, 9, 1 << 49, 0xFFFFFFFF)
    assert statuses(reply) == [(1, 1, [((1 << 32) - 512, 3)])]


def test_a_failing_context_fails_the_whole_status() -> None:
    def broken(offset: int, length: int) -> list[Extent]:
        raise OSError(errno.ENOMEM, "too much")

    requests = Requests(
        size=SIZE,
        flags=0,
        structured=True,
        contexts=((1, BASE), (2, DIRTY)),
        functions={DIRTY: broken},
    )
    assert error_of(requests.execute(NullNode(SIZE), STATUS, 0, 1, 0, 1)) == (12, b"too much")


def test_partial_answers_are_continued_and_neighbours_joined() -> None:
    assert collect(walk(striped(1, 10), 5, 30), 100) == [
        Extent(5, 5, 0),
        Extent(10, 10, 1),
        Extent(20, 10, 0),
        Extent(30, 5, 1),
    ]
    one_by_one = collect(walk(lambda offset, _: [Extent(offset, 1, 3)], 7, 50), 100)
    assert one_by_one == [Extent(7, 50, 3)]


def test_the_list_ends_at_the_limit_with_a_whole_extent() -> None:
    found = collect(walk(striped(3, 10), 0, 1000), 7)
    assert len(found) == 7
    assert found[-1] == Extent(60, 10, 0)


def test_joining_goes_on_behind_the_limit() -> None:
    """The last of the permitted extents is as long as it really is."""
    assert collect(walk(lambda offset, _: [Extent(offset, 1, 0)], 0, 9), 1) == [Extent(0, 9, 0)]


@pytest.mark.parametrize("answer", [[], [Extent(0, 0, 0)]])
def test_a_function_that_gets_nowhere_is_an_error_and_no_endless_loop(
    answer: list[Extent],
) -> None:
    with pytest.raises(OSError, match="no progress"):
        collect(walk(lambda *_: answer, 0, 10), 5)
    requests = Requests(
        size=SIZE,
        flags=0,
        structured=True,
        contexts=((2, DIRTY),),
        functions={DIRTY: lambda *_: answer},
    )
    assert error_of(requests.execute(NullNode(SIZE), STATUS, 0, 1, 0, 10))[0] == c.NBD_EIO

"""The protocol's section "Error values": which number our server sends in which situation."""

import errno
from pathlib import Path

import pytest

from nbdwire.errors import from_wire, to_wire
from tests.support.faulty import Hooked
from tests.support.nbdraw import (
    CACHE,
    FAST_ZERO,
    FLUSH,
    READ,
    STATUS,
    TRIM,
    WRITE,
    ZEROES,
    Raw,
    connected,
)
from tests.support.serving import serving

SIZE = 4 << 20
LEGAL = {1, 5, 12, 22, 28, 75, 95, 108}
RANGED = {
    READ: errno.EINVAL,
    TRIM: errno.EINVAL,
    CACHE: errno.EINVAL,
    STATUS: errno.EINVAL,
    WRITE: errno.ENOSPC,
    ZEROES: errno.ENOSPC,
}


def error(client: Raw, kind: int, offset: int, length: int, flags: int = 0) -> int:
    return client.ask(kind, offset, length, flags, bytes(length) if kind == WRITE else b"").error


@pytest.mark.parametrize("kind", RANGED)
@pytest.mark.parametrize(
    ("offset", "length"),
    [(SIZE, 1), (SIZE - 1, 2), (0, SIZE + 1), (1 << 63, 512), ((1 << 64) - 512, 512)],
)
def test_what_lies_beyond_the_end_has_its_number(
    client: Raw, kind: int, offset: int, length: int
) -> None:
    """nbd.md §12: beyond the end: EINVAL, for WRITE and WRITE_ZEROES ENOSPC (qemu: EINVAL)."""
    assert error(client, kind, offset, length) == RANGED[kind]
    client.in_step()


@pytest.mark.parametrize("kind", [READ, TRIM, CACHE, ZEROES, STATUS])
def test_a_range_over_the_end_of_all_numbers_is_no_overflow(client: Raw, kind: int) -> None:
    """nbd.md §12: offset + length over 2^64: the same error, and nothing is done."""
    length = (1 << 64) - 1 if client.session.extended else 0xFFFF_FFFF
    assert error(client, kind, (1 << 64) - 1, length) == RANGED[kind]
    client.in_step()


def test_a_read_only_export_is_not_changed(
    tmp_path: Path, node: Hooked, form: dict[str, bool]
) -> None:
    """nbd.md §12: WRITE, TRIM, WRITE_ZEROES on read-only: EPERM, payloads consumed."""
    for verb in ("pwrite", "trim", "zero"):
        node.fail(verb, AssertionError("it is read-only"))
    with serving(tmp_path, Hooked(512)) as (server, uri):
        server.add("fixed", node, read_only=True)
        with connected(uri, "fixed", **form) as client:
            for kind in (WRITE, TRIM, ZEROES):
                assert error(client, kind, 0, 512) == errno.EPERM
                assert error(client, kind, 0, 100_000) == errno.EPERM
            assert error(client, READ, 0, 512) == error(client, FLUSH, 0, 0) == 0


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.EPERM, errno.EPERM),
        (errno.EROFS, errno.EPERM),
        (errno.EIO, errno.EIO),
        (errno.ENOSPC, errno.ENOSPC),
        (errno.EDQUOT, errno.ENOSPC),
        (errno.EFBIG, errno.ENOSPC),
        (errno.EINVAL, errno.EINVAL),
        (errno.EOVERFLOW, errno.EOVERFLOW),
        (errno.ESHUTDOWN, errno.ESHUTDOWN),
        (errno.EBADF, errno.EIO),
        (errno.ESTALE, errno.EIO),
        (errno.ETIMEDOUT, errno.EIO),
        (None, errno.EIO),
    ],
)
def test_what_the_storage_says_becomes_a_number_of_the_protocol(
    client: Raw, node: Hooked, number: int | None, expected: int
) -> None:
    """nbd.md §12: eight numbers, nothing else on the wire; EDQUOT and EFBIG are ENOSPC."""
    node.fail("pwrite", OSError(number, "it says") if number else OSError("it says"))
    assert error(client, WRITE, 0, 512) == expected


def test_no_errno_of_this_system_leaks_to_the_wire() -> None:
    """nbd.md §12: nothing but the eight numbers, whatever the system's errno."""
    assert {to_wire(number) for number in [None, 0, -1, *errno.errorcode, 100_000]} <= LEGAL
    assert {to_wire(from_wire(number)) for number in LEGAL} == LEGAL


def test_a_number_that_nobody_knows_is_einval_for_a_client() -> None:
    """nbd.md §12: a client treats unknown errors as EINVAL."""
    for number in {*range(200), 0xFFFF_FFFF} - LEGAL:
        assert from_wire(number) == errno.EINVAL


def test_enotsup_is_for_fast_zero_alone(client: Raw, node: Hooked) -> None:
    """nbd.md §12: FAST_ZERO not fast: ENOTSUP, only there."""
    for verb in ("pwrite", "trim", "zero", "flush", "pread_into"):
        node.fail(verb, OSError(errno.EOPNOTSUPP, "cannot"))
    for kind in (WRITE, TRIM, ZEROES, FLUSH, READ):
        assert error(client, kind, 0, 0 if kind == FLUSH else 512) == errno.EINVAL
    assert error(client, ZEROES, 0, 512, FAST_ZERO) == 95


def test_a_fault_of_ours_is_an_io_error_and_no_traceback(client: Raw, node: Hooked) -> None:
    """nbd.md §12: what has no number is EIO; the client learns nothing of our inside."""
    node.fail("pwrite", RuntimeError("secret /etc/passwd"))
    reply = client.ask(WRITE, 0, 512, 0, bytes(512))
    assert reply.error == errno.EIO
    assert "secret" not in reply.message
    client.in_step()


def test_requests_that_come_when_the_server_ends_are_told_so(
    tmp_path: Path, node: Hooked, form: dict[str, bool]
) -> None:
    """nbd.md §12: server ends: ESHUTDOWN."""
    with serving(tmp_path, node) as (server, uri), connected(uri, **form) as client:
        client.in_step()
        for connection in server._everybody():
            connection.stopping.set()  # as `stop` does, which hangs up a moment later
        for kind in (READ, WRITE, FLUSH, TRIM):
            assert error(client, kind, 0, 0 if kind == FLUSH else 512) == errno.ESHUTDOWN

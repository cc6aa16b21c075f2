# SPDX-License-Identifier: Apache-2.0
"""What a client makes sure of before it sends a request, and how it cuts what is too long for one.

Every function takes the `ClientSession` that was negotiated and raises RequestError.
"""

import errno
from collections.abc import Collection, Iterator
from typing import Final

from nbdwire import constants as c
from nbdwire.codec import status_filter
from nbdwire.errors import RequestError
from nbdwire.negotiate_client import ClientSession
from nbdwire.pending import Pending

# Requests without payload are cut too: servers differ in what they make of more than 31 bits.
_COMPACT_EFFECT: Final = 1 << 30
_EXTENDED_EFFECT: Final = 1 << 62


def check_range(session: ClientSession, offset: int, length: int) -> None:
    """EINVAL unless the range lies within the export."""
    if offset < 0 or length < 0 or offset + length > session.size:
        raise RequestError(
            errno.EINVAL, f"{length} bytes at {offset} are not within {session.size} bytes"
        )


def check_writable(session: ClientSession, offset: int, length: int) -> None:
    """EPERM if the export is read-only; else as `check_range`."""
    if session.flags & c.TFLAG_READ_ONLY:
        raise RequestError(errno.EPERM, "the export is read-only")
    check_range(session, offset, length)


def need(session: ClientSession, flag: int, what: str) -> None:
    """EOPNOTSUPP unless the server offers ``flag`` (TFLAG_*)."""
    if not session.flags & flag:
        raise RequestError(errno.EOPNOTSUPP, f"the server does not support {what}")


def payload_limit(session: ClientSession) -> int:
    """Bytes that one READ or WRITE may carry."""
    payload = min(session.maximum_payload, c.MAX_PAYLOAD)
    return payload - payload % session.minimum_block


def effect_limit(session: ClientSession) -> int:
    """Bytes that one request without payload may be about."""
    return _EXTENDED_EFFECT if session.extended else _COMPACT_EFFECT


def cut(offset: int, length: int, step: int) -> Iterator[tuple[int, int]]:
    """The range as (offset, length) of parts of at most ``step`` bytes."""
    for start in range(offset, offset + length, step):
        yield start, min(step, offset + length - start)


def context_ids(session: ClientSession, names: Collection[str] | None) -> tuple[int, ...]:
    """The ids of the contexts ``names`` (None: all negotiated); EOPNOTSUPP if one was not."""
    if names is None:
        return tuple(number for number, _ in session.contexts)
    known = {name: number for number, name in session.contexts}
    for name in names:
        if name not in known:
            raise RequestError(errno.EOPNOTSUPP, f"the context {name} was not negotiated")
    return tuple(known[name] for name in names)


def status_request(
    session: ClientSession, offset: int, length: int, ids: tuple[int, ...]
) -> tuple[Pending, memoryview | None]:
    """A BLOCK_STATUS that is answered for ``ids``, and its payload.

    A server without the payload filter answers for all contexts.
    """
    everything = tuple(number for number, _ in session.contexts)
    if len(ids) == len(everything) or not session.flags & c.TFLAG_BLOCK_STATUS_PAYLOAD:
        return Pending(c.CMD_BLOCK_STATUS, offset, length, contexts=everything), None
    payload = memoryview(status_filter(length, ids))
    return Pending(c.CMD_BLOCK_STATUS, offset, length, contexts=ids), payload

# SPDX-License-Identifier: Apache-2.0
"""`RemoteNode`: an export of another NBD server as a node of ours."""

import errno
from collections.abc import Callable
from contextlib import ExitStack
from itertools import count
from typing import ParamSpec, TypeVar

from fleece.block.node import Node
from fleece.block.ranges import RangeLock
from fleece.errors import FleeceError, ImageError, NotFound, UsageError
from nbdwire.client import Client, connect
from nbdwire.constants import CMD_FLAG_FUA, TFLAG_CAN_MULTI_CONN, TFLAG_SEND_FLUSH, TFLAG_SEND_TRIM
from nbdwire.errors import (
    ConnectionClosed,
    NBDError,
    NegotiationError,
    RequestError,
    UnknownExport,
    URIError,
)
from nbdwire.extents import Extent
from nbdwire.reconnect import Policy, Reconnecting
from nbdwire.uri import parse

_P = ParamSpec("_P")
_T = TypeVar("_T")


class RemoteNode(Node):
    """The export that ``uri`` names. Requests of several threads are in flight at once.

    ``connections`` above 1 are used if the server allows (CAN_MULTI_CONN). A server that has no
    trim or no flush is not asked for it; the client makes up for the rest. Where the server tells
    a minimum block above 1, requests are rounded outwards to it, writes by reading, changing and
    writing whole blocks under a range lock.

    A lost connection is opened again if the URI says ``reconnect=N``, N times at most; the next
    `flush` raises EIO then if writes that were not flushed may be lost. Without it every later verb
    raises ESHUTDOWN. EIO if the server broke the protocol. Raises `UsageError`, `NotFound` or
    `ImageError`.
    """

    blocking = True

    def __init__(
        self, uri: str, *, read_only: bool = False, name: str | None = None, connections: int = 1
    ) -> None:
        clients = _connect(uri, connections)
        first = clients[0]
        shown = uri if name is None else name
        super().__init__(shown, first.size, read_only=read_only or first.read_only)
        self._clients = clients
        self._reconnects = isinstance(first, Reconnecting)
        self._turn = count()
        self._flags = first.flags
        self._block = first.session.minimum_block
        self._ranges = RangeLock()

    def _client(self) -> "Client | Reconnecting":
        """They take turns; an uneven turn would do no harm."""
        return self._clients[next(self._turn) % len(self._clients)]

    def _do(self, verb: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Call ``verb``; on the data path there is no error but OSError."""
        try:
            return verb(*args, **kwargs)
        except RequestError:
            raise
        except ConnectionClosed as error:
            raise OSError(errno.ESHUTDOWN, f"the server went away ({error})", self.name) from error
        except NBDError as error:
            raise OSError(
                errno.EIO, f"the server broke the protocol ({error})", self.name
            ) from error

    def _around(self, offset: int, length: int) -> tuple[int, int]:
        """The blocks that the range touches, as (start, stop)."""
        stop = offset + length
        return offset - offset % self._block, min(stop + -stop % self._block, self.size)

    def pread_into(self, buf: memoryview, offset: int) -> None:
        """READ."""
        start, stop = self._around(offset, len(buf))
        if (start, stop) == (offset, offset + len(buf)):
            self._do(self._client().pread_into, buf, offset)
            return
        whole = memoryview(bytearray(stop - start))
        self._do(self._client().pread_into, whole, start)
        buf[:] = whole[offset - start : offset - start + len(buf)]

    def pread_cached(self, buf: memoryview, offset: int) -> bool:
        """False: there is a network between."""
        return False

    def pwrite(self, buf: memoryview, offset: int, fua: bool = False) -> None:
        """WRITE; blocks that are written in part are read first."""
        self._check_writable()
        if self._block == 1:
            self._do(self._client().pwrite, buf, offset, fua)
            return
        if not len(buf):
            return
        start, stop = self._around(offset, len(buf))
        with self._ranges.exclusive(start, stop):
            if (start, stop) == (offset, offset + len(buf)):
                self._do(self._client().pwrite, buf, offset, fua)
            else:
                self._patch(buf, offset, start, stop, fua)

    def _patch(self, buf: memoryview, offset: int, start: int, stop: int, fua: bool) -> None:
        whole, end = memoryview(bytearray(stop - start)), offset + len(buf)
        first, last = self._block, stop - 1 - (stop - 1) % self._block
        if offset > start:
            self._do(self._client().pread_into, whole[:first], start)
        if end < stop and (last > start or offset == start):
            self._do(self._client().pread_into, whole[last - start :], last)
        whole[offset - start : end - start] = buf
        self._do(self._client().pwrite, whole, start, fua)

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        """WRITE_ZEROES, or zeroes written. FAST_ZERO is EOPNOTSUPP unless the server offers it."""
        self._check_writable()
        if self._block == 1:
            self._do(self._client().zero, offset, length, flags)
            return
        start, stop = offset + -offset % self._block, offset + length
        if stop != self.size:
            stop -= stop % self._block
        if start >= stop:
            self.pwrite(memoryview(bytes(length)), offset, bool(flags & CMD_FLAG_FUA))
            return
        with self._ranges.exclusive(start, stop):
            self._do(self._client().zero, start, stop - start, flags)
        for begin, end in ((offset, start), (stop, offset + length)):
            if begin < end:
                self.pwrite(memoryview(bytes(end - begin)), begin, bool(flags & CMD_FLAG_FUA))

    def trim(self, offset: int, length: int, flags: int = 0) -> None:
        """TRIM of the whole blocks in the range, or nothing."""
        self._check_writable()
        start, stop = offset + -offset % self._block, offset + length
        if stop != self.size:
            stop -= stop % self._block
        if self._flags & TFLAG_SEND_TRIM and start < stop:
            with self._ranges.exclusive(start, stop):
                self._do(self._client().trim, start, stop - start, flags)

    def flush(self) -> None:
        """One FLUSH: CAN_MULTI_CONN promises that it covers the other connections.

        Clients that reconnect each know what was lost on their own, so all are asked.
        """
        if self._flags & TFLAG_SEND_FLUSH:
            for client in self._clients if self._reconnects else self._clients[:1]:
                self._do(client.flush)

    def extents(self, offset: int, length: int) -> list[Extent]:
        """``base:allocation``, or one extent of data where the server does not know."""
        start, stop = self._around(offset, length)
        found = self._do(self._client().extents, start, stop - start)
        if (start, stop) == (offset, offset + length):
            return found
        clipped = [(max(x.offset, offset), min(x.end, offset + length), x.status) for x in found]
        return [Extent(begin, end - begin, status) for begin, end, status in clipped if begin < end]

    def _check_writable(self) -> None:
        if self.read_only:
            raise OSError(errno.EPERM, "opened read-only", self.name)

    def close(self) -> None:
        """Leave the server. Idempotent."""
        with ExitStack() as stack:
            for client in self._clients:
                stack.callback(client.close)


def _connect(uri: str, connections: int) -> "list[Client] | list[Reconnecting]":
    """The first connection, and more of them if the server allows that."""
    with ExitStack() as stack:
        try:
            policy = _policy(uri)
            if policy is None:
                return _connect_all(stack, lambda: connect(uri), connections)
            return _connect_all(stack, lambda: connect(uri, reconnect=policy), connections)
        except (NBDError, OSError) as error:
            raise _refusal(uri, error) from error


_C = TypeVar("_C", Client, Reconnecting)


def _connect_all(stack: ExitStack, once: Callable[[], _C], connections: int) -> list[_C]:
    clients: list[_C] = [stack.enter_context(once())]
    if clients[0].flags & TFLAG_CAN_MULTI_CONN:
        clients += [stack.enter_context(once()) for _ in range(connections - 1)]
    stack.pop_all()
    return clients


def _policy(uri: str) -> Policy | None:
    """What the URI's parameter ``reconnect`` says: how often to try."""
    text = parse(uri).param("reconnect")
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and 0 < int(text) <= 1000):
        raise URIError(f"{uri!r}: reconnect is {text!r}; it can be 1 to 1000 attempts")
    return Policy(attempts=int(text))


def _refusal(uri: str, error: NBDError | OSError) -> FleeceError:
    if isinstance(error, URIError):
        return UsageError(str(error))
    if isinstance(error, UnknownExport):
        return NotFound(f"{uri}: {error}; ask the server for the names that it has")
    if isinstance(error, NegotiationError):
        return ImageError(f"cannot open {uri}: {error}; change that at the server, or the URI")
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return ImageError(f"cannot open {uri}: {reason}; check that an NBD server listens there")

# SPDX-License-Identifier: Apache-2.0
"""`RemoteNode`: an export of another NBD server as a node of ours."""

import errno
from collections.abc import Callable
from contextlib import ExitStack
from itertools import count
from typing import ParamSpec, TypeVar

from fleece.block.node import Node
from fleece.errors import FleeceError, ImageError, NotFound, UsageError
from nbdwire.client import Client, connect
from nbdwire.constants import TFLAG_CAN_MULTI_CONN, TFLAG_SEND_FLUSH, TFLAG_SEND_TRIM
from nbdwire.errors import (
    ConnectionClosed,
    NBDError,
    NegotiationError,
    RequestError,
    UnknownExport,
    URIError,
)
from nbdwire.extents import Extent

_P = ParamSpec("_P")
_T = TypeVar("_T")


class RemoteNode(Node):
    """The export that ``uri`` names. Requests of several threads are in flight at once.

    ``connections`` above 1 are used if the server allows (CAN_MULTI_CONN). A server that has no
    trim or no flush is not asked for it; the client makes up for the rest. A lost connection is not
    opened again: every later verb raises ESHUTDOWN; EIO if the server broke the protocol.
    Raises `UsageError`, `NotFound` or `ImageError`.
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
        self._turn = count()
        self._flags = first.flags

    def _client(self) -> Client:
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

    def pread_into(self, buf: memoryview, offset: int) -> None:
        """READ."""
        self._do(self._client().pread_into, buf, offset)

    def pread_cached(self, buf: memoryview, offset: int) -> bool:
        """False: there is a network between."""
        return False

    def pwrite(self, buf: memoryview, offset: int, fua: bool = False) -> None:
        """WRITE."""
        self._check_writable()
        self._do(self._client().pwrite, buf, offset, fua)

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        """WRITE_ZEROES, or zeroes written. FAST_ZERO is EOPNOTSUPP unless the server offers it."""
        self._check_writable()
        self._do(self._client().zero, offset, length, flags)

    def trim(self, offset: int, length: int, flags: int = 0) -> None:
        """TRIM, or nothing."""
        self._check_writable()
        if self._flags & TFLAG_SEND_TRIM:
            self._do(self._client().trim, offset, length, flags)

    def flush(self) -> None:
        """One FLUSH: CAN_MULTI_CONN promises that it covers the other connections."""
        if self._flags & TFLAG_SEND_FLUSH:
            self._do(self._client().flush)

    def extents(self, offset: int, length: int) -> list[Extent]:
        """``base:allocation``, or one extent of data where the server does not know."""
        return self._do(self._client().extents, offset, length)

    def _check_writable(self) -> None:
        if self.read_only:
            raise OSError(errno.EPERM, "opened read-only", self.name)

    def close(self) -> None:
        """Leave the server. Idempotent."""
        with ExitStack() as stack:
            for client in self._clients:
                stack.callback(client.close)


def _connect(uri: str, connections: int) -> list[Client]:
    """The first connection, and more of them if the server allows that."""
    with ExitStack() as stack:
        try:
            clients = [stack.enter_context(connect(uri))]
            if clients[0].flags & TFLAG_CAN_MULTI_CONN:
                clients += [stack.enter_context(connect(uri)) for _ in range(connections - 1)]
        except (NBDError, OSError) as error:
            raise _refusal(uri, error) from error
        stack.pop_all()
        return clients


def _refusal(uri: str, error: NBDError | OSError) -> FleeceError:
    if isinstance(error, URIError):
        return UsageError(str(error))
    if isinstance(error, UnknownExport):
        return NotFound(f"{uri}: {error}; ask the server for the names that it has")
    if isinstance(error, NegotiationError):
        return ImageError(f"cannot open {uri}: {error}; change that at the server, or the URI")
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return ImageError(f"cannot open {uri}: {reason}; check that an NBD server listens there")

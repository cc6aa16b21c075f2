# SPDX-License-Identifier: Apache-2.0
"""Several connections to one export.

A server that says CAN_MULTI_CONN promises that a flush on one connection covers the writes that
were completed on all. One that does not say it gets one connection.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import count
from typing import Any, Final, TypeVar

from nbdwire import constants as c
from nbdwire.client import Client, connect
from nbdwire.delegate import Delegate
from nbdwire.errors import ProtocolError
from nbdwire.pipeline import DEPTH, Pipeline
from nbdwire.uri import NBDURI

T = TypeVar("T")

CONNECTIONS: Final = 4
"""How many, unless the caller says."""


class Pool(Delegate):
    """The verbs of `Client` over several connections, which take turns; for many threads."""

    def __init__(self, clients: Sequence[Client]) -> None:
        """Take over ``clients``, all connected to one export. ProtocolError: that cannot be."""
        first = clients[0].session
        for client in clients[1:]:
            if (client.size, client.flags) != (first.size, first.flags):
                raise ProtocolError("the server tells each connection something else")
        if len(clients) > 1 and not first.flags & c.TFLAG_CAN_MULTI_CONN:
            raise ValueError("the server does not allow several connections")
        self.session = first
        self.clients = tuple(clients)
        self._turn = count()

    def _do(self, verb: Callable[[Client], T], dirty: tuple[int, int] = (0, 0)) -> T:
        return verb(self.clients[next(self._turn) % len(self.clients)])

    def pipeline(self, depth: int = DEPTH) -> Pipeline:
        """Requests on all connections, at most ``depth`` in flight in all."""
        return Pipeline(self.clients, depth)

    def flush(self) -> None:
        """One FLUSH covers all connections."""
        self.clients[0].flush()

    def close(self) -> None:
        """Close all connections."""
        with ExitStack() as stack:
            for client in self.clients:
                stack.callback(client.close)


def connect_pool(uri: str | NBDURI, connections: int = CONNECTIONS, **options: Any) -> Pool:
    """Up to ``connections`` to the export that ``uri`` names; one if the server allows no more.

    ``options`` and errors are those of `nbdwire.client.connect`; there is no ``reconnect``.
    """
    with ExitStack() as stack:
        clients: list[Client] = [stack.enter_context(connect(uri, **options))]
        if clients[0].flags & c.TFLAG_CAN_MULTI_CONN:
            clients += [
                stack.enter_context(connect(uri, **options)) for _ in range(connections - 1)
            ]
        pool = Pool(clients)
        stack.pop_all()
        return pool

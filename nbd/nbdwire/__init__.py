# SPDX-License-Identifier: Apache-2.0
"""The NBD protocol: handshake, codec, server and client. Standard library only.

`connect` and `Client` are one side, `Server` is the other; what is served has the verbs of
`nbdwire.export.Export`, and so has a `Client`. The errors are printed in `nbdwire.errors`.
"""

from typing import TYPE_CHECKING, Any

from nbdwire.client import Client, connect, describe, list_contexts, list_exports
from nbdwire.errors import (
    ConnectionClosed,
    NBDError,
    NegotiationError,
    PolicyRefused,
    ProtocolError,
    RequestError,
    ShuttingDown,
    TLSError,
    TLSRequired,
    UnknownExport,
    URIError,
    WritesLost,
)
from nbdwire.export import Export
from nbdwire.extents import Extent
from nbdwire.pipeline import Pipeline, Ticket
from nbdwire.pool import Pool, connect_pool
from nbdwire.reconnect import Policy, Reconnecting
from nbdwire.uri import NBDURI
from nbdwire.uri import parse as parse_uri

if TYPE_CHECKING:
    from nbdwire.server import Server

__all__ = [
    "NBDURI",
    "Client",
    "ConnectionClosed",
    "Export",
    "Extent",
    "NBDError",
    "NegotiationError",
    "Pipeline",
    "Policy",
    "PolicyRefused",
    "Pool",
    "ProtocolError",
    "Reconnecting",
    "RequestError",
    "Server",
    "ShuttingDown",
    "TLSError",
    "TLSRequired",
    "Ticket",
    "URIError",
    "UnknownExport",
    "WritesLost",
    "connect",
    "connect_pool",
    "describe",
    "list_contexts",
    "list_exports",
    "parse_uri",
]


def __getattr__(name: str) -> Any:
    """The server is loaded when it is asked for: a client should start fast."""
    if name != "Server":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from nbdwire.server import Server

    return Server

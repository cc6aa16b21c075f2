# SPDX-License-Identifier: Apache-2.0
"""The NBD protocol: handshake, codec, server and client. Standard library only.

`connect` and `Client` are one side, `Server` is the other; what is served has the verbs of
`nbdwire.export.Export`, and so has a `Client`. The errors are printed in `nbdwire.errors`.
"""

from nbdwire.client import Client, connect, list_contexts, list_exports
from nbdwire.errors import (
    ConnectionClosed,
    NBDError,
    NegotiationError,
    PolicyRefused,
    ProtocolError,
    RequestError,
    TLSRequired,
    UnknownExport,
    URIError,
)
from nbdwire.export import Export
from nbdwire.extents import Extent
from nbdwire.server import Server
from nbdwire.uri import NBDURI
from nbdwire.uri import parse as parse_uri

__all__ = [
    "NBDURI",
    "Client",
    "ConnectionClosed",
    "Export",
    "Extent",
    "NBDError",
    "NegotiationError",
    "PolicyRefused",
    "ProtocolError",
    "RequestError",
    "Server",
    "TLSRequired",
    "URIError",
    "UnknownExport",
    "connect",
    "list_contexts",
    "list_exports",
    "parse_uri",
]

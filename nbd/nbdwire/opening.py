# SPDX-License-Identifier: Apache-2.0
"""From a URI to a connection whose handshake is done, TLS included, within one time limit."""

import time
from typing import Final, TypeVar

from nbdwire.handshake import Handshake
from nbdwire.transport import Stream, Upgrader, connect_socket, establish
from nbdwire.uri import NBDURI

T = TypeVar("T")

CONNECT_TIMEOUT: Final = 30.0
"""Seconds for connecting and the handshake together."""


def open_stream(
    uri: NBDURI, handshake: Handshake[T], timeout: float, tls: Upgrader | None = None
) -> tuple[Stream, T]:
    """Connect and run ``handshake``; if that fails, nothing stays open.

    ``tls`` makes the socket TLS when the handshake asks for it; without it the URI's parameters
    tell how.
    """
    deadline = time.monotonic() + timeout
    upgrade = _from_uri(uri) if tls is None and uri.tls else tls
    sock = connect_socket(uri, timeout, upgraded=upgrade is not None)
    try:
        result, stream = establish(sock, handshake, deadline, upgrade)
        return stream, result
    except BaseException:
        sock.close()
        raise


def _from_uri(uri: NBDURI) -> Upgrader:
    from nbdwire.tls import client_context  # ssl is slow to load, and most clients need none

    return client_context(uri)

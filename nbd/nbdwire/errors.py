# SPDX-License-Identifier: Apache-2.0
"""The errors of this package, and the one table between errno and the error numbers on the wire.

::

    NBDError(Exception)
    ├── ProtocolError            the peer broke the specification; the connection is over
    ├── NegotiationError         an option was refused; .option, .reply, .message (the server's own)
    │   ├── UnknownExport
    │   ├── TLSRequired
    │   ├── PolicyRefused
    │   └── ShuttingDown
    ├── RequestError(OSError)    this request failed, .errno is set; the connection goes on
    │   └── WritesLost           .ranges were written but not flushed when the connection was lost
    ├── ConnectionClosed         the peer is gone
    ├── BusyError                an export is in use; .clients, how many
    ├── TLSError                 TLS cannot be set up, or broke down
    └── URIError(ValueError)     this is no NBD URI
"""

import errno
import os
from collections.abc import Sequence
from typing import Final

from nbdwire import constants as c


class NBDError(Exception):
    """Anything that this package raises on its own account."""

    code = "nbd-error"


class ProtocolError(NBDError):
    """The peer broke the specification. The connection cannot be used any more."""

    code = "nbd-protocol-error"


class NegotiationError(NBDError):
    """The server refused an option.

    ``option`` and ``reply`` are numbers of the specification; ``message`` is the server's text,
    or an empty string.
    """

    code = "nbd-refused"

    def __init__(self, text: str, option: int = 0, reply: int = 0, message: str = "") -> None:
        super().__init__(text)
        self.option = option
        self.reply = reply
        self.message = message


class UnknownExport(NegotiationError):
    """The server has no export of that name."""

    code = "nbd-unknown-export"


class TLSRequired(NegotiationError):
    """The server insists on TLS for this option or export."""

    code = "nbd-tls-required"


class PolicyRefused(NegotiationError):
    """The server's configuration forbids it."""

    code = "nbd-refused-by-policy"


class ShuttingDown(NegotiationError):
    """The server is about to end."""

    code = "nbd-shutting-down"


class RequestError(NBDError, OSError):
    """One request failed with ``errno``; the connection goes on."""

    code = "nbd-request-error"

    def __init__(self, number: int, message: str = "") -> None:
        OSError.__init__(self, number, message or os.strerror(number))


class WritesLost(RequestError):
    """The connection was lost before ``ranges``, (offset, length) each, were flushed.

    They may be stored or not; write them again.
    """

    code = "nbd-writes-lost"

    def __init__(self, ranges: Sequence[tuple[int, int]]) -> None:
        self.ranges = list(ranges)
        lost = sum(length for _, length in self.ranges)
        super().__init__(
            errno.EIO,
            f"the connection was lost before {lost} bytes in {len(self.ranges)} ranges, the first "
            f"at {self.ranges[0][0]}, were flushed; they may not be stored: write them again",
        )


class ConnectionClosed(NBDError):
    """The peer closed the connection."""

    code = "nbd-connection-closed"


class TLSError(NBDError):
    """Certificates or keys cannot be used, or a peer failed in TLS; such a connection is over."""

    code = "nbd-tls-error"


class BusyError(NBDError):
    """Clients are connected to the export. ``clients`` is how many."""

    code = "nbd-busy"

    def __init__(self, text: str, clients: int = 0) -> None:
        super().__init__(text)
        self.clients = clients


class URIError(NBDError, ValueError):
    """The text is not an NBD URI, or names something that we do not do."""

    code = "nbd-bad-uri"


# Section "Error values": these eight numbers, and no other, may be sent.
_TO_WIRE: Final[dict[int, int]] = {
    errno.EPERM: c.NBD_EPERM,
    errno.EROFS: c.NBD_EPERM,
    errno.EACCES: c.NBD_EPERM,
    errno.EIO: c.NBD_EIO,
    errno.ENOMEM: c.NBD_ENOMEM,
    errno.EINVAL: c.NBD_EINVAL,
    errno.ENOSPC: c.NBD_ENOSPC,
    errno.EDQUOT: c.NBD_ENOSPC,
    errno.EFBIG: c.NBD_ENOSPC,
    errno.EOVERFLOW: c.NBD_EOVERFLOW,
    errno.EOPNOTSUPP: c.NBD_ENOTSUP,
    errno.ESHUTDOWN: c.NBD_ESHUTDOWN,
}

_FROM_WIRE: Final[dict[int, int]] = {
    c.NBD_EPERM: errno.EPERM,
    c.NBD_EIO: errno.EIO,
    c.NBD_ENOMEM: errno.ENOMEM,
    c.NBD_EINVAL: errno.EINVAL,
    c.NBD_ENOSPC: errno.ENOSPC,
    c.NBD_EOVERFLOW: errno.EOVERFLOW,
    c.NBD_ENOTSUP: errno.EOPNOTSUPP,
    c.NBD_ESHUTDOWN: errno.ESHUTDOWN,
}


def to_wire(number: int | None) -> int:
    """The protocol's error number for an errno; what it has no name for is EIO."""
    return _TO_WIRE.get(number or errno.EIO, c.NBD_EIO)


def from_wire(number: int) -> int:
    """The errno for the protocol's error number; an unknown one is EINVAL, as the spec asks."""
    return _FROM_WIRE.get(number, errno.EINVAL)


def is_loss(error: Exception) -> bool:
    """Whether the connection is over. Also a server that answers ESHUTDOWN is about to go."""
    return isinstance(error, ConnectionClosed) or (
        isinstance(error, RequestError) and error.errno == errno.ESHUTDOWN
    )

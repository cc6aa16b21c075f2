# SPDX-License-Identifier: Apache-2.0
"""What both halves of the handshake share: how a handshake without I/O speaks to its driver."""

from collections.abc import Generator
from enum import Enum
from typing import Final, TypeAlias, TypeVar

T = TypeVar("T")


class Upgrade(Enum):
    """What a handshake may want done to the stream itself."""

    TLS = 1


UPGRADE: Final = Upgrade.TLS
"""Yielded: "make the stream TLS now, then resume me with b''"."""

Handshake: TypeAlias = Generator[int | bytes | Upgrade, bytes, T]
"""Yields what it wants to receive (a length), to send (bytes), or UPGRADE; returns a ``T``."""

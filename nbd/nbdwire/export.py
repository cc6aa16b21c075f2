# SPDX-License-Identifier: Apache-2.0
"""What a server needs from the thing that it serves. Structural: there is nothing to inherit.

One verb set everywhere: a client of a remote server, a disk image, a filter and an export all
speak it, so each of them can be served and each can be stacked on another.

Rules for all verbs. ``offset`` and lengths are bytes; the caller has checked that the range lies
in ``[0, size)`` and that its length is not 0. A verb does all of the range or raises ``OSError``
with an errno; it may be called by several threads at once; it keeps no view of ``buf``.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Final, Protocol, TypeAlias, runtime_checkable

from nbdwire.extents import Extent

Run: TypeAlias = tuple[int, int, int]
"""``(fd, host_offset, length)``: where bytes live. ``fd`` may be ZERO_RUN or OPAQUE_RUN instead."""

ZERO_RUN: Final = -1
"""In place of a descriptor: these bytes read as zeroes and take no data."""

OPAQUE_RUN: Final = -2
"""In place of a descriptor: only ``pread_into`` can tell (remote, compressed, still volatile)."""

ExtentsFunction: TypeAlias = Callable[[int, int], list[Extent]]
"""``f(offset, length)``: see `Export.extents`."""


@runtime_checkable
class Export(Protocol):
    """The seven verbs. ``flags`` are CMD_FLAG_FUA, CMD_FLAG_NO_HOLE and CMD_FLAG_FAST_ZERO."""

    @property
    def size(self) -> int:
        """Bytes; less than 2**63."""
        ...

    @property
    def read_only(self) -> bool:
        """Whether pwrite, zero and trim would be refused (EPERM)."""
        ...

    def pread_into(self, buf: memoryview, offset: int) -> None:
        """Fill ``buf`` with the bytes from ``offset``."""
        ...

    def pwrite(self, buf: memoryview, offset: int, fua: bool = False) -> None:
        """Write ``buf`` at ``offset``; with ``fua`` it is on stable storage on return."""
        ...

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        """Make the range read as zeroes.

        NO_HOLE keeps it allocated. FAST_ZERO: EOPNOTSUPP, and nothing changed, unless this is
        faster than writing.
        """
        ...

    def trim(self, offset: int, length: int, flags: int = 0) -> None:
        """The contents are not needed any more; a hint, and what reads return is unspecified."""
        ...

    def flush(self) -> None:
        """Return when every write that completed before this call is on stable storage."""
        ...

    def extents(self, offset: int, length: int) -> list[Extent]:
        """Allocation of the range (STATE_HOLE, STATE_ZERO), in order from ``offset``, without gaps.

        At least one extent; the list may end before the range does, and never behind its end.
        """
        ...


@runtime_checkable
class SupportsMap(Protocol):
    """Optional: the bytes live in files that the caller may read itself."""

    def map(self, offset: int, length: int) -> list[Run]:
        """Runs in order from ``offset``, without gaps, that add up to at most ``length``.

        What a file run names is stable enough to be sent with ``sendfile`` until the session that
        asked is closed.
        """
        ...


@runtime_checkable
class SupportsPrefetch(Protocol):
    """Optional: overlapped reading of what is not in memory yet."""

    def pread_cached(self, buf: memoryview, offset: int) -> bool:
        """As `Export.pread_into` if no storage has to be waited for; else False (buf undefined)."""
        ...

    def prefetch(self, offset: int, length: int) -> None:
        """Start to bring the range into memory; do not wait for it."""
        ...


@runtime_checkable
class Session(Protocol):
    """What one connection holds while it uses an export; the server closes it at the end.

    ``node`` is used only while ``gate`` is held, and is looked up again each time that the gate was
    taken: whoever takes all gates may change what stands behind the export. The gate is never held
    while a client is waited for.
    """

    @property
    def gate(self) -> AbstractContextManager[object]:
        """Held around the verbs."""
        ...

    @property
    def node(self) -> Export:
        """Where the verbs go at this moment."""
        ...

    def close(self) -> None:
        """The connection is over."""
        ...


@runtime_checkable
class SupportsSessions(Protocol):
    """Optional, for what is exported: give each connection an object of its own."""

    def open_session(self) -> Session:
        """Called once for each connection that enters transmission."""
        ...

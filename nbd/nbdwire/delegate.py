# SPDX-License-Identifier: Apache-2.0
"""The verbs of a client, for what stands in front of one client or several."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

from nbdwire import constants as c
from nbdwire.extents import Extent
from nbdwire.negotiate_client import ClientSession

if TYPE_CHECKING:
    from nbdwire.client import Client

T = TypeVar("T")
D = TypeVar("D", bound="Delegate")


class Delegate(ABC):
    """Has the verbs of `nbdwire.client.Client`, and hands each call to one. Errors: as there."""

    session: ClientSession

    @abstractmethod
    def _do(self, verb: "Callable[[Client], T]", dirty: tuple[int, int] = (0, 0)) -> T:
        """Call ``verb`` with a client. ``dirty``: (offset, length) that it leaves unflushed."""

    @abstractmethod
    def flush(self) -> None:
        """Return when every write that completed before this call is on stable storage."""

    @abstractmethod
    def close(self) -> None:
        """Leave the server. Idempotent."""

    def __enter__(self: D) -> D:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def size(self) -> int:
        """Bytes."""
        return self.session.size

    @property
    def flags(self) -> int:
        """The transmission flags, TFLAG_*."""
        return self.session.flags

    @property
    def read_only(self) -> bool:
        """Whether the server refuses pwrite, zero and trim."""
        return bool(self.session.flags & c.TFLAG_READ_ONLY)

    @property
    def contexts(self) -> tuple[str, ...]:
        """The metadata contexts that `extents` can be asked for."""
        return tuple(name for _, name in self.session.contexts)

    def pread_into(self, buf: memoryview, offset: int) -> None:
        """`Client.pread_into`."""
        self._do(lambda client: client.pread_into(buf, offset))

    def pread(self, length: int, offset: int) -> bytes:
        """`Client.pread`."""
        return self._do(lambda client: client.pread(length, offset))

    def pwrite(self, buf: memoryview | bytes | bytearray, offset: int, fua: bool = False) -> None:
        """`Client.pwrite`."""
        length = 0 if fua else memoryview(buf).nbytes
        self._do(lambda client: client.pwrite(buf, offset, fua), (offset, length))

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        """`Client.zero`."""
        dirty = 0 if flags & c.CMD_FLAG_FUA else length
        self._do(lambda client: client.zero(offset, length, flags), (offset, dirty))

    def trim(self, offset: int, length: int, flags: int = 0) -> None:
        """`Client.trim`."""
        self._do(lambda client: client.trim(offset, length, flags))

    def cache(self, offset: int, length: int) -> None:
        """`Client.cache`."""
        self._do(lambda client: client.cache(offset, length))

    def extents(
        self, offset: int, length: int, context: str = c.CONTEXT_BASE_ALLOCATION
    ) -> list[Extent]:
        """`Client.extents`."""
        return self._do(lambda client: client.extents(offset, length, context))

    def status(
        self, offset: int, length: int, contexts: Collection[str] | None = None
    ) -> dict[str, list[Extent]]:
        """`Client.status`."""
        return self._do(lambda client: client.status(offset, length, contexts))

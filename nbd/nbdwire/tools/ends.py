# SPDX-License-Identifier: Apache-2.0
"""What can be copied from and to: here a file or device, standard input and output.

A copy has one or several lanes, each a thread with a reader of the source and a writer of the
target that nobody else uses. What fails is CopyFailed, whose text says what, and where.
"""

import errno
import os
import stat
from collections import deque
from collections.abc import Callable
from typing import Final, Protocol, TypeAlias

from nbdwire import constants as c
from nbdwire.errors import NBDError
from nbdwire.extents import Extent
from nbdwire.tools.files import FileExport

Done: TypeAlias = Callable[[int, bool], None]
"""Told (length, whether it was made zero) of what the target has acknowledged."""

_ZEROES: Final = bytes(1 << 18)
_ANY: Final = 1 << 30


class CopyFailed(NBDError):
    """The target is incomplete; the text says what failed, and where."""

    code = "nbd-copy-failed"


class Reader(Protocol):
    """Reads for one lane. ``depth``: how many pieces may be asked for and not taken."""

    depth: int

    def extents(self, offset: int, length: int) -> list[Extent]:
        """As `nbdwire.export.Export.extents`."""
        ...

    def ask(self, offset: int, length: int) -> None:
        """Start to read a piece."""
        ...

    def take(self) -> memoryview:
        """Wait for the piece that was asked for first; valid until the next call."""
        ...


class Source(Protocol):
    """``size`` is in bytes, None for a stream; what begins at a multiple of ``block`` is readable.

    ``lanes``: how many may read at once; ``ordered``: it has but one, and must be read in order.
    ``maximum``: bytes of the longest piece.
    """

    name: str
    size: int | None
    block: int
    lanes: int
    ordered: bool
    maximum: int

    def reader(self, lane: int) -> Reader:
        """For the lane with that number, from 0."""
        ...

    def cancel(self) -> None:
        """The copy has failed: all that waits ends soon. From any thread."""
        ...

    def close(self) -> None:
        """No lane uses it any more."""
        ...


class Writer(Protocol):
    """Writes for one lane."""

    def write(self, view: memoryview, offset: int) -> None:
        """Start to write; ``view`` may be used again on return."""
        ...

    def zero(self, offset: int, length: int, allocate: bool) -> None:
        """Make the range read as zeroes; ``allocate``: it should take up room."""
        ...

    def drain(self) -> None:
        """Wait until everything is acknowledged."""
        ...


class Target(Protocol):
    """As `Source`. ``is_zero``: it reads as zeroes where nothing is written."""

    name: str
    size: int | None
    block: int
    lanes: int
    ordered: bool
    is_zero: bool

    def writer(self, lane: int, done: Done) -> Writer:
        """For the lane with that number, from 0."""
        ...

    def cancel(self) -> None:
        """As that of `Source`."""
        ...

    def finish(self, size: int, flush: bool) -> None:
        """All is written, ``size`` bytes in all: make it stable if ``flush``."""
        ...

    def close(self) -> None:
        """As that of `Source`."""
        ...


class FileEnd:
    """A regular file or a block device. It is its own writer: nothing of it is in flight."""

    ordered = False
    maximum = _ANY

    def __init__(self, name: str, export: FileExport, *, lanes: int = 1) -> None:
        self.name = name
        self.size: int | None = export.size
        self.block = 1
        self.lanes = lanes
        self.is_zero = False
        self.export = export
        self._grows = False

    @classmethod
    def create(cls, path: str, size: int | None, *, keep: bool, lanes: int = 1) -> "FileEnd":
        """As a target. A regular file begins empty unless ``keep``; a device is as it is."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        fd = os.open(path, flags, 0o666)
        mode = os.fstat(fd).st_mode
        os.close(fd)
        if not stat.S_ISREG(mode):
            return cls(path, FileExport.open(path), lanes=lanes)
        if not keep:
            os.truncate(path, 0)
        if size is not None and os.stat(path).st_size < size:
            os.truncate(path, size)
        end = cls(path, FileExport.open(path), lanes=lanes)
        end.is_zero, end._grows = not keep, size is None
        end.size = None if end._grows else end.size
        return end

    def reader(self, lane: int) -> "FileReader":
        """With a buffer of its own."""
        return FileReader(self.name, self.export)

    def writer(self, lane: int, done: Done) -> "FileWriter":
        """For one lane."""
        return FileWriter(self.name, self.export, done)

    def cancel(self) -> None:
        """Nothing waits for long."""

    def finish(self, size: int, flush: bool) -> None:
        """A file that was a stream's target gets its size now."""
        if self._grows:
            os.truncate(self.name, size)
        if flush:
            self.export.flush()

    def close(self) -> None:
        """Close the file."""
        self.export.close()


class FileReader:
    """Reads when the data are taken, always into the same buffer."""

    depth = 1

    def __init__(self, name: str, export: FileExport) -> None:
        self._name = name
        self._export = export
        self._asked: deque[tuple[int, int]] = deque()
        self._buffer = bytearray()

    def extents(self, offset: int, length: int) -> list[Extent]:
        """The holes that the file system knows."""
        try:
            return self._export.extents(offset, length)
        except OSError as error:
            reason = f"cannot ask {self._name} where its data are: {text(error)}"
            raise CopyFailed(reason) from error

    def ask(self, offset: int, length: int) -> None:
        """Remember it."""
        self._asked.append((offset, length))

    def take(self) -> memoryview:
        """``preadv``."""
        offset, length = self._asked.popleft()
        if len(self._buffer) < length:
            self._buffer = bytearray(length)
        view = memoryview(self._buffer)[:length]
        try:
            self._export.pread_into(view, offset)
        except OSError as error:
            raise failed("read", length, offset, self._name, error) from error
        return view


class FileWriter:
    """``pwrite`` and ``fallocate``, done when they return."""

    def __init__(self, name: str, export: FileExport, done: Done) -> None:
        self._name = name
        self._export = export
        self._done = done

    def write(self, view: memoryview, offset: int) -> None:
        """``pwrite``."""
        try:
            self._export.pwrite(view, offset)
        except OSError as error:
            raise failed("write", len(view), offset, self._name, error) from error
        self._done(len(view), False)

    def zero(self, offset: int, length: int, allocate: bool) -> None:
        """A hole, or zeroes that take up room."""
        try:
            self._export.zero(offset, length, c.CMD_FLAG_NO_HOLE if allocate else 0)
        except OSError as error:
            raise failed("zero", length, offset, self._name, error) from error
        self._done(length, True)

    def drain(self) -> None:
        """Nothing is ever in flight."""


class StreamSource:
    """Standard input: a `Source` without a size, which is read in order."""

    name = "standard input"
    size: int | None = None
    block = 1
    lanes = 1
    ordered = True
    maximum = _ANY
    depth = 1

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._position = 0
        self._wanted = 0
        self._buffer = bytearray()

    def reader(self, lane: int) -> "StreamSource":
        """It is its own."""
        return self

    def extents(self, offset: int, length: int) -> list[Extent]:
        """All is data."""
        return [Extent(offset, length, 0)]

    def ask(self, offset: int, length: int) -> None:
        """The next bytes."""
        self._wanted = length

    def take(self) -> memoryview:
        """As much as was asked for, or less at the end."""
        if len(self._buffer) < self._wanted:
            self._buffer = bytearray(self._wanted)
        view, done = memoryview(self._buffer)[: self._wanted], 0
        try:
            while done < len(view):
                got = os.readv(self._fd, [view[done:]])
                if not got:
                    break
                done += got
        except OSError as error:
            where = f"cannot read {self.name} at offset {self._position + done}"
            raise CopyFailed(f"{where}: {text(error)}") from error
        self._position += done
        return view[:done]

    def cancel(self) -> None:
        """It has one lane, and that one knows."""

    def close(self) -> None:
        """Not ours to close."""


class StreamTarget:
    """Standard output: a `Target` that is written in order, zeroes too."""

    name = "standard output"
    size: int | None = None
    block = 1
    lanes = 1
    ordered = True

    def __init__(self, fd: int) -> None:
        self.is_zero = False
        self._fd = fd
        self._position = 0
        self._done: Done = lambda length, zero: None

    def writer(self, lane: int, done: Done) -> "StreamTarget":
        """It is its own."""
        self._done = done
        return self

    def write(self, view: memoryview, offset: int) -> None:
        """The bytes that come next."""
        self._put(view, offset)
        self._done(len(view), False)

    def zero(self, offset: int, length: int, allocate: bool) -> None:
        """Zeroes, written."""
        for start in range(0, length, len(_ZEROES)):
            self._put(memoryview(_ZEROES)[: length - start], offset + start)
        self._done(length, True)

    def _put(self, view: memoryview, offset: int) -> None:
        if offset != self._position:
            raise CopyFailed(
                f"{self.name} is at {self._position}, not at {offset}: a fault of ours"
            )
        try:
            while view:
                sent = os.write(self._fd, view)
                self._position += sent
                view = view[sent:]
        except OSError as error:
            raise failed("write", len(view), self._position, self.name, error) from error

    def drain(self) -> None:
        """Everything has been written."""

    def cancel(self) -> None:
        """It has one lane, and that one knows."""

    def finish(self, size: int, flush: bool) -> None:
        """A pipe cannot be flushed."""

    def close(self) -> None:
        """Not ours to close."""


def failed(verb: str, length: int, offset: int, name: str, error: Exception) -> CopyFailed:
    """What could not be done, where, and why."""
    return CopyFailed(f"cannot {verb} {length} bytes at offset {offset} of {name}: {text(error)}")


def text(error: Exception) -> str:
    """An error in words, without its number."""
    if isinstance(error, OSError) and error.strerror:
        if error.errno == errno.ENOSPC:
            return f"{error.strerror}; make room there, then copy again"
        return error.strerror
    return str(error)

# SPDX-License-Identifier: Apache-2.0
"""The file in which the epoch map of a disk lives, mapped shared into memory.

What is stored in it is in the page cache at once, so it outlives a process that is killed; it is on
disk only after `Sidecar.flush`. Layout, words in the byte order of the host::

    0       magic, length, CRC-32, JSON: what does not change in a generation (`Description`)
    8192    boot id, 64 bytes of ASCII
    8256    words: clean, image identity (5), alive until
    12288   words: current slot, epochs of slots 0..255 (`fleece.tracking.epochs`)
    16384   reserved (for an intent log)
    65536   the cells, one byte for each granule

The file is allocated in full when it is made: a store into a hole of a mapped file kills the
process (SIGBUS) when the disk is full.

Order of the stores, for a kill or a power cut between any two: `Sidecar.begin` puts the boot id and
"alive until" before it takes back "clean", and that is durable before the first mark;
`Sidecar.finish` makes the cells and the identity durable before it says "clean".
"""

import contextlib
import errno
import fcntl
import json
import mmap
import os
import stat
import struct
import sys
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from fleece.errors import Busy, TrackingError
from fleece.tracking.atomic import sync_directory, temporary_of
from fleece.tracking.epochs import (
    STATE_WORDS,
    EpochMap,
    check_granularity,
    granules_of,
    start,
)
from fleece.tracking.identity import Identity

HEADER_BYTES: Final = 65536
MAX_REASON: Final = 500

_MAGIC: Final = b"FLCEPOCH"
_VERSION: Final = 1
_STATIC: Final = struct.Struct("<8sII")  # magic, length of the JSON, its CRC-32
_BOOT: Final = 8192
_BOOT_BYTES: Final = 64
_WORDS: Final = _BOOT + _BOOT_BYTES
_CLEAN, _IDENTITY, _ALIVE, _WORD_COUNT = 0, 1, 6, 7
_STATE: Final = 12288
_IN_USE: Final = "{} is in use by another fleece; stop that one first"


class Damaged(Exception):
    """The file is no sidecar that can be believed; the text says why, for `Description.reason`."""


@dataclass(frozen=True)
class Description:
    """What holds for a whole generation. ``reason``: why it began, for the consumers of others."""

    disk: str
    generation: str
    granularity: int
    size: int
    reason: str

    def pack(self) -> bytes:
        """The static part of the header."""
        fields = asdict(self) | {"version": _VERSION, "byteorder": sys.byteorder}
        fields["reason"] = self.reason[:MAX_REASON]
        text = json.dumps(fields).encode()
        return _STATIC.pack(_MAGIC, len(text), zlib.crc32(text)) + text

    @classmethod
    def parse(cls, header: bytes) -> "Description":
        """The inverse of `pack`. Raises `Damaged`."""
        magic, length, checksum = _STATIC.unpack_from(header)
        text = header[_STATIC.size : _STATIC.size + length]
        if magic != _MAGIC or zlib.crc32(text) != checksum:
            raise Damaged("has a damaged header")
        try:
            fields = json.loads(text)
            version, byteorder = fields.pop("version"), fields.pop("byteorder")
        except (ValueError, AttributeError, KeyError):
            raise Damaged("has a damaged header") from None
        if version != _VERSION or byteorder != sys.byteorder:
            raise Damaged("was made by another version of fleece or on another kind of host")
        return cls._checked(fields)

    @classmethod
    def _checked(cls, fields: dict[str, object]) -> "Description":
        kinds = {"disk": str, "generation": str, "granularity": int, "size": int, "reason": str}
        if {name: type(value) for name, value in fields.items()} != kinds:
            raise Damaged("has a damaged header")
        found = cls(**fields)  # type: ignore[arg-type]  # their types were compared just above
        try:
            check_granularity(found.granularity)
        except TrackingError:
            raise Damaged("has a damaged header") from None
        return found

    @property
    def file_bytes(self) -> int:
        """The length of the sidecar."""
        return HEADER_BYTES + granules_of(self.size, self.granularity)


class Lock:
    """A regular file held open with an exclusive flock(2): one process, one user of a sidecar."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    @classmethod
    def take(cls, path: Path, *, create: bool = False) -> "Lock | None":
        """Lock the file that ``path`` names; None if there is none. Raises `Busy`, OSError."""
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        while True:
            try:
                lock = cls(os.open(path, flags | (os.O_CREAT if create else 0), 0o600))
            except FileNotFoundError:
                return None
            try:
                fcntl.flock(lock.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.release()
                raise Busy(_IN_USE.format(path)) from None
            if lock.holds(path):
                return lock
            lock.release()

    def holds(self, path: Path) -> bool:
        """Whether ``path`` still names this file: it may have been replaced before we locked it."""
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(self.fd), os.stat(path, follow_symlinks=False))
        return False

    def release(self) -> None:
        """Close the file, which unlocks it. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Sidecar:
    """An open, locked, mapped sidecar. ``map`` stands on its memory and ends with it."""

    def __init__(self, lock: Lock) -> None:
        """Map the locked file. Raises `Damaged` or OSError; the lock is then still the caller's."""
        self.lock = lock
        self.description = _describe(lock.fd)
        self._mmap = mmap.mmap(lock.fd, self.description.file_bytes)
        self._views = contextlib.ExitStack()
        try:
            self._words = self._view(_WORDS, 8 * _WORD_COUNT, words=True)
            self.map = self._open_map()
        except BaseException:
            self.unmap()
            raise

    def _view(self, offset: int, length: int, *, words: bool) -> memoryview:
        enter = self._views.enter_context
        part = enter(enter(memoryview(self._mmap))[offset : offset + length])
        return enter(part.cast("Q")) if words else part

    def _open_map(self) -> EpochMap:
        about = self.description
        try:
            return EpochMap(
                self._view(HEADER_BYTES, about.file_bytes - HEADER_BYTES, words=False),
                self._view(_STATE, 8 * STATE_WORDS, words=True),
                size=about.size,
                granularity=about.granularity,
                generation=about.generation,
            )
        except TrackingError:
            raise Damaged("has a damaged table of epochs") from None

    @classmethod
    def create(
        cls,
        path: Path,
        description: Description,
        *,
        boot_id: str,
        identity: Identity,
        until: int,
        replaced: Lock | None,
    ) -> "Sidecar":
        """Make the sidecar of a new generation at ``path``, in use (`begin`).

        It is prepared beside it, made durable and renamed. ``replaced`` is the lock of what is
        there now, None if there was nothing. Raises `Busy` or OSError with ``path`` as it was.
        """
        temporary = temporary_of(path)
        lock = Lock.take(temporary, create=True)
        if lock is None:
            raise FileNotFoundError(errno.ENOENT, "the directory went away", str(path.parent))
        try:
            # Whoever makes one holds this lock until it is in place: look now, not before.
            if replaced is None and path.exists():
                raise Busy(_IN_USE.format(path))
            _fill(lock.fd, description)
            sidecar = cls(lock)
            sidecar.begin(boot_id, identity, until)
            temporary.replace(path)
            sync_directory(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            lock.release()
            raise
        return sidecar

    @property
    def clean(self) -> bool:
        """Whether `finish` was called, and `begin` not since."""
        return self._words[_CLEAN] == 1

    @property
    def boot_id(self) -> str:
        """The boot of the host in which it was last in use."""
        return self._mmap[_BOOT : _BOOT + _BOOT_BYTES].rstrip(b"\0").decode("ascii", "replace")

    @property
    def identity(self) -> Identity:
        """The image as of `begin`, or as of `finish` if that was called since."""
        return Identity.from_words(tuple(self._words[_IDENTITY:_ALIVE]))

    @property
    def alive_until(self) -> int:
        """Nanoseconds since 1970: whoever used the sidecar did not touch the image after this."""
        return self._words[_ALIVE]

    @alive_until.setter
    def alive_until(self, when: int) -> None:
        self._words[_ALIVE] = when

    def begin(self, boot_id: str, identity: Identity, until: int) -> None:
        """It is in use, alive ``until``: durable on return, before any mark. Raises OSError."""
        self.alive_until = until
        name = boot_id.encode("ascii", "replace")[:_BOOT_BYTES]
        self._mmap[_BOOT : _BOOT + _BOOT_BYTES] = name.ljust(_BOOT_BYTES, b"\0")
        self._words[_CLEAN] = 0
        self._store(identity)
        self._mmap.flush(0, HEADER_BYTES)

    def finish(self, identity: Identity) -> None:
        """It and the image, which has this ``identity`` now, are done with. Raises OSError."""
        self._store(identity)
        self._mmap.flush()
        self._words[_CLEAN] = 1
        self._mmap.flush(0, HEADER_BYTES)

    def _store(self, identity: Identity) -> None:
        for index, word in enumerate(identity.words()):
            self._words[_IDENTITY + index] = word

    def unmap(self) -> None:
        """End ``map``, and keep the lock. Idempotent."""
        self._views.close()
        self._mmap.close()

    def close(self) -> None:
        """`unmap`, and give the lock back. Idempotent."""
        self.unmap()
        self.lock.release()


def _describe(fd: int) -> Description:
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_size < HEADER_BYTES:
        raise Damaged("is too short")
    description = Description.parse(os.pread(fd, _BOOT, 0))
    if description.file_bytes != found.st_size:
        raise Damaged("has the wrong length")
    return description


def _fill(fd: int, description: Description) -> None:
    """Make the locked file a sidecar on which nothing was marked, allocated and durable."""
    state = memoryview(bytearray(8 * STATE_WORDS)).cast("Q")
    start(state)
    os.ftruncate(fd, 0)
    os.posix_fallocate(fd, 0, description.file_bytes)
    os.pwrite(fd, description.pack(), 0)
    os.pwrite(fd, state, _STATE)
    os.fsync(fd)

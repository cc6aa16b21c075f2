# SPDX-License-Identifier: Apache-2.0
"""`Overlay`: the qcow2 file that takes the old data of a disk while a snapshot of it lives.

A real qcow2 image, version 3, whose backing file is the disk, so ``qemu-img`` can look at it. It is
laid out for one purpose: to save a run of clusters in two system calls.

* All L2 tables lie in one sparse region, one behind the other, and every L1 entry is written when
  the file is made. So the region is one flat table with 8 bytes for each cluster of the disk.
* New data always goes to the end of the file. There is nothing to look up and nothing to free.
* Lazy refcounts: the file is dirty from its first byte to its last, and counts are not kept.
  ``qemu-img check -r all`` makes them, should anybody want to keep the file.

`Overlay.store` hands the data to the kernel, and then the entries that refer to it. So the file
is right after a SIGKILL at any moment, and `Overlay.open` finds what was saved. Nothing is ever
synced: after a crash of the host, an overlay means nothing any more.

The entries are written with ``pwrite`` and read with ``pread``, not through a mapping: to store
into a mapped hole of a full file system is a SIGBUS, and so is to read a page that the disk cannot
give; ``pread`` of some entries takes 0.5 us, and needs no memory.
"""

import errno
import logging
import os
import stat
import struct
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from fleece.block.fallocate import KEEP_SIZE, fallocate
from fleece.block.null import clear
from fleece.errors import ImageCorrupt, ImageError, NotFound, UnsupportedFeature
from fleece.formats.qcow2 import constants as c
from fleece.formats.qcow2 import header as headers
from fleece.formats.qcow2.entries import ClusterRun, Scanner
from fleece.formats.qcow2.header import Header
from fleece.formats.qcow2.hosting import write_all
from fleece.units import align_up, format_size, is_power_of_two
from nbdwire.constants import STATE_HOLE, STATE_ZERO
from nbdwire.export import ZERO_RUN, Run
from nbdwire.extents import Extent

_CHUNK: Final = 4 << 20
_RESERVE: Final = 4 << 20
_START_BYTES: Final = 4096  # a page

log = logging.getLogger(__name__)


class Overlay:
    """Clusters of one disk as they were. Made by `create` or `open`.

    ``size`` is that of the disk and ``cluster_size`` a power of two, in bytes. All verbs may be
    called by several threads at once; two that store must not name the same cluster. Reading verbs
    are for clusters that were stored: OSError (EIO) for any other.
    """

    def __init__(self, path: Path, fd: int, header: Header) -> None:
        self.path = path
        self.fd = fd
        self.size = header.size
        self.cluster_size = header.cluster_size
        self.broken = bool(header.incompatible & c.INCOMPATIBLE_CORRUPT)
        self._header = header
        self._bits = header.cluster_bits
        self._clusters = _cluster_count(header)
        self._tables = _tables_offset(header)
        self._data = _data_offset(header)
        self._scanner = Scanner(header.cluster_size)
        self._lock = threading.Lock()
        self._next = self._data
        self._stored = 0
        self._reserved = 0

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        size: int,
        *,
        backing: str,
        backing_format: str,
        cluster_size: int = 65536,
    ) -> Self:
        """A new and empty overlay of a disk of ``size`` bytes, which ``backing`` names.

        OSError (FileExistsError too) if the file cannot be made; none is left behind then.
        `UnsupportedFeature` if ``cluster_size`` (512 bytes to 2 MiB) is too small for the disk.
        """
        path = Path(path)
        header = _plan(path, size, backing, backing_format, cluster_size)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, _data_offset(header))
            write_all(fd, memoryview(_start(header)), 0)
            write_all(fd, memoryview(_first_level(header).tobytes()), header.l1_offset)
        except BaseException:
            os.close(fd)
            path.unlink(missing_ok=True)
            raise
        return cls(path, fd, header)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """The overlay that an earlier process made, killed or not, with all that it stored.

        `NotFound`, `NotAnImage`, or `ImageCorrupt` if anything in it is not as `create` and `store`
        leave it. Costs a look at every L2 entry that was ever written.
        """
        path = Path(path)
        fd = _open(path)
        try:
            return cls._from_file(path, fd)
        except OSError as error:
            os.close(fd)
            raise ImageError(f"{path}: cannot be read: {error.strerror or error}") from error
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def _from_file(cls, path: Path, fd: int) -> Self:
        end = os.fstat(fd).st_size
        start = os.pread(fd, 512, 0)
        start = os.pread(fd, headers.cluster_size_of(start), 0)
        header = headers.parse(start, end, str(path))
        _check_layout(header, path, fd, end)
        overlay = cls(path, fd, header)
        overlay._next = align_up(end, overlay.cluster_size)
        try:
            overlay._check_entries()
        except MemoryError:
            raise ImageCorrupt(f"{path}: a file of {end} bytes is no overlay") from None
        return overlay

    # Saving

    def store(self, first: int, count: int, view: memoryview) -> None:
        """Save clusters ``[first, first + count)``, whose old bytes are ``view``.

        Only the last cluster of the disk may be short. OSError: nothing of it is stored.
        """
        length = count << self._bits
        with self._lock:
            host = self._next
            self._next = host + length
            self._stored += length
            if self._next > self._reserved:
                self._reserve(host)
        try:
            if len(view) != length:
                view = _padded(view, length)
            write_all(self.fd, view, host)
            entry = host | c.COPIED
            if count == 1:
                self._publish(first, entry.to_bytes(8, "big"))
            else:
                entries = range(entry, entry + length, self.cluster_size)
                self._publish(first, struct.pack(f">{count}Q", *entries))
        except BaseException:
            self._give_back(host, length)
            raise

    def _reserve(self, start: int) -> None:
        """Let the file system allocate ahead: a store takes a fifth less time then.

        It is behind the end of the file, so nothing but the file system sees it; what cannot be
        had is not needed.
        """
        try:
            fallocate(self.fd, KEEP_SIZE, start, self._next - start + _RESERVE)
            self._reserved = self._next + _RESERVE
        except OSError:
            self._reserved = sys.maxsize

    def store_zeroes(self, first: int, count: int) -> None:
        """Save clusters ``[first, first + count)`` as zeroes, without data. OSError: none is."""
        for start in range(first, first + count, _CHUNK // 8):
            n = min(_CHUNK // 8, first + count - start)
            try:
                self._publish(start, c.ZERO.to_bytes(8, "big") * n)
            except BaseException:
                if start > first:
                    self._withdraw(first, (start - first) * 8)
                raise

    def _publish(self, first: int, entries: bytes) -> None:
        at = self._tables + first * 8
        done = os.pwrite(self.fd, entries, at)
        try:
            while done < len(entries):
                done += os.pwrite(self.fd, entries[done:], at + done)
        except BaseException:
            self._withdraw(first, done)
            raise

    def _withdraw(self, first: int, length: int) -> None:
        """Take back entries just written: their place is allocated, so this needs no space."""
        write_all(self.fd, memoryview(bytes(length)), self._tables + first * 8)

    def _give_back(self, host: int, length: int) -> None:
        with self._lock:
            self._stored -= length
            if self._next == host + length:
                self._next = host

    # What was saved

    def saved_map(self) -> bytearray:
        """A byte for each cluster of the disk: 1 if it was stored, else 0."""
        saved = bytearray(self._clusters)
        view = np.frombuffer(saved, np.uint8)
        for first, entries in self._written_entries():
            view[first : first + len(entries)] = entries != 0
        return saved

    def _written_entries(self) -> Iterator[tuple[int, NDArray[np.uint64]]]:
        """``(first cluster, entries)`` of the parts of the tables that are no holes."""
        at, end = self._tables, self._tables + self._clusters * 8
        while at < end:
            try:
                at = max(at, os.lseek(self.fd, at, os.SEEK_DATA) & ~7)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return
                raise
            stop = min(end, align_up(os.lseek(self.fd, at, os.SEEK_HOLE), 8))
            while at < stop:
                data = os.pread(self.fd, min(_CHUNK, stop - at), at)
                if not data or len(data) % 8:
                    raise OSError(errno.EIO, "the file was cut short", str(self.path))
                yield (at - self._tables) // 8, np.frombuffer(data, ">u8").astype(np.uint64)
                at += len(data)

    def _check_entries(self) -> None:
        """No entry but what `store` writes: in the data, and no cluster twice. Counts them too."""
        low, bits = np.uint64(self._data >> self._bits), np.uint64(self._bits)
        seen = np.zeros((self._next - self._data) >> self._bits, np.bool_)
        total = 0
        for first, entries in self._written_entries():
            data = entries[(entries != 0) & (entries != c.ZERO)]
            hosts = data & np.uint64(~(c.COPIED | (self.cluster_size - 1)) & (1 << 64) - 1)
            numbers = (hosts >> bits) - low  # wraps where a host lies before the data
            if ((hosts | np.uint64(c.COPIED)) != data).any() or (numbers >= len(seen)).any():
                raise ImageCorrupt(
                    f"{self.path}: an L2 entry from cluster {first} is not an overlay's; remove it"
                )
            seen[numbers.astype(np.int64)] = True
            total += len(data)
        if int(np.count_nonzero(seen)) != total:
            raise ImageCorrupt(f"{self.path}: two clusters share one place; remove the file")
        self._stored = total << self._bits

    def _runs(self, offset: int, length: int) -> list[ClusterRun]:
        first = offset >> self._bits
        count = ((offset + length - 1) >> self._bits) - first + 1
        data = os.pread(self.fd, count * 8, self._tables + first * 8)
        runs: list[ClusterRun] = []
        self._scanner.scan(runs, data, 0, count)
        return runs

    def map(self, offset: int, length: int) -> list[Run]:
        """Runs of the overlay's file, and zero runs, of all of the range."""
        first = offset >> self._bits
        if (offset + length - 1) >> self._bits == first:  # most reads: half the time this way
            entry = int.from_bytes(os.pread(self.fd, 8, self._tables + first * 8), "big")
            if entry > c.COPIED:
                inside = offset & (self.cluster_size - 1)
                return [(self.fd, (entry & c.OFFSET_MASK) + inside, length)]
        out: list[Run] = []
        position, end = offset, offset + length
        for kind, host, count in self._runs(offset, length):
            inside = position & (self.cluster_size - 1)
            n = min((count << self._bits) - inside, end - position)
            if kind == c.NORMAL:
                out.append((self.fd, host + inside, n))
            elif kind == c.ZERO_PLAIN:
                out.append((ZERO_RUN, 0, n))
            else:
                raise OSError(errno.EIO, "cluster was not stored", str(self.path))
            position += n
        return out

    def extents(self, offset: int, length: int) -> list[Extent]:
        """Data, or for what was stored as zeroes HOLE | ZERO, of all of the range."""
        out = []
        for fd, _, n in self.map(offset, length):
            out.append(Extent(offset, n, STATE_HOLE | STATE_ZERO if fd == ZERO_RUN else 0))
            offset += n
        return out

    def pread_into(self, buf: memoryview, offset: int) -> None:
        """Fill ``buf`` with what was stored from ``offset``."""
        at = 0
        for fd, host, length in self.map(offset, len(buf)):
            part = buf[at : at + length]
            at += length
            if fd == ZERO_RUN:
                clear(part)
            elif os.preadv(fd, [part], host) != length:
                self._read_rest(part, host)

    def _read_rest(self, part: memoryview, host: int) -> None:
        """The kernel gave less than asked: it may, for over 2 GiB, but not at the end."""
        while part:
            got = os.preadv(self.fd, [part], host)
            if got == 0:
                raise OSError(errno.EIO, "the overlay was cut short", str(self.path))
            part, host = part[got:], host + got

    # The file

    @property
    def data_bytes(self) -> int:
        """What it holds, in whole clusters; zeroes and tables count nothing."""
        return self._stored

    @property
    def backing_file(self) -> str | None:
        """The name of the backing file: the disk, or the overlay of the next newer snapshot."""
        return self._header.backing_file

    def set_backing(self, path: str, fmt: str) -> None:
        """Name another backing file: the first bytes of the file, in one write.

        ImageError if the name is too long (`c.MAX_BACKING_NAME`, less in small clusters).
        """
        with self._lock:
            header = _with_backing(self._header, path, fmt, self.path)
            write_all(self.fd, memoryview(_start(header)), 0)
            self._header = header

    def mark_broken(self) -> None:
        """Old data was lost: say so in the file, for whoever opens it after us. Never raises.

        It is the format's corrupt bit, and needs no space. Should not even that be possible, the
        file is cut to nothing, so that it can never be taken for a snapshot again.
        """
        self.broken = True
        try:
            with self._lock:
                bits = self._header.incompatible | c.INCOMPATIBLE_CORRUPT
                self._header = replace(self._header, incompatible=bits)
                write_all(self.fd, memoryview(bits.to_bytes(8, "big")), c.AT_INCOMPATIBLE)
        except OSError as error:
            log.warning("overlay %s cannot be marked as broken: %s; it is cut", self.path, error)
            self._cut()

    def _cut(self) -> None:
        try:
            os.ftruncate(self.fd, 0)
        except OSError as error:
            log.error("overlay %s cannot even be cut: %s; remove it", self.path, error)

    def close(self) -> None:
        """Close the file and leave it. Idempotent."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def remove(self) -> None:
        """Close the file and delete it. Idempotent."""
        self.path.unlink(missing_ok=True)
        self.close()


def _plan(path: Path, size: int, backing: str, backing_format: str, cluster_size: int) -> Header:
    """The header of a new overlay: header, refcount table, L1 table, L2 tables, data."""
    bits = cluster_size.bit_length() - 1
    if not is_power_of_two(cluster_size) or not c.MIN_CLUSTER_BITS <= bits <= c.MAX_CLUSTER_BITS:
        raise UnsupportedFeature(
            f"a cluster size of {cluster_size} bytes is not possible; "
            "take a power of two from 512 to 2M"
        )
    l1_size = -(-size // (cluster_size * cluster_size // 8))
    if l1_size * 8 > c.MAX_L1_BYTES or size > c.MAX_SIZE:
        raise UnsupportedFeature(
            f"clusters of {format_size(cluster_size)} are too small for a disk of "
            f"{format_size(size)}; take larger ones"
        )
    header = Header(
        version=3,
        cluster_bits=bits,
        size=size,
        l1_size=l1_size,
        l1_offset=2 << bits,
        refcount_table_offset=1 << bits,
        refcount_table_clusters=1,
        incompatible=c.INCOMPATIBLE_DIRTY,
        compatible=c.COMPATIBLE_LAZY_REFCOUNTS,
    )
    return _with_backing(header, backing, backing_format, path)


def _with_backing(header: Header, backing: str, fmt: str, path: Path) -> Header:
    header = replace(header, backing_file=headers.backing_name(backing), backing_format=fmt)
    try:
        _start(header)
    except ValueError as error:
        raise ImageError(f"{path}: {error}; use a shorter path or larger clusters") from None
    return header


def _start(header: Header) -> bytes:
    """The header as one block of fixed length, within one page: a kill cannot tear its write."""
    return headers.build(header).ljust(min(header.cluster_size, _START_BYTES), b"\0")


def _cluster_count(header: Header) -> int:
    return -(-header.size // header.cluster_size)


def _tables_offset(header: Header) -> int:
    return header.l1_offset + align_up(header.l1_size * 8, header.cluster_size)


def _data_offset(header: Header) -> int:
    return _tables_offset(header) + (header.l1_size << header.cluster_bits)


def _first_level(header: Header) -> NDArray[np.uint64]:
    """The whole L1 table, big-endian: every L2 table in its place."""
    numbers = np.arange(header.l1_size, dtype=np.uint64) << np.uint64(header.cluster_bits)
    return (numbers + np.uint64(_tables_offset(header) | c.COPIED)).astype(">u8")


def _open(path: Path) -> int:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise NotFound(f"there is no overlay {path}") from None
    except OSError as error:
        raise ImageError(f"{path}: cannot be opened: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ImageError(f"{path}: an overlay is a regular file")
    return fd


def _check_layout(header: Header, path: Path, fd: int, end: int) -> None:
    """Raise `ImageCorrupt` unless header and L1 table are what `Overlay.create` writes."""
    flags = header.incompatible & ~c.INCOMPATIBLE_CORRUPT
    planned = replace(
        _plan(path, header.size, "", "raw", header.cluster_size),
        incompatible=header.incompatible,
        backing_file=header.backing_file,
        backing_format=header.backing_format,
        extensions=header.extensions,
    )
    if header != planned or flags != c.INCOMPATIBLE_DIRTY or end < _data_offset(header):
        raise ImageCorrupt(f"{path}: this is not an overlay as it was made; remove it")
    first_level = _first_level(header).tobytes()
    if os.pread(fd, len(first_level), header.l1_offset) != first_level:
        raise ImageCorrupt(f"{path}: the L1 table is not as it was made; remove the file")


def _padded(view: memoryview, length: int) -> memoryview:
    """The end of the disk: the file has whole clusters all the same."""
    padded = bytearray(length)
    padded[: len(view)] = view
    return memoryview(padded)

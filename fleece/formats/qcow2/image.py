# SPDX-License-Identifier: Apache-2.0
"""`Qcow2Node`: a qcow2 image as a node, read and written.

Locks. One lock for the metadata (`Metadata.lock`), not held while data is read or written. Whoever
allocates holds the clusters concerned in a `RangeLock`, so that two writers that both see a cluster
as new do not each make one. A write to clusters that are there takes no range lock: such a cluster
never moves.

`map` promises that its runs are stable: a host cluster that was ever named by it is not given to
other data while somebody may still be sending it. A cluster that `zero` or `trim` gave back can be
reused only when that is durable, and some time later: see `refcounts`. Until then it reads as it
did, or as zeroes once its space was given back: both are what a read that overlaps a trim may get.

The order in which things reach the disk, and what that promises, is told in `metadata`.
"""

import errno
from typing import Final

from fleece.block.node import Node
from fleece.errors import ImageCorrupt, ImageError, UnsupportedFeature
from fleece.formats.qcow2 import compressed
from fleece.formats.qcow2 import constants as c
from fleece.formats.qcow2 import header as headers
from fleece.formats.qcow2.bitmaps import BitmapSet
from fleece.formats.qcow2.entries import CorruptEntry
from fleece.formats.qcow2.header import Header
from fleece.formats.qcow2.options import Qcow2Options
from fleece.formats.qcow2.rebuild import rebuild
from fleece.formats.qcow2.refcounts import Refcounts
from fleece.formats.qcow2.zeroing import Qcow2Zeroer

_DEFAULTS: Final = Qcow2Options()


class Qcow2Node(Qcow2Zeroer):
    """A qcow2 image, version 2 or 3. ``name`` is what messages call it, usually its path.

    It takes over ``file``, ``backing`` and ``data_file`` (where the guest's data lies, if it is
    not in ``file``): all are closed with it. Raises `NotAnImage`, `UnsupportedFeature` or
    `ImageCorrupt` (and closes none). An image that was not closed is repaired before it is written.
    """

    def __init__(
        self,
        file: Node,
        *,
        backing: Node | None = None,
        data_file: Node | None = None,
        read_only: bool = False,
        name: str | None = None,
        header: Header | None = None,
        options: Qcow2Options = _DEFAULTS,
    ) -> None:
        name = file.name if name is None else name
        header = read_header(file, name) if header is None else header
        headers.check_supported(header, name, writable=not read_only)
        _check_data_file(header, data_file, name)
        try:
            if header.dirty and not read_only:
                header = rebuild(file, header, name)
            limit = options.refcount_cache_bytes
            counts = None if read_only else Refcounts(file, header, limit=limit)
            super().__init__(
                file,
                header,
                backing,
                name=name,
                data=data_file,
                read_only=read_only,
                counts=counts,
                options=options,
            )
            if not read_only and headers.extension(header, c.EXT_BITMAPS) is not None:
                self.bitmaps = BitmapSet(self)
                self.refresh_recorder()
        except OSError as error:
            kind = ImageCorrupt if error.errno in (errno.EIO, errno.EFBIG) else ImageError
            raise kind(f"{name}: {error.strerror or error}") from error

    def _begin(self) -> None:
        if self.read_only:
            raise OSError(errno.EPERM, "opened read-only", self.name)
        if self.bitmaps is not None:
            self.bitmaps.begin()
        self._meta.begin()

    def refresh_recorder(self) -> None:
        """The set of bitmaps, or one of them, was changed while the disk was at rest."""
        self._record = None if self.bitmaps is None else self.bitmaps.recorder

    def write_compressed(self, view: memoryview, offset: int) -> bool:
        """One whole cluster, or the disk's last bytes, compressed; False if it does not shrink.

        Nothing is written then. OSError (EIO) if the cluster is there already, as in QEMU;
        (EOPNOTSUPP) in an image that is encrypted or has a data file. Several threads may compress.
        """
        if self.data is not self.file:
            raise OSError(errno.EOPNOTSUPP, "it cannot hold compressed clusters", self.name)
        packed = compressed.pack(view, self.header.compression_type, self._bits)
        if packed is None:
            return False
        self.write_packed(packed, offset)
        return True

    def write_packed(self, packed: bytes, offset: int) -> None:
        """The cluster at ``offset``, as `fleece.formats.qcow2.compressed.pack` made it. OSError."""
        self._change(offset, min(self._mask + 1, self.size - offset))
        cluster = offset >> self._bits
        try:
            with self._ranges.exclusive(cluster, cluster + 1):
                self._own_tables(cluster, cluster + 1)
                self._write_packed(cluster, packed)
        except CorruptEntry as error:
            self._meta.mark_corrupt(str(error.strerror))
            raise
        if self._meta.crowded:
            self.flush()

    def _write_packed(self, cluster: int, packed: bytes) -> None:
        with self._lock:
            if self._map.entry(cluster) or cluster in self._pending:
                raise OSError(errno.EIO, "a cluster that is there cannot be compressed", self.name)
            host = self._meta.counts.allocate_bytes(len(packed))
        try:
            self._write_data(memoryview(packed), host)
        except BaseException:
            with self._lock:
                self._meta.counts.release_bytes(host, len(packed))
            raise
        words = [compressed.entry_for(host, len(packed), self._bits), 0]
        with self._lock:
            self._publish(cluster, words[: self._per_entry])

    def set_header(self, header: Header) -> None:
        """Write another header; the caller has drained the node, and flushed it."""
        self._meta.set_header(header)
        self.size = header.size

    def reload(self) -> None:
        """The tables on disk were rearranged, after a flush of a drained node: read them again."""
        with self._lock:
            header = self.header
            self.size = header.size
            self._map.reload(header.l1_offset, header.l1_size)
            self._meta.overlap.reload(self.file, header)
            self._unpacked.clear()

    def flush(self) -> None:
        """All is on stable storage: one sync, or two or three where clusters are new."""
        if self.read_only:
            return
        self._meta.check_usable()
        try:
            self._settle_all()
        except OSError:
            if not self._meta.broken:
                self._meta.flush()  # what can be kept is kept
            raise
        self._meta.flush()

    def close(self) -> None:
        """Write all metadata and close the files. OSError if that failed; they are closed then."""
        try:
            closed, self._closed = self._closed, True
            stored = self.bitmaps is None or not self.bitmaps.changed
            if not closed and not self.read_only and (self._meta.begun or not stored):
                try:
                    self._settle_all()
                finally:
                    self._close_metadata()
        finally:
            super().close()

    def _close_metadata(self) -> None:
        try:
            if self.bitmaps is not None and not self._meta.broken:
                self._meta.flush()
                self.bitmaps.store()
        except ImageError as error:
            raise OSError(errno.ENOSPC, str(error)) from error
        finally:
            self._meta.close()


def _check_data_file(header: Header, data_file: Node | None, name: str) -> None:
    """`ImageError` if the data is not where the header says."""
    if header.crypt_method and data_file is None:
        raise UnsupportedFeature(
            f"{name}: it is encrypted; give its passphrase: --object secret,id=sec0,file=FILE "
            "--image-opts driver=qcow2,encrypt.key-secret=sec0,file.filename=IMAGE"
        )
    if header.has_data_file and data_file is None:
        raise ImageError(f"{name}: its data lies in another file; name it with data-file=FILE")


def read_header(file: Node, name: str) -> Header:
    """The validated header of ``file``; `NotAnImage`, `UnsupportedFeature` or `ImageCorrupt`."""
    start = _read(file, min(file.size, 512))
    data = _read(file, min(file.size, headers.cluster_size_of(start)))
    return headers.parse(data, file.size, name)


def _read(file: Node, length: int) -> bytes:
    data = bytearray(length)
    if length:
        file.pread_into(memoryview(data), 0)
    return bytes(data)

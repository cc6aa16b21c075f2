# SPDX-License-Identifier: Apache-2.0
"""The compressed clusters that were read last, unpacked: small reads unpack each cluster once.

Those that will be read soon are unpacked by other threads beforehand (`Unpacked.prefetch`): to
inflate is most of the work of a read, and it holds no lock of Python's.
"""

import os
import threading
import time
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

from fleece.block.node import Node
from fleece.formats.qcow2 import compressed
from fleece.formats.qcow2.header import Header

_LIMIT: Final = 8 << 20  # bytes; 4 clusters at least
# A cluster that is unpacked sooner is not worth the way to another thread and back.
_WORTH_A_THREAD: Final = 100e-6  # seconds


class Unpacked:
    """Compressed clusters of one image, by their L2 entry. Thread-safe; unpacking is not locked."""

    def __init__(self, file: Node, header: Header) -> None:
        self._file = file
        self._bits = header.cluster_bits
        self._type = header.compression_type
        self._most = max(4, _LIMIT >> header.cluster_bits)
        self._lock = threading.Lock()
        self._clusters: OrderedDict[int, bytes] = OrderedDict()
        self._coming: dict[int, Future[bytes]] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._seconds = 0.0  # that one cluster takes, of late

    def read(self, entry: int, view: memoryview, at: int) -> None:
        """Fill ``view`` with the cluster's bytes from ``at``. OSError (EIO) if it is damaged."""
        data = self._get(entry)
        if data is None:
            coming = self._coming.get(entry)
            data = self._load(entry) if coming is None else self._take(entry, coming)
            if len(view) < len(data):  # who reads all of it does not come again
                self._put(entry, data)
        view[:] = data[at : at + len(view)]

    def read_cached(self, entry: int, view: memoryview, at: int) -> bool:
        """As `read`, or False if it would have to be unpacked."""
        data = self._get(entry)
        if data is None:
            return False
        view[:] = data[at : at + len(view)]
        return True

    def prefetch(self, entry: int) -> None:
        """Let another thread unpack it, if it is not there yet and few others are under way."""
        if self._seconds < _WORTH_A_THREAD:
            return
        with self._lock:
            if entry in self._clusters or entry in self._coming or self._is_busy():
                return
            if self._pool is None:
                self._pool = ThreadPoolExecutor(os.cpu_count() or 1, "unpack")
            self._coming[entry] = self._pool.submit(self._load, entry)

    def _is_busy(self) -> bool:
        """Whether as many are under way as may be; one that nobody came for makes room."""
        if len(self._coming) < self._most:
            return False
        oldest = next(iter(self._coming))
        if self._coming[oldest].done():
            del self._coming[oldest]
            return False
        return True

    def _load(self, entry: int) -> bytes:
        began = time.perf_counter()
        data = compressed.read(self._file, entry, self._bits, self._type)
        self._seconds += (time.perf_counter() - began - self._seconds) / 8
        return data

    def _take(self, entry: int, coming: Future[bytes]) -> bytes:
        """What another thread unpacks; it is forgotten then, so that none of it stays for ever."""
        try:
            return coming.result()
        finally:
            with self._lock:
                if self._coming.get(entry) is coming:
                    del self._coming[entry]

    def _get(self, entry: int) -> bytes | None:
        with self._lock:
            data = self._clusters.get(entry)
            if data is not None:
                self._clusters.move_to_end(entry)
            return data

    def _put(self, entry: int, data: bytes) -> None:
        with self._lock:
            self._clusters[entry] = data
            if len(self._clusters) > self._most:
                self._clusters.popitem(last=False)

    def clear(self) -> None:
        """The image's tables were changed behind its back; nobody reads meanwhile."""
        with self._lock:
            self._clusters.clear()
            self._coming.clear()

    def forget(self, entry: int) -> None:
        """Nothing refers to it any more: its place may get other data."""
        with self._lock:
            self._clusters.pop(entry, None)
            self._coming.pop(entry, None)

    def close(self) -> None:
        """End the threads."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(cancel_futures=True)

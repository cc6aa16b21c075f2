# SPDX-License-Identifier: Apache-2.0
"""The compressed clusters that were read last, unpacked: small reads unpack each cluster once."""

import threading
from collections import OrderedDict
from typing import Final

from fleece.block.node import Node
from fleece.formats.qcow2 import compressed
from fleece.formats.qcow2.header import Header

_LIMIT: Final = 8 << 20  # bytes; 4 clusters at least


class Unpacked:
    """Compressed clusters of one image, by their L2 entry. Thread-safe; unpacking is not locked."""

    def __init__(self, file: Node, header: Header) -> None:
        self._file = file
        self._bits = header.cluster_bits
        self._type = header.compression_type
        self._most = max(4, _LIMIT >> header.cluster_bits)
        self._lock = threading.Lock()
        self._clusters: OrderedDict[int, bytes] = OrderedDict()
        self._forgotten = 0  # how often something was

    def read(self, entry: int, view: memoryview, at: int) -> None:
        """Fill ``view`` with the cluster's bytes from ``at``. OSError (EIO) if it is damaged."""
        forgotten = self._forgotten
        data = self._get(entry)
        if data is None:
            data = compressed.read(self._file, entry, self._bits, self._type)
            if len(view) < len(data):  # who reads all of it does not come again
                self._put(entry, data, forgotten)
        view[:] = data[at : at + len(view)]

    def read_cached(self, entry: int, view: memoryview, at: int) -> bool:
        """As `read`, or False if it would have to be unpacked."""
        data = self._get(entry)
        if data is None:
            return False
        view[:] = data[at : at + len(view)]
        return True

    def _get(self, entry: int) -> bytes | None:
        with self._lock:
            data = self._clusters.get(entry)
            if data is not None:
                self._clusters.move_to_end(entry)
            return data

    def _put(self, entry: int, data: bytes, forgotten: int) -> None:
        with self._lock:
            if forgotten != self._forgotten:
                return  # it may have been this one, and its place may get other data
            self._clusters[entry] = data
            if len(self._clusters) > self._most:
                self._clusters.popitem(last=False)

    def forget(self, entry: int) -> None:
        """Nothing refers to it any more: its place may get other data."""
        with self._lock:
            self._clusters.pop(entry, None)
            self._forgotten += 1

    def clear(self) -> None:
        """Forget all: the tables were rearranged."""
        with self._lock:
            self._clusters.clear()
            self._forgotten += 1

# SPDX-License-Identifier: Apache-2.0
"""BLOCK_STATUS: which contexts are asked about, and their extents in the shape that is sent.

Source: the protocol's sections "Metadata querying" and, of "Request types", NBD_CMD_BLOCK_STATUS.
"""

import errno
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from nbdwire import constants as c
from nbdwire.codec import EFFECT_LENGTH, U32
from nbdwire.export import Export, ExtentsFunction
from nbdwire.extents import Extent

_Combine = Callable[[int, int], int]


class Context:
    """One selected context. Only the allocation is the node's own: ``function`` None.

    ``combine`` says what one status is true for two extents together, None if there is none.
    """

    __slots__ = ("combine", "function", "number")

    def __init__(self, number: int, name: str, function: ExtentsFunction | None) -> None:
        self.number = number
        self.function = function
        self.combine: _Combine | None = None
        if name == c.CONTEXT_BASE_ALLOCATION:
            self.combine = operator.and_  # "not known to be a hole, or zero" is always true
        elif name.startswith(c.CONTEXT_DIRTY_BITMAP_PREFIX):
            self.combine = operator.or_  # too much is dirty rather than too little

    def extents(
        self, node: Export, offset: int, length: int, limit: int, block: int = 1
    ) -> list[Extent]:
        """At most ``limit`` extents from ``offset``, whose borders are multiples of ``block``.

        The last may end with the range instead. OSError.
        """
        found = walk(node.extents if self.function is None else self.function, offset, length)
        if block > 1 and self.combine is not None:
            found = align(found, block, self.combine)
        return collect(found, limit)


def select(
    contexts: Sequence[tuple[int, str]], functions: Mapping[str, ExtentsFunction]
) -> list[Context]:
    """The negotiated ``contexts``, (id, name). KeyError if the export has lost one of them.

    No context but the allocation may ever be answered with the node's own extents.
    """
    return [
        Context(
            number,
            name,
            functions.get(name) if name == c.CONTEXT_BASE_ALLOCATION else functions[name],
        )
        for number, name in contexts
    ]


def parse_filter(payload: bytes, contexts: Sequence[Context]) -> tuple[int, list[Context]]:
    """The effect length, and those of ``contexts`` that a request with a payload asks about.

    OSError (EINVAL): its length is wrong, or an id is unknown or there twice.
    """
    head = EFFECT_LENGTH.size
    if len(payload) <= head or (len(payload) - head) % U32.size:
        raise OSError(errno.EINVAL, "a status payload holds 8 bytes and 4 for each of its contexts")
    known = {context.number: context for context in contexts}
    numbers = [number for (number,) in U32.iter_unpack(payload[head:])]
    if len(set(numbers)) < len(numbers) or not set(numbers) <= known.keys():
        raise OSError(errno.EINVAL, "a context of the status payload is unknown, or there twice")
    (length,) = EFFECT_LENGTH.unpack_from(payload)
    return length, [known[number] for number in numbers]


def walk(function: ExtentsFunction, offset: int, length: int) -> Iterator[Extent]:
    """Ask ``function`` until the range is covered; what it tells beyond the range is cut off.

    OSError (EIO): its answer has a gap, or is empty.
    """
    position, end = offset, offset + length
    while position < end:
        before = position
        for extent in function(position, end - position):
            if extent.offset != position:
                raise OSError(errno.EIO, "the list of extents has a gap")
            position = extent.end
            if position >= end:
                yield Extent(extent.offset, end - extent.offset, extent.status)
                return
            yield extent
        if position <= before:
            raise OSError(errno.EIO, "the list of extents made no progress")


def collect(extents: Iterable[Extent], limit: int) -> list[Extent]:
    """The first ``limit`` of them, each as long as its status lasts; neighbours are joined."""
    found: list[Extent] = []
    for extent in extents:
        if found and found[-1].status == extent.status:
            last = found[-1]
            found[-1] = Extent(last.offset, last.length + extent.length, last.status)
        elif len(found) == limit:
            break
        elif extent.length:
            found.append(extent)
    return found


def align(extents: Iterable[Extent], block: int, combine: _Combine) -> Iterator[Extent]:
    """The same with borders at multiples of ``block``; a block of several gets one status.

    The first extent must begin at such a border; the last ends where it did.
    """
    begun: Extent | None = None  # a block that is not complete yet
    for extent in extents:
        start, stop, status = extent.offset, extent.end, extent.status
        if begun is not None:
            stop = min(stop, begun.offset + block)
            begun = Extent(begun.offset, stop - begun.offset, combine(begun.status, status))
            if begun.length < block:
                continue
            yield begun
            start, stop, begun = stop, extent.end, None
        whole = (stop - start) // block * block
        if whole:
            yield Extent(start, whole, status)
        if start + whole < stop:
            begun = Extent(start + whole, stop - start - whole, status)
    if begun is not None:
        yield begun


def clip_lengths(extents: list[Extent], longest: int) -> list[Extent]:
    """``extents`` up to the first that is longer than ``longest``, which is cut to that."""
    for index, extent in enumerate(extents):
        if extent.length > longest:
            return [*extents[:index], Extent(extent.offset, longest, extent.status)]
    return extents

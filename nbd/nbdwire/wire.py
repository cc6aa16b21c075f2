# SPDX-License-Identifier: Apache-2.0
"""The three forms that requests and replies have on the wire; the handshake chooses one of them.

=========== ==================== =============================================
form        request              reply
=========== ==================== =============================================
simple      28 bytes             16 bytes, and the data of a successful READ
structured  28 bytes             chunks; a success without data is as in simple
extended    32, 64-bit lengths   chunks only, with 64-bit lengths and an offset
=========== ==================== =============================================

The worker packs its two commonest heads itself; every other head of a reply comes from here.
``cookie`` and ``offset`` are always those of the request, ``flags`` REPLY_FLAG_DONE or 0.
Source: the protocol's sections "Request message", "Simple reply message", "Structured reply chunk
message", "Extended reply chunk message".
"""

import sys
from array import array
from collections.abc import Sequence
from struct import Struct
from typing import Final

from nbdwire import codec
from nbdwire import constants as c
from nbdwire.extents import Extent

_DONE: Final = c.REPLY_FLAG_DONE


class Wire:
    """The simple form, and what the others do not do differently.

    ``request`` unpacks to (magic, flags, type, cookie, offset, length). ``data_head`` is the length
    of what stands before the data of a READ. ``chunked``: a reply may have several parts.
    """

    request: Struct = codec.REQUEST
    request_magic: int = c.REQUEST_MAGIC
    data_head: int = codec.SIMPLE_REPLY.size
    chunked: bool = False
    extended: bool = False

    def done(self, cookie: int, offset: int) -> bytes:
        """Success of a command that has no data in its reply."""
        return codec.SIMPLE_REPLY.pack(c.SIMPLE_REPLY_MAGIC, c.NBD_SUCCESS, cookie)

    def error(
        self, cookie: int, offset: int, error: int, message: str, at: int | None = None
    ) -> bytes:
        """Failure (NBD_E*); where there are chunks, with its text, and the place if it is known."""
        return codec.SIMPLE_REPLY.pack(c.SIMPLE_REPLY_MAGIC, error, cookie)

    def data(self, cookie: int, offset: int, at: int, length: int, flags: int = _DONE) -> bytes:
        """The head of ``length`` bytes of data from ``at``."""
        return codec.SIMPLE_REPLY.pack(c.SIMPLE_REPLY_MAGIC, c.NBD_SUCCESS, cookie)

    def hole(self, cookie: int, offset: int, at: int, length: int, flags: int = _DONE) -> bytes:
        """Says that ``length`` bytes from ``at`` are zeroes. Only where there are chunks."""
        raise NotImplementedError

    def status(
        self, cookie: int, offset: int, context: int, extents: Sequence[Extent], flags: int = _DONE
    ) -> bytes:
        """The extents of one metadata context. Only where there are chunks.

        OverflowError: a length or a status has more bits than this form has.
        """
        raise NotImplementedError


class StructuredWire(Wire):
    """Compact requests, replies in chunks."""

    data_head = codec.CHUNK_OFFSET_DATA.size
    chunked = True

    def error(
        self, cookie: int, offset: int, error: int, message: str, at: int | None = None
    ) -> bytes:
        """As in `Wire`."""
        kind = c.REPLY_ERROR if at is None else c.REPLY_ERROR_OFFSET
        payload = codec.error_payload(error, message, at)
        return self._chunk(_DONE, kind, cookie, offset, len(payload)) + payload

    def data(self, cookie: int, offset: int, at: int, length: int, flags: int = _DONE) -> bytes:
        """As in `Wire`."""
        head = self._chunk(flags, c.REPLY_OFFSET_DATA, cookie, offset, codec.OFFSET.size + length)
        return head + codec.OFFSET.pack(at)

    def hole(self, cookie: int, offset: int, at: int, length: int, flags: int = _DONE) -> bytes:
        """As in `Wire`."""
        head = self._chunk(flags, c.REPLY_OFFSET_HOLE, cookie, offset, codec.HOLE.size)
        return head + codec.HOLE.pack(at, length)

    def status(
        self, cookie: int, offset: int, context: int, extents: Sequence[Extent], flags: int = _DONE
    ) -> bytes:
        """As in `Wire`."""
        payload = codec.U32.pack(context) + _words("I", extents)
        return self._chunk(flags, c.REPLY_BLOCK_STATUS, cookie, offset, len(payload)) + payload

    def none(self, cookie: int, offset: int) -> bytes:
        """The end of a reply, in a chunk of its own."""
        return self._chunk(_DONE, c.REPLY_NONE, cookie, offset, 0)

    def _chunk(self, flags: int, kind: int, cookie: int, offset: int, length: int) -> bytes:
        return codec.CHUNK.pack(c.STRUCTURED_REPLY_MAGIC, flags, kind, cookie, length)


class ExtendedWire(StructuredWire):
    """Extended headers both ways."""

    request = codec.EXTENDED_REQUEST
    request_magic = c.EXTENDED_REQUEST_MAGIC
    data_head = codec.EXTENDED_OFFSET_DATA.size
    extended = True

    def done(self, cookie: int, offset: int) -> bytes:
        """As in `Wire`."""
        return self.none(cookie, offset)

    def status(
        self, cookie: int, offset: int, context: int, extents: Sequence[Extent], flags: int = _DONE
    ) -> bytes:
        """As in `Wire`."""
        payload = codec.BLOCK_STATUS_EXT.pack(context, len(extents)) + _words("Q", extents)
        return self._chunk(flags, c.REPLY_BLOCK_STATUS_EXT, cookie, offset, len(payload)) + payload

    def _chunk(self, flags: int, kind: int, cookie: int, offset: int, length: int) -> bytes:
        return codec.EXTENDED_CHUNK.pack(
            c.EXTENDED_REPLY_MAGIC, flags, kind, cookie, offset, length
        )


SIMPLE: Final = Wire()
STRUCTURED: Final = StructuredWire()
EXTENDED: Final = ExtendedWire()


def choose(structured: bool, extended: bool) -> Wire:
    """The form for what was negotiated; extended headers take precedence."""
    return EXTENDED if extended else STRUCTURED if structured else SIMPLE


def _words(code: str, extents: Sequence[Extent]) -> bytes:
    """(length, status) of each extent as big-endian integers of the size that ``code`` names."""
    words = array(code, (word for extent in extents for word in (extent.length, extent.status)))
    if sys.byteorder == "little":
        words.byteswap()
    return words.tobytes()

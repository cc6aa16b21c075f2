# SPDX-License-Identifier: Apache-2.0
"""How the protocol's structures look on the wire: all integers big-endian.

The data path uses the `struct.Struct` objects directly; the handshake uses the helpers below them.
Source: the NBD protocol document, sections "Newstyle negotiation" and "Transmission".
"""

from collections.abc import Sequence
from struct import Struct
from typing import Final

from nbdwire import constants as c
from nbdwire.errors import NegotiationError, ProtocolError

# Handshake
GREETING: Final = Struct(">QQH")  # NBDMAGIC, IHAVEOPT, handshake flags
CLIENT_FLAGS: Final = Struct(">I")
OPTION: Final = Struct(">QII")  # IHAVEOPT, option, length of the data that follows
OPTION_REPLY: Final = Struct(">QIII")  # OPTION_REPLY_MAGIC, option, reply, length
EXPORT_NAME_REPLY: Final = Struct(">QH")  # size, transmission flags
EXPORT_NAME_ZEROES: Final = bytes(124)
INFO_EXPORT: Final = Struct(">HQH")  # INFO_EXPORT, size, transmission flags
INFO_BLOCK_SIZE: Final = Struct(">HIII")  # INFO_BLOCK_SIZE, minimum, preferred, maximum payload
U16: Final = Struct(">H")
U32: Final = Struct(">I")

# Transmission
REQUEST: Final = Struct(">IHHQQI")  # REQUEST_MAGIC, flags, type, cookie, offset, length
SIMPLE_REPLY: Final = Struct(">IIQ")  # SIMPLE_REPLY_MAGIC, error, cookie
CHUNK: Final = Struct(">IHHQI")  # STRUCTURED_REPLY_MAGIC, flags, type, cookie, payload length
CHUNK_OFFSET_DATA: Final = Struct(">IHHQIQ")  # CHUNK (length 8 + n), offset; n bytes follow
HOLE_CHUNK: Final = Struct(">IHHQIQI")  # CHUNK (length 12), offset, size of the hole
CHUNK_BLOCK_STATUS: Final = Struct(">IHHQII")  # CHUNK (length 4 + 8n), context id; n extents follow
OFFSET: Final = Struct(">Q")  # the head of an OFFSET_DATA payload
HOLE: Final = Struct(">QI")  # an OFFSET_HOLE payload: offset, size
EXTENT: Final = Struct(">II")  # one block status descriptor: length, flags
CHUNK_ERROR: Final = Struct(">IH")  # an ERROR payload: error, length of the message that follows

CHUNK_ERROR_OFFSET: Final = Struct(">Q")  # behind the message of an ERROR_OFFSET payload

# Transmission with extended headers: lengths have 64 bits, chunks repeat the request's offset
EXTENDED_REQUEST: Final = Struct(">IHHQQQ")  # EXTENDED_REQUEST_MAGIC, then as REQUEST
EXTENDED_CHUNK: Final = Struct(">IHHQQQ")  # EXTENDED_REPLY_MAGIC, flags, type, cookie, offset, len
EXTENDED_OFFSET_DATA: Final = Struct(">IHHQQQQ")  # EXTENDED_CHUNK (length 8 + n), offset
EXTENDED_HOLE: Final = Struct(">IHHQQQQI")  # EXTENDED_CHUNK (length 12), offset, size of the hole
BLOCK_STATUS_EXT: Final = Struct(">II")  # the payload's head: context id, number of extents
EXTENT_EXT: Final = Struct(">QQ")  # one descriptor of it: length, flags
EFFECT_LENGTH: Final = Struct(">Q")  # a BLOCK_STATUS payload's head; context ids of 32 bits follow

REQUEST_SIZE: Final = REQUEST.size  # 28
EXTENDED_REQUEST_SIZE: Final = EXTENDED_REQUEST.size  # 32
SIMPLE_REPLY_SIZE: Final = SIMPLE_REPLY.size  # 16
CHUNK_SIZE: Final = CHUNK.size  # 20
EXTENDED_CHUNK_SIZE: Final = EXTENDED_CHUNK.size  # 32


def clip_string(text: str, limit: int = c.MAX_STRING) -> bytes:
    """``text`` as the protocol's string: UTF-8 in at most ``limit`` bytes, without NUL."""
    data = text.replace("\0", "").encode("utf-8", "replace")[:limit]
    return data.decode("utf-8", "ignore").encode()


def string(text: str) -> bytes:
    """``text`` as it is sent. NegotiationError if the protocol has no way to say it."""
    data = text.encode("utf-8", "surrogatepass")
    try:
        parse_string(data)
    except ProtocolError as problem:
        raise NegotiationError(f"{text[:64]!r} cannot be asked for: {problem}") from None
    return data


def option_request(option: int, data: bytes = b"") -> bytes:
    """A client's option with its data."""
    return OPTION.pack(c.IHAVEOPT, option, len(data)) + data


def option_reply(option: int, reply: int, data: bytes = b"") -> bytes:
    """A server's reply of type ``reply`` (REP_*) to ``option``."""
    return OPTION_REPLY.pack(c.OPTION_REPLY_MAGIC, option, reply, len(data)) + data


def option_error(option: int, reply: int, message: str = "") -> bytes:
    """An error reply (REP_ERR_*); ``message`` is for people and is cut to the protocol's limit."""
    return option_reply(option, reply, clip_string(message))


def sized(data: bytes) -> bytes:
    """``data`` behind its length in 32 bits."""
    return U32.pack(len(data)) + data


def info_request(name: str, infos: tuple[int, ...] = ()) -> bytes:
    """The data of INFO and GO: an export's name and the INFO_* numbers that are wanted.

    NegotiationError: the name is no string of the protocol.
    """
    wanted = b"".join(U16.pack(info) for info in infos)
    return sized(string(name)) + U16.pack(len(infos)) + wanted


def context_request(name: str, queries: tuple[str, ...]) -> bytes:
    """The data of LIST_META_CONTEXT and SET_META_CONTEXT; errors as in `info_request`."""
    asked = b"".join(sized(string(query)) for query in queries)
    return sized(string(name)) + U32.pack(len(queries)) + asked


def simple_reply(cookie: int, error: int = 0) -> bytes:
    """A simple reply without data; ``error`` is one of NBD_E*, or 0."""
    return SIMPLE_REPLY.pack(c.SIMPLE_REPLY_MAGIC, error, cookie)


def none_chunk(cookie: int) -> bytes:
    """The empty last chunk of a structured reply."""
    return CHUNK.pack(c.STRUCTURED_REPLY_MAGIC, c.REPLY_FLAG_DONE, c.REPLY_NONE, cookie, 0)


def error_chunk(
    cookie: int, error: int, message: str = "", flags: int = c.REPLY_FLAG_DONE
) -> bytes:
    """An ERROR chunk, the last of its reply unless ``flags`` say otherwise."""
    payload = error_payload(error, message)
    head = CHUNK.pack(c.STRUCTURED_REPLY_MAGIC, flags, c.REPLY_ERROR, cookie, len(payload))
    return head + payload


def error_payload(error: int, message: str, at: int | None = None) -> bytes:
    """What an ERROR chunk holds, or, where the error's offset ``at`` is known, an ERROR_OFFSET."""
    text = clip_string(message)
    head = CHUNK_ERROR.pack(error, len(text)) + text
    return head if at is None else head + CHUNK_ERROR_OFFSET.pack(at)


def status_filter(length: int, contexts: Sequence[int]) -> bytes:
    """The payload of a BLOCK_STATUS for ``length`` bytes that wants only ``contexts`` (ids)."""
    return EFFECT_LENGTH.pack(length) + b"".join(U32.pack(number) for number in contexts)


def hole_chunk(cookie: int, offset: int, size: int, flags: int = c.REPLY_FLAG_DONE) -> bytes:
    """An OFFSET_HOLE chunk: ``size`` zero bytes at ``offset`` of the export."""
    return HOLE_CHUNK.pack(
        c.STRUCTURED_REPLY_MAGIC, flags, c.REPLY_OFFSET_HOLE, cookie, HOLE.size, offset, size
    )


class Fields:
    """Takes the parts of ``data`` one after the other; ProtocolError if they do not fit.

    The error texts never repeat what the peer sent, so they may be sent back to it.
    """

    __slots__ = ("_data", "_position")

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    @property
    def left(self) -> int:
        """Bytes not taken yet."""
        return len(self._data) - self._position

    def take(self, length: int) -> bytes:
        """The next ``length`` bytes."""
        if length > self.left:
            raise ProtocolError("a length in the data runs past its end")
        start = self._position
        self._position = start + length
        return self._data[start : start + length]

    def u16(self) -> int:
        """The next 16 bits."""
        return int.from_bytes(self.take(2))

    def u32(self) -> int:
        """The next 32 bits."""
        return int.from_bytes(self.take(4))

    def u64(self) -> int:
        """The next 64 bits."""
        return int.from_bytes(self.take(8))

    def sized_string(self) -> str:
        """A string behind its length in 32 bits."""
        length = self.u32()
        if length > c.MAX_STRING:
            raise ProtocolError(f"a string is longer than {c.MAX_STRING} bytes")
        return parse_string(self.take(length))

    def rest(self) -> bytes:
        """Everything that is left."""
        return self.take(self.left)

    def end(self) -> None:
        """Nothing may be left."""
        if self.left:
            raise ProtocolError(f"{self.left} bytes too many in the data")


def parse_string(data: bytes) -> str:
    """A string of the protocol (section "Values"): UTF-8, no NUL, at most 4096 bytes."""
    if len(data) > c.MAX_STRING:
        raise ProtocolError(f"a string is longer than {c.MAX_STRING} bytes")
    if 0 in data:
        raise ProtocolError("a string has a NUL in it")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise ProtocolError("a string is not UTF-8") from None

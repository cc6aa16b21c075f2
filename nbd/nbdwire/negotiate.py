# SPDX-License-Identifier: Apache-2.0
"""The server's half of the handshake, without I/O.

A handshake is a generator. It yields an ``int n`` ("give me exactly n bytes", answered by
``send(data)``) or ``bytes`` ("send these", answered by ``send(b"")``) and returns its result.
`nbdwire.transport.run_handshake` runs one on a socket; tests run it on byte strings.

Source: the NBD protocol document, sections "Fixed newstyle negotiation" and "Option types".
The client's half is in `nbdwire.negotiate_client`.
"""

from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import Final, Protocol, TypeAlias, TypeVar

from nbdwire import codec
from nbdwire import constants as c
from nbdwire.errors import ProtocolError

T = TypeVar("T")

Handshake: TypeAlias = Generator[int | bytes, bytes, T]
"""Yields what it wants to receive (a length) or to send (bytes); returns a ``T``."""

MAX_OPTIONS: Final = 1024
"""Options that one client may send, in all: nobody haggles for ever."""

_HANDSHAKE_FLAGS: Final = c.FLAG_FIXED_NEWSTYLE | c.FLAG_NO_ZEROES
_NEEDS_STRUCTURED: Final = c.TFLAG_SEND_DF
# What belongs to extensions that are not negotiated here must not be offered.
_NEVER: Final = c.TFLAG_BLOCK_STATUS_PAYLOAD | c.TFLAG_SEND_RESIZE
_UNKNOWN_EXPORT: Final = "there is no export of that name; the option LIST tells the names"


@dataclass(frozen=True)
class ExportInfo:
    """What the handshake tells a client about one export.

    ``size`` is in bytes (less than 2**63), ``flags`` are TFLAG_*, the block sizes are in bytes
    (section "Block size constraints") and ``contexts`` are the names of its metadata contexts.
    """

    name: str
    size: int
    flags: int
    description: str = ""
    minimum_block: int = c.MIN_BLOCK
    preferred_block: int = c.PREFERRED_BLOCK
    maximum_payload: int = c.MAX_PAYLOAD
    contexts: tuple[str, ...] = ()


class Catalog(Protocol):
    """The exports of a server, as the handshake sees them."""

    def listing(self) -> list[tuple[str, str]]:
        """Name and description of each export, in the order of the list."""
        ...

    def lookup(self, name: str) -> ExportInfo | None:
        """The export that a client calls ``name`` ("" is the default one); None if there is none.

        The result bears the canonical name.
        """
        ...


@dataclass(frozen=True)
class Negotiated:
    """What was agreed: ``contexts`` are (id, name), ``flags`` the transmission flags as sent."""

    export: ExportInfo
    structured: bool
    contexts: tuple[tuple[int, str], ...]
    flags: int


def server_handshake(catalog: Catalog) -> Handshake[Negotiated | None]:
    """Greet a client and answer its options until it enters transmission, or aborts (None).

    Raises ProtocolError when the connection must be closed: the client broke the specification,
    or asked for something by EXPORT_NAME, which knows no other way to refuse.
    """
    yield codec.GREETING.pack(c.NBDMAGIC, c.IHAVEOPT, _HANDSHAKE_FLAGS)
    (flags,) = codec.CLIENT_FLAGS.unpack((yield codec.CLIENT_FLAGS.size))
    if flags & ~_HANDSHAKE_FLAGS:
        raise ProtocolError(f"the client set handshake flags that were not offered: {flags:#x}")
    haggling = _Haggling(catalog)
    for _ in range(MAX_OPTIONS):
        option, data = yield from _read_option()
        if option == c.OPT_EXPORT_NAME:
            return (yield from haggling.export_name(data, bool(flags & c.FLAG_NO_ZEROES)))
        if not flags & c.FLAG_FIXED_NEWSTYLE:
            raise ProtocolError(f"the client sent option {option} without fixed newstyle")
        if option == c.OPT_ABORT:
            yield codec.option_reply(option, c.REP_ACK)
            return None
        yield haggling.answer(option, data)
        if haggling.result is not None:
            return haggling.result
    raise ProtocolError(f"the client sent {MAX_OPTIONS} options without choosing an export")


def _read_option() -> Handshake[tuple[int, bytes]]:
    magic, option, length = codec.OPTION.unpack((yield codec.OPTION.size))
    if magic != c.IHAVEOPT:
        raise ProtocolError(f"the client sent {magic:#018x} where an option should begin")
    if length > c.MAX_OPTION_DATA:
        raise ProtocolError(f"option {option} announces {length} bytes of data")
    data = (yield length) if length else b""
    return option, data


class _Refused(Exception):
    """Answer the option with this error reply."""

    def __init__(self, reply: int, message: str) -> None:
        super().__init__(message)
        self.reply = reply


class _Haggling:
    """The state between options: what one connection has negotiated so far."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._structured = False
        self._selected_for = ""  # canonical export name
        self._selected: tuple[tuple[int, str], ...] = ()
        self.result: Negotiated | None = None
        self._handlers = {
            c.OPT_LIST: self._list,
            c.OPT_INFO: self._info,
            c.OPT_GO: self._go,
            c.OPT_STRUCTURED_REPLY: self._structured_reply,
            c.OPT_LIST_META_CONTEXT: self._list_contexts,
            c.OPT_SET_META_CONTEXT: self._set_contexts,
        }

    def answer(self, option: int, data: bytes) -> bytes:
        """All replies to one option; sets ``result`` when transmission begins behind them."""
        handler = self._handlers.get(option)
        if handler is None:
            return codec.option_error(option, c.REP_ERR_UNSUP, f"option {option} is not supported")
        try:
            replies = [codec.option_reply(option, reply, body) for reply, body in handler(data)]
        except _Refused as refusal:
            return codec.option_error(option, refusal.reply, str(refusal))
        except ProtocolError as error:  # from codec.Fields: the data does not parse
            return codec.option_error(option, c.REP_ERR_INVALID, str(error))
        return b"".join([*replies, codec.option_reply(option, c.REP_ACK)])

    def export_name(self, data: bytes, no_zeroes: bool) -> Handshake[Negotiated]:
        """Enter transmission as EXPORT_NAME does it, or raise ProtocolError."""
        name = codec.parse_string(data)
        info = self._catalog.lookup(name)
        if info is None:
            raise ProtocolError(
                f"the client asked by EXPORT_NAME for {name[:256]!r}: no such export"
            )
        result = self._negotiated(info)
        head = codec.EXPORT_NAME_REPLY.pack(info.size, result.flags)
        yield head if no_zeroes else head + codec.EXPORT_NAME_ZEROES
        return result

    def _negotiated(self, info: ExportInfo) -> Negotiated:
        selected = self._selected if self._selected_for == info.name else ()
        # The export may have been replaced since the contexts were selected.
        contexts = tuple(pair for pair in selected if pair[1] in info.contexts)
        return Negotiated(info, self._structured, contexts, self._flags(info))

    def _flags(self, info: ExportInfo) -> int:
        masked = _NEVER if self._structured else _NEVER | _NEEDS_STRUCTURED
        return (info.flags | c.TFLAG_HAS_FLAGS) & ~masked

    def _lookup(self, name: str) -> ExportInfo:
        info = self._catalog.lookup(name)
        if info is None:
            raise _Refused(c.REP_ERR_UNKNOWN, _UNKNOWN_EXPORT)
        return info

    # Handlers: take the option's data, return the replies that come before the ACK.

    def _list(self, data: bytes) -> list[tuple[int, bytes]]:
        _no_data(data)
        return [
            (c.REP_SERVER, codec.sized(name.encode()) + codec.clip_string(description))
            for name, description in self._catalog.listing()
        ]

    def _structured_reply(self, data: bytes) -> list[tuple[int, bytes]]:
        _no_data(data)
        self._structured = True
        return []

    def _info(self, data: bytes) -> list[tuple[int, bytes]]:
        return self._describe(*_parse_info(data))

    def _go(self, data: bytes) -> list[tuple[int, bytes]]:
        name, wanted = _parse_info(data)
        info = self._lookup(name)
        self.result = self._negotiated(info)
        return _infos(info, self.result.flags, wanted)

    def _describe(self, name: str, wanted: Iterable[int]) -> list[tuple[int, bytes]]:
        info = self._lookup(name)
        return _infos(info, self._flags(info), wanted)

    def _list_contexts(self, data: bytes) -> list[tuple[int, bytes]]:
        name, queries = _parse_contexts(data)
        info = self._lookup(name)
        found = [x for x in info.contexts if not queries or any(_matches(x, q) for q in queries)]
        return [_context_reply(0, x) for x in found]

    def _set_contexts(self, data: bytes) -> list[tuple[int, bytes]]:
        self._selected = ()  # also when this option fails
        if not self._structured:
            raise _Refused(c.REP_ERR_INVALID, "negotiate structured replies first")
        name, queries = _parse_contexts(data)
        info = self._lookup(name)
        self._selected = tuple(enumerate((x for x in info.contexts if x in queries), 1))
        self._selected_for = info.name
        return [_context_reply(number, x) for number, x in self._selected]


def _no_data(data: bytes) -> None:
    if data:
        raise _Refused(c.REP_ERR_INVALID, "this option takes no data")


def _parse_info(data: bytes) -> tuple[str, set[int]]:
    """The name and the wanted infos, each of them once, of INFO and GO."""
    fields = codec.Fields(data)
    name = fields.sized_string()
    wanted = {fields.u16() for _ in range(fields.u16())}
    fields.end()
    return name, wanted


def _infos(info: ExportInfo, flags: int, wanted: Iterable[int]) -> list[tuple[int, bytes]]:
    """The REP_INFO replies: the export always, of the others only what is wanted and known."""
    known = {
        c.INFO_NAME: codec.U16.pack(c.INFO_NAME) + info.name.encode(),
        c.INFO_DESCRIPTION: codec.U16.pack(c.INFO_DESCRIPTION)
        + codec.clip_string(info.description),
        c.INFO_BLOCK_SIZE: codec.INFO_BLOCK_SIZE.pack(
            c.INFO_BLOCK_SIZE, info.minimum_block, info.preferred_block, info.maximum_payload
        ),
    }
    export = codec.INFO_EXPORT.pack(c.INFO_EXPORT, info.size, flags)
    return [(c.REP_INFO, export), *((c.REP_INFO, known[n]) for n in known if n in wanted)]


def _parse_contexts(data: bytes) -> tuple[str, set[str]]:
    """The export's name and the queries of LIST_META_CONTEXT and SET_META_CONTEXT."""
    fields = codec.Fields(data)
    name = fields.sized_string()
    queries = {fields.sized_string() for _ in range(fields.u32())}
    fields.end()
    return name, queries


def _context_reply(number: int, name: str) -> tuple[int, bytes]:
    return c.REP_META_CONTEXT, codec.U32.pack(number) + name.encode()


def _matches(context: str, query: str) -> bool:
    """Whether LIST_META_CONTEXT finds ``context``: exact, or a wildcard.

    Wildcards are a bare namespace (``base:``, ``qemu:``) and ``qemu:dirty-bitmap:``.
    """
    namespace = query.endswith(":") and query.count(":") == 1
    if namespace or query == c.CONTEXT_DIRTY_BITMAP_PREFIX:
        return context.startswith(query)
    return context == query

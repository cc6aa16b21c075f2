# SPDX-License-Identifier: Apache-2.0
"""The server's half of the handshake, without I/O.

A handshake is a generator. It yields an ``int n`` ("give me exactly n bytes", answered by
``send(data)``), ``bytes`` ("send these", answered by ``send(b"")``) or UPGRADE ("from here on the
stream is TLS", answered by ``send(b"")``) and returns its result. `nbdwire.transport` runs one on
a socket; tests run it on byte strings.

Source: the NBD protocol document, sections "Fixed newstyle negotiation", "TLS support" and "Option
types". The client's half is in `nbdwire.negotiate_client`.
"""

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, Protocol, TypeAlias, get_args

from nbdwire import codec
from nbdwire import constants as c
from nbdwire.errors import (
    NegotiationError,
    PolicyRefused,
    ProtocolError,
    ShuttingDown,
    TLSRequired,
    UnknownExport,
)
from nbdwire.handshake import UPGRADE, Handshake

MAX_OPTIONS: Final = 1024
"""Options that one client may send, in all: nobody haggles for ever."""

MAX_REFUSED: Final = 16
"""Options that are answered to a client that is not wanted, before it is hung up."""

TLSMode: TypeAlias = Literal["off", "allowed", "required"]
"""Section "Server-side requirements": NOTLS, SELECTIVETLS (see `ExportInfo`), FORCEDTLS."""

_HANDSHAKE_FLAGS: Final = c.FLAG_FIXED_NEWSTYLE | c.FLAG_NO_ZEROES
# RESIZE, an extension that is not done here, and what no specification knows are never offered.
_NEVER: Final = c.TFLAG_SEND_RESIZE | ~((c.TFLAG_BLOCK_STATUS_PAYLOAD << 1) - 1)
_UNKNOWN_EXPORT: Final = "there is no export of that name; the option LIST tells the names"
_TLS_FIRST: Final = "this server wants TLS first: send STARTTLS"
_TLS_FOR_EXPORT: Final = "no export of that name is offered without TLS; check the name, or use TLS"
_REPLIES: Final[dict[type[NegotiationError], int]] = {
    UnknownExport: c.REP_ERR_UNKNOWN,
    PolicyRefused: c.REP_ERR_POLICY,
    ShuttingDown: c.REP_ERR_SHUTDOWN,
    TLSRequired: c.REP_ERR_TLS_REQD,
}

_Replies: TypeAlias = list[tuple[int, bytes]]  # (REP_*, data)


@dataclass(frozen=True)
class ExportInfo:
    """What the handshake tells a client about one export.

    ``size`` is in bytes (less than 2**63), ``flags`` are TFLAG_*, the block sizes are in bytes
    (section "Block size constraints") and ``contexts`` are the names of its metadata contexts, of
    which the ``wide_contexts`` have status values of 64 bits. ``tls_required``: without TLS the
    export does not exist. ``block_size_required``: only clients that asked for the block sizes get
    in, if those are not the usual ones; unaligned requests of the others fail with EINVAL.
    ValueError for a size or a block size that the specification does not allow.
    """

    name: str
    size: int
    flags: int
    description: str = ""
    minimum_block: int = c.MIN_BLOCK
    preferred_block: int = c.PREFERRED_BLOCK
    maximum_payload: int = c.MAX_PAYLOAD
    contexts: tuple[str, ...] = ()
    tls_required: bool = False
    wide_contexts: tuple[str, ...] = ()
    block_size_required: bool = False

    def __post_init__(self) -> None:
        low, best, most = self.minimum_block, self.preferred_block, self.maximum_payload
        if not 0 <= self.size < 1 << 63:
            raise ValueError(f"an export has less than 2**63 bytes, not {self.size}")
        if not _power_of_2(low) or low > c.MAX_BLOCK:
            raise ValueError(f"the minimum block is a power of 2 up to {c.MAX_BLOCK}, not {low}")
        if not _power_of_2(best) or best < max(low, 512):
            raise ValueError(
                f"the preferred block is a power of 2 from {max(low, 512)}, not {best}"
            )
        if not best <= most < 1 << 32:
            raise ValueError(
                f"the maximum payload lies between {best} and 2**32 - 1, not at {most}"
            )


def _power_of_2(number: int) -> bool:
    return number > 0 and not number & (number - 1)


class Catalog(Protocol):
    """The exports of a server, as the handshake of one client sees them.

    Both methods may refuse with a text for the client: PolicyRefused, UnknownExport, ShuttingDown.
    """

    def listing(self) -> Sequence[tuple[str, str]]:
        """Name and description of each export, in the order of the list."""
        ...

    def lookup(self, name: str) -> ExportInfo | None:
        """The export that a client calls ``name`` ("" is the default one); None if there is none.

        The result bears the canonical name.
        """
        ...


@dataclass(frozen=True)
class Negotiated:
    """What was agreed: ``contexts`` are (id, name), ``flags`` the transmission flags as sent.

    ``extended`` headers take precedence over ``structured`` replies. ``tls``: the stream is TLS.
    """

    export: ExportInfo
    structured: bool
    contexts: tuple[tuple[int, str], ...]
    flags: int
    extended: bool = False
    tls: bool = False


def server_handshake(
    catalog: Catalog, *, tls: TLSMode = "off", stopping: threading.Event | None = None
) -> Handshake[Negotiated | None]:
    """Greet a client and answer its options until it enters transmission, or aborts (None).

    Once ``stopping`` is set every option but ABORT is refused with ERR_SHUTDOWN. Raises
    ProtocolError or NegotiationError when the connection must be closed: the client broke the
    specification, or asked for something by EXPORT_NAME, which knows no other way to refuse.
    """
    if tls not in get_args(TLSMode):
        raise ValueError(f"the TLS mode is one of {', '.join(get_args(TLSMode))}, not {tls!r}")
    flags = yield from _greet()
    haggling = _Haggling(catalog, tls, stopping)
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
        if haggling.starts_tls:
            yield UPGRADE
            # Nothing that was said in plain text counts any more (CVE-2021-3716).
            haggling = _Haggling(catalog, tls, stopping, secure=True)
    raise ProtocolError(f"the client sent {MAX_OPTIONS} options without choosing an export")


def server_refusal(message: str, reply: int = c.REP_ERR_POLICY) -> Handshake[None]:
    """Tell a client that it is not wanted: each option but ABORT is refused with ``message``.

    Returns when the client has understood, or after MAX_REFUSED options.
    """
    flags = yield from _greet()
    for _ in range(MAX_REFUSED):
        option, _data = yield from _read_option()
        if option == c.OPT_EXPORT_NAME or not flags & c.FLAG_FIXED_NEWSTYLE:
            return
        if option == c.OPT_ABORT:
            yield codec.option_reply(option, c.REP_ACK)
            return
        yield codec.option_error(option, reply, message)


def _greet() -> Handshake[int]:
    """Exchange the first flags; returns the client's."""
    yield codec.GREETING.pack(c.NBDMAGIC, c.IHAVEOPT, _HANDSHAKE_FLAGS)
    flags = int.from_bytes((yield codec.CLIENT_FLAGS.size))
    if flags & ~_HANDSHAKE_FLAGS:
        raise ProtocolError(f"the client set handshake flags that were not offered: {flags:#x}")
    return flags


def _read_option() -> Handshake[tuple[int, bytes]]:
    magic, option, length = codec.OPTION.unpack((yield codec.OPTION.size))
    if magic != c.IHAVEOPT:
        raise ProtocolError(f"the client sent {magic:#018x} where an option should begin")
    if length > c.MAX_OPTION_DATA:
        raise ProtocolError(f"option {option} announces {length} bytes of data")
    data = (yield length) if length else b""
    return option, data


class _Refused(Exception):
    """Answer the option with this error reply; ``before``: what is told ahead of it."""

    def __init__(self, reply: int, message: str, before: _Replies | None = None) -> None:
        super().__init__(message)
        self.reply = reply
        self.before = before or []


class _Haggling:
    """The state between options: what one connection has negotiated so far."""

    def __init__(
        self,
        catalog: Catalog,
        tls: TLSMode,
        stopping: threading.Event | None,
        *,
        secure: bool = False,
    ) -> None:
        self._catalog = catalog
        self._tls = tls
        self._stopping = stopping
        self._secure = secure
        self._structured = False
        self._extended = False
        self._told_sizes: set[str] = set()  # canonical names of exports whose block sizes were told
        self._selected_for = ""  # canonical export name
        self._selected: tuple[tuple[int, str], ...] = ()
        self.starts_tls = False
        self.result: Negotiated | None = None
        self._handlers = {
            c.OPT_LIST: self._list,
            c.OPT_STARTTLS: self._start_tls,
            c.OPT_INFO: self._info,
            c.OPT_GO: self._go,
            c.OPT_STRUCTURED_REPLY: self._structured_reply,
            c.OPT_LIST_META_CONTEXT: self._list_contexts,
            c.OPT_SET_META_CONTEXT: self._set_contexts,
            c.OPT_EXTENDED_HEADERS: self._extended_headers,
        }

    def answer(self, option: int, data: bytes) -> bytes:
        """All replies to one option.

        Behind them transmission begins if ``result`` is set then, and TLS if ``starts_tls`` is.
        """
        try:
            replies = [*self._handle(option, data), (c.REP_ACK, b"")]
        except _Refused as refusal:
            replies = [*refusal.before, (refusal.reply, codec.clip_string(str(refusal)))]
        except NegotiationError as refusal:  # the catalogue's
            reply = _REPLIES.get(type(refusal), c.REP_ERR_POLICY)
            replies = [(reply, codec.clip_string(str(refusal)))]
        except ProtocolError as error:  # from codec.Fields: the data does not parse
            replies = [(c.REP_ERR_INVALID, codec.clip_string(str(error)))]
        return b"".join(codec.option_reply(option, reply, body) for reply, body in replies)

    def _handle(self, option: int, data: bytes) -> _Replies:
        self._check_stopping()
        if self._needs_tls_first and option != c.OPT_STARTTLS:
            raise _Refused(c.REP_ERR_TLS_REQD, _TLS_FIRST)
        handler = self._handlers.get(option)
        if handler is None:
            raise _Refused(c.REP_ERR_UNSUP, f"option {option} is not supported")
        return handler(data)

    @property
    def _needs_tls_first(self) -> bool:
        return self._tls == "required" and not self._secure

    def _check_stopping(self) -> None:
        if self._stopping is not None and self._stopping.is_set():
            raise ShuttingDown("the server is shutting down")

    def export_name(self, data: bytes, no_zeroes: bool) -> Handshake[Negotiated]:
        """Enter transmission as EXPORT_NAME does it, or raise: it knows no error reply."""
        self._check_stopping()
        if self._needs_tls_first:
            raise TLSRequired("the client sent EXPORT_NAME without TLS, which is required")
        if self._extended:
            raise ProtocolError("the client sent EXPORT_NAME after it chose extended headers")
        name = codec.parse_string(data)
        asked = f"the client asked by EXPORT_NAME for {name[:256]!r}"
        info = self._catalog.lookup(name)
        if info is None:
            raise UnknownExport(f"{asked}: no such export")
        if self._is_hidden(info):
            raise TLSRequired(f"{asked}: it is offered only with TLS")
        if info.block_size_required and not self._knows_sizes(info):
            raise PolicyRefused(f"{asked}: its block sizes must be negotiated with GO")
        result = self._negotiated(info)
        head = codec.EXPORT_NAME_REPLY.pack(info.size, result.flags)
        yield head if no_zeroes else head + codec.EXPORT_NAME_ZEROES
        return result

    def _negotiated(self, info: ExportInfo) -> Negotiated:
        contexts = self._contexts(info)
        flags = self._flags(info, bool(contexts))
        return Negotiated(info, self._structured, contexts, flags, self._extended, self._secure)

    def _contexts(self, info: ExportInfo) -> tuple[tuple[int, str], ...]:
        selected = self._selected if self._selected_for == info.name else ()
        # The export may have been replaced since the contexts were selected.
        return tuple(pair for pair in selected if pair[1] in info.contexts)

    def _flags(self, info: ExportInfo, contexts: bool) -> int:
        """The transmission flags, with those and only those that fit what was negotiated."""
        flags = (info.flags | c.TFLAG_HAS_FLAGS) & ~(_NEVER | c.TFLAG_BLOCK_STATUS_PAYLOAD)
        if not self._structured and not self._extended:
            flags &= ~c.TFLAG_SEND_DF
        if not flags & c.TFLAG_SEND_WRITE_ZEROES:
            flags &= ~c.TFLAG_SEND_FAST_ZERO
        if self._extended and contexts:
            flags |= c.TFLAG_BLOCK_STATUS_PAYLOAD
        return flags

    def _is_hidden(self, info: ExportInfo) -> bool:
        return info.tls_required and not self._secure

    def _lookup(self, name: str) -> ExportInfo:
        """For the options that do not enter transmission; what is hidden is unknown to them."""
        info = self._catalog.lookup(name)
        if info is None or self._is_hidden(info):
            raise UnknownExport(_UNKNOWN_EXPORT)
        return info

    def _lookup_to_enter(self, name: str) -> ExportInfo:
        """For INFO and GO: a client without TLS does not learn whether TLS would find the name."""
        if self._tls != "allowed" or self._secure:
            return self._lookup(name)
        info = self._catalog.lookup(name)
        if info is None or info.tls_required:
            raise _Refused(c.REP_ERR_TLS_REQD, _TLS_FOR_EXPORT)
        return info

    def _knows_sizes(self, info: ExportInfo) -> bool:
        usual = info.minimum_block == c.MIN_BLOCK and info.maximum_payload >= c.MAX_PAYLOAD
        return usual or info.name in self._told_sizes

    # Handlers: take the option's data, return the replies that come before the ACK.

    def _list(self, data: bytes) -> _Replies:
        _no_data(data)
        return [
            (c.REP_SERVER, codec.sized(name.encode()) + codec.clip_string(description))
            for name, description in self._catalog.listing()
        ]

    def _start_tls(self, data: bytes) -> _Replies:
        _no_data(data)
        if self._tls == "off":
            raise _Refused(c.REP_ERR_POLICY, "TLS is switched off on this server")
        if self._secure:
            raise _Refused(c.REP_ERR_INVALID, "TLS is on already")
        self.starts_tls = True
        return []

    def _structured_reply(self, data: bytes) -> _Replies:
        _no_data(data)
        if self._extended:
            raise _Refused(c.REP_ERR_EXT_HEADER_REQD, "extended headers have been chosen already")
        self._structured = True
        return []

    def _extended_headers(self, data: bytes) -> _Replies:
        _no_data(data)
        self._extended = True
        return []

    def _info(self, data: bytes) -> _Replies:
        name, wanted = _parse_info(data)
        return self._describe(self._lookup_to_enter(name), wanted)

    def _go(self, data: bytes) -> _Replies:
        name, wanted = _parse_info(data)
        info = self._lookup_to_enter(name)
        replies = self._describe(info, wanted)
        self.result = self._negotiated(info)
        return replies

    def _describe(self, info: ExportInfo, wanted: set[int]) -> _Replies:
        """The answer to INFO and GO, which is the same for both."""
        if c.INFO_BLOCK_SIZE in wanted:
            self._told_sizes.add(info.name)
        if info.block_size_required and not self._knows_sizes(info):
            raise _Refused(
                c.REP_ERR_BLOCK_SIZE_REQD,
                f"ask for the block sizes: the smallest is {info.minimum_block} bytes",
                [(c.REP_INFO, _block_size(info))],
            )
        return _infos(info, self._negotiated(info).flags, wanted)

    def _list_contexts(self, data: bytes) -> _Replies:
        name, queries = _parse_contexts(data)
        found = self._offered(self._lookup(name), queries)
        found = [x for x in found if not queries or any(_matches(x, q) for q in queries)]
        return [_context_reply(0, x) for x in found]

    def _set_contexts(self, data: bytes) -> _Replies:
        self._selected = ()  # also when this option fails
        if not self._structured and not self._extended:
            raise _Refused(
                c.REP_ERR_INVALID, "negotiate structured replies or extended headers first"
            )
        name, queries = _parse_contexts(data)
        info = self._lookup(name)
        found = (x for x in self._offered(info, queries) if x in queries)
        self._selected = tuple(enumerate(found, 1))
        self._selected_for = info.name
        return [_context_reply(number, x) for number, x in self._selected]

    def _offered(self, info: ExportInfo, queries: set[str]) -> list[str]:
        """The contexts that this client can use; it is told if it asks for one that it cannot."""
        if self._extended:
            return list(info.contexts)
        if queries & set(info.wide_contexts):
            raise _Refused(
                c.REP_ERR_EXT_HEADER_REQD, "a context with 64-bit status needs extended headers"
            )
        return [name for name in info.contexts if name not in info.wide_contexts]


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


def _block_size(info: ExportInfo) -> bytes:
    return codec.INFO_BLOCK_SIZE.pack(
        c.INFO_BLOCK_SIZE, info.minimum_block, info.preferred_block, info.maximum_payload
    )


def _infos(info: ExportInfo, flags: int, wanted: Iterable[int]) -> _Replies:
    """The REP_INFO replies: the export always, of the others only what is wanted and known."""
    known = {
        c.INFO_NAME: codec.U16.pack(c.INFO_NAME) + info.name.encode(),
        c.INFO_DESCRIPTION: codec.U16.pack(c.INFO_DESCRIPTION)
        + codec.clip_string(info.description),
        c.INFO_BLOCK_SIZE: _block_size(info),
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

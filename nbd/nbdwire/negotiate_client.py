# SPDX-License-Identifier: Apache-2.0
"""The client's half of the handshake, without I/O: see `nbdwire.negotiate` for what that means.

The server is not trusted: each of its replies is bounded in length, and so is their sum.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, NoReturn

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

MAX_REPLIES: Final = 16 << 20
"""Bytes of replies to one option that a client takes, headers included."""

_OLDSTYLE: Final = 0x0000420281861253
_INFOS: Final = (c.INFO_NAME, c.INFO_DESCRIPTION, c.INFO_BLOCK_SIZE)
_OPTION_NAMES: Final = {
    c.OPT_LIST: "LIST",
    c.OPT_STARTTLS: "STARTTLS",
    c.OPT_INFO: "INFO",
    c.OPT_GO: "GO",
    c.OPT_STRUCTURED_REPLY: "STRUCTURED_REPLY",
    c.OPT_EXTENDED_HEADERS: "EXTENDED_HEADERS",
    c.OPT_LIST_META_CONTEXT: "LIST_META_CONTEXT",
    c.OPT_SET_META_CONTEXT: "SET_META_CONTEXT",
}
_REFUSALS: Final[dict[int, tuple[type[NegotiationError], str]]] = {
    c.REP_ERR_UNSUP: (NegotiationError, "it does not support that"),
    c.REP_ERR_POLICY: (PolicyRefused, "its configuration forbids it"),
    c.REP_ERR_INVALID: (NegotiationError, "it takes the request for invalid"),
    c.REP_ERR_PLATFORM: (NegotiationError, "its platform cannot do that"),
    c.REP_ERR_TLS_REQD: (TLSRequired, "it wants TLS first (use an nbds:// URI)"),
    c.REP_ERR_UNKNOWN: (UnknownExport, "it has no such export"),
    c.REP_ERR_SHUTDOWN: (ShuttingDown, "it is shutting down"),
    c.REP_ERR_BLOCK_SIZE_REQD: (NegotiationError, "it wants block sizes to be negotiated"),
    c.REP_ERR_TOO_BIG: (NegotiationError, "the request is too big for it"),
    c.REP_ERR_EXT_HEADER_REQD: (NegotiationError, "it wants extended headers"),
}


@dataclass(frozen=True)
class ClientSession:
    """What a server told about an export, and what was agreed with it.

    ``name`` is the canonical name if the server told it, else the one that was asked for. Sizes
    are in bytes, ``flags`` are TFLAG_*, ``contexts`` are (id, name) of the selected ones.
    ``structured``: replies come in chunks, as they also do with ``extended`` headers.
    """

    name: str
    size: int = 0
    flags: int = 0
    description: str = ""
    minimum_block: int = c.MIN_BLOCK
    preferred_block: int = c.PREFERRED_BLOCK
    maximum_payload: int = c.MAX_PAYLOAD
    structured: bool = False
    contexts: tuple[tuple[int, str], ...] = ()
    extended: bool = False
    tls: bool = False


def client_handshake(
    export: str | Sequence[str],
    contexts: Sequence[str] = (),
    structured: bool = True,
    *,
    extended: bool = True,
    tls: bool = False,
) -> Handshake[ClientSession]:
    """Enter transmission with ``export``, or with the first of several that the server accepts.

    Extended headers, else structured replies, and the metadata ``contexts`` are used if they are
    had; what the server lacks is left out of the result. With ``tls`` nothing is asked before the
    stream is TLS. UnknownExport, TLSRequired, PolicyRefused or NegotiationError: it refuses the
    export (the last one); ProtocolError: it broke the specification.
    """
    names = (export,) if isinstance(export, str) else tuple(export)
    flags = yield from _greet()
    if not flags & c.FLAG_FIXED_NEWSTYLE:
        _must_be_plain(tls)
        return (yield from _export_name(ClientSession(names[-1]), flags))
    try:
        session = yield from _features(tls, structured, extended)
        for name in names[:-1]:
            with contextlib.suppress(NegotiationError):
                return (yield from _enter(replace(session, name=name), tuple(contexts), flags))
        return (yield from _enter(replace(session, name=names[-1]), tuple(contexts), flags))
    except NegotiationError:
        yield codec.option_request(c.OPT_ABORT)
        raise


def client_list(*, tls: bool = False) -> Handshake[list[tuple[str, str]]]:
    """Name and description of each export that the server lists; then say good-bye."""
    yield from _greet_fixed(tls)
    replies = yield from _ask(c.OPT_LIST)
    found = [_parse_server(data) for _, data in _only(replies, c.REP_SERVER)]
    yield codec.option_request(c.OPT_ABORT)
    return found


def client_list_contexts(
    export: str, queries: Sequence[str] = (), *, tls: bool = False
) -> Handshake[list[str]]:
    """The metadata contexts of ``export`` that match ``queries`` (none: all); then good-bye."""
    yield from _greet_fixed(tls)
    yield from _try(c.OPT_STRUCTURED_REPLY)
    found = yield from _list_contexts(export, queries)
    yield codec.option_request(c.OPT_ABORT)
    return found


def client_describe(
    export: str, *, tls: bool = False
) -> Handshake[tuple[ClientSession, tuple[str, ...]]]:
    """What the server tells about ``export`` and its contexts without entering it; good-bye.

    A server that cannot list contexts has none. Errors: `client_handshake`.
    """
    yield from _greet_fixed(tls)
    try:
        session = replace((yield from _features(False, True, True)), name=export, tls=tls)
        replies = yield from _ask(c.OPT_INFO, codec.info_request(export, _INFOS), repr(export))
        session = _apply_infos(session, [data for _, data in _only(replies, c.REP_INFO)])
        found: list[str] = []
        with contextlib.suppress(NegotiationError):
            found = yield from _list_contexts(export)
    except NegotiationError:
        yield codec.option_request(c.OPT_ABORT)
        raise
    yield codec.option_request(c.OPT_ABORT)
    return session, tuple(found)


def _list_contexts(export: str, queries: Sequence[str] = ()) -> Handshake[list[str]]:
    request = codec.context_request(export, tuple(queries))
    replies = yield from _ask(c.OPT_LIST_META_CONTEXT, request, repr(export))
    return [_parse_context(data)[1] for _, data in _only(replies, c.REP_META_CONTEXT)]


def _greet() -> Handshake[int]:
    """Exchange the first flags; returns those that both sides have."""
    magic, kind, flags = codec.GREETING.unpack((yield codec.GREETING.size))
    if magic != c.NBDMAGIC:
        raise ProtocolError("the peer does not speak NBD: its greeting is wrong")
    if kind == _OLDSTYLE:
        raise ProtocolError("the server speaks the oldstyle protocol, which is not supported")
    if kind != c.IHAVEOPT:
        raise ProtocolError(f"the server's greeting is wrong: {kind:#018x} instead of IHAVEOPT")
    common: int = flags & (c.FLAG_FIXED_NEWSTYLE | c.FLAG_NO_ZEROES)
    yield codec.CLIENT_FLAGS.pack(common)
    return common


def _greet_fixed(tls: bool) -> Handshake[None]:
    flags = yield from _greet()
    if not flags & c.FLAG_FIXED_NEWSTYLE:
        _must_be_plain(tls)
        raise NegotiationError("the server is too old to list anything: it lacks fixed newstyle")
    if tls:
        yield from _start_tls()


def _must_be_plain(tls: bool) -> None:
    """Never fall back to plain text where TLS was wanted (CVE-2019-14842)."""
    if tls:
        raise NegotiationError("the server is too old for TLS: it lacks fixed newstyle")


def _start_tls() -> Handshake[None]:
    yield from _ask(c.OPT_STARTTLS)
    yield UPGRADE


def _features(tls: bool, structured: bool, extended: bool) -> Handshake[ClientSession]:
    """The session before an export is chosen. STARTTLS comes first: it would wipe the others."""
    if tls:
        yield from _start_tls()
    session = ClientSession("", tls=tls)
    if structured and extended and (yield from _try(c.OPT_EXTENDED_HEADERS)) is not None:
        return replace(session, structured=True, extended=True)
    if structured and (yield from _try(c.OPT_STRUCTURED_REPLY)) is not None:
        return replace(session, structured=True)
    return session


def _enter(
    session: ClientSession, contexts: tuple[str, ...], flags: int
) -> Handshake[ClientSession]:
    """GO with the export ``session.name``, or EXPORT_NAME if the server does not know GO."""
    export = session.name
    if session.structured and contexts:
        session = replace(session, contexts=(yield from _select(export, contexts)))
    try:
        replies = yield from _ask(c.OPT_GO, codec.info_request(export, _INFOS), repr(export))
    except NegotiationError as error:
        # With extended headers EXPORT_NAME is illegal; who has them must have GO.
        if error.reply != c.REP_ERR_UNSUP or session.extended:
            raise
        return (yield from _export_name(session, flags))
    return _apply_infos(session, [data for _, data in _only(replies, c.REP_INFO)])


def _select(export: str, contexts: tuple[str, ...]) -> Handshake[tuple[tuple[int, str], ...]]:
    """SET_META_CONTEXT; if the server refuses it, nothing is selected (GO will tell why)."""
    request = codec.context_request(export, contexts)
    replies = yield from _try(c.OPT_SET_META_CONTEXT, request)
    found = [_parse_context(data) for _, data in _only(replies or [], c.REP_META_CONTEXT)]
    names = {name for _, name in found}
    if len({number for number, _ in found}) < len(found) or len(names) < len(found):
        raise ProtocolError("the server selected a metadata context twice")
    if not names <= set(contexts):
        raise ProtocolError("the server selected a metadata context that was not asked for")
    return tuple(found)


def _export_name(session: ClientSession, flags: int) -> Handshake[ClientSession]:
    """Enter transmission with EXPORT_NAME; a server that refuses closes the connection."""
    yield codec.option_request(c.OPT_EXPORT_NAME, codec.string(session.name))
    head = yield codec.EXPORT_NAME_REPLY.size
    if not flags & c.FLAG_NO_ZEROES:
        yield len(codec.EXPORT_NAME_ZEROES)
    return _with_export(session, head)


def _try(option: int, data: bytes = b"") -> Handshake[list[tuple[int, bytes]] | None]:
    """`_ask`, but None if the server refuses; TLSRequired is raised all the same."""
    try:
        return (yield from _ask(option, data))
    except TLSRequired:
        raise
    except NegotiationError:
        return None


def _ask(option: int, data: bytes = b"", what: str = "") -> Handshake[list[tuple[int, bytes]]]:
    """Send an option; returns the (type, data) of the replies that come before the ACK."""
    yield codec.option_request(option, data)
    replies: list[tuple[int, bytes]] = []
    taken = 0
    while True:
        reply, body = yield from _read_reply(option)
        if reply & c.REP_FLAG_ERROR:
            _refused(option, reply, body, what)
        if reply == c.REP_ACK:
            return replies
        replies.append((reply, body))
        # A list's entry costs more memory than an empty reply has bytes.
        taken += codec.OPTION_REPLY.size + 64 + len(body)
        if taken > MAX_REPLIES:
            raise ProtocolError(f"the server answers option {option} without end")


def _read_reply(option: int) -> Handshake[tuple[int, bytes]]:
    magic, echo, reply, length = codec.OPTION_REPLY.unpack((yield codec.OPTION_REPLY.size))
    if magic != c.OPTION_REPLY_MAGIC:
        raise ProtocolError(f"the server sent {magic:#018x} where a reply should begin")
    if echo != option:
        raise ProtocolError(f"the server answers option {echo} instead of {option}")
    if length > c.MAX_OPTION_DATA:
        raise ProtocolError(f"the server's reply to option {option} has {length} bytes")
    data = (yield length) if length else b""
    return reply, data


def _refused(option: int, reply: int, body: bytes, what: str) -> NoReturn:
    kind, reason = _REFUSALS.get(reply, (NegotiationError, f"error reply {reply:#x}"))
    message = printable(body)
    name = _OPTION_NAMES.get(option, f"option {option}")
    target = f" for export {what}" if what else ""
    said = f" (it says: {message})" if message else ""
    raise kind(f"the server refuses {name}{target}: {reason}{said}", option, reply, message)


def printable(data: bytes) -> str:
    """A peer's message, made harmless for a terminal or a log: one line, at most 4096 bytes."""
    text = data[: c.MAX_STRING].decode("utf-8", "replace")
    return "".join(x if x.isprintable() else "\N{REPLACEMENT CHARACTER}" for x in text)


def _only(replies: list[tuple[int, bytes]], wanted: int) -> list[tuple[int, bytes]]:
    for reply, _ in replies:
        if reply != wanted:
            raise ProtocolError(f"the server sent a reply of type {reply} instead of {wanted}")
    return replies


def _parse_server(data: bytes) -> tuple[str, str]:
    fields = codec.Fields(data)
    return fields.sized_string(), codec.parse_string(fields.rest())


def _parse_context(data: bytes) -> tuple[int, str]:
    fields = codec.Fields(data)
    return fields.u32(), codec.parse_string(fields.rest())


def _apply_infos(session: ClientSession, infos: list[bytes]) -> ClientSession:
    """``session`` with what the REP_INFO replies tell; unknown ones are ignored."""
    told = False
    for data in infos:
        fields = codec.Fields(data)
        kind = fields.u16()
        if kind == c.INFO_EXPORT:
            session, told = _with_export(session, fields.rest()), True
        elif kind == c.INFO_NAME:
            session = replace(session, name=codec.parse_string(fields.rest()))
        elif kind == c.INFO_DESCRIPTION:
            session = replace(session, description=codec.parse_string(fields.rest()))
        elif kind == c.INFO_BLOCK_SIZE:
            session = _with_block_sizes(session, fields)
    if not told:
        raise ProtocolError("the server accepts the export without telling its size")
    return session


def _with_export(session: ClientSession, data: bytes) -> ClientSession:
    fields = codec.Fields(data)
    size, flags = fields.u64(), fields.u16()
    fields.end()
    if size >= 1 << 63:
        raise ProtocolError(f"the server announces an impossible size: {size} bytes")
    if not flags & c.TFLAG_HAS_FLAGS:
        raise ProtocolError(f"the server's transmission flags are impossible: {flags:#06x}")
    return replace(session, size=size, flags=flags & ~_unusable(session, flags))


def _unusable(session: ClientSession, flags: int) -> int:
    """The flags that the server must not have set: what they promise was not negotiated."""
    wrong = 0 if session.structured else c.TFLAG_SEND_DF
    wrong |= 0 if session.extended else c.TFLAG_BLOCK_STATUS_PAYLOAD
    return wrong | (0 if flags & c.TFLAG_SEND_WRITE_ZEROES else c.TFLAG_SEND_FAST_ZERO)


def _with_block_sizes(session: ClientSession, fields: codec.Fields) -> ClientSession:
    """Values that break the specification's rules are ignored: the defaults hold then."""
    minimum, preferred, maximum = fields.u32(), fields.u32(), fields.u32()
    fields.end()
    if not (_power_of_two(minimum) and _power_of_two(preferred)):
        return session
    if minimum > 65536 or not minimum <= preferred <= maximum:
        return session
    return replace(
        session, minimum_block=minimum, preferred_block=preferred, maximum_payload=maximum
    )


def _power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0

# SPDX-License-Identifier: Apache-2.0
"""An export under a name: what is served, on what terms, and what the handshake tells of it."""

import contextlib
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias, TypedDict, Unpack

from nbdwire import constants as c
from nbdwire.access import Rule, as_rules
from nbdwire.export import Export, ExtentsFunction, Session, SupportsSessions
from nbdwire.negotiate import ExportInfo

Exportable: TypeAlias = Export | SupportsSessions

_CAN: Final = (
    c.TFLAG_HAS_FLAGS
    | c.TFLAG_SEND_FLUSH
    | c.TFLAG_SEND_FUA
    | c.TFLAG_SEND_DF
    | c.TFLAG_SEND_CACHE
    | c.TFLAG_CAN_MULTI_CONN
)
_CAN_WRITE: Final = c.TFLAG_SEND_TRIM | c.TFLAG_SEND_WRITE_ZEROES | c.TFLAG_SEND_FAST_ZERO


@dataclass(frozen=True)
class PlainSession:
    """The session of an export that gives none: no gate, always the same node."""

    node: Export
    gate: contextlib.AbstractContextManager[object] = field(default_factory=nullcontext)

    def close(self) -> None:
        """Nothing to give back."""


@dataclass(frozen=True, eq=False)
class ServedExport:
    """An export under a name; two of them are never equal, even with the same name and export.

    ``size`` and the block sizes are in bytes. ``contexts``: what BLOCK_STATUS tells beside the
    allocation. ``access`` None: everybody may.
    """

    name: str
    export: Exportable
    size: int
    read_only: bool
    description: str = ""
    contexts: Mapping[str, ExtentsFunction] = field(default_factory=dict)
    minimum_block: int = c.MIN_BLOCK
    preferred_block: int = c.PREFERRED_BLOCK
    maximum_payload: int = c.MAX_PAYLOAD
    access: tuple[Rule, ...] | None = None
    tls_required: bool = False
    wide_contexts: tuple[str, ...] = ()
    block_size_required: bool = False

    @property
    def blocking(self) -> bool:
        """Whether its verbs may wait long, at this moment."""
        return bool(getattr(self.export, "blocking", False))

    def info(self) -> ExportInfo:
        """What the handshake tells clients."""
        return ExportInfo(
            name=self.name,
            size=self.size,
            flags=_CAN | (c.TFLAG_READ_ONLY if self.read_only else _CAN_WRITE),
            description=self.description,
            minimum_block=self.minimum_block,
            preferred_block=self.preferred_block,
            maximum_payload=self.maximum_payload,
            contexts=(c.CONTEXT_BASE_ALLOCATION, *self.contexts),
            tls_required=self.tls_required,
            wide_contexts=self.wide_contexts,
            block_size_required=self.block_size_required,
        )

    def open_session(self) -> Session:
        """An object for one connection, or for one of its threads."""
        if isinstance(self.export, SupportsSessions):
            return self.export.open_session()
        return PlainSession(self.export)


class Offer(TypedDict, total=False):
    """How an export is offered; what is not given is as in `ServedExport`.

    ``contexts``: the functions behind metadata contexts, by name. ``read_only`` True makes a
    writable export read-only; None and False leave it as it is. The rest is described at
    `nbdwire.negotiate.ExportInfo` (sizes in bytes) and `nbdwire.access` (``access``).
    """

    description: str
    contexts: Mapping[str, ExtentsFunction] | None
    read_only: bool | None
    minimum_block: int
    preferred_block: int
    maximum_payload: int
    access: Rule | Sequence[Rule] | None
    tls_required: bool
    wide_contexts: Collection[str]
    block_size_required: bool


def serve(name: str, export: Exportable, **offer: Unpack[Offer]) -> ServedExport:
    """``export`` under ``name``. ValueError if a client could not be told so."""
    _check_name(name)
    target: Any = export
    given: dict[str, Any] = dict(offer)
    read_only = target.read_only or bool(given.pop("read_only", None))
    given["contexts"] = dict(given.get("contexts") or {})
    given["wide_contexts"] = tuple(given.get("wide_contexts", ()))
    given["access"] = as_rules(given.get("access"))
    for context in given["contexts"]:
        _check_context(context)
    served = ServedExport(name, export, target.size, read_only, **given)
    _check_sizes(served)
    return served


def _check_name(name: str) -> None:
    if len(name.encode()) > c.MAX_STRING or "\0" in name:
        raise ValueError(f"an export name has at most {c.MAX_STRING} bytes and no NUL")


def _check_context(name: str) -> None:
    if len(name.encode()) > c.MAX_STRING or "\0" in name or ":" not in name:
        raise ValueError(
            f"a metadata context is called namespace:leaf, with at most {c.MAX_STRING} bytes and "
            f"no NUL, not {name[:64]!r}"
        )


def _check_sizes(served: ServedExport) -> None:
    served.info()  # ValueError for what the specification rules out
    name, size, block = served.name, served.size, served.minimum_block
    if size % block:
        raise ValueError(f"export {name!r}: {size} bytes are no multiple of its block of {block}")
    if served.maximum_payload % block or served.maximum_payload > c.MAX_PAYLOAD:
        raise ValueError(
            f"export {name!r}: the maximum payload is a multiple of the minimum block, and "
            f"{c.MAX_PAYLOAD} bytes at most"
        )

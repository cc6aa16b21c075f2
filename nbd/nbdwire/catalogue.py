# SPDX-License-Identifier: Apache-2.0
"""The exports as one connection may see them: its peer, its listener's terms, places that are left.

This is the `nbdwire.negotiate.Catalog` of one connection. It has no part in the bytes of the
handshake, and the handshake knows nothing of rules.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from nbdwire.access import Peer, Rule, needs_tls, refusal
from nbdwire.errors import PolicyRefused, ShuttingDown
from nbdwire.exports import Exports
from nbdwire.negotiate import ExportInfo, TLSMode
from nbdwire.served import ServedExport

if TYPE_CHECKING:
    from nbdwire.tls import ServerTLS

TOO_MANY: Final = "too many clients are connected; try again later"
_TLS_FIRST: Final = "the client asked without TLS for what is offered only with it"


@dataclass(frozen=True)
class Terms:
    """What a listener grants. ``mode`` is "off", "allowed" or "required" (TLS).

    ``access`` None: everybody; ``exports`` None: all of them; ``default``: the export behind the
    empty name; ``hidden``: nobody is told what exports there are.
    """

    mode: TLSMode = "off"
    tls: "ServerTLS | None" = None
    access: tuple[Rule, ...] | None = None
    exports: frozenset[str] | None = None
    default: str | None = None
    hidden: bool = False

    def offers(self, name: str) -> bool:
        """Whether the export can be had at this listener."""
        return self.exports is None or name in self.exports


class Catalogue:
    """For one connection. ``peer`` is replaced when TLS has proved who it is.

    ``selected`` is what the last look-up found and allowed; ``refused`` is why the last option that
    was refused was so, for the log.
    """

    def __init__(
        self,
        exports: Exports,
        terms: Terms,
        peer: Peer,
        *,
        reserve: Callable[[], bool],
        stopping: Callable[[], bool],
    ) -> None:
        self.peer = peer
        self.selected: ServedExport | None = None
        self.refused = ""
        self._exports = exports
        self._terms = terms
        self._reserve = reserve
        self._stopping = stopping
        self._made = ""  # the name that this connection holds on demand

    def listing(self) -> list[tuple[str, str]]:
        """Name and description of what this peer may use. PolicyRefused, ShuttingDown."""
        self._check_open()
        self._check_listener()
        if self._terms.hidden:
            raise PolicyRefused("this server does not tell its exports; ask for one by its name")
        return [
            (served.name, served.description)
            for served in self._exports.all()
            if self._terms.offers(served.name) and refusal(served.access, self.peer) is None
        ]

    def lookup(self, name: str) -> ExportInfo | None:
        """What ``name`` stands for ("" is the default); None if there is none of it.

        PolicyRefused if this peer may not have it, or there is no place left; ShuttingDown.
        """
        self.selected, self.refused = None, ""
        self._check_open()
        if needs_tls(self._terms.access, self.peer) and self._terms.mode != "off":
            # Nothing is told, or made, before the peer has proved who it is.
            self.refused = _TLS_FIRST
            return ExportInfo(name=name, size=0, flags=0, tls_required=True)
        self._check_listener()
        served = self._find(name)
        if served is None:
            self.refused = f"there is no export {name[:256]!r}"
            return None
        info = self._judge(served)
        if info is not None and info.tls_required:
            self.refused = _TLS_FIRST
        elif info is not None and not self._reserve():
            raise self._refusal(TOO_MANY)
        self.selected = served if info is not None else None
        return info

    def _find(self, name: str) -> ServedExport | None:
        if name == "" and self._terms.default is not None and not self._exports.has(""):
            name = self._terms.default
        return self._use(name) if self._terms.offers(name) else None

    def _use(self, name: str) -> ServedExport | None:
        """One export made on demand at most is held by a connection: the last it asked for."""
        found = self._exports.find(name, self)
        if self._made != name:
            self.release()
            self._made = name
        return found

    def _judge(self, served: ServedExport) -> ExportInfo | None:
        """What this peer is told of it; None: nothing. PolicyRefused."""
        info = replace(served.info(), tls_required=served.tls_required and not self.peer.tls)
        reason = refusal(served.access, self.peer)
        if reason is not None and needs_tls(served.access, self.peer):
            info = replace(info, tls_required=True)
        elif reason is not None:
            refused = self._refusal(f"{reason} to use the export {served.name!r}")
            if self._terms.hidden:
                return None
            raise refused
        if info.tls_required and self._terms.mode == "off":
            raise self._refusal(f"the export {served.name!r} needs TLS, which is not offered here")
        return info

    def _check_listener(self) -> None:
        reason = refusal(self._terms.access, self.peer)
        if reason is not None:
            raise self._refusal(reason)

    def _check_open(self) -> None:
        if self._stopping():
            self.refused = "the server is shutting down"
            raise ShuttingDown(self.refused)

    def _refusal(self, why: str) -> PolicyRefused:
        self.refused = why
        return PolicyRefused(_polite(why, self.peer))

    def release(self) -> None:
        """Give back what was made for this connection, and is not used any longer."""
        self._exports.release(self._made, self)


def _polite(why: str, peer: Peer) -> str:
    """What the client is told: not which of its credentials we know."""
    return why.replace(peer.text, "you")

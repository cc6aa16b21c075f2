# SPDX-License-Identifier: Apache-2.0
"""Who may use an export: rules about the peer of a connection.

Without rules everybody may who can reach the listener. With rules, who matches none of them may
not. Addresses are compared as numbers, never as text.

>>> rules = [parse("net:192.0.2.0/24"), parse("uid:0")]
>>> refusal(rules, Peer("192.0.2.7:4711", address=ip_address("192.0.2.7"))) is None
True
>>> refusal(rules, Peer("192.0.20.7:4711", address=ip_address("192.0.20.7")))
'no rule allows 192.0.20.7:4711'
"""

import contextlib
import socket
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)
from struct import Struct
from typing import Any, Final, TypeAlias

Address: TypeAlias = IPv4Address | IPv6Address
Network: TypeAlias = IPv4Network | IPv6Network

_CREDENTIALS: Final = Struct("=iII")  # struct ucred: pid, uid, gid
_SO_PEERGROUPS: Final = 59
_MOST_GROUPS: Final = 256 * 4  # bytes; Python asks for no longer options


@dataclass(frozen=True)
class Peer:
    """The other end of a connection: what the system tells of it, and what TLS proved.

    ``text`` is for people. ``address`` is set for TCP; ``pid``, ``uid`` and ``gids`` (the primary
    group first) for Unix sockets; ``cid`` for vsock. ``subject`` is the distinguished name of a
    verified client certificate and ``names`` its alternative names, such as ``DNS:backup.example``;
    ``psk`` is the identity of a pre-shared key.
    """

    text: str
    address: Address | None = None
    pid: int | None = None
    uid: int | None = None
    gids: tuple[int, ...] = ()
    cid: int | None = None
    tls: str = ""
    subject: str = ""
    names: tuple[str, ...] = ()
    psk: str = ""

    def __str__(self) -> str:
        return self.text

    @property
    def origin(self) -> Hashable:
        """Equal for connections that come from the same host, or locally from the same process."""
        return self.address or self.cid or (self.uid, self.pid)

    def with_tls(self, stream: object) -> "Peer":
        """The same peer, after TLS: ``stream`` has ``description`` and ``identity``."""
        identity: Any = getattr(stream, "identity", None)
        return replace(
            self,
            tls=getattr(stream, "description", "") or "TLS",
            subject=getattr(identity, "subject", None) or "",
            names=tuple(getattr(identity, "names", None) or ()),
            psk=getattr(identity, "psk", None) or "",
        )


@dataclass(frozen=True)
class Rule:
    """Allows peers: each criterion that is given must hold, by any one of its values."""

    uids: frozenset[int] = frozenset()
    gids: frozenset[int] = frozenset()
    networks: tuple[Network, ...] = ()
    cids: frozenset[int] = frozenset()
    subjects: frozenset[str] = frozenset()
    names: frozenset[str] = frozenset()
    psk: frozenset[str] = frozenset()

    def allows(self, peer: Peer) -> bool:
        """Whether ``peer`` satisfies all of it. A rule without a criterion allows everybody."""
        return self._allows_origin(peer) and self._allows_identity(peer)

    def needs_tls(self, peer: Peer) -> bool:
        """Whether ``peer``, as it is, could satisfy it once it has proved who it is."""
        return not peer.tls and self._allows_origin(peer) and not self._allows_identity(peer)

    def _allows_origin(self, peer: Peer) -> bool:
        return (
            (not self.uids or peer.uid in self.uids)
            and (not self.gids or not self.gids.isdisjoint(peer.gids))
            and (not self.cids or peer.cid in self.cids)
            and (not self.networks or _within(peer.address, self.networks))
        )

    def _allows_identity(self, peer: Peer) -> bool:
        return (
            (not self.subjects or peer.subject in self.subjects)
            and (not self.names or not _folded(self.names).isdisjoint(_folded(peer.names)))
            and (not self.psk or peer.psk in self.psk)
        )


def _within(address: Address | None, networks: Sequence[Network]) -> bool:
    # An address is in no network of the other family; ipaddress says so without an error.
    return address is not None and any(address in network for network in networks)


def _folded(names: Sequence[str] | frozenset[str]) -> set[str]:
    """Alternative names, with those parts in lower case that mean the same in any case."""
    folded = set()
    for name in names:
        kind, _, value = name.partition(":")
        folded.add(f"{kind}:{value.lower()}" if kind.upper() == "DNS" else name)
    return folded


def as_rules(access: Rule | Sequence[Rule] | None) -> tuple[Rule, ...] | None:
    """One rule, several or none, in the form that `refusal` takes."""
    if access is None:
        return None
    return (access,) if isinstance(access, Rule) else tuple(access)


def refusal(rules: Sequence[Rule] | None, peer: Peer) -> str | None:
    """None if ``peer`` may; else why not. ``rules`` None: everybody may."""
    if rules is None or any(rule.allows(peer) for rule in rules):
        return None
    proved = peer.subject or peer.psk
    return f"no rule allows {peer.text}" + (f" ({proved})" if proved else "")


def needs_tls(rules: Sequence[Rule] | None, peer: Peer) -> bool:
    """Whether ``peer`` is refused only because it has not proved by TLS who it is."""
    return (
        rules is not None
        and refusal(rules, peer) is not None
        and any(rule.needs_tls(peer) for rule in rules)
    )


def parse(text: str) -> Rule:
    """The rule that ``KIND:VALUE,...`` writes; ValueError says what is wrong with it.

    Kinds: ``uid``, ``gid`` (numbers), ``net`` (an address or a network), ``cid``, ``subject`` (a
    distinguished name, commas included), ``san`` (``DNS:name`` ...), ``psk`` (an identity).
    """
    kind, colon, value = text.partition(":")
    if not colon or not value or kind not in _KINDS:
        raise ValueError(f"{text!r} is no access rule: write KIND:VALUE, with {_KINDS_TEXT}")
    try:
        return _KINDS[kind](value)
    except ValueError as problem:
        raise ValueError(f"access rule {text!r}: {problem}") from None


def _numbers(text: str) -> frozenset[int]:
    found = frozenset(int(part) for part in text.split(","))
    if min(found) < 0:
        raise ValueError("numbers are not negative")
    return found


_KINDS: Final[dict[str, Callable[[str], Rule]]] = {
    "uid": lambda text: Rule(uids=_numbers(text)),
    "gid": lambda text: Rule(gids=_numbers(text)),
    "net": lambda text: Rule(networks=tuple(ip_network(part) for part in text.split(","))),
    "cid": lambda text: Rule(cids=_numbers(text)),
    "subject": lambda text: Rule(subjects=frozenset([text])),
    "san": lambda text: Rule(names=frozenset(text.split(","))),
    "psk": lambda text: Rule(psk=frozenset(text.split(","))),
}
_KINDS_TEXT: Final = ", ".join(_KINDS) + " for KIND"


def peer_of(sock: socket.socket, address: object) -> Peer:
    """The peer of a connected socket; ``address`` as `socket.accept` returned it."""
    if sock.family == socket.AF_UNIX:
        return _unix_peer(sock)
    if not isinstance(address, tuple):
        return Peer(str(address))
    if sock.family == socket.AF_VSOCK:
        return Peer(f"vsock:{address[0]}:{address[1]}", cid=address[0])
    host = plain_address(address[0])
    return Peer(f"[{host}]:{address[1]}" if host.version == 6 else f"{host}:{address[1]}", host)


def plain_address(text: str) -> Address:
    """The address without a scope; an IPv4 address that was mapped into IPv6 is IPv4 again."""
    host = ip_address(text.partition("%")[0])
    if isinstance(host, IPv6Address) and host.ipv4_mapped is not None:
        return host.ipv4_mapped
    return host


def _unix_peer(sock: socket.socket) -> Peer:
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, gid = _CREDENTIALS.unpack(raw)
    others: tuple[int, ...] = ()
    with contextlib.suppress(OSError):  # more groups than this buffer holds
        data = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _MOST_GROUPS)
        others = tuple(memoryview(data).cast("I"))
    return Peer(f"unix:pid={pid},uid={uid}", pid=pid, uid=uid, gids=(gid, *others))

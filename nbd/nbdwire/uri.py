# SPDX-License-Identifier: Apache-2.0
"""NBD URIs: ``nbd://host/export``, ``nbd+unix:///export?socket=PATH`` and their relatives.

Source: "The NBD Uniform Resource Indicator (URI) format" (doc/uri.md of the NBD project), and
libnbd's ``nbd+vsock``, ``nbds+vsock``, ``tls-certificates`` and ``tls-psk-file``.
"""

import os
import re
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote, unquote_to_bytes

from nbdwire.constants import DEFAULT_PORT, MAX_STRING
from nbdwire.errors import URIError

_URI: Final = re.compile(
    r"(?P<scheme>[a-z+]+)://(?P<authority>[^/?#]*)(?:/(?P<path>[^?#]*))?(?:\?(?P<query>[^#]*))?",
    re.ASCII,
)
_AUTHORITY: Final = re.compile(
    r"(?:(?P<user>[^@]*)@)?(?P<host>\[[^\[\]]*\]|[^\[\]:@]*)(?::(?P<port>[0-9]{0,10}))?", re.ASCII
)
_BAD_PERCENT: Final = re.compile(r"%(?![0-9A-Fa-f]{2})")
_SCHEMES: Final = ("nbd", "nbds", "nbd+unix", "nbds+unix", "nbd+vsock", "nbds+vsock")
_PARAMS: Final[dict[str, tuple[str, ...]]] = {  # and what they may be; (): anything
    "tls-type": ("anon", "x509", "psk"),
    "tls-verify-peer": ("0", "1", "false", "true"),
    "tls-hostname": (),
    "tls-certificates": (),
    "tls-psk-file": (),
}
_VSOCK_HOST: Final = "2"  # VMADDR_CID_HOST


@dataclass(frozen=True)
class NBDURI:
    """Where a server is, and which of its exports is meant.

    ``socket`` (a path; an abstract name begins with NUL) is set for Unix sockets only; ``vsock``
    makes ``host`` a context id. An empty ``host`` is localhost and an empty ``export`` the
    server's default. Port 0 lets a server that listens choose one. ``params`` are the query's
    other pairs, in order; ``user`` is for TLS.
    """

    host: str = ""
    port: int = DEFAULT_PORT
    socket: str = ""
    export: str = ""
    tls: bool = False
    params: tuple[tuple[str, str], ...] = ()
    user: str = ""
    vsock: bool = False

    @property
    def scheme(self) -> str:
        """The first part of the URI, such as ``nbd+unix``."""
        base = "nbds" if self.tls else "nbd"
        return base + ("+unix" if self.socket else "+vsock" if self.vsock else "")

    def with_export(self, name: str) -> "NBDURI":
        """The same server, another export."""
        return NBDURI(
            self.host, self.port, self.socket, name, self.tls, self.params, self.user, self.vsock
        )

    def param(self, name: str) -> str | None:
        """The value of the query's parameter ``name``; None if it is not there.

        ``tls-type`` (anon, x509 or psk), ``tls-verify-peer`` (0 or 1), ``tls-hostname``,
        ``tls-certificates`` (a directory) and ``tls-psk-file`` say how TLS is to be done.
        """
        return dict(self.params).get(name)

    def __str__(self) -> str:
        query = [("socket", self.socket)] if self.socket else []
        pairs = "&".join(f"{_quote(key)}={_quote(value)}" for key, value in [*query, *self.params])
        text = f"{self.scheme}://{self._authority()}/{_quote(self.export)}"
        return f"{text}?{pairs}" if pairs else text

    def _authority(self) -> str:
        user = f"{quote(self.user, safe='')}@" if self.user else ""
        if self.socket:
            return user
        host = quote(self.host, safe=":")
        host = f"[{host}]" if ":" in host else host
        return user + host + (f":{self.port}" if self.port != DEFAULT_PORT else "")


def _quote(text: str) -> str:
    return quote(os.fsencode(text), safe="/:")


def format_uri(uri: NBDURI) -> str:
    """The text of ``uri``; `parse` turns it back."""
    return str(uri)


def parse(text: str) -> NBDURI:
    """The parts of an NBD URI. URIError if it is none."""
    match = _URI.fullmatch(text)
    if match is None or match["scheme"] not in _SCHEMES:
        raise URIError(f"{text!r} is no NBD URI; it should look like nbd://host/export")
    tls, _, kind = match["scheme"].partition("+")
    try:
        user, host, port = _split_authority(match["authority"])
        export = _decode_name(match["path"] or "")
        socket, params = _split_query(match["query"] or "")
        _check_kind(kind, host, port, socket)
        _check_params(params)
    except URIError as error:
        raise URIError(f"{text!r}: {error}") from None
    if kind == "vsock":
        host = _context_id(host)
    return NBDURI(host, port, socket, export, tls == "nbds", params, user, kind == "vsock")


def _split_authority(text: str) -> tuple[str, str, int]:
    match = _AUTHORITY.fullmatch(text)
    if match is None:
        raise URIError(f"{text!r} is no host and port; an IPv6 address goes into brackets")
    port = int(match["port"] or DEFAULT_PORT)
    return _decode(match["user"] or ""), _decode(match["host"].strip("[]")), port


def _split_query(text: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    """The value of ``socket``, and the other pairs."""
    sockets, params = [], []
    for item in filter(None, re.split("[&;]", text)):
        key, _, value = item.partition("=")
        if key == "socket":
            sockets.append(_decode_path(value))
        else:
            params.append((_decode(key), _decode(value)))
    if len(sockets) > 1:
        raise URIError("it names more than one socket")
    return sockets[0] if sockets else "", tuple(params)


def _check_kind(kind: str, host: str, port: int, socket: str) -> None:
    if port >> (32 if kind == "vsock" else 16):
        raise URIError(f"{port} is no port number")
    if kind == "unix" and host:
        raise URIError("a Unix socket has no host; write nbd+unix:///export?socket=PATH")
    if kind == "unix" and not socket:
        raise URIError("the socket is missing; write nbd+unix:///export?socket=PATH")
    if kind != "unix" and socket:
        raise URIError("only nbd+unix and nbds+unix take a socket")


def _check_params(params: tuple[tuple[str, str], ...]) -> None:
    """Unknown ones are for others; a mistake in what decides about security is told."""
    names = [name for name, _ in params if name in _PARAMS]
    if len(set(names)) < len(names):
        raise URIError("it has a tls parameter twice")
    for name, value in params:
        allowed = _PARAMS.get(name)
        if name in _PARAMS and not value:
            raise URIError(f"{name} has no value")
        if allowed and value not in allowed:
            raise URIError(f"{name} is {value!r}; it can be {', '.join(allowed)}")


def _context_id(host: str) -> str:
    if host and not (host.isascii() and host.isdigit()):
        raise URIError(f"{host!r} is no vsock context id, which is a number")
    return host or _VSOCK_HOST


def _decode_bytes(text: str) -> bytes:
    if _BAD_PERCENT.search(text):
        raise URIError("a percent sign stands without two hexadecimal digits (write %25)")
    return unquote_to_bytes(text)


def _decode(text: str) -> str:
    data = _decode_bytes(text)
    if 0 in data:
        raise URIError("there is a NUL in it")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise URIError("it is not UTF-8 after percent-decoding") from None


def _decode_name(text: str) -> str:
    name = _decode(text)
    if len(name.encode()) > MAX_STRING:
        raise URIError(f"the export's name is longer than {MAX_STRING} bytes")
    return name


def _decode_path(text: str) -> str:
    data = _decode_bytes(text)
    if 0 in data[1:]:  # a NUL in front marks Linux's abstract names
        raise URIError("there is a NUL in the socket's path")
    return os.fsdecode(data)

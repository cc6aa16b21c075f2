# SPDX-License-Identifier: Apache-2.0
"""TLS for servers and clients, configured as libnbd, nbdkit and QEMU are.

A directory holds ``ca-cert.pem`` (who signed the other side), optionally ``ca-crl.pem`` (whom that
revoked), and ``server-cert.pem`` with ``server-key.pem`` or ``client-cert.pem`` with
``client-key.pem``. TLS 1.2 is the oldest version, renegotiation and compression are off, and
anonymous TLS does not exist here: it protects against nobody who can change what passes.

Source: the NBD protocol document, section "TLS support"; doc/uri.md; libnbd's URI parameters.
"""

import os
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, TypeAlias, get_args

from nbdwire import ktls, psk
from nbdwire.errors import TLSError
from nbdwire.ktls import KernelTLSStream
from nbdwire.negotiate import TLSMode
from nbdwire.psk import StrPath
from nbdwire.tlsstream import Identity, TLSStream, explain
from nbdwire.transport import Upgrader
from nbdwire.uri import NBDURI

__all__ = ["ClientTLS", "Files", "Identity", "ServerTLS", "TLSStream", "client_context"]

ServerStream: TypeAlias = TLSStream | KernelTLSStream

# Where libnbd looks when a URI does not say.
_USUAL: Final = ("~/.pki/libnbd", "~/.config/pki/libnbd", "/etc/pki/libnbd")


@dataclass(frozen=True)
class Files:
    """Paths of PEM files. ``ca`` may hold several certificates, ``crl`` several lists.

    An empty ``ca`` is the system's list of authorities; an empty ``certificate`` shows none.
    """

    certificate: str = ""
    key: str = ""
    ca: str = ""
    crl: str = ""

    @classmethod
    def of_server(cls, directory: StrPath) -> "Files":
        """By the names that QEMU and nbdkit use; TLSError if the server's are not there."""
        files = cls._find(directory, "server")
        if not files.certificate:
            raise TLSError(f"{os.fspath(directory)} holds no server-cert.pem with server-key.pem")
        return files

    @classmethod
    def of_client(cls, directory: StrPath) -> "Files":
        """By the names that QEMU and libnbd use; TLSError if there is no ca-cert.pem."""
        files = cls._find(directory, "client")
        if not files.ca:
            raise TLSError(f"{os.fspath(directory)} holds no ca-cert.pem")
        return files

    @classmethod
    def _find(cls, directory: StrPath, side: str) -> "Files":
        def there(name: str) -> str:
            path = Path(directory, name)
            return str(path) if path.is_file() else ""

        files = cls(
            there(f"{side}-cert.pem"),
            there(f"{side}-key.pem"),
            there("ca-cert.pem"),
            there("ca-crl.pem"),
        )
        if bool(files.certificate) != bool(files.key):
            raise TLSError(
                f"{os.fspath(directory)} needs both {side}-cert.pem and {side}-key.pem, or neither"
            )
        return files


class ServerTLS:
    """How a server does TLS.

    ``mode``: "off"; "allowed" (clients may, and must for exports with ``tls_required``); or
    "required" (nothing is to be had without). Either ``certificates`` (a directory or `Files`),
    with ``verify_peer`` if clients must show a certificate that the authority signed, or
    ``psk_file``, the names and keys of those that may connect. With ``kernel`` the kernel encrypts
    what TCP clients are sent (`nbdwire.ktls`). TLSError if that cannot be used.

    All methods may be called from any thread.
    """

    def __init__(
        self,
        mode: TLSMode = "required",
        *,
        certificates: StrPath | Files | None = None,
        ca: StrPath | None = None,
        verify_peer: bool = False,
        psk_file: StrPath | None = None,
        kernel: bool = False,
    ) -> None:
        if mode not in get_args(TLSMode):
            raise TLSError(f"the TLS mode is one of {', '.join(get_args(TLSMode))}, not {mode!r}")
        if mode != "off" and (certificates is None) == (psk_file is None):
            raise TLSError("TLS needs either certificates or a psk_file, one of the two")
        self.mode = mode
        self.verify_peer = verify_peer
        self._certificates = certificates
        self._ca = ca
        self._psk_file = psk_file
        self._kernel = kernel
        self._current = self._load() if mode != "off" else None

    def reload(self) -> None:
        """Read the files again: new clients see the new ones, connected ones are left alone.

        TLSError if the new ones cannot be used; then those that were read before stay in use.
        """
        if self.mode != "off":
            self._current = self._load()

    def upgrade(self, sock: socket.socket, deadline: float | None = None) -> ServerStream:
        """TLS with the client of ``sock``, which has been told to begin.

        ``deadline`` is a `time.monotonic`; without one the socket's time limit holds for the whole
        of it. TLSError, ConnectionClosed, TimeoutError; ``sock`` stays the caller's then.
        """
        current = self._current
        if current is None:
            raise TLSError("TLS is switched off on this server")
        context, keys = current
        in_kernel = self._kernel and sock.family in (socket.AF_INET, socket.AF_INET6)
        stream: ServerStream = (
            KernelTLSStream(sock, context)
            if in_kernel
            else TLSStream(sock, context, server_side=True)
        )
        limit = _deadline(sock, deadline)
        if keys is None:
            stream.handshake(limit)
        else:
            _with_keys(stream, keys, limit)
        return stream

    def _load(self) -> tuple[ssl.SSLContext, psk.Keys | None]:
        context = _context(ssl.PROTOCOL_TLS_SERVER)
        # Nobody resumes an NBD session, and what is not kept cannot pile up or outlive `reload`.
        context.options |= ssl.OP_NO_TICKET
        context.num_tickets = 0
        if self._kernel:
            ktls.prepare(context)
        if self._psk_file is not None:
            psk.require_python()
            keys = psk.Keys(psk.read_keys(self._psk_file))
            keys.install(context)
            return context, keys
        assert self._certificates is not None
        _use(context, self._files(self._certificates))
        if self.verify_peer:
            context.verify_mode = ssl.CERT_REQUIRED
        return context, None

    def _files(self, certificates: StrPath | Files) -> Files:
        files = certificates if isinstance(certificates, Files) else Files.of_server(certificates)
        if self._ca is not None:
            files = replace(files, ca=os.fspath(self._ca))
        if not files.certificate or not files.key:
            raise TLSError("a TLS server needs a certificate and its key")
        if self.verify_peer and not files.ca:
            raise TLSError("verify_peer needs ca-cert.pem: who signs the clients' certificates")
        return files if self.verify_peer else replace(files, ca="", crl="")


class ClientTLS:
    """How a client does TLS.

    ``certificates`` is a directory or `Files`; without it the usual directories are looked for,
    then the system's authorities trusted. ``hostname`` is what the server's certificate must be
    for; None does not look at the name (a Unix socket has none), only at who signed it.
    ``verify_peer=False`` trusts anybody. With ``psk_file`` and ``user`` no certificates are used.
    TLSError if that cannot be used.
    """

    def __init__(
        self,
        *,
        certificates: StrPath | Files | None = None,
        hostname: str | None = None,
        verify_peer: bool = True,
        psk_file: StrPath | None = None,
        user: str = "",
    ) -> None:
        self._hostname = hostname or None
        context = self._context = _context(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        if psk_file is not None:
            # CERT_REQUIRED, and no authority: a server that comes with a certificate is refused.
            psk.require_python()
            name = user or os.environ.get("LOGNAME", "")
            psk.install_client(context, name, psk.client_key(psk_file, name))
            return
        context.check_hostname = self._hostname is not None and verify_peer
        context.verify_mode = ssl.CERT_REQUIRED if verify_peer else ssl.CERT_NONE
        _use(context, _client_files(certificates))

    @classmethod
    def from_uri(cls, uri: NBDURI) -> "ClientTLS":
        """By a URI's user, host and ``tls-*`` parameters; TLSError if they make no sense."""
        params = dict(uri.params)  # `nbdwire.uri.parse` has looked at their values
        kind = params.get("tls-type", "psk" if "tls-psk-file" in params else "x509")
        if kind == "anon":
            raise TLSError("anonymous TLS protects nothing and is not supported; use certificates")
        if kind == "psk" and "tls-psk-file" not in params:
            raise TLSError("tls-type=psk needs tls-psk-file=FILE as well")
        host = None if uri.socket or uri.vsock else uri.host or "localhost"
        return cls(
            certificates=params.get("tls-certificates"),
            hostname=params.get("tls-hostname") or host,
            verify_peer=params.get("tls-verify-peer", "1") not in ("0", "false"),
            psk_file=params["tls-psk-file"] if kind == "psk" else None,
            user=uri.user,
        )

    def upgrade(self, sock: socket.socket, deadline: float | None = None) -> TLSStream:
        """TLS with the server of ``sock``. ``deadline`` and errors: as `ServerTLS.upgrade`."""
        stream = TLSStream(sock, self._context, server_side=False, server_hostname=self._hostname)
        stream.handshake(_deadline(sock, deadline))
        return stream


def client_context(uri: NBDURI) -> Upgrader:
    """What `nbdwire.transport.establish` needs to connect to ``uri``; TLSError."""
    return ClientTLS.from_uri(uri).upgrade


def _with_keys(stream: ServerStream, keys: psk.Keys, deadline: float | None) -> None:
    keys.begin()
    try:
        stream.handshake(deadline)
    except TLSError as problem:
        if keys.name:
            raise TLSError(f"{problem} (it claims to be {keys.name!r})") from None
        raise TLSError(f"{problem} (it gave no name that has a key here)") from None
    stream.identity = Identity(psk=keys.name)


def _deadline(sock: socket.socket, deadline: float | None) -> float | None:
    left = sock.gettimeout()
    return deadline if deadline is not None or left is None else time.monotonic() + left


def _context(protocol: int) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    return context


def _client_files(certificates: StrPath | Files | None) -> Files:
    if isinstance(certificates, Files):
        return certificates
    if certificates is not None:
        return Files.of_client(certificates)
    for usual in map(os.path.expanduser, _USUAL):
        if Path(usual, "ca-cert.pem").is_file():
            return Files.of_client(usual)
    return Files()


def _use(context: ssl.SSLContext, files: Files) -> None:
    if files.ca:
        _try(files.ca, lambda: context.load_verify_locations(files.ca))
    elif context.verify_mode == ssl.CERT_REQUIRED:
        context.load_default_certs()
    if files.crl:
        _try(files.crl, lambda: context.load_verify_locations(files.crl))
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    if files.certificate:
        _try(
            f"{files.certificate} and {files.key}",
            lambda: context.load_cert_chain(files.certificate, files.key, password=_no_password),
        )


def _try(what: str, load: Callable[[], object]) -> None:
    try:
        load()
    except ssl.SSLError as problem:
        raise TLSError(f"cannot use {what}: {explain(problem)}") from None
    except OSError as problem:
        raise TLSError(f"cannot read {what}: {problem.strerror or problem}") from None


def _no_password() -> str:
    # Without this OpenSSL would ask whoever sits at the terminal.
    raise TLSError(
        "the key is encrypted; store it without a pass phrase, readable to its user only"
    )

# SPDX-License-Identifier: Apache-2.0
"""TLS whose records the kernel encrypts (Linux, TCP): then files can be sent with ``sendfile``.

OpenSSL does the handshake and gives the keys to the kernel. From then on it only receives, and all
that is sent goes to the socket directly, by any thread: the kernel makes records of it. Should the
kernel not take over, the connection is refused: what is sent here would otherwise be plain text.

It needs Python 3.12, OpenSSL 3 with kernel TLS, and the kernel's module ``tls``; see `unavailable`.
Source: the kernel's Documentation/networking/tls.rst.
"""

import contextlib
import socket
import ssl
import struct
import time
from collections.abc import Iterable
from typing import Final

from nbdwire.errors import ConnectionClosed, TLSError
from nbdwire.tlsstream import Identity, explain, identity_of
from nbdwire.transport import Buffer

_TCP_ULP: Final = 31
_SOL_TLS: Final = 282
_TLS_TX: Final = 1
_AES_GCM_256: Final = struct.pack("=HH", 0x0304, 52)  # version, cipher; iv, key, salt, number
_SET_RECORD_TYPE: Final = 1
_ALERT: Final = bytes([21])
_CLOSE_NOTIFY: Final = bytes([1, 0])
_CIPHERS: Final = (
    "ECDHE+AESGCM:ECDHE+CHACHA20:DHE+AESGCM"  # of TLS 1.2: those that the kernel knows
)
_UNREAD_MOST: Final = 64


def unavailable() -> str:
    """Why the kernel cannot encrypt here; empty if nothing speaks against it."""
    if not hasattr(ssl, "OP_ENABLE_KTLS"):
        return "Python 3.12 or newer is needed"
    problem = _try_kernel()
    return f"the kernel says {problem} (are its modules tls and gcm loaded?)" if problem else ""


def _try_kernel() -> str:
    """The kernel's error when it is given a key; empty if it takes it."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as sock,
    ):
        try:
            sock.setsockopt(socket.IPPROTO_TCP, _TCP_ULP, b"tls")
            sock.setsockopt(_SOL_TLS, _TLS_TX, _AES_GCM_256 + bytes(52))
        except OSError as problem:
            return problem.strerror or str(problem)
    return ""


def prepare(context: ssl.SSLContext) -> None:
    """Make ``context`` hand its keys to the kernel; TLSError if that is not to be had here."""
    why = unavailable()
    if why:
        raise TLSError(f"kernel TLS cannot be used: {why}")
    context.options |= ssl.OP_ENABLE_KTLS  # type: ignore[attr-defined,unused-ignore]
    context.set_ciphers(_CIPHERS)


def has_taken_over(sock: socket.socket) -> bool:
    """Whether the kernel encrypts what is sent on ``sock``."""
    try:
        info = sock.getsockopt(_SOL_TLS, _TLS_TX, 4)  # version and cipher, 16 bits each
    except OSError:
        return False
    return len(info) == 4 and any(info)


class KernelTLSStream:
    """A `nbdwire.transport.Stream`. One thread may receive and any number send at the same time."""

    secure: Final = True
    can_sendfile: Final = True

    def __init__(self, sock: socket.socket, context: ssl.SSLContext) -> None:
        """The server's side of ``sock``; ``context`` is `prepare`d."""
        self.identity = Identity()
        self.description = "TLS"
        self._sock = sock
        # Of its own descriptor, for wrapping takes the socket away from whoever has it.
        self._tls = context.wrap_socket(sock.dup(), server_side=True, do_handshake_on_connect=False)
        self._timeout: float | None = sock.gettimeout()
        self._said_goodbye = True  # until there is somebody to say it to

    def handshake(self, deadline: float | None) -> None:
        """As `nbdwire.tlsstream.TLSStream.handshake`; also TLSError if the kernel takes no part."""
        try:
            self._shake(deadline)
        except BaseException:
            self._tls.close()  # the socket is the caller's
            raise
        self._said_goodbye = False
        self.settimeout(self._timeout)
        cipher = self._tls.cipher()
        self.description = f"{self._tls.version()} {cipher[0] if cipher else ''} in the kernel"
        self.identity = identity_of(self._tls.getpeercert())

    def _shake(self, deadline: float | None) -> None:
        try:
            self._limit(deadline)
            self._tls.do_handshake()
        except ssl.SSLError as problem:
            raise TLSError(f"no TLS with the client: {explain(problem)}") from None
        except ConnectionError as problem:
            raise ConnectionClosed(f"the client is gone ({problem.strerror})") from problem
        if not has_taken_over(self._sock):
            raise TLSError("the kernel did not take over TLS; switch kernel TLS off")

    def recv_into(self, buffer: memoryview, nbytes: int = 0, flags: int = 0, /) -> int:
        """As `nbdwire.tlsstream.TLSStream.recv_into`."""
        view = buffer[:nbytes] if nbytes else buffer
        wanted = len(view) if flags & socket.MSG_WAITALL else 1
        deadline = None if self._timeout is None else time.monotonic() + self._timeout
        done = 0
        try:
            while done < wanted or (done < len(view) and self._tls.pending()):
                self._limit(deadline)
                got = self._tls.recv_into(view[done:])
                if not got:
                    break
                done += got
        except ssl.SSLError as problem:
            raise TLSError(f"TLS with the client broke down: {explain(problem)}") from None
        return done

    def sendall(self, data: Buffer, flags: int = 0, /) -> None:
        """As `socket.socket.sendall`."""
        self._must_be_secure()
        self._sock.sendall(data, flags)

    def sendmsg(self, buffers: Iterable[Buffer], /) -> int:
        """As `socket.socket.sendmsg`."""
        self._must_be_secure()
        return self._sock.sendmsg(buffers)

    def pending(self) -> int:
        """Bytes that have been decrypted and not received."""
        return self._tls.pending()

    def _must_be_secure(self) -> None:
        if self._said_goodbye:  # or the handshake is not done
            raise TLSError("TLS with the client is over, or has not begun")

    def goodbye(self) -> None:
        """Send close_notify, unless that would wait."""
        if self._said_goodbye:
            return
        self._said_goodbye = True
        with contextlib.suppress(OSError):
            kind = (_SOL_TLS, _SET_RECORD_TYPE, _ALERT)
            self._sock.sendmsg([_CLOSE_NOTIFY], [kind], socket.MSG_DONTWAIT)

    def shutdown(self, how: int, /) -> None:
        """As that of a socket, with a `goodbye` before the sending side is shut."""
        if how != socket.SHUT_RD:
            self.goodbye()
        self._sock.shutdown(how)

    def close(self) -> None:
        """Say `goodbye` and close the socket. Idempotent."""
        if self._sock.fileno() >= 0:
            self.goodbye()
            # Unread input would make the kernel reset the connection under what was just sent.
            with contextlib.suppress(OSError):
                self._tls.settimeout(0)
                for _ in range(_UNREAD_MOST):
                    if not self._tls.recv(1 << 16):
                        break
        self._tls.close()
        self._sock.close()

    def settimeout(self, value: float | None, /) -> None:
        """Seconds that each later call may take in all; None: no limit."""
        self._timeout = value
        self._sock.settimeout(value)
        self._tls.settimeout(value)

    def _limit(self, deadline: float | None) -> None:
        if deadline is not None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError("timed out")
            self._tls.settimeout(left)

    def fileno(self) -> int:
        """The socket's descriptor, for ``os.sendfile``; -1 when closed."""
        return self._sock.fileno()

    @property
    def family(self) -> int:
        """The socket's: AF_INET or AF_INET6."""
        return self._sock.family

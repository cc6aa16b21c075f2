# SPDX-License-Identifier: Apache-2.0
"""A socket turned to TLS: the same methods, and safe to read and write at the same time.

OpenSSL works on memory here (`ssl.SSLObject`), never on the socket. An `ssl.SSLSocket` may not be
read by one thread while another writes, which is what a server with several threads and a client
do all the time; and it asks the kernel for each record of 16 KiB twice, where this asks once for
many. Measured, it is as fast or faster: the copies cost less than the system calls.

Two locks, always taken in this order: ``_sending`` (one writer at a time; records must reach the
socket in the order in which they were made), then ``_state`` (of OpenSSL's object, which is never
held while the socket is waited for).
"""

import contextlib
import re
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

from nbdwire.errors import ConnectionClosed, TLSError
from nbdwire.pages import give_back, pages
from nbdwire.transport import Buffer

STEP: Final = 128 << 10  # of plain text: encrypted, then sent, while the peer decrypts the last one
IN_SIZE: Final = 256 << 10
RECORD: Final = 16 << 10
UNREAD_MOST: Final = 4 << 20  # thrown away at the end
UNSENT_MOST: Final = 4 * STEP  # a writer at work has less than half of it there

_SPECIAL: Final = re.compile(r'[,+"\\<>;=]|^[ #]| $|[\x00-\x1f\x7f]')
_SHORT: Final = {
    "commonName": "CN", "organizationName": "O", "organizationalUnitName": "OU",
    "countryName": "C", "stateOrProvinceName": "ST", "localityName": "L",
    "domainComponent": "DC", "userId": "UID", "emailAddress": "EMAIL", "streetAddress": "STREET",
}  # fmt: skip
_KINDS: Final = {"IP Address": "IP", "Registered ID": "RID"}
_HINTS: Final = {
    "WRONG_VERSION_NUMBER": "what came is not TLS",
    "HTTP_REQUEST": "what came is not TLS",
    "UNSUPPORTED_PROTOCOL": "it speaks nothing newer than TLS 1.1",
    "NO_SHARED_CIPHER": "there is no cipher that both sides know",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "it has shown no certificate",
    "BINDER_DOES_NOT_VERIFY": "its key is another one",
    "DECRYPTION_FAILED_OR_BAD_RECORD_MAC": "a record was damaged or forged",
}
# What the other side means by it.
_ALERTS: Final = {
    "UNKNOWN_CA": "it does not trust the authority that signed this side's certificate",
    "CERTIFICATE_UNKNOWN": "it does not accept this side's certificate",
    "BAD_CERTIFICATE": "it does not accept this side's certificate",
    "CERTIFICATE_EXPIRED": "this side's certificate is too old, or a clock is wrong",
    "CERTIFICATE_REVOKED": "this side's certificate was revoked",
    "CERTIFICATE_REQUIRED": "it wants this side to show a certificate",
    "PROTOCOL_VERSION": "the two sides have no version of TLS in common",
    "UNKNOWN_PSK_IDENTITY": "it has no key for that name",
}

_UNKNOWN_SIGNER: Final = (18, 19, 20, 21)  # X509_V_ERR_*, with four texts that few understand


@dataclass(frozen=True)
class Identity:
    """Who the peer has proved to be; all empty if it proved nothing.

    ``subject`` is the certificate's distinguished name, most general part first, as GnuTLS and
    QEMU write it: ``C=GB,O=Acme,CN=backup1``, special characters escaped (RFC 4514). ``names`` are
    its subject alternative names, such as ``DNS:backup1.example`` and ``IP:192.0.2.7``. ``psk`` is
    the name that goes with a pre-shared key.
    """

    subject: str = ""
    names: tuple[str, ...] = ()
    psk: str = ""

    def __str__(self) -> str:
        return self.subject or (f"psk:{self.psk}" if self.psk else "nobody")


class TLSStream:
    """What `nbdwire.transport.Stream` asks for, in TLS. Create it, then call `handshake`.

    One thread may receive and any number may send at the same time. Data that was cut off (an end
    without close_notify, as QEMU and the Linux client do it) looks as any other end: every NBD
    message tells its length, so that nothing can be taken for complete which is not.
    """

    secure: Final = True
    can_sendfile: Final = False

    def __init__(
        self,
        sock: socket.socket,
        context: ssl.SSLContext,
        *,
        server_side: bool,
        server_hostname: str | None = None,
    ) -> None:
        """Take over ``sock``. TLSError: ``server_hostname`` is no name that can be verified."""
        self.identity = Identity()
        self.description = "TLS"
        self._sock = sock
        self._peer = "client" if server_side else "server"
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        try:
            self._ssl = context.wrap_bio(
                self._incoming, self._outgoing, server_side, server_hostname
            )
        except ValueError as problem:
            raise TLSError(f"{server_hostname!r} cannot be verified: {problem}") from None
        # The types do not know that `read` returns a count when it is given a buffer.
        self._read: Callable[[int, memoryview], int] = self._ssl.read  # type: ignore[assignment]
        self._write = self._ssl.write
        self._pages = pages(IN_SIZE)
        self._arrived = memoryview(self._pages)
        self._sending = threading.Lock()
        self._state = threading.Lock()
        self._timeout: float | None = sock.gettimeout()
        self._ended = False
        self._said_goodbye = False

    def handshake(self, deadline: float | None) -> None:
        """Agree with the peer, until ``deadline`` (`time.monotonic`; None: whatever it takes).

        TLSError: it failed, with the reason in one line; TimeoutError; ConnectionClosed.
        """
        try:
            while not self._shake():
                self._flush_by(deadline)
                self._fill(deadline)
                if self._ended:
                    raise ConnectionClosed(f"the {self._peer} hung up during the TLS handshake")
            self._flush_by(deadline)
        except ssl.SSLError as problem:
            self._send_leftovers()
            raise TLSError(f"no TLS with the {self._peer}: {explain(problem)}") from None
        except ConnectionError as problem:
            raise ConnectionClosed(f"the {self._peer} is gone ({problem.strerror})") from problem
        self._sock.settimeout(self._timeout)
        cipher = self._ssl.cipher()
        self.description = f"{self._ssl.version()} {cipher[0] if cipher else ''}".strip()
        self.identity = identity_of(self._ssl.getpeercert())

    def _shake(self) -> bool:
        try:
            self._ssl.do_handshake()
        except ssl.SSLWantReadError:
            return False
        return True

    # Receiving

    def recv_into(self, buffer: memoryview, nbytes: int = 0, flags: int = 0, /) -> int:
        """As `socket.socket.recv_into`, of what the peer encrypted; knows MSG_WAITALL.

        It takes along what has arrived already, up to the view's length. 0 at the end. TLSError:
        what arrived is not what the peer sent.
        """
        view = buffer[:nbytes] if nbytes else buffer
        wanted = len(view) if flags & socket.MSG_WAITALL else 1
        deadline = None if self._timeout is None else time.monotonic() + self._timeout
        done = self._decrypt(view) if self.pending() and not self._ended else 0
        while done < wanted and not self._ended:
            self._fill(deadline)
            done += self._decrypt(view[done:])
        return done

    def _decrypt(self, view: memoryview) -> int:
        """Fill ``view`` as far as what has arrived goes: it is decrypted into its place."""
        done, room = 0, len(view)
        read, tls, incoming = self._read, self._ssl, self._incoming
        try:
            with self._state:
                while done < room:
                    count = read(room - done, view[done:])
                    if not count:
                        self._ended = True
                        break
                    done += count
                    if not incoming.pending and not tls.pending():
                        break
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:  # both have said goodbye
            self._ended = True
        except ssl.SSLError as problem:
            self._ended = True
            self._send_leftovers()
            raise TLSError(f"TLS with the {self._peer} broke down: {explain(problem)}") from None
        if self._outgoing.pending:
            self._answer()
        return done

    def _fill(self, deadline: float | None) -> None:
        if deadline is not None:
            self._limit(deadline)
        got = self._sock.recv_into(self._arrived)
        if got:
            self._incoming.write(self._arrived[:got])
        else:
            self._ended = True

    def _answer(self) -> None:
        """Send what OpenSSL has to say for itself; a writer that is at work takes it along."""
        if self._sending.acquire(blocking=False):
            try:
                self._flush()
            finally:
                self._sending.release()
        elif self._outgoing.pending > UNSENT_MOST:
            raise TLSError(f"the {self._peer} asks for new keys without end")

    def rest(self) -> None:
        """The peer is silent: have no memory for what it sent. For the thread that receives."""
        give_back(self._pages)

    def pending(self) -> int:
        """Bytes that have arrived and not been received, encrypted ones included."""
        return self._ssl.pending() or self._incoming.pending

    # Sending

    def sendall(self, data: Buffer, flags: int = 0, /) -> None:
        """As `socket.socket.sendall`. ``flags`` are for the socket; MSG_MORE has no effect."""
        with self._sending:
            self._encrypt(memoryview(data), flags & ~socket.MSG_MORE)
            self._flush(flags & ~socket.MSG_MORE)

    def sendmsg(self, buffers: Iterable[Buffer], /) -> int:
        """As `socket.socket.sendmsg`, and always all of it. Small buffers share one record."""
        views = [memoryview(buffer) for buffer in buffers]
        total = sum(map(len, views))
        if total <= RECORD:
            self.sendall(b"".join(views))
            return total
        with self._sending:
            for view in views:
                self._encrypt(view, 0)
            self._flush()
        return total

    def _encrypt(self, view: memoryview, flags: int) -> None:
        """All of ``view``; what is more than STEP goes out at once."""
        write, outgoing = self._write, self._outgoing
        for start in range(0, len(view), STEP):
            try:
                with self._state:
                    write(view[start : start + STEP])
            except ssl.SSLError as problem:
                raise TLSError(f"TLS with the {self._peer} is over: {explain(problem)}") from None
            if outgoing.pending >= STEP:
                self._flush(flags)

    def _flush(self, flags: int = 0) -> None:
        """Send what is encrypted. ``_sending`` is held, or there is one thread only."""
        with self._state:
            data = self._outgoing.read()
        if data:
            self._sock.sendall(data, flags)

    def _flush_by(self, deadline: float | None) -> None:
        if deadline is not None:
            self._limit(deadline)
        self._flush()

    def _send_leftovers(self) -> None:
        """The last words, as far as they can be sent without waiting."""
        if not self._sending.acquire(blocking=False):
            return
        try:
            with contextlib.suppress(OSError, ValueError):  # the socket may be closed
                poller = select.poll()
                poller.register(self._sock, select.POLLOUT)
                if poller.poll(0):  # a socket with a time limit waits in spite of the flag
                    with self._state:
                        data = self._outgoing.read()
                    self._sock.send(data, socket.MSG_DONTWAIT)
        finally:
            self._sending.release()

    # The end, and the rest of what a socket has

    def goodbye(self) -> None:
        """Send close_notify, unless that would wait: nobody may be held up by a peer's silence."""
        with self._state:
            if self._said_goodbye:
                return
            self._said_goodbye = True
            with contextlib.suppress(OSError):  # it wants the peer's, which comes or does not
                self._ssl.unwrap()
        self._send_leftovers()

    def shutdown(self, how: int, /) -> None:
        """As that of a socket, with a `goodbye` before the sending side is shut."""
        if how != socket.SHUT_RD:
            self.goodbye()
        self._sock.shutdown(how)

    def close(self) -> None:
        """Say `goodbye` and close the socket. Idempotent."""
        if self._sock.fileno() < 0:
            return
        self.goodbye()
        # Closing a socket with unread input would reset the connection under what was just sent.
        with contextlib.suppress(OSError):
            self._sock.setblocking(False)
            for _ in range(UNREAD_MOST // IN_SIZE):
                if self._ended or not self._sock.recv_into(self._arrived):
                    break
        self._sock.close()

    def settimeout(self, value: float | None, /) -> None:
        """Seconds that each later call may take in all; None: no limit."""
        self._timeout = value
        self._sock.settimeout(value)

    def _limit(self, deadline: float) -> None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        self._sock.settimeout(left)

    def fileno(self) -> int:
        """The socket's descriptor; -1 when closed."""
        return self._sock.fileno()

    @property
    def family(self) -> int:
        """The socket's: AF_INET and so on."""
        return self._sock.family


def explain(problem: ssl.SSLError) -> str:
    """The reason in one line, without OpenSSL's numbers and file names."""
    if isinstance(problem, ssl.SSLCertVerificationError):
        text = " ".join(str(problem.verify_message).split()).rstrip(".")
        if problem.verify_code in _UNKNOWN_SIGNER:
            text += " (no authority that is trusted here has signed it)"
        return f"its certificate is refused: {text}"
    reason = problem.reason or ""
    if reason in _HINTS:
        return _HINTS[reason]
    # Older versions of OpenSSL know alerts by the protocol that brought them in.
    alert = re.fullmatch(r"(?:SSLV3|TLSV1|TLSV13)_ALERT_(\w+)", reason)
    if alert:
        hint = _ALERTS.get(alert[1])
        return f"it refused, saying: {_words(alert[1])}" + (f" ({hint})" if hint else "")
    return _words(reason) or re.sub(r"\[[^]]*\] ?| ?\(_ssl\.c:\d+\)", "", str(problem))


def _words(reason: str) -> str:
    return reason.replace("_", " ").lower()


def identity_of(certificate: Any) -> Identity:
    """What `ssl.SSLObject.getpeercert` returned, which is empty unless it was verified."""
    if not certificate:
        return Identity()
    parts = [
        "+".join(f"{_SHORT.get(key, key)}={_SPECIAL.sub(_escape, value)}" for key, value in rdn)
        for rdn in certificate.get("subject", ())
    ]
    names = [
        f"{_KINDS.get(kind, kind)}:{value}"
        for kind, value in certificate.get("subjectAltName", ())
        if isinstance(value, str)
    ]
    return Identity(",".join(parts), tuple(names))


def _escape(found: re.Match[str]) -> str:
    character = found[0]
    return f"\\{character}" if character.isprintable() else f"\\{ord(character):02X}"

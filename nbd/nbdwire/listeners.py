# SPDX-License-Identifier: Apache-2.0
"""Listening sockets: TCP on every address of a name, Unix (abstract too), vsock, inherited ones."""

import contextlib
import errno
import ipaddress
import logging
import math
import os
import select
import socket
import stat
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any, Final, TypeAlias

from nbdwire.uri import NBDURI, parse

log = logging.getLogger(__name__)

BACKLOG: Final = 1024
FIRST_INHERITED: Final = 3  # SD_LISTEN_FDS_START
_NO_SUCH_ADDRESS: Final = frozenset({errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT})
_OUT_OF_RESOURCES: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})
_REST_MILLISECONDS: Final = 100
_COMPLAIN_SECONDS: Final = 10.0

Where: TypeAlias = str | NBDURI | socket.socket | int
"""A URI, or a socket (or its descriptor) that somebody else has bound."""

Accepted: TypeAlias = Callable[[socket.socket, object], None]
"""Called with a new client's socket, blocking, and its address. It must return soon."""


class Listener:
    """The listening sockets of one address, and the thread that accepts from them.

    ``uri`` tells where they are: port 0 has become the port that the system chose.
    """

    def __init__(self, where: Where, accepted: Accepted) -> None:
        if isinstance(where, str | NBDURI):
            uri = parse(where) if isinstance(where, str) else where
            self._sockets = bind(uri)
            self._file = _identity(uri.socket) if _is_path(uri.socket) else None
            self.uri = _with_address_of(uri, self._sockets[0])
        else:
            self._sockets = [adopt(where)]
            self._file = None  # whoever made it also removes it
            self.uri = uri_of(self._sockets[0])
        self._accepted = accepted
        self._complained = -math.inf
        self._wake, self._alarm = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="nbd-accept", daemon=True)

    def start(self) -> None:
        """Begin to accept."""
        self._thread.start()

    def _run(self) -> None:
        poll = select.poll()
        for sock in (*self._sockets, self._wake):
            poll.register(sock, select.POLLIN)
        by_number = {sock.fileno(): sock for sock in self._sockets}
        wake = self._wake.fileno()
        while True:
            ready = [fd for fd, _ in poll.poll()]
            if wake in ready:
                return
            for fd in ready:
                self._accept(by_number[fd])

    def _accept(self, listening: socket.socket) -> None:
        try:
            sock, address = listening.accept()
        except OSError as problem:
            if problem.errno in _OUT_OF_RESOURCES:
                self._complain(problem)
                self._rest()  # the client stays in the backlog meanwhile
            return
        sock.setblocking(True)
        self._accepted(sock, address)

    def _complain(self, problem: OSError) -> None:
        now = time.monotonic()
        if now - self._complained >= _COMPLAIN_SECONDS:
            self._complained = now
            log.warning(
                "cannot accept clients at %s: %s; they wait until that is over",
                self.uri,
                problem.strerror,
            )

    def _rest(self) -> None:
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        poll.poll(_REST_MILLISECONDS)

    def close(self) -> None:
        """Stop to accept; the socket file goes, unless somebody has put another in its place."""
        self._alarm.close()
        if self._thread.ident is not None:
            self._thread.join()
        for sock in (*self._sockets, self._wake):
            sock.close()
        if self._file is not None and _identity(self.uri.socket) == self._file:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.uri.socket)


# Sockets of our own


def bind(uri: NBDURI) -> list[socket.socket]:
    """The listening sockets for ``uri``: one for each address of the host. OSError if none."""
    if uri.socket:
        return [_bind_unix(uri.socket)]
    if uri.vsock:
        return [_bind_vsock(uri.host, uri.port)]
    return _bind_tcp(uri.host or "localhost", uri.port)


def _bind_tcp(host: str, port: int) -> list[socket.socket]:
    """One for each address, all with the same port; addresses that do not exist are left out."""
    sockets: list[socket.socket] = []
    missing: OSError | None = None
    try:
        for family, _, _, _, address in _addresses(host, port):
            try:
                sockets.append(_bind_address(family, address))
            except OSError as problem:
                # localhost is often ::1 too, also where there is no IPv6.
                if problem.errno not in _NO_SUCH_ADDRESS:
                    raise
                missing = problem
                continue
            if port == 0:
                return sockets + _bind_others(host, sockets[0])
    except OSError:
        _close_all(sockets)
        raise
    if not sockets:
        raise missing or OSError(errno.EADDRNOTAVAIL, f"{host} has no address")
    return sockets


def _addresses(host: str, port: int) -> list[Any]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return list(dict.fromkeys(found))


def _bind_others(host: str, first: socket.socket) -> list[socket.socket]:
    """The other addresses of ``host``, on the port that the system chose for the first.

    Nobody asked for that port: where another program has it, this address is left out.
    """
    others = []
    for family, _, _, _, address in _addresses(host, first.getsockname()[1]):
        if address[:2] == first.getsockname()[:2]:
            continue
        with contextlib.suppress(OSError):
            others.append(_bind_address(family, address))
    return others


def _bind_address(family: int, address: Any) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            # The wildcard [::] means every address, IPv4 included.
            every = ipaddress.ip_address(address[0].partition("%")[0]).is_unspecified
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not every)
        return _listen(sock, address)
    except OSError:
        sock.close()
        raise


def _bind_vsock(host: str, port: int) -> socket.socket:
    sock = socket.socket(socket.AF_VSOCK)
    try:
        any_port = 0xFFFFFFFF  # VMADDR_PORT_ANY
        return _listen(sock, (int(host or socket.VMADDR_CID_ANY), port or any_port))
    except OSError:
        sock.close()
        raise


def _bind_unix(path: str) -> socket.socket:
    """A file that a killed server left behind is replaced; anything else is EADDRINUSE."""
    sock = socket.socket(socket.AF_UNIX)
    try:
        if _is_path(path) and _is_stale(path):
            os.unlink(path)
        return _listen(sock, path)
    except OSError as problem:
        sock.close()
        number = problem.errno or errno.EINVAL
        raise OSError(number, problem.strerror or str(problem), path) from problem


def _listen(sock: socket.socket, address: Any) -> socket.socket:
    sock.bind(address)
    sock.listen(BACKLOG)
    sock.setblocking(False)
    return sock


def _close_all(sockets: Collection[socket.socket]) -> None:
    for sock in sockets:
        sock.close()


def _is_path(name: str) -> bool:
    return bool(name) and not name.startswith("\0")  # the abstract name space has no files


def _is_stale(path: str) -> bool:
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return False
    except FileNotFoundError:
        return False
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)  # a server that is too busy to accept is alive all the same
        return probe.connect_ex(path) == errno.ECONNREFUSED


def _identity(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino


def _with_address_of(uri: NBDURI, sock: socket.socket) -> NBDURI:
    """The port, and on vsock the context id, that the system chose."""
    if uri.socket:
        return uri
    address = sock.getsockname()
    return replace(uri, port=address[1], host=str(address[0]) if uri.vsock else uri.host)


# Sockets of others


@dataclass(frozen=True)
class Inherited:
    """A socket that a service manager opened for us, with the name that it has there."""

    name: str
    socket: socket.socket


def inherited(names: Collection[str] | None = None) -> list[Inherited]:
    """The sockets of systemd's socket activation; of them those with one of the ``names``.

    Empty if there are none for this process. They can be had once: the environment is cleared, so
    that children do not take them for theirs. ValueError if the environment makes no sense.
    Source: sd_listen_fds(3).
    """
    found = {key: os.environ.pop(key, "") for key in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")}
    if found["LISTEN_PID"] != str(os.getpid()):
        return []
    count = found["LISTEN_FDS"]
    if not (count.isascii() and count.isdigit() and len(count) < 5):
        raise ValueError(f"LISTEN_FDS is {count!r}, which is no number of sockets")
    labels = found["LISTEN_FDNAMES"].split(":") if found["LISTEN_FDNAMES"] else []
    if labels and len(labels) != int(count):
        raise ValueError(f"LISTEN_FDNAMES has {len(labels)} names for {count} sockets")
    labels = labels or ["unknown"] * int(count)
    descriptors = range(FIRST_INHERITED, FIRST_INHERITED + int(count))
    for fd in descriptors:
        os.set_inheritable(fd, False)
    return [
        Inherited(label, socket.socket(fileno=fd))
        for label, fd in zip(labels, descriptors, strict=True)
        if names is None or label in names
    ]


def adopt(where: socket.socket | int) -> socket.socket:
    """A socket that somebody else has bound, ready to accept; from now on it is ours to close.

    ValueError if it is none that clients can connect to.
    """
    sock = socket.socket(fileno=where) if isinstance(where, int) else where
    kinds = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_VSOCK)
    if sock.type != socket.SOCK_STREAM or sock.family not in kinds:
        raise ValueError(f"descriptor {sock.fileno()} is no stream socket")
    if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        if _is_connected(sock):
            raise ValueError(f"descriptor {sock.fileno()} is connected already: serve_socket()")
        sock.listen(BACKLOG)
    sock.setblocking(False)
    return sock


def _is_connected(sock: socket.socket) -> bool:
    try:
        sock.getpeername()
    except OSError:
        return False
    return True


def uri_of(sock: socket.socket) -> NBDURI:
    """Where clients find a bound socket."""
    address = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        return NBDURI(socket=os.fsdecode(address))
    return NBDURI(host=str(address[0]), port=address[1], vsock=sock.family == socket.AF_VSOCK)

# SPDX-License-Identifier: Apache-2.0
"""TLS with pre-shared keys: a name and a secret on both sides instead of certificates.

Python has it from 3.13. On older versions everything here that would switch it on raises TLSError,
so that a server is refused when it is configured and not when its first client comes.

Where keys are in use no certificate is, on either side: so a peer that got through the handshake
has the key, whatever the version of TLS made of it.
"""

import os
import re
import ssl
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, Protocol, TypeAlias, cast

from nbdwire.errors import TLSError

StrPath: TypeAlias = str | os.PathLike[str]

MAX_FILE: Final = 1 << 20
_MAX_KEY: Final = 256
_MAX_NAME: Final = 128  # what OpenSSL takes
_CIPHERS: Final = "kDHEPSK+AESGCM:kECDHEPSK+CHACHA20:kDHEPSK+CHACHA20:kPSK+AESGCM:kPSK+CHACHA20"
_LINE: Final = re.compile(r"(?P<name>[^:]+):(?P<key>(?:[0-9A-Fa-f]{2})+)")


class _KeyedContext(Protocol):
    """What `ssl.SSLContext` has from Python 3.13."""

    def set_psk_server_callback(
        self, callback: Callable[[str | None], bytes], identity_hint: str | None = None
    ) -> None: ...

    def set_psk_client_callback(
        self, callback: Callable[[str | None], tuple[str | None, bytes]]
    ) -> None: ...


def require_python() -> None:
    """TLSError if this Python cannot do it."""
    if not (hasattr(ssl.SSLContext, "set_psk_server_callback") and getattr(ssl, "HAS_PSK", False)):
        raise TLSError(
            "TLS with pre-shared keys needs Python 3.13 with OpenSSL; use certificates instead"
        )


def read_keys(path: StrPath) -> dict[str, bytes]:
    """The keys of a file as GnuTLS's ``psktool`` writes it: a line ``NAME:HEX`` for each.

    Empty lines and lines that begin with ``#`` do not count. TLSError, without any part of a key.
    """
    keys: dict[str, bytes] = {}
    for number, line in enumerate(_read(path).splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None:
            raise TLSError(
                f"{os.fspath(path)}, line {number} is not NAME:KEY with a hexadecimal key"
            )
        name, key = match["name"], bytes.fromhex(match["key"])
        if name in keys or len(name.encode()) > _MAX_NAME or len(key) > _MAX_KEY:
            raise TLSError(
                f"{os.fspath(path)}, line {number}: {name!r} is there twice, or it is too long, "
                "or its key is"
            )
        keys[name] = key
    if not keys:
        raise TLSError(f"{os.fspath(path)} holds no key; make one with psktool -u NAME -p FILE")
    return keys


def _read(path: StrPath) -> str:
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_FILE + 1)
    except OSError as problem:
        raise TLSError(f"cannot read the keys: {os.fspath(path)}: {problem.strerror}") from None
    if len(data) > MAX_FILE:
        raise TLSError(f"{os.fspath(path)} is larger than {MAX_FILE} bytes; it is no file of keys")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise TLSError(f"{os.fspath(path)} is not text; it is no file of keys") from None


class Keys:
    """The keys of a server; tells which one the handshake of this thread has used."""

    def __init__(self, keys: Mapping[str, bytes]) -> None:
        self._keys = dict(keys)
        self._thread = threading.local()

    def install(self, context: ssl.SSLContext) -> None:
        """Make ``context``, a server's without certificates, accept these keys and nothing else."""
        require_python()
        context.set_ciphers(_CIPHERS)
        cast("_KeyedContext", context).set_psk_server_callback(self._key, "nbd")

    def _key(self, name: str | None) -> bytes:
        key = self._keys.get(name or "", b"")  # an empty one: the handshake fails
        self._thread.name = name if key else ""
        return key

    def begin(self) -> None:
        """Call it before a handshake."""
        self._thread.name = ""

    @property
    def name(self) -> str:
        """Whose key this thread's last handshake used."""
        return getattr(self._thread, "name", "")


def install_client(context: ssl.SSLContext, name: str, key: bytes) -> None:
    """Make ``context``, a client's that trusts nobody's certificate, use this key."""
    require_python()
    context.set_ciphers(_CIPHERS)
    cast("_KeyedContext", context).set_psk_client_callback(lambda hint: (name, key))


def client_key(path: StrPath, name: str) -> bytes:
    """The key of ``name`` in the file ``path``; TLSError if there is none."""
    keys = read_keys(path)
    if name not in keys:
        raise TLSError(
            f"{os.fspath(path)} has no key for {name!r}; put the name before @ in the URI"
        )
    return keys[name]

# SPDX-License-Identifier: Apache-2.0
"""Files that are replaced as a whole: after a crash they hold the old contents or the new.

A new file is written beside the old one, made durable and renamed over it, and then the directory
is made durable, as rename(2) and fsync(2) demand of a file that must survive a power cut.
"""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final, TypeAlias
from urllib.parse import quote

Bytes: TypeAlias = bytes | bytearray | memoryview


_MAX_STEM: Final = 200


def file_stem(name: str, safe: str = "") -> str:
    """``name`` as part of a file name: readable, without ``/``, and at most 200 bytes long.

    A longer one is cut and gets 16 digits of its SHA-256, so that different names stay different.
    """
    stem = quote(name, safe=safe)
    if len(stem) <= _MAX_STEM:
        return stem
    return f"{stem[: _MAX_STEM - 17]}-{hashlib.sha256(stem.encode()).hexdigest()[:16]}"


def replace_file(path: Path, data: Bytes | Iterable[Bytes], *, durable: bool = True) -> None:
    """Make ``data`` (one buffer, or several in order) the contents of ``path``, mode 0600.

    With ``durable`` false nothing is synced: a killed process still leaves the old file or the new
    one, a crash of the host may leave neither. One writer at a time for each path: the temporary
    name is fixed (``.NAME.tmp``), so that what a killed process left behind does not pile up.
    Raises OSError, with the old file in place and no temporary one left.
    """
    parts = [data] if isinstance(data, bytes | bytearray | memoryview) else data
    temporary = temporary_of(path)
    try:
        _write(temporary, parts, durable)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync_directory(path.parent)


def temporary_of(path: Path) -> Path:
    """The name under which a new ``path`` is prepared, in the same directory."""
    return path.with_name(f".{path.name}.tmp")


def sync_directory(path: Path) -> None:
    """Make the names in the directory ``path`` durable. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write(path: Path, parts: Iterable[Bytes], durable: bool) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(path, flags, 0o600), "wb", buffering=0) as file:
        for part in parts:
            view = memoryview(part).cast("B")
            while view:
                view = view[file.write(view) or 0 :]
        if durable:
            os.fsync(file.fileno())

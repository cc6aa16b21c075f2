# SPDX-License-Identifier: Apache-2.0
"""Which files an image may name: the policy for backing files and external data files.

Whoever made an image gets to read what it names. So a name is followed only if it is a plain path
that the policy covers, to a regular file; never ``json:``, a network, a device or a FIFO. What a
user names on the command line is the user's own business, and no policy asks.
(formats.md §12; CVE-2015-5163, CVE-2024-32498, CVE-2024-4467 are what happens without.)
"""

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fleece.errors import ImageError, NotFound, UsageError

SAME_TREE: Final = "same-tree"
ANY_LOCAL: Final = "any-local"
NONE: Final = "none"
POLICIES: Final = (SAME_TREE, ANY_LOCAL, NONE)


@dataclass(frozen=True)
class Policy:
    """``same_tree``: what lies in the directory of the image that was opened, or below it.

    ``directories`` (real paths) are allowed as well; ``any_local``: every regular file is.
    """

    same_tree: bool = True
    any_local: bool = False
    directories: tuple[Path, ...] = ()

    @classmethod
    def of(cls, words: Sequence[str]) -> "Policy":
        """From `POLICIES`, ``any`` or directories, which add to same-tree. `UsageError` if not."""
        directories: list[Path] = []
        any_local = none = False
        for word in words:
            if word in (ANY_LOCAL, "any"):
                any_local = True
            elif word == NONE:
                none = True
            elif word != SAME_TREE:
                directories.append(_directory(word))
        if none and (any_local or directories):
            raise UsageError("backing policy none allows nothing; leave it or the others out")
        return cls(not none, any_local, tuple(directories))

    @property
    def nothing(self) -> bool:
        """Whether no name is ever followed."""
        return not (self.same_tree or self.any_local or self.directories)

    def resolve(self, name: str, what: str, image: Path | None, root: Path | None) -> Path:
        """The real path of ``name``, which ``image`` gives as its ``what`` ("backing file").

        ``root`` is the directory of the image that was opened; both are None for an image that is
        no file. `ImageError` or `NotFound`.
        """
        who = "the image" if image is None else image
        shown = f"{who}: its {what} {name!r}"
        if self.nothing:
            raise ImageError(f"{who}: it has a {what}, {name!r}, and these are not allowed")
        if has_protocol(name):
            raise ImageError(f"{shown} is not a plain path; not opened")
        if image is None and not os.path.isabs(name):
            raise ImageError(
                f"{shown} is relative, and the image is no file here; "
                "name it with the options of the image"
            )
        base = Path("/") if image is None else Path(os.path.realpath(image)).parent
        try:
            path = Path(os.path.realpath(base / name))
        except (OSError, ValueError) as error:
            raise ImageError(f"{shown} is not a path that can be: {error}") from None
        if not self.covers(path, root):
            raise ImageError(
                f"{shown} lies outside of {root}; not opened, "
                f"allow it with --allow-backing {path.parent}"
            )
        _check_regular(path, shown)
        return path

    def covers(self, path: Path, root: Path | None) -> bool:
        """Whether a file at the real path ``path`` may be opened."""
        roots = (*self.directories, *((root,) if self.same_tree and root is not None else ()))
        return self.any_local or any(path.is_relative_to(allowed) for allowed in roots)

    def check_opened(self, fd: int, what: str, path: Path, root: Path | None) -> None:
        """Once more, of the file that was opened: the path may have become another one since."""
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ImageError(f"{path}: a {what} named by an image must be a regular file")
        try:
            real = Path(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:
            return  # no /proc here: what was looked at before has to do
        if not self.covers(real, root):
            raise ImageError(f"{path}: the {what} was replaced while it was opened; try again")


SAME_TREE_POLICY: Final = Policy()


def _directory(word: str) -> Path:
    path = Path(os.path.realpath(word))
    if not path.is_dir():
        raise UsageError(
            f"backing policy {word!r} is unknown; use a directory, any, none or {SAME_TREE}"
        )
    return path


def _check_regular(path: Path, shown: str) -> None:
    """Looked at before it is opened: opening a FIFO or a device may do something."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise NotFound(f"{shown} does not exist") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ImageError(f"{shown} cannot be opened: {reason}") from None
    if not stat.S_ISREG(mode):
        raise ImageError(f"{shown} is not a regular file; not opened")


def has_protocol(name: str) -> bool:
    """Whether there is a colon before the first slash: then QEMU takes it for ``protocol:rest``."""
    return ":" in name.split("/", 1)[0]


def combined(image: str, name: str) -> str:
    """``name``, which ``image`` names, with the directory of ``image`` in front if need be.

    Put together as text, as QEMU shows it; what is opened is what `Policy.resolve` returns.
    """
    if os.path.isabs(name) or has_protocol(name) or "/" not in image:
        return name
    return f"{image.rpartition('/')[0]}/{name}"

# SPDX-License-Identifier: Apache-2.0
"""What the commands of ``fleece image`` have in common: sources, secrets, output and statuses."""

import argparse
import base64
import binascii
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fleece.block.options import Options, choice, parse_pairs, text, typed
from fleece.cli.output import report_error
from fleece.errors import FleeceError, UsageError

if TYPE_CHECKING:
    from fleece.block.node import Node
    from fleece.formats.chain import Policy

_MOST_SECRET: Final = 1 << 20
_SECRET: Final = {
    "qom-type": text,
    "id": text,
    "data": text,
    "file": text,
    "format": choice("raw", "base64"),
}


def add_source(parser: argparse.ArgumentParser, *, fmt: bool = True) -> None:
    """``-f --image-opts -U --object --allow-backing``; without ``-f`` if not ``fmt``."""
    if fmt:
        parser.add_argument("-f", "--format", metavar="FMT", help="of the image (default: look)")
    parser.add_argument(
        "--image-opts",
        action="store_true",
        help="images are given as options (driver=qcow2,file.filename=PATH) and not as filenames",
    )
    parser.add_argument(
        "-U", "--force-share", action="store_true", help="read it while others write it; no locks"
    )
    add_objects(parser)
    add_backing_policy(parser)


def add_objects(parser: argparse.ArgumentParser) -> None:
    """``--object``."""
    parser.add_argument(
        "--object",
        metavar="OPTIONS",
        dest="objects",
        action="append",
        default=[],
        help="a password: secret,id=NAME,file=PATH (or data=TEXT; format=base64 if it is)",
    )


def add_backing_policy(parser: argparse.ArgumentParser) -> None:
    """``--allow-backing``."""
    parser.add_argument(
        "--allow-backing",
        metavar="WHERE",
        action="append",
        default=[],
        help="files that an image names are opened within its own directory; also within this "
        "directory, `any`where on this host, or not at all (`none`); may be repeated",
    )


def add_output(parser: argparse.ArgumentParser) -> None:
    """``--output human|json``, and ``--json``."""
    parser.add_argument(
        "--output", choices=("human", "json"), default="human", help="form of the output"
    )
    parser.add_argument(
        "--json", action="store_true", help="as --output json; an error is JSON as well"
    )


def wants_json(args: argparse.Namespace) -> bool:
    """Whether standard output is to be JSON."""
    return bool(args.json or args.output == "json")


def add_progress(parser: argparse.ArgumentParser) -> None:
    """``-p``."""
    parser.add_argument("-p", "--progress", action="store_true", help="show the progress")


def policy(args: argparse.Namespace) -> "Policy":
    """What ``--allow-backing`` says."""
    from fleece.formats.chain import Policy

    return Policy.of(args.allow_backing)


def secrets(args: argparse.Namespace) -> dict[str, bytes]:
    """The secrets of ``--object``, by their id. `UsageError`."""
    found: dict[str, bytes] = {}
    for words in args.objects:
        kind, _, rest = words.partition(",")
        options = parse_pairs(rest if "=" not in kind else words)
        kind = options.get("qom-type", kind)
        if kind != "secret":
            raise UsageError(f"--object: there is no object {kind!r}; write secret,id=NAME,file=F")
        options = typed(options, _SECRET, "object secret")
        if "id" not in options:
            raise UsageError("--object: the secret has no id")
        found[options["id"]] = _secret(options)
    return found


def _secret(options: Options) -> bytes:
    name = options["id"]
    if ("data" in options) == ("file" in options):
        raise UsageError(f"--object: secret {name!r} needs data= or file=, one of the two")
    if "data" in options:
        data = options["data"].encode("utf-8", "surrogateescape")
    else:
        data = _read_secret(options["file"], name)
    if options.get("format") == "base64":
        try:
            data = base64.b64decode(b"".join(data.split()), validate=True)
        except binascii.Error:
            raise UsageError(f"--object: secret {name!r} is not base64") from None
    return bytes(data)


def _read_secret(path: str, name: str) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read(_MOST_SECRET + 1)
    except OSError as error:
        raise UsageError(f"--object: secret {name!r}: {path}: {error.strerror}") from None
    if len(data) > _MOST_SECRET:
        raise UsageError(f"--object: secret {name!r}: {path} is too long for a password")
    return data


def source_of(args: argparse.Namespace, filename: str, fmt: str | None) -> tuple[Any, str | None]:
    """``(source, fmt)`` as `open_node` takes them, for a filename or for ``--image-opts``."""
    if not args.image_opts:
        return filename, fmt
    if fmt is not None:
        raise UsageError("--image-opts and a format exclude each other; write driver=FORMAT,...")
    return parse_pairs(filename), None


def open_source(
    args: argparse.Namespace,
    filename: str,
    fmt: str | None = None,
    *,
    writable: bool = False,
    **more: Any,
) -> "Node":
    """The image that ``args`` (of a parser with `add_source`) mean; close it in the end.

    ``more`` goes to `fleece.formats.opening.open_node` (``snapshot``, ``writable_backing``).
    """
    from fleece.formats.opening import open_node

    source, fmt = source_of(args, filename, fmt)
    return open_node(
        source,
        fmt,
        read_only=not writable,
        allow_backing=policy(args),
        keys=secrets(args),
        force_share=args.force_share,
        **more,
    )


class Progress:
    """QEMU's line ``(12.34/100%)`` on standard output, if it is wanted; call it as work is done.

    From one thread at a time. Use it as a context manager: it ends the line.
    """

    def __init__(self, wanted: bool) -> None:
        self._wanted = wanted
        self._last = float("-inf")
        self._shown = False

    def __call__(self, done: int, total: int) -> None:
        """``done`` of ``total``, in whatever unit; shown four times a second."""
        now = time.monotonic()
        if self._wanted and (now - self._last >= 0.25 or done == total):
            self._last = now
            self._show(100 * done / total if total else 100.0)

    def _show(self, share: float) -> None:
        self._shown = True
        sys.stdout.write(f"    ({share:.2f}/100%)\r")
        sys.stdout.flush()

    def __enter__(self) -> "Progress":
        if self._wanted:
            self._show(0.0)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._shown:
            if kind is None:
                self._show(100.0)
            sys.stdout.write("\n")


def progress(args: argparse.Namespace) -> Progress:
    """The progress that ``-p`` asks for; nothing with ``-q`` or JSON output."""
    quiet = getattr(args, "quiet", False) or getattr(args, "json", False)
    return Progress(args.progress and not quiet)


def run_as_qemu(
    args: argparse.Namespace, function: Callable[[argparse.Namespace], int], failed: int = 1
) -> int:
    """``function(args)``; an error is one line, and the exit status ``failed`` whatever it was."""
    try:
        return function(args)
    except (FleeceError, OSError, MemoryError) as error:
        if isinstance(error, BrokenPipeError):
            raise
        code = error.code if isinstance(error, FleeceError) else FleeceError.code
        report_error(_told(error), code, bool(getattr(args, "json", False)))
        return failed


def _told(error: Exception) -> Exception:
    """The error as people should see it: an OSError without its number."""
    if isinstance(error, MemoryError):
        return FleeceError("there is not enough memory for this")
    if not isinstance(error, OSError) or not error.strerror:
        return error
    where = f"{error.filename}: " if isinstance(error.filename, str | Path) else ""
    return FleeceError(f"{where}{error.strerror}")


def below_filters(node: "Node") -> "Node":
    """The first node of a chain that is no filter."""
    from fleece.block.node import Filter

    while isinstance(node, Filter):
        node = node.next
    return node


@contextmanager
def closing_all(*nodes: "Node") -> "Iterator[tuple[Node, ...]]":
    """Close the nodes in the end, all of them."""
    try:
        yield nodes
    finally:
        problem: OSError | None = None
        for node in nodes:
            try:
                node.close()
            except OSError as error:
                problem = problem or error
        if problem is not None:
            raise problem

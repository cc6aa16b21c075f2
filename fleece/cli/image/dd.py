# SPDX-License-Identifier: Apache-2.0
"""``fleece image dd``: copy a part of a disk into a new image."""

import argparse
import sys
from typing import Any, Final

from fleece.cli.image import common
from fleece.cli.output import print_json, printable
from fleece.errors import UsageError
from fleece.units import align_up, parse_size

_MOST_BLOCK: Final = (1 << 31) - 1
_OPERANDS: Final = ("if", "of", "bs", "count", "skip")


def configure(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "dd",
        help="copy a part of a disk",
        description="Copy COUNT blocks of BYTES bytes (512) of a disk, from block SKIP on, into a "
        "new image. What is at its path is replaced.",
        example="fleece image dd -f qcow2 -O raw bs=1M count=64 if=disk.qcow2 of=part.raw",
    )
    common.add_source(parser)
    parser.add_argument("-O", "--output-format", metavar="FMT", default="raw", help="of the target")
    parser.add_argument("--json", action="store_true", help="say in JSON what was made")
    parser.add_argument(
        "operands",
        metavar="OPERAND",
        nargs="*",
        help="if=IMAGE of=TARGET [bs=BYTES] [count=N] [skip=N]",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do it; the exit status."""
    return common.run_as_qemu(args, _run)


def _run(args: argparse.Namespace) -> int:
    words = _operands(args.operands)
    block = _number(words, "bs", 512)
    if not 0 < block <= _MOST_BLOCK:
        raise UsageError(f"Invalid bs specified. Must be between 1 and {_MOST_BLOCK}.")
    skip, count = _number(words, "skip", 0), _number(words, "count", -1)
    from fleece.block.window import Window
    from fleece.formats import converting, creating

    node = common.open_source(args, words["if"], args.format)
    with common.closing_all(node):
        start = skip * block
        end = node.size if count < 0 else min(node.size, count * block)
        if start > node.size:
            name = printable(words["if"])
            print(f"fleece: {name}: cannot skip to specified offset", file=sys.stderr)
        size = max(0, end - start)
        recipe = creating.recipe(args.output_format, [], common.secrets(args))
        target = converting.Target(words["of"], args.output_format, recipe)
        window = Window(node, start if size else 0, size)
        converting.convert([window], target, converting.Options())
    if args.json:
        made = {"filename": words["of"], "format": args.output_format}
        print_json(made | {"virtual-size": align_up(size, 512)})
    return 0


def _operands(texts: list[str]) -> dict[str, str]:
    words: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or name not in _OPERANDS:
            raise UsageError(f"unrecognized operand {name}; there are {', '.join(_OPERANDS)}")
        words[name] = value
    if "if" not in words or "of" not in words:
        raise UsageError("Must specify both input and output files")
    return words


def _number(words: dict[str, str], name: str, default: int) -> int:
    if name not in words:
        return default
    try:
        return parse_size(words[name])
    except ValueError as error:
        raise UsageError(f"Invalid {name} specified: {error}") from None

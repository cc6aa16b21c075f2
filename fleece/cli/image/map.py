# SPDX-License-Identifier: Apache-2.0
"""``fleece image map``: where an image and its backing files have data, holes and zeroes."""

import argparse
import sys
from typing import TYPE_CHECKING, Any, Final, TextIO

from fleece.cli.arguments import checked
from fleece.cli.image import common
from fleece.cli.output import printable
from fleece.errors import ImageError, UsageError
from fleece.units import parse_size

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fleece.formats.mapping import Batch
    from fleece.formats.opening import Layer

_EXAMPLE: Final = """\
fleece image map --output json disk.qcow2
fleece image map --picture disk.qcow2
fleece image map --picture disk.svg disk.qcow2"""
_HEADER: Final = "Offset          Length          Mapped to       File"
_MOST: Final = 1 << 63


def configure(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "map",
        help="where an image has data, holes and zeroes",
        description="Show which parts of the disk hold data, where in which file of the chain of "
        "backing files it lies, and what reads as zeroes. The output for people has the data only.",
        example=_EXAMPLE,
    )
    common.add_source(parser)
    common.add_output(parser)
    parser.add_argument(
        "-s", "--start-offset", metavar="BYTES", default="0", help="begin here (k, M, G, ...)"
    )
    parser.add_argument("--max-length", metavar="BYTES", help="look at so many bytes only")
    parser.add_argument(
        "--compressed", action="store_true", help="tell compressed data in JSON, as QEMU 8.2 does"
    )
    parser.add_argument(
        "--picture",
        metavar="FILE.svg",
        nargs="?",
        const="",
        help="draw it: in the terminal, or as SVG if a FILE.svg is named",
    )
    parser.add_argument(
        "filename", metavar="IMAGE", nargs="?", help="a file, device, URI, or json:{...}"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print it; the exit status."""
    return common.run_as_qemu(args, _run)


def _run(args: argparse.Namespace) -> int:
    from fleece.formats.opening import Asked, Opener

    _sort_out(args)
    start = checked("--start-offset", parse_size, args.start_offset)
    most = str(_MOST) if args.max_length is None else args.max_length
    length = checked("--max-length", parse_size, most)
    source, fmt = common.source_of(args, args.filename, args.format)
    asked = Asked(common.policy(args), common.secrets(args), args.force_share)
    with Opener(asked) as opener:
        layers = opener.chain(source, fmt)
        if args.picture is not None:
            _picture(args, layers, start, length)
        else:
            _text(args, layers, start, length)
    return 0


def _sort_out(args: argparse.Namespace) -> None:
    """``--picture IMAGE``: what argparse takes for the picture's name is the image's."""
    if args.filename is None:
        args.filename, args.picture = args.picture, ""
    if not args.filename:
        raise UsageError("name the IMAGE to map; see fleece image map --help")
    if args.picture and not args.picture.endswith(".svg"):
        raise UsageError(f"a picture is written as SVG; name it FILE.svg, not {args.picture!r}")


def _text(args: argparse.Namespace, layers: "list[Layer]", start: int, length: int) -> None:
    from fleece.formats.mapping import walk

    batches = walk(layers, start, start + length)
    if common.wants_json(args):
        _print_json(batches, start, sys.stdout, compressed=args.compressed)
    else:
        _print_human(batches, [_name(layer) for layer in layers], sys.stdout)


def _name(layer: "Layer") -> str:
    """The file where the data of the layer lies."""
    return layer.shown if layer.data is None else layer.data.name


def _print_json(
    batches: "Iterable[Batch]", start: int, out: TextIO, *, compressed: bool = False
) -> None:
    """Byte for byte what ``qemu-img map --output=json`` prints."""
    templates = _Templates(compressed)
    before = "["
    for batch in batches:
        out.write(before)
        templates.write(batch, out)
        before = ",\n"
    if before == "[":  # QEMU prints one entry in any case
        out.write(f'[{{ "start": {start}, "length": 0, "depth": 0, "present": false, ')
        out.write('"zero": false, "data": false' + (', "compressed": false' * compressed) + "}")
    out.write("]\n")


class _Templates(dict[int, str]):
    """From an entry's code to its line, with a place for each number."""

    def __init__(self, compressed: bool) -> None:
        super().__init__()
        self._compressed = compressed

    def __missing__(self, code: int) -> str:
        from fleece.formats import mapping as m

        def flag(bit: int) -> str:
            return "true" if code & bit else "false"

        line = (
            f'{{ "start": %d, "length": %d, "depth": {code >> m.DEPTH_SHIFT}, '
            f'"present": {flag(m.PRESENT)}, "zero": {flag(m.ZERO)}, "data": {flag(m.DATA)}'
        )
        line += f', "compressed": {flag(m.COMPRESSED)}' if self._compressed else ""
        line += ', "offset": %d}' if code & m.OFFSET else "}"
        self[code] = line
        return line

    def write(self, batch: "Batch", out: TextIO) -> None:
        """All entries of ``batch`` by one formatting call: half the time of a call for each."""
        import numpy as np

        from fleece.formats.mapping import OFFSET

        numbers = np.stack([batch.starts, batch.lengths, batch.hosts], axis=1)
        wanted = np.ones(numbers.shape, bool)
        wanted[:, 2] = batch.codes & OFFSET != 0
        lines = ",\n".join([self[code] for code in batch.codes.tolist()])
        out.write(lines % tuple(numbers[wanted].tolist()))


def _print_human(batches: "Iterable[Batch]", names: list[str], out: TextIO) -> None:
    from fleece.formats import mapping as m

    shown = [printable(name) for name in names]
    out.write(_HEADER + "\n")
    for batch in batches:
        codes = batch.codes
        data = (codes & m.DATA != 0) & (codes & m.ZERO == 0)
        columns = (batch.starts[data], batch.lengths[data], batch.hosts[data], codes[data])
        rows = zip(*(column.tolist() for column in columns), strict=True)
        lines: list[str] = []
        for start, length, host, code in rows:
            if not code & m.OFFSET:
                out.write("".join(lines))
                out.flush()
                raise ImageError(
                    "the image has compressed or encrypted clusters, which lie nowhere in a "
                    "simple way; use --output json"
                )
            name = shown[code >> m.DEPTH_SHIFT]
            lines.append(f"{_hex(start):<16}{_hex(length):<16}{_hex(host):<16}{name}\n")
        out.write("".join(lines))


def _hex(value: int) -> str:
    """As C prints ``%#x``: no prefix for zero."""
    return f"{value:#x}" if value else "0"


def _picture(args: argparse.Namespace, layers: "list[Layer]", start: int, length: int) -> None:
    import fleece.cli.image.picture as picture
    from fleece.formats.mapping import disk_size, walk

    stop = min(start + length, disk_size(layers))
    if args.picture:
        picture.write_svg(args.picture, walk(layers, start, stop), start, stop, args.filename)
    else:
        picture.print_text(walk(layers, start, stop), start, stop, sys.stdout)

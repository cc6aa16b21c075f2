# SPDX-License-Identifier: Apache-2.0
"""The allocation of a disk as a picture: in the terminal, and as SVG.

The disk is cut into as many cells as the picture has. Data wins in a cell: of what is in it, the
topmost layer's data is shown, then zeroes, then what nothing in the chain has.
"""

import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TextIO
from xml.sax.saxutils import escape

from fleece.cli.output import printable
from fleece.errors import ImageError
from fleece.units import format_size

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fleece.formats.mapping import Batch

# Kinds of cell; 0 and up are data of that depth.
HOLE: Final = -1
ZERO: Final = -2

_ROWS: Final = 16
_LABEL: Final = len("1023.9 MiB")
_DEPTHS: Final = 5
"""Layers with a colour of their own; deeper ones have that of the last."""

# Shades that differ in lightness too: blue, orange, green, purple, brown (dark and light grounds).
_ANSI: Final = (33, 208, 35, 170, 137)
_SVG: Final = ("#1f6feb", "#e8833a", "#2da160", "#a763c9", "#9a7b4f")
_ANSI_ZERO: Final = 244
_LETTERS: Final = "01234"
_SVG_ZERO, _SVG_HOLE = "#b8bfc8", "#eef1f4"


class Grid:
    """``cells`` cells of a disk from ``start`` to ``stop``, each with bytes of every kind."""

    def __init__(self, batches: "Iterable[Batch]", start: int, stop: int, cells: int) -> None:
        import numpy as np

        self.start, self.stop = start, stop
        cells = max(1, min(cells, (stop - start) // 512))
        self.edges = start + (stop - start) * np.arange(cells + 1, dtype=object) // cells
        edges = self.edges.astype(np.int64)
        self._shares = np.zeros((_DEPTHS + 2, cells), np.int64)
        for batch in batches:
            for kind in range(_DEPTHS + 2):
                self._shares[kind] += _overlaps(batch, _of_kind(batch, kind), edges)

    def kinds(self) -> list[int]:
        """The kind of each cell."""
        return [self._kind([int(share) for share in column]) for column in self._shares.T]

    @staticmethod
    def _kind(shares: list[int]) -> int:
        for depth in range(_DEPTHS):
            if shares[depth]:
                return depth
        return ZERO if shares[_DEPTHS] else HOLE

    def fullness(self) -> list[float]:
        """How much of each cell is data, 0 to 1."""
        data = self._shares[:_DEPTHS].sum(axis=0)
        return [float(share) for share in data / self._shares.sum(axis=0).clip(1)]

    def totals(self) -> dict[int, int]:
        """Bytes of each kind that there is."""
        sums = [int(total) for total in self._shares.sum(axis=1)]
        kinds = [*range(_DEPTHS), ZERO, HOLE]
        return {kind: total for kind, total in zip(kinds, sums, strict=True) if total}


def _of_kind(batch: "Batch", kind: int) -> "NDArray[Any]":
    """Which entries of ``batch`` are of row ``kind``: a depth, then zeroes, then holes."""
    import numpy as np

    from fleece.formats import mapping as m

    zero = batch.codes & m.ZERO != 0
    data = (batch.codes & m.DATA != 0) & ~zero
    depth = np.minimum(batch.codes >> m.DEPTH_SHIFT, _DEPTHS - 1)
    if kind < _DEPTHS:
        return np.asarray(data & (depth == kind))
    present = batch.codes & m.PRESENT != 0
    return np.asarray(~data & (present if kind == _DEPTHS else ~present))


def _overlaps(batch: "Batch", wanted: "NDArray[Any]", edges: "NDArray[Any]") -> "NDArray[Any]":
    """How many bytes of the wanted entries lie between each two edges.

    They are counted below each edge first: whole entries, and a part of the one it is in.
    """
    import numpy as np

    lengths = np.where(wanted, batch.lengths, 0)
    bounds = np.append(batch.starts, batch.stop)
    below = np.concatenate([[0], np.cumsum(lengths)])
    at = np.clip(np.searchsorted(bounds, edges, "right") - 1, 0, len(lengths) - 1)
    inside = np.clip(edges, bounds[0], bounds[-1]) - bounds[at]
    exact = below[at] + np.where(lengths[at] > 0, np.clip(inside, 0, batch.lengths[at]), 0)
    return np.asarray(np.diff(exact))


def print_text(batches: "Iterable[Batch]", start: int, stop: int, out: TextIO) -> None:
    """Lines of blocks as wide as the terminal, the offset in front, and a legend."""
    width = max(20, shutil.get_terminal_size().columns)
    margin = _LABEL + 2
    columns = width - margin
    grid = Grid(batches, start, stop, columns * _ROWS)
    kinds, fullness = grid.kinds(), grid.fullness()
    colour = _has_colour(out)
    for at in range(0, len(kinds), columns):
        label = format_size(int(grid.edges[at])).rjust(_LABEL)
        row = zip(kinds[at : at + columns], fullness[at : at + columns], strict=True)
        out.write(f"{label}  {''.join(_blocks(row, colour=colour))}\n")
    out.write(f"{format_size(stop).rjust(_LABEL)}\n\n")
    for line in _legend(grid, colour=colour):
        out.write(line + "\n")


def _has_colour(out: TextIO) -> bool:
    plain = "NO_COLOR" in os.environ or os.environ.get("TERM") in (None, "dumb")
    return bool(out.isatty()) and not plain


def _blocks(row: Iterable[tuple[int, float]], *, colour: bool) -> Iterator[str]:
    last = 0
    for kind, full in row:
        wanted, text = _block(kind, full, colour=colour)
        if colour and wanted != last:
            yield f"\033[38;5;{wanted}m" if wanted else "\033[0m"
            last = wanted
        yield text
    if last:
        yield "\033[0m"


def _block(kind: int, full: float, *, colour: bool) -> tuple[int, str]:
    """``(colour number, character)``: the fuller of data, the denser."""
    if kind == HOLE:
        return (_ANSI_ZERO if colour else 0), "·"
    if kind == ZERO:
        return _ANSI_ZERO, "░" if colour else "-"
    if not colour:
        return 0, _LETTERS[kind]
    return _ANSI[kind], "█" if full > 0.67 else "▓" if full > 0.33 else "▒"


def _legend(grid: Grid, *, colour: bool) -> Iterator[str]:
    whole = max(1, grid.stop - grid.start)
    for kind, total in grid.totals().items():
        mark = "".join(_blocks([(kind, 1.0)], colour=colour))
        share = 100 * total / whole
        yield f"{mark} {meaning(kind)}: {format_size(total)} ({share:.1f} %)"


def meaning(kind: int) -> str:
    """The kind in words."""
    if kind == HOLE:
        return "nothing, reads as zeroes"
    if kind == ZERO:
        return "zeroes"
    if kind == 0:
        return "data of the image itself"
    more = " and deeper" if kind == _DEPTHS - 1 else ""
    return f"data of backing file {kind}{more}"


_CELL: Final = 10
_SVG_COLUMNS: Final = 96
_SVG_ROWS: Final = 32


def write_svg(path: str, batches: "Iterable[Batch]", start: int, stop: int, title: str) -> None:
    """The picture as a file. `ImageError` if it cannot be written."""
    text = svg(Grid(batches, start, stop, _SVG_COLUMNS * _SVG_ROWS), title)
    try:
        Path(path).write_text(text, "utf-8", "backslashreplace")
    except OSError as error:
        raise ImageError(f"{path}: the picture cannot be written: {error.strerror}") from error


def svg(grid: Grid, title: str) -> str:
    """An SVG document: cells in rows, offsets at the left, a legend below."""
    kinds, fullness = grid.kinds(), grid.fullness()
    rows = -(-len(kinds) // _SVG_COLUMNS)
    left, top = 90, 44
    width = left + _SVG_COLUMNS * _CELL + 20
    legend = list(grid.totals().items())
    height = top + rows * _CELL + 30 + 20 * len(legend)
    shown = escape(printable(title))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="sans-serif" font-size="12" '
        'fill="#24292f">',
        f"<title>{shown}</title>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="{left}" y="26" font-size="15" font-weight="bold">{shown}</text>',
        *_svg_cells(grid, kinds, fullness, left, top),
        *_svg_legend(legend, max(1, grid.stop - grid.start), left, top + rows * _CELL + 24),
        "</svg>\n",
    ]
    return "\n".join(parts)


def _svg_cells(
    grid: Grid, kinds: list[int], fullness: list[float], left: int, top: int
) -> Iterator[str]:
    for at in range(0, len(kinds), _SVG_COLUMNS):
        y = top + at // _SVG_COLUMNS * _CELL
        if at // _SVG_COLUMNS % 4 == 0:
            label = format_size(int(grid.edges[at]))
            yield f'<text x="{left - 8}" y="{y + 9}" text-anchor="end">{label}</text>'
        cells = [
            _svg_look(kind, full)
            for kind, full in zip(
                kinds[at : at + _SVG_COLUMNS], fullness[at : at + _SVG_COLUMNS], strict=True
            )
        ]
        yield from _svg_row(cells, left, y)


def _svg_row(cells: list[tuple[str, float]], left: int, y: int) -> Iterator[str]:
    """Neighbours that look the same are one rectangle."""
    first = 0
    for at in range(1, len(cells) + 1):
        if at == len(cells) or cells[at] != cells[first]:
            colour, opacity = cells[first]
            x, width = left + first * _CELL, (at - first) * _CELL
            look = f'fill="{colour}"' + (f' fill-opacity="{opacity}"' if opacity < 1 else "")
            yield f'<rect x="{x}" y="{y}" width="{width}" height="{_CELL - 1}" {look}/>'
            first = at


def _svg_look(kind: int, full: float) -> tuple[str, float]:
    if kind == HOLE:
        return _SVG_HOLE, 1.0
    if kind == ZERO:
        return _SVG_ZERO, 1.0
    return _SVG[kind], (1.0 if full > 0.67 else 0.7 if full > 0.33 else 0.45)


def _svg_legend(legend: list[tuple[int, int]], whole: int, left: int, top: int) -> Iterator[str]:
    for number, (kind, total) in enumerate(legend):
        y = top + 20 * number
        colour, _ = _svg_look(kind, 1.0)
        text = f"{meaning(kind)}: {format_size(total)} ({100 * total / whole:.1f} %)"
        yield f'<rect x="{left}" y="{y}" width="12" height="12" fill="{colour}"/>'
        yield f'<text x="{left + 20}" y="{y + 10}">{escape(text)}</text>'

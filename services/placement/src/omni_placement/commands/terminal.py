"""Heat maps and tables on a terminal."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from rich.color import Color
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from omni_placement.report.study import Values

WIDTH = 200
"""Tables are not cut in pipes: a figure that is cut is none."""
MARGIN = 6
MOST_ROWS = 64
LEAST_SCALE = 2.0
"""A scale of loads ends here at least, so that what is even looks even."""
SHADES = " .:-=+*#@"
"""Where there are no colours: from the smallest to the largest, with one of its own for the middle."""
COOL = ((5, 48, 97), (67, 147, 195), (209, 229, 240), (247, 247, 247))
WARM = ((247, 247, 247), (253, 219, 199), (214, 96, 77), (103, 0, 31))
RISING = ((252, 253, 191), (254, 159, 109), (222, 73, 104), (140, 41, 129), (40, 11, 84))
NOTHING = (120, 120, 120)
Colour = tuple[int, int, int]
Ramp = Callable[[float], Colour]


def show_table(headings: Sequence[str], rows: Sequence[Sequence[str]], console: Console) -> None:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for index, heading in enumerate(headings):
        table.add_column(
            heading, no_wrap=True, justify="right" if index and rows and _is_figure(rows[0][index]) else "left"
        )
    for row in rows:
        table.add_row(*row)
    console.print(table, highlight=False)


def wide_console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH)


def show_relative(values: Values, column: str, console: Console) -> None:
    """Loads as multiples of the mean of their layer, (layers, columns): blue below 1, red above. NaN holds nothing."""
    largest = max(float(np.nanmax(values)), LEAST_SCALE)
    scaled = np.where(values <= 1.0, values / 2, 0.5 + (values - 1.0) / (largest - 1.0) / 2)
    _show(values, scaled, column, console, _diverging)
    _legend(console, (("0", 0.0), ("1", 0.5), (f"{largest:.3g}", 1.0)), "× the mean of the layer", _diverging)


def show_counts(values: Values, column: str, unit: str, console: Console) -> None:
    """Whole numbers from 1 on, (layers, columns)."""
    largest = float(values.max())
    scaled = (values - 1.0) / max(largest - 1.0, 1.0)
    _show(values, scaled, column, console, _rising)
    _legend(console, (("1", 0.0), (f"{largest:.0f}", 1.0)), unit, _rising)


def _show(values: Values, scaled: Values, column: str, console: Console, colour_of: Ramp) -> None:
    rows, columns = scaled.shape
    across = -(-columns // max(1, console.width - MARGIN))
    down = -(-rows // MOST_ROWS)
    cells = _largest(_largest(scaled, across, 1), down, 0)
    if console.color_system in ("truecolor", "256") and not console.no_color:
        _half_blocks(cells, down, console, colour_of)
    else:
        _characters(cells, down, console)
    each = [f"{across} {column}s" * (across > 1), f"{down} layers" * (down > 1)]
    merged = " and ".join(text for text in each if text)
    note = f"; a cell is the largest of {merged}" if merged else ""
    console.print(
        f"{'':{MARGIN}}{column} 0 to {columns - 1}, down: layer 0 to {rows - 1}{note}", style="dim", highlight=False
    )


def _half_blocks(cells: Values, down: int, console: Console, colour_of: Ramp) -> None:
    """Two layers in a line: the upper half of a character and its background."""
    for top in range(0, len(cells), 2):
        line = Text(f"{top * down:>{MARGIN - 1}} ")
        below = cells[top + 1] if top + 1 < len(cells) else None
        for index, value in enumerate(cells[top]):
            under = None if below is None else _rich(colour_of(float(below[index])))
            line.append("▀", Style(color=_rich(colour_of(float(value))), bgcolor=under))
        console.print(line, no_wrap=True, crop=True)


def _characters(cells: Values, down: int, console: Console) -> None:
    for row, line in enumerate(cells):
        shades = "".join("/" if np.isnan(v) else SHADES[min(int(v * len(SHADES)), len(SHADES) - 1)] for v in line)
        console.print(f"{row * down:>{MARGIN - 1}} {shades}", markup=False, highlight=False, no_wrap=True, crop=True)


def _legend(console: Console, marks: Sequence[tuple[str, float]], unit: str, colour_of: Ramp) -> None:
    line = Text(" " * MARGIN)
    for label, place in marks:
        if console.color_system in ("truecolor", "256") and not console.no_color:
            line.append("██", Style(color=_rich(colour_of(place))))
        else:
            line.append(f"'{SHADES[min(int(place * len(SHADES)), len(SHADES) - 1)]}'")
        line.append(f" {label}   ")
    console.print(line.append(unit), highlight=False)


def _largest(values: Values, width: int, axis: int) -> Values:
    """The largest of each `width` neighbours; NaN where none has a value."""
    if width == 1:
        return values
    starts = np.arange(0, values.shape[axis], width)
    known = np.maximum.reduceat(np.where(np.isnan(values), -np.inf, values), starts, axis=axis)
    return np.where(np.isneginf(known), np.nan, known)


def _diverging(value: float) -> Colour:
    if np.isnan(value):
        return NOTHING
    return _between(COOL, value * 2) if value <= 0.5 else _between(WARM, value * 2 - 1)


def _rising(value: float) -> Colour:
    return _between(RISING, value)


def _between(stops: Sequence[Colour], share: float) -> Colour:
    place = min(max(share, 0.0), 1.0) * (len(stops) - 1)
    low = min(int(place), len(stops) - 2)
    mixed = [round(a + (b - a) * (place - low)) for a, b in zip(stops[low], stops[low + 1], strict=True)]
    return mixed[0], mixed[1], mixed[2]


def _rich(colour: Colour) -> Color:
    return Color.from_rgb(*colour)


def _is_figure(text: str) -> bool:
    return text[:1].isdigit() or text[:1] in "-+"


def show_pairs(pairs: Mapping[str, str], console: Console) -> None:
    width = max(map(len, pairs), default=0)
    for name, text in pairs.items():
        console.print(f"[dim]{name:<{width}}[/]  ", end="")
        console.print(text, markup=False, highlight=False, soft_wrap=True)

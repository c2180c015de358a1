"""Figures as files: one look for all of them, and where the cells of a heat map lie, so that a page can name them."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from omni_placement.report.study import Values

WIDTH_IN = 7.2
"""The text width of a printed page."""
DPI = 200
INK, GREY, BLUE, ORANGE, UNUSED = "#1b1f24", "#8a929c", "#0f62a8", "#c75b12", "#d9dce0"
"""Told apart by people who see no red or no green, and in print without colours."""
LOOK: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 8,
    "axes.linewidth": 0.6,
    "axes.edgecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "hatch.linewidth": 0.5,
    "svg.fonttype": "path",
    "svg.hashsalt": "omni-placement",
}


@dataclass(frozen=True, eq=False)
class Cells:
    """Cells of a heat map, (rows, columns); NaN cells have no value. `is_relative`: the mean of the row matters too."""

    axes: Axes
    row: str
    column: str
    unit: str
    values: Values
    is_relative: bool = False


@dataclass(frozen=True, eq=False)
class Drawing:
    """A figure with its caption, which defines what it shows, and the cells that can be pointed at."""

    name: str
    title: str
    caption: str
    figure: Figure
    cells: Sequence[Cells] = field(default_factory=tuple)

    def __post_init__(self) -> None:
        # Settled once: laying it out again may move it by a hair. The second pass knows the width of tick labels.
        self.figure.draw_without_rendering()
        self.figure.draw_without_rendering()
        self.figure.set_layout_engine("none")

    def png(self) -> bytes:
        return self._saved("png", {"Software": None})

    def svg(self) -> bytes:
        return self._saved("svg", {"Date": None, "Creator": None})

    def write(self, folder: Path) -> Path:
        """`<name>.png` in the folder."""
        path = folder / f"{self.name}.png"
        path.write_bytes(self.png())
        return path

    def boxes(self) -> list[tuple[float, float, float, float]]:
        """Left, top, width and height of each heat map as shares of the figure."""
        boxes = [cells.axes.get_position() for cells in self.cells]
        return [(box.x0, 1 - box.y1, box.width, box.height) for box in boxes]

    def _saved(self, kind: str, metadata: dict[str, str | None]) -> bytes:
        content = io.BytesIO()
        with matplotlib.rc_context(LOOK):
            self.figure.savefig(content, format=kind, dpi=DPI, metadata=metadata)
        return content.getvalue()


@contextmanager
def look() -> Iterator[None]:
    """Figures made inside have one look, whatever the user's own settings."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(LOOK)
        yield


def new_figure(height_in: float) -> Figure:
    figure = Figure(figsize=(WIDTH_IN, height_in), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def rows_height(rows: int) -> float:
    """Inches for a heat map of so many rows: legible for few, bounded for many."""
    return float(np.clip(rows * 0.05, 1.1, 3.6))

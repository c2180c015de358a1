"""A report as files."""

import json
from collections.abc import Mapping
from pathlib import Path

from omni_placement.report.canvas import look
from omni_placement.report.figures import drawings
from omni_placement.report.machine import machine
from omni_placement.report.page import page
from omni_placement.report.study import Study
from omni_placement.report.summary import summary


def write_report(study: Study, folder: Path, provenance: Mapping[str, str]) -> list[Path]:
    """report.html, one PNG for each figure and summary.json; returns their paths, the page first."""
    folder.mkdir(parents=True, exist_ok=True)
    with look():
        figures = drawings(study)
        written = [figure.write(folder) for figure in figures]
        content = page(study, figures, dict(provenance) | dict(machine()))
    (folder / "report.html").write_text(content, encoding="utf-8")
    (folder / "summary.json").write_text(json.dumps(summary(study), indent=2) + "\n", encoding="utf-8")
    return [folder / "report.html", *written, folder / "summary.json"]


def write_page(study: Study, path: Path, provenance: Mapping[str, str]) -> None:
    """The page alone."""
    with look():
        path.write_text(page(study, drawings(study), dict(provenance) | dict(machine())), encoding="utf-8")


def write_figures(study: Study, png: Path, names: tuple[str, ...]) -> list[Path]:
    """One PNG at the path for one figure; for several, their names are added to it: `a.png` -> `a-moves.png`."""
    with look():
        figures = drawings(study, names)
        paths = [png if len(figures) == 1 else png.with_stem(f"{png.stem}-{figure.name}") for figure in figures]
        for figure, path in zip(figures, paths, strict=True):
            path.write_bytes(figure.png())
    return paths

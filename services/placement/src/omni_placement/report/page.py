"""The report: one HTML file that fetches nothing, to be read on a screen and to be printed."""

import json
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

import numpy as np

from omni_placement.report.canvas import Cells, Drawing
from omni_placement.report.study import Measured, Study, Values
from omni_placement.report.summary import above_bound
from omni_placement.report.units import duration, percent, size, times, tokens

METHOD: Mapping[str, str] = {
    "Load": "Tokens routed to each logical expert of each layer. They spread evenly over the copies of an expert.",
    "Step load": "Tokens of the slowest rank of a layer, summed over layers: what a step has to wait for.",
    "Balancedness": "Tokens of the mean rank over tokens of the slowest, by layer; 1 is even. Ranks that can hold no "
    "routed expert do not count.",
    "Bound": "A proven lower bound on the tokens of the slowest rank, by layer, for any layout of the same slots. "
    "The distance to it is an upper limit of what a better layout could still gain.",
    "Rounds": "Weights move in rounds; in one, a rank sends at most one expert of one layer and receives at most one, "
    "and every expert is somewhere after each.",
    "Repeatable": "Every solver is deterministic: no random numbers are drawn, there is no seed. The same load, ranks "
    "and layout in force give the same layout.",
}


def page(study: Study, drawings: Sequence[Drawing], provenance: Mapping[str, str]) -> str:
    """The whole file. `provenance` are further entries of the method: the load's source, the machine."""
    template = Template(_part("page.html"))
    maps = [_map(cells) for drawing in drawings for cells in drawing.cells]
    return template.substitute(
        title=escape(study.title),
        lead=escape(_lead(study)),
        style=_part("page.css"),
        script=_part("page.js"),
        results=_results(study),
        figures=_figures(drawings),
        comparison=_comparison(study),
        method="\n".join(
            f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>"
            for name, text in (dict(METHOD) | dict(provenance)).items()
        ),
        layers=_layers(study, 3 if len(study.layouts) > 2 else 2),
        maps=json.dumps(maps, separators=(",", ":")).replace("<", "\\u003c"),
    )


def _part(name: str) -> str:
    return (files("omni_placement.report") / name).read_text(encoding="utf-8")


def _lead(study: Study) -> str:
    topology, before, after = study.problem.topology, study.before, study.after
    hosts = int(topology.hosts[-1]) + 1
    change = 1 - after.step_load / before.step_load if before.step_load else 0.0
    return (
        f"{topology.num_layers} layers of {topology.num_experts} experts on {topology.num_ranks} ranks"
        f"{f' of {hosts} hosts' if hosts > 1 else ''}, {topology.slots_per_rank} slots each. {after.name} "
        f"{'lowers' if change >= 0 else 'raises'} the step load by {percent(abs(change))} against {before.name} and is "
        f"{percent(study.gap(after))} above the bound."
    )


def _results(study: Study) -> str:
    before, after = study.before, study.after
    rows: list[tuple[str, ...]] = [
        ("Balancedness, mean of layers", *_pair(_ratio, before, after, "mean"), _ratio(study.best_balancedness.mean())),
        ("Balancedness, worst layer", *_pair(_ratio, before, after, "min"), _ratio(study.best_balancedness.min())),
        ("Step load, tokens", tokens(before.step_load), tokens(after.step_load), tokens(study.step_bound)),
        ("Above the bound", above_bound(study, before), above_bound(study, after), ""),
        ("Hottest rank of a layer, × its mean", _hottest(study, before), _hottest(study, after), ""),
        ("Copies beyond one of each expert", f"{before.copies.sum():,}", f"{after.copies.sum():,}", ""),
    ]
    if study.rounds is not None:
        rows.append(("Expert weights sent", "", f"{study.num_sent:,} in {len(study.rounds):,} rounds", ""))
        if study.sent_bytes:
            rows.append(("Weight bytes sent", "", size(study.sent_bytes), ""))
    heading = ("", f"before: {before.name}", f"after: {after.name}", "bound")
    return _table("Table 1. The layout before and after.", heading, rows)


def _pair(show: Any, before: Measured, after: Measured, reduce: str) -> tuple[str, str]:
    return show(getattr(before.balancedness, reduce)()), show(getattr(after.balancedness, reduce)())


def _hottest(study: Study, measured: Measured) -> str:
    return times(float(np.nanmax(study.relative_load(measured))))


def _figures(drawings: Iterable[Drawing]) -> str:
    parts, first = [], 0
    for number, drawing in enumerate(drawings, 1):
        picture = b64encode(drawing.svg()).decode()
        areas = "".join(
            f'<div class="cells" tabindex="0" role="img" data-map="{first + index}" '
            f'aria-label="{escape(drawing.title)}: cells" style="left:{100 * left:.3f}%;top:{100 * top:.3f}%;'
            f'width:{100 * width:.3f}%;height:{100 * height:.3f}%"></div>'
            for index, (left, top, width, height) in enumerate(drawing.boxes())
        )
        first += len(drawing.cells)
        parts.append(
            f'<figure id="{drawing.name}"><div class="plate"><img alt="{escape(drawing.title)}" '
            f'src="data:image/svg+xml;base64,{picture}">{areas}</div>\n<figcaption><strong>Figure {number}. '
            f"{escape(drawing.title)}.</strong> {escape(drawing.caption)}</figcaption></figure>"
        )
    return "\n".join(parts)


def _comparison(study: Study) -> str:
    if len(study.layouts) <= 2:
        return ""
    ranked = sorted(study.layouts, key=lambda measured: measured.step_load)
    rows = [
        (
            measured.name,
            _ratio(measured.balancedness.mean()),
            _ratio(measured.balancedness.min()),
            tokens(measured.step_load),
            above_bound(study, measured),
            f"{measured.copies.sum():,}",
            "" if measured.seconds is None else duration(measured.seconds),
        )
        for measured in ranked
    ]
    heading = ("solver", "balancedness, mean", "worst layer", "step load, tokens", "above the bound", "copies", "time")
    caption = "Table 2. Solvers on the same load and slots, the least step load first. Time: one run on this machine."
    chosen = [measured.name for measured in ranked].index(study.after.name)
    return "<h2>Solvers</h2>\n" + _table(caption, heading, rows, chosen=chosen)


def _layers(study: Study, number: int) -> str:
    slowest = [measured.rank_loads.argmax(axis=1) for measured in (study.before, study.after)]
    rows = [
        (
            str(layer),
            tokens(float(study.problem.load[layer].sum())),
            times(float(study.expert_share[layer].max())),
            _ratio(study.before.balancedness[layer]),
            _ratio(study.after.balancedness[layer]),
            _ratio(study.best_balancedness[layer]),
            str(slowest[0][layer]),
            str(slowest[1][layer]),
            str(study.after.copies[layer]),
        )
        for layer in range(study.problem.topology.num_layers)
    ]
    heading = (
        "layer", "tokens", "hottest expert", "balancedness before", "after", "bound", "slowest rank before", "after",
        "spare copies",
    )  # fmt: skip
    return _table(f"Table {number}. The layers.", heading, rows, kind="wide small")


def _table(
    caption: str, heading: Sequence[str], rows: Sequence[Sequence[str]], *, kind: str = "wide", chosen: int = -1
) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in heading)
    body = "\n".join(
        f'<tr{" class=chosen" if index == chosen else ""}><th scope="row">{escape(cells[0])}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells[1:])
        + "</tr>"
        for index, cells in enumerate(rows)
    )
    return (
        f'<table class="{kind}"><caption>{escape(caption)}</caption>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table>"
    )


def _map(cells: Cells) -> dict[str, Any]:
    return {
        "row": cells.row,
        "column": cells.column,
        "unit": cells.unit,
        "isRelative": cells.is_relative,
        "values": [[_number(value) for value in line] for line in cells.values],
    }


def _number(value: float) -> float | int | None:
    """Five digits are enough to read, and keep the file small."""
    if np.isnan(value):
        return None
    return int(value) if float(value).is_integer() else float(f"{value:.5g}")


def _ratio(value: float | np.floating[Any] | Values) -> str:
    return f"{float(value):.3f}"

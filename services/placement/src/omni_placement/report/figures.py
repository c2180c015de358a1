"""The figures of a study. Each says in its caption what it shows and in which unit."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, Colormap, ListedColormap, LogNorm, Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator

from omni_placement.report.canvas import BLUE, GREY, INK, ORANGE, UNUSED, Cells, Drawing, new_figure, rows_height
from omni_placement.report.study import Measured, Study, Values
from omni_placement.report.units import percent, size, times

LARGEST_MATRIX = 64
"""Ranks in a matrix of moves; more are added up by host."""
NUMBERED_CELLS = 16
"""A matrix of at most so many rows has its numbers written into it."""
DISCRETE_COPIES = 8
SMALLEST_SHARE = 1 / 64


def expert_load(study: Study) -> Drawing:
    """Heat map of the load, layers x experts."""
    layers, experts = study.expert_share.shape
    figure = new_figure(rows_height(layers) + 0.75)
    axes = figure.add_subplot()
    largest = max(float(study.expert_share.max(initial=0.0)), 2.0)
    smallest = max(float(study.expert_share.min(initial=largest)), SMALLEST_SHARE)
    norm = LogNorm(min(smallest, 0.5), largest, clip=True)
    shown = np.maximum(study.expert_share, SMALLEST_SHARE)
    image = _heat(axes, shown, norm, colormaps["viridis"])
    _colour_bar(figure, image, axes, "× mean of its layer", _powers_of_two(norm))
    axes.set(xlabel="expert", ylabel="layer")
    hottest = np.unravel_index(int(study.expert_share.argmax()), study.expert_share.shape)
    caption = (
        f"Tokens routed to each expert as a multiple of the mean of its layer ({layers} layers, {experts} experts; "
        f"{study.problem.load.sum():,.0f} tokens in all). The hottest is expert {hottest[1]} of layer {hottest[0]} at "
        f"{times(float(study.expert_share.max()))}. The scale is logarithmic."
    )
    cells = Cells(axes, "layer", "expert", "tokens", study.problem.load, is_relative=True)
    return Drawing("expert-load", "Load of the experts", caption, figure, (cells,))


def rank_load(study: Study) -> Drawing:
    """Heat maps of the ranks' load before and after, on one scale."""
    layers = study.problem.topology.num_layers
    figure = new_figure(2 * rows_height(layers) + 1.2)
    both: Any = figure.subplots(2, 1, sharex=True)
    pair = (study.before, study.after)
    shown = [study.relative_load(measured) for measured in pair]
    largest = max(float(np.nanmax(relative)) for relative in shown)
    norm = TwoSlopeNorm(1.0, 0.0, max(largest, 1.01))
    cells = []
    for axes, measured, relative, when in zip(both, pair, shown, ("before", "after"), strict=True):
        image = _heat(axes, relative, norm, colormaps["RdBu_r"])
        axes.set(ylabel="layer", title=f"{when}: {measured.name}")
        _host_lines(axes, study)
        values = np.where(study.is_usable, measured.rank_loads, np.nan)
        cells.append(Cells(axes, "layer", "rank", "tokens", values, is_relative=True))
    both[-1].set_xlabel("rank")
    _colour_bar(figure, image, both, "× mean of its layer", _multiples(largest))
    caption = (
        "Tokens that each rank computes, as a multiple of the mean of its layer; 1 is even. A layer waits for its "
        f"slowest rank: at worst {times(float(np.nanmax(shown[0])))} the mean before, "
        f"{times(float(np.nanmax(shown[1])))} after. Both maps have one scale.{_unused_note(study)}"
    )
    return Drawing("rank-load", "Load of the ranks before and after", caption, figure, tuple(cells))


def replicas(study: Study) -> Drawing:
    """Heat map of the copies of each expert, and the spare copies each layer was given."""
    layout = study.after.layout
    copies, layers = layout.replicas, layout.topology.num_layers
    figure = new_figure(rows_height(layers) + 0.75)
    axes, bars = figure.subplots(1, 2, sharey=True, width_ratios=(5, 1))
    largest = int(copies.max())
    colours, norm = _copies_scale(largest)
    image = _heat(axes, copies.astype(np.float64), norm, colours)
    ticks = np.arange(1, largest + 1) if largest <= DISCRETE_COPIES else MaxNLocator(6, integer=True)
    _colour_bar(figure, image, (axes, bars), "copies", ticks)
    axes.set(xlabel="expert", ylabel="layer")
    bars.stairs(study.after.copies, np.arange(layers + 1) - 0.5, orientation="horizontal", fill=True, color=BLUE)
    bars.set(xlabel="spare copies", xlim=(0, max(int(study.after.copies.max()), 1) * 1.05))
    bars.xaxis.set_major_locator(MaxNLocator(3, integer=True))
    spread = f"{study.after.copies.min()} to {study.after.copies.max()}"
    caption = (
        f"Copies of each expert in the layout of {study.after.name}: at least one, at most {largest}. Right: copies "
        f"beyond one of each expert, {study.after.copies.sum():,} in all, {spread} in a layer."
    )
    cells = Cells(axes, "layer", "expert", "copies", copies.astype(np.float64))
    return Drawing("replicas", "Copies of each expert", caption, figure, (cells,))


def _copies_scale(largest: int) -> tuple[Colormap, Normalize]:
    """One colour for each number of copies where they are few; one copy is the palest."""
    colours = colormaps["magma_r"]
    if largest > DISCRETE_COPIES:
        return colours, Normalize(1, largest)
    listed = ListedColormap(colours(np.linspace(0.0, 0.85, largest)))
    return listed, BoundaryNorm(np.arange(largest + 1) + 0.5, largest)


def moves(study: Study) -> Drawing:
    """Expert weights sent in each round, and from rank to rank, or from host to host where there are many ranks."""
    topology, rounds = study.problem.topology, study.rounds or ()
    sent, what = study.traffic, "rank"
    if topology.num_ranks > LARGEST_MATRIX and topology.hosts[-1] > 0:
        what, hosts = "host", int(topology.hosts[-1]) + 1
        sent = np.zeros((hosts, hosts), dtype=np.int64)
        np.add.at(sent, (topology.hosts[:, None], topology.hosts[None, :]), study.traffic)
    figure = new_figure(3.2)
    steps, axes = figure.subplots(1, 2, width_ratios=(1, 1.25))
    in_round = [sum(move.source_rank != move.target_rank for move in step.moves) for step in rounds]
    steps.stairs(in_round, np.arange(len(rounds) + 1) + 0.5, fill=True, color=BLUE)
    steps.set(xlabel="round", ylabel="experts sent", ylim=(0, max(*in_round, 1) * 1.05))
    steps.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    steps.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    image = _heat(axes, sent.astype(np.float64), Normalize(0, max(int(sent.max()), 1)), colormaps["Blues"])
    _colour_bar(figure, image, axes, "experts sent", MaxNLocator(5, integer=True))
    axes.set(xlabel=f"to {what}", ylabel=f"from {what}", aspect="equal")
    if len(sent) <= NUMBERED_CELLS:
        _write_numbers(axes, sent)
    known = f", {size(study.sent_bytes)}" if study.sent_bytes else ""
    inside = "within a rank nothing is sent" if what == "rank" else "the diagonal stays within a host"
    caption = (
        f"Expert weights (of one layer each) sent to get from {study.before.name} to {study.after.name}: "
        f"{study.num_sent:,} over the network{known}, {study.num_between_hosts:,} of them between hosts, in "
        f"{len(rounds):,} rounds. Left: by round; a rank sends at most one and receives at most one. "
        f"Right: by {what}; {inside}."
    )
    cells = Cells(axes, f"from {what}", f"to {what}", "experts", sent.astype(np.float64))
    return Drawing("moves", "Weights that move", caption, figure, (cells,))


def balancedness(study: Study) -> Drawing:
    """Balancedness of every layer before and after beside what the bound allows, and the distance to the bound."""
    figure = new_figure(3.6)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    layers = np.arange(study.problem.topology.num_layers)
    marker: dict[str, Any] = {"linewidth": 1.0, "markersize": 2.6}
    before, after = study.before, study.after
    upper.plot(layers, study.best_balancedness, color=INK, linestyle="--", linewidth=0.9, label="bound")
    upper.plot(layers, before.balancedness, color=ORANGE, marker="s", label=f"before: {before.name}", **marker)
    upper.plot(layers, after.balancedness, color=BLUE, marker="o", label=f"after: {after.name}", **marker)
    upper.set(ylabel="balancedness", ylim=(0, 1.04))
    upper.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, borderaxespad=0.2)
    above = _above_bound(study, after)
    lower.bar(layers, 100 * above, color=BLUE, width=0.8)
    lower.set(xlabel="layer", ylabel="above bound, %")
    lower.set_ylim(0, max(100 * float(above.max()) * 1.1, 0.1))
    lower.xaxis.set_major_locator(_steps(len(layers), 8))
    caption = (
        "Balancedness of each layer: tokens of the mean rank over tokens of the slowest, 1 is even. The dashed line is "
        "the best that the proven lower bound on the slowest rank leaves open; no layout of these slots is above it. "
        f"Below: by how much the slowest rank of {after.name} exceeds that bound, "
        f"{percent(study.gap(after))} over all layers."
    )
    return Drawing("balancedness", "Balancedness of each layer", caption, figure)


def solvers(study: Study) -> Drawing:
    """Every layout of the study: balancedness and distance to the bound."""
    possible = [measured for measured in study.layouts if study.is_possible(measured)]
    ranked = sorted(possible, key=lambda measured: measured.step_load, reverse=True)
    figure = new_figure(0.9 + 0.3 * len(ranked))
    left, right = figure.subplots(1, 2, sharey=True)
    places = np.arange(len(ranked))
    means = [float(m.balancedness.mean()) for m in ranked]
    worst = [float(m.balancedness.min()) for m in ranked]
    left.hlines(places, worst, means, color=GREY, linewidth=1.2)
    left.plot(worst, places, "|", color=INK, markersize=9, label="worst layer")
    left.plot(means, places, "o", color=BLUE, markersize=5, label="mean of layers")
    left.axvline(float(study.best_balancedness.mean()), color=INK, linestyle="--", linewidth=0.9, label="bound")
    left.set(xlabel="balancedness", xlim=(0, 1.04), yticks=places, yticklabels=[m.name for m in ranked])
    left.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, borderaxespad=0.2, columnspacing=1.2)
    gaps = [100 * study.gap(m) for m in ranked]
    right.barh(places, gaps, height=0.6, color=[BLUE if m.name == study.after.name else GREY for m in ranked])
    for place, gap in zip(places, gaps, strict=True):
        right.annotate(
            percent(gap / 100), (gap, place), xytext=(3, 0), textcoords="offset points", va="center", fontsize=7.5
        )
    right.set(xlabel="step load above the bound, %")
    right.margins(x=0.18)
    caption = (
        "Layouts of the same load and slots. Left: balancedness, the mean of the layers and the worst layer. Right: "
        "how far the step load (tokens of the slowest rank, summed over layers) lies above the proven lower bound."
    )
    return Drawing("solvers", "Solvers side by side", caption, figure)


FIGURES: dict[str, Callable[[Study], Drawing]] = {
    "expert-load": expert_load,
    "rank-load": rank_load,
    "balancedness": balancedness,
    "replicas": replicas,
    "moves": moves,
    "solvers": solvers,
}


def _heat(axes: Axes, values: Values, norm: Normalize, colours: Colormap) -> AxesImage:
    """An image of whole cells; NaN cells are grey and hatched."""
    axes.patch.set(facecolor=UNUSED, hatch="/////", edgecolor="white")
    rows, columns = values.shape
    axes.xaxis.set_major_locator(_steps(columns, 8))
    axes.yaxis.set_major_locator(_steps(rows, 5))
    return axes.imshow(values, norm=norm, cmap=colours, aspect="auto", interpolation="nearest")


def _steps(count: int, most: int) -> MultipleLocator:
    """Ticks at a power of two, as counts of experts and ranks mostly are."""
    return MultipleLocator(2 ** max(0, int(np.log2(max(count / most, 1)))))


def _colour_bar(figure: Figure, image: AxesImage, axes: Any, unit: str, ticks: Any) -> None:
    bar = figure.colorbar(image, ax=axes, label=unit, pad=0.015, fraction=0.04, aspect=16, ticks=ticks)
    bar.outline.set_linewidth(0.4)
    bar.ax.minorticks_off()
    if unit.startswith("×"):
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))


def _write_numbers(axes: Axes, counts: npt.NDArray[np.int64]) -> None:
    for (row, column), count in np.ndenumerate(counts):
        colour = "white" if count > 0.6 * counts.max() else INK
        axes.text(column, row, str(count), ha="center", va="center", fontsize=6.5, color=colour)


def _powers_of_two(norm: Normalize) -> Values:
    low, high = float(norm.vmin or 1), float(norm.vmax or 1)
    exponents = np.arange(np.ceil(np.log2(low)), np.floor(np.log2(high)) + 1)
    step = max(1, int(np.ceil(len(exponents) / 7)))
    kept: Values = 2.0 ** exponents[::step]
    return kept


def _multiples(largest: float) -> Values:
    """0, 1 and a few above it, up to the largest."""
    above = MaxNLocator(3, steps=[1, 2, 5, 10]).tick_values(1.0, max(largest, 1.01))
    ticks: Values = np.array([0.0, 0.5, 1.0, *(tick for tick in above if 1.0 < tick <= largest)])
    return ticks


def _short(value: float) -> str:
    return f"1/{round(1 / value)}" if 0 < value < 0.49 else f"{value:.3g}"


def _host_lines(axes: Axes, study: Study) -> None:
    hosts = study.problem.topology.hosts
    for edge in np.flatnonzero(np.diff(hosts)):
        axes.axvline(edge + 0.5, color=INK, linewidth=0.3, alpha=0.6)


def _unused_note(study: Study) -> str:
    if study.is_usable.all():
        return ""
    return f" Hatched: {int((~study.is_usable).sum())} ranks that hold no routed expert."


def _above_bound(study: Study, measured: Measured) -> Values:
    bound = np.where(study.bound > 0, study.bound, 1.0)
    above: Values = np.where(study.bound > 0, measured.rank_loads.max(axis=1) / bound - 1.0, 0.0)
    return np.maximum(above, 0.0)


def drawings(study: Study, names: Sequence[str] = tuple(FIGURES)) -> list[Drawing]:
    """Those of the figures that have something to show: no moves without a way, no comparison of two."""
    wanted = [name for name in names if name != "moves" or study.rounds]
    return [FIGURES[name](study) for name in wanted if name != "solvers" or len(study.layouts) > 2]

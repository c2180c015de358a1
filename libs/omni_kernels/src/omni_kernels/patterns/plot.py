"""Accuracy against KV bytes, as a picture."""

from collections.abc import Mapping
from pathlib import Path

from omni_kernels.patterns.search import Candidate, Score, Space, front


def draw(runs: Mapping[str, Mapping[Candidate, Score]], space: Space, title: str, path: Path) -> None:
    """PNG of every candidate scored, by method, with the front over all of them.

    Raises RuntimeError where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise RuntimeError("the plot needs matplotlib: pip install matplotlib, or leave --plot out") from None
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    everything: dict[Candidate, Score] = {}
    for (method, seen), marker in zip(runs.items(), "osx+^v", strict=False):
        everything |= seen
        shares = [100 * space.share(candidate) for candidate in seen]
        axes.scatter(shares, [100 * s.accuracy for s in seen.values()], marker=marker, alpha=0.6, label=method)
    best = front(everything, space)
    axes.step(
        [100 * space.share(c) for c in best], [100 * everything[c].accuracy for c in best], where="post", label="front"
    )
    axes.set(xlabel=f"KV bytes of a sequence of {space.tokens} tokens, % of full attention", ylabel="right answers, %")
    axes.set_xscale("log")
    axes.set_title(title)
    axes.legend()
    figure.savefig(path, format="png", dpi=120, metadata={"Software": None})

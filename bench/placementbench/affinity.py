"""Whether groups of engines should each serve their own kinds of text, with a layout for them.

A fleet of groups, each with its own expert-parallel ranks and a layout solved for the traffic it gets. Ways to route:

    mixed      every group gets every kind, in the fleet's shares
    filled     groups are filled with one kind after the other, each to the same number of tokens
    own        a group for each kind, however many tokens that is
    hot, cold  the most frequent kind has groups of its own, the others share the rest

Steps are drawn at random; a step waits for the slowest rank of each layer. Layouts are solved for one half of the
router's choices, steps drawn from the other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
import numpy.typing as npt

from omni_placement.layout import EMPTY, Layout, Topology
from omni_placement.problem import Problem, Solver
from placementbench.families import Loads
from placementbench.router import Routed, stretched

Counts = npt.NDArray[np.int64]
Group = Mapping[str, float]
"""Share of the fleet's tokens by kind of text."""

SHARES: Mapping[str, Sequence[float]] = {"even": (0.2, 0.2, 0.2, 0.2, 0.2), "uneven": (0.4, 0.25, 0.15, 0.12, 0.08)}


class Traffic(Protocol):
    """Where the tokens of a kind go: (layers, experts)."""

    def expected(self, kind: str) -> Loads: ...
    def step(self, kind: str, tokens: int, random: np.random.Generator) -> Counts: ...


class TinyTraffic:
    """Tokens with the choices that the tiny model's router made for them."""

    def __init__(self, routed: Routed) -> None:
        self._experts = routed.num_experts
        self._fit = {kind: chosen[::2] for kind, chosen in routed.choices.items()}
        self._held_out = {kind: chosen[1::2] for kind, chosen in routed.choices.items()}

    def expected(self, kind: str) -> Loads:
        return self._count(self._fit[kind]) / len(self._fit[kind])

    def step(self, kind: str, tokens: int, random: np.random.Generator) -> Counts:
        return self._count(random.choice(self._held_out[kind], tokens))

    def _count(self, chosen: npt.NDArray[np.int8]) -> Counts:
        counts = [np.bincount(layer.ravel(), minlength=self._experts) for layer in chosen.swapaxes(0, 1)]
        return np.array(counts, dtype=np.int64)


class LargeTraffic:
    """The tiny router's counts stretched over a large model's experts; every choice of a token drawn by itself."""

    def __init__(self, routed: Routed, layers: int, experts: int, per_token: int, seed: int) -> None:
        counts = {kind: routed.counts(kind) for kind in routed.choices}
        every = np.sum(list(counts.values()), axis=0)
        order = np.argsort(np.random.default_rng(seed).random((layers, experts)), axis=1)
        source = np.arange(layers) % len(every)
        self._per_token = per_token
        self._shares = {
            kind: np.take_along_axis(stretched(count, every, experts)[source], order, axis=1)
            for kind, count in counts.items()
        }

    def expected(self, kind: str) -> Loads:
        return self._per_token * self._shares[kind]

    def step(self, kind: str, tokens: int, random: np.random.Generator) -> Counts:
        return random.multinomial(self._per_token * tokens, self._shares[kind])


def routings(kinds: Sequence[str], shares: Sequence[float], groups: int) -> dict[str, list[Group]]:
    """Groups by way of routing. `shares` sum to 1, the largest first."""
    hot = max(1, round(shares[0] * groups))
    rest = {kind: share / (groups - hot) for kind, share in zip(kinds[1:], shares[1:], strict=True)}
    ways: dict[str, list[Group]] = {
        "mixed": [{kind: share / groups for kind, share in zip(kinds, shares, strict=True)}] * groups,
        "filled": _filled(kinds, shares, groups),
        "own": [{kind: share} for kind, share in zip(kinds, shares, strict=True)],
        "hot, cold": [*[{kinds[0]: shares[0] / hot}] * hot, *[rest] * (groups - hot)],
    }
    return ways


def _filled(kinds: Sequence[str], shares: Sequence[float], groups: int) -> list[Group]:
    ends = np.cumsum([0.0, *shares])
    edges = np.linspace(0, 1, groups + 1)
    return [
        {
            kind: float(overlap)
            for kind, (begin, end) in zip(kinds, pairwise(ends), strict=True)
            if (overlap := min(end, high) - max(begin, low)) > 1e-9
        }
        for low, high in pairwise(edges)
    ]


@dataclass(frozen=True, slots=True, eq=False)
class Fleet:
    """`tokens`: of one group in a step, where groups are equally busy."""

    traffic: Traffic
    topology: Topology
    groups: int
    tokens: int
    solver: Solver

    def layouts(self, groups: Sequence[Group]) -> list[Layout]:
        made: dict[tuple[tuple[str, float], ...], Layout] = {}
        for group in groups:
            key = tuple(sorted(group.items()))
            if key not in made:
                load = sum((share * self.traffic.expected(kind) for kind, share in group.items()), np.zeros(()))
                made[key] = self.solver(Problem(self.topology, load))
        return [made[tuple(sorted(group.items()))] for group in groups]

    def steps(
        self, groups: Sequence[Group], layouts: Sequence[Layout], count: int, random: np.random.Generator
    ) -> dict[str, float]:
        """Means over `count` steps of every group.

        `step_load`: what a token waits for, over perfect balance of an equally busy group: tokens of the slowest rank,
        summed over layers, averaged over tokens. `busiest`: the same of the busiest group alone. `active`: experts with
        any token on the rank that has most of them, averaged over layers and tokens.
        """
        choices = self.traffic.expected(next(iter(groups[0]))).sum()
        perfect = choices * self.tokens / (self.topology.capacity > 0).sum()
        slowest, active, weights = [], [], []
        for group, layout in zip(groups, layouts, strict=True):
            dealer = _Dealer(layout)
            placed = [dealer.placed(self._drawn(group, random)) for _ in range(count)]
            slowest.append(np.mean([each.sum(axis=2).max(axis=1).sum() for each in placed]) / perfect)
            active.append(np.mean([(each > 0).sum(axis=2).max(axis=1).mean() for each in placed]))
            weights.append(sum(group.values()))
        busiest = int(np.argmax(weights))
        return {
            "step_load": float(np.average(slowest, weights=weights)),
            "busiest": float(slowest[busiest]),
            "busiest_tokens": float(max(weights) * len(groups)),
            "active": float(np.average(active, weights=weights)),
        }

    def _drawn(self, group: Group, random: np.random.Generator) -> Counts:
        shares = np.array(list(group.values()))
        tokens = random.multinomial(round(shares.sum() * self.groups * self.tokens), shares / shares.sum())
        drawn = [self.traffic.step(kind, number, random) for kind, number in zip(group, tokens.tolist(), strict=True)]
        counts: Counts = np.sum(drawn, axis=0)
        return counts


class _Dealer:
    """An expert's tokens are dealt to its copies in turn."""

    def __init__(self, layout: Layout) -> None:
        self._shape = layout.physical.shape
        self._at = np.nonzero(layout.physical != EMPTY)
        layers, experts = self._at[0], layout.physical[self._at]
        self._source = layers, experts
        self._copies = layout.replicas[layers, experts]
        pair = layers * layout.topology.num_experts + experts
        order = np.argsort(pair, kind="stable")
        self._turn = np.empty_like(order)
        self._turn[order] = np.arange(len(order)) - np.searchsorted(pair[order], pair[order])

    def placed(self, counts: Counts) -> Counts:
        """Whole tokens in each slot: (layers, ranks, slots)."""
        tokens = counts[self._source]
        placed = np.zeros(self._shape, dtype=np.int64)
        placed[self._at] = tokens // self._copies + (self._turn < tokens % self._copies)
        return placed

"""Families of expert loads. Each gives the load a layout is made for, and what it becomes soon and later.

Loads are whole tokens, (layers, experts), TOKENS of them in every layer.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placementbench.router import Routed, stretched

Loads = npt.NDArray[np.float64]
TOKENS = 4_000_000
SOON, LATER = (0.05, 0.1), (0.2, 0.2)
"""How zipf, lognormal and adversarial loads drift: share of experts that change places, and sigma of a lognormal
factor on all (not for adversarial loads, whose exact sizes are the point)."""


@dataclass(frozen=True, slots=True)
class Shape:
    layers: int
    experts: int
    ranks: int


@dataclass(frozen=True, slots=True, eq=False)
class Drift:
    before: Loads
    soon: Loads
    later: Loads


Family = Callable[[Shape, np.random.Generator, Routed], Drift]


def zipf(shape: Shape, random: np.random.Generator, routed: Routed) -> Drift:
    """Exponents from 0.4 to 1.0 over the layers; which expert is popular differs from layer to layer."""
    exponents = random.permutation(np.linspace(0.4, 1.0, shape.layers))
    loads = _shuffled(np.arange(1, shape.experts + 1) ** -exponents[:, None], random)
    return _drifting_apart(loads, random)


def lognormal(shape: Shape, random: np.random.Generator, routed: Routed) -> Drift:
    """Sigma from 0.4 to 1.2 over the layers."""
    sigmas = random.permutation(np.linspace(0.4, 1.2, shape.layers))
    return _drifting_apart(np.exp(sigmas[:, None] * random.normal(size=(shape.layers, shape.experts))), random)


def real(shape: Shape, random: np.random.Generator, routed: Routed) -> Drift:
    """Choices of the tiny model's router, stretched over the experts. Traffic turns from chat, code and prose to prose,
    numbers and other languages; soon a fifth of it has. Layer l is tiny layer l mod 4, its experts in their own order.
    """
    counts = {kind: routed.counts(kind) for kind in routed.choices}
    every = np.sum(list(counts.values()), axis=0)
    source = np.arange(shape.layers) % len(every)
    order = np.argsort(random.random((shape.layers, shape.experts)), axis=1)

    def traffic(*kinds: str) -> Loads:
        loads = stretched(np.sum([counts[kind] for kind in kinds], axis=0), every, shape.experts)
        return np.take_along_axis(loads[source], order, axis=1)

    before, later = traffic("chat", "code", "prose"), traffic("prose", "numbers", "languages")
    return _drift(before, 0.8 * before + 0.2 * later, later)


def drifting(shape: Shape, random: np.random.Generator, routed: Routed) -> Drift:
    """Logarithms walk at random from a lognormal start, sigma 0.1 a window; means of 10 windows, 5 and 30 later."""
    steps = random.normal(size=(40, shape.layers, shape.experts)) * 0.1
    steps[0] = random.normal(size=steps[0].shape) * 0.7
    windows = np.exp(np.cumsum(steps, axis=0))
    return _drift(*(windows[start : start + 10].mean(axis=0) for start in (0, 5, 30)))


def bursty(shape: Shape, random: np.random.Generator, routed: Routed) -> Drift:
    """A calm lognormal base (sigma 0.4); 2% of the experts are 5 to 20 times as busy: soon half of them are others,
    later all."""
    base = np.exp(0.4 * random.normal(size=(shape.layers, shape.experts)))
    first, second = (random.random(base.shape) < 0.02 for _ in range(2))
    factor, stays = random.uniform(5, 20, base.shape), random.random(base.shape) < 0.5
    bursts = (first, np.where(stays, first, second), second)
    return _drift(*(base * np.where(burst, factor, 1.0) for burst in bursts))


def adversarial(shape: Shape, random: np.random.Generator, routed: Routed) -> Drift:
    """Built against greedy packing, three kinds of layer in turn.

    Graham's worst case of longest-processing-time-first (sizes 2m-1, 2m-1, ..., m+1, m+1, m, m, m on m ranks, next to
    nothing besides); a secret perfect packing (each rank's mean cut at random among its experts); and two sizes, 3 and
    2, which only fit in the right pairs.
    """
    makers = (_graham, _secret, _two_sizes)
    loads = np.stack([makers[layer % 3](shape, random) for layer in range(shape.layers)])
    return _drifting_apart(_shuffled(loads, random), random, jitters=False)


def _graham(shape: Shape, random: np.random.Generator) -> Loads:
    ranks = min(shape.ranks, (shape.experts - 1) // 2)
    sizes = np.sort([*np.repeat(np.arange(ranks, 2 * ranks), 2), ranks])[::-1]
    return np.concatenate([sizes, np.full(shape.experts - len(sizes), 1e-3)])


def _secret(shape: Shape, random: np.random.Generator) -> Loads:
    parts = np.array_split(np.arange(shape.experts), min(shape.ranks, shape.experts))
    return np.concatenate([random.dirichlet(np.ones(len(part))) for part in parts])


def _two_sizes(shape: Shape, random: np.random.Generator) -> Loads:
    return np.where(np.arange(shape.experts) < shape.experts // 3, 3.0, 2.0)


FAMILIES: Mapping[str, Family] = {
    "zipf": zipf,
    "lognormal": lognormal,
    "real": real,
    "drifting": drifting,
    "bursty": bursty,
    "adversarial": adversarial,
}


def _shuffled(loads: Loads, random: np.random.Generator) -> Loads:
    return random.permuted(loads, axis=1)


def _drifting_apart(loads: Loads, random: np.random.Generator, jitters: bool = True) -> Drift:
    drifted = []
    for shuffled, sigma in (SOON, LATER):
        after = loads * np.exp(sigma * jitters * random.normal(size=loads.shape))
        for row in after:
            chosen = random.choice(len(row), max(2, int(shuffled * len(row))), replace=False)
            row[chosen] = row[np.roll(chosen, 1)]
        drifted.append(after)
    return _drift(loads, *drifted)


def _drift(before: Loads, soon: Loads, later: Loads) -> Drift:
    return Drift(_tokens(before), _tokens(soon), _tokens(later))


def _tokens(loads: Loads) -> Loads:
    tokens: Loads = np.round(loads / loads.sum(axis=1, keepdims=True) * TOKENS)
    return tokens

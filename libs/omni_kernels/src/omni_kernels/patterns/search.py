"""Searches for a pattern: genetic, greedy and random. Pure and repeatable: the same seed asks for the same patterns.

A candidate names one of `Space.choices` for each layer. What is sought is either the best score within a budget of KV
bytes, or the fewest bytes above a floor of accuracy.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from omni_kernels.patterns.pattern import Layer, Pattern

Candidate = tuple[Layer, ...]


@dataclass(frozen=True, slots=True)
class Score:
    """`accuracy`: part of questions whose greedy answer is right and ends by itself. `perplexity` of the good answers'
    tokens."""

    accuracy: float
    perplexity: float


@dataclass(frozen=True, slots=True)
class Space:
    """Patterns of `num_layers` layers out of `choices`, weighed at a context of `tokens`."""

    full: Pattern
    choices: tuple[Layer, ...]
    tokens: int

    @property
    def num_layers(self) -> int:
        return len(self.full.layers)

    def share(self, candidate: Candidate) -> float:
        """KV bytes as a part of full attention's at `tokens`."""
        blocks = sum(self.full.blocks_of(layer, self.tokens) for layer in candidate)
        return blocks / (self.num_layers * self.full.blocks_of(None, self.tokens))

    @property
    def least_share(self) -> float:
        """Of the candidate that keeps least."""
        return min(self.share((choice,) * self.num_layers) for choice in self.choices)


@dataclass(frozen=True, slots=True)
class Goal:
    """Exactly one is set: `share` is the most KV bytes as a part of full attention's, `accuracy` the least accuracy."""

    share: float | None = None
    accuracy: float | None = None

    def __post_init__(self) -> None:
        if (self.share is None) == (self.accuracy is None):
            raise ValueError("set either a budget of KV bytes or a floor of accuracy")

    def merit(self, share: float, score: Score) -> tuple[float, ...]:
        """Larger is better; what misses the goal ranks below all that meets it, by how far it misses it."""
        if self.share is not None:
            if share > self.share:
                return (0, self.share - share, 0, 0)
            return (1, score.accuracy, -score.perplexity, -share)
        assert self.accuracy is not None
        if score.accuracy < self.accuracy:
            return (0, score.accuracy - self.accuracy, -score.perplexity, 0)
        return (1, -share, score.accuracy, -score.perplexity)


@dataclass(slots=True)
class Search:
    """Scores asked for so far. `progress` is told of each: the count, the candidate, its share and score."""

    space: Space
    goal: Goal
    score: Callable[[Candidate], Score]
    progress: Callable[[int, Candidate, float, Score], None] = lambda count, candidate, share, score: None
    seen: dict[Candidate, Score] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises ValueError where no candidate can meet the goal."""
        if self.goal.share is not None and self.space.least_share > self.goal.share:
            raise _unreachable()

    def merit(self, candidate: Candidate) -> tuple[float, ...]:
        if candidate not in self.seen:
            self.seen[candidate] = self.score(candidate)
            self.progress(len(self.seen), candidate, self.space.share(candidate), self.seen[candidate])
        return self.goal.merit(self.space.share(candidate), self.seen[candidate])

    def best(self, candidates: Sequence[Candidate]) -> Candidate:
        """The first of the best."""
        return max(candidates, key=self.merit)


def greedy(search: Search, seed: int = 0) -> Candidate:
    """Each layer alone under each choice, then the change of least loss per byte saved, as long as the goal wants it.

    The loss of a change is what it does alone to the perplexity; effects are taken to add up, which they need not.
    `num_layers` x choices scores, and one more per change where a floor of accuracy must be held.
    """
    space, full = search.space, search.space.full.layers
    changes = [(n, choice) for n in range(space.num_layers) for choice in space.choices]
    for n, choice in changes:
        search.merit(_changed(full, n, choice))
    loss = {(n, choice): search.seen[_changed(full, n, choice)].perplexity for n, choice in changes}
    current, allowed = full, set(changes)
    while search.goal.share is None or space.share(current) > search.goal.share:
        held, saved = current, {}
        for n, choice in changes:
            fewer = space.share(held) - space.share(_changed(held, n, choice))
            if fewer > 0 and (n, choice) in allowed:
                saved[n, choice] = (loss[n, choice] - loss[n, held[n]]) / fewer
        if not saved:
            break
        chosen = min(saved, key=lambda change: saved[change])
        following = _changed(current, *chosen)
        if search.goal.share is not None or search.merit(following) > search.merit(current):
            current = following
        else:
            allowed.remove(chosen)
    search.merit(current)
    return current


def _changed(candidate: Candidate, n: int, choice: Layer) -> Candidate:
    return (*candidate[:n], choice, *candidate[n + 1 :])


def genetic(search: Search, seed: int = 0, population: int = 16, generations: int = 8) -> Candidate:
    """Evolution with elitism: parents by tournament, uniform crossover, mutation of a layer's choice.

    Starts from full attention, every choice for all layers, and random candidates. Holland 1975; OmniAttn names a
    genetic search for its patterns and does not publish it.
    """
    rng, space = random.Random(seed), search.space
    pool: list[Candidate] = [space.full.layers, *((choice,) * space.num_layers for choice in space.choices)]
    pool += [_drawn(rng, space) for _ in range(population)]
    for _ in range(generations):
        pool = sorted(dict.fromkeys(pool), key=search.merit, reverse=True)[: max(2, population // 2)]
        parents = list(pool)
        while len(pool) < population:
            mother, father = (search.best(rng.sample(parents, 2)) for _ in range(2))
            child = [rng.choice(pair) for pair in zip(mother, father, strict=True)]
            for n in range(space.num_layers):
                if rng.random() < 1 / space.num_layers:
                    child[n] = rng.choice(space.choices)
            pool.append(tuple(child))
    return search.best(pool)


def scattered(search: Search, seed: int = 0, count: int = 16) -> Candidate:
    """The best of `count` random candidates that meet a budget of bytes; of all where a floor is the goal."""
    return search.best(samples(search.space, search.goal.share, seed, count))


def samples(space: Space, share: float | None, seed: int, count: int, at_least: float = 0.0) -> list[Candidate]:
    """Different random candidates whose share lies between `at_least` and `share`; fewer where there are not so many.

    Draws are bounded, so that a range with nothing in it ends.
    """
    rng = random.Random(seed)
    found: dict[Candidate, None] = {}
    for _ in range(2000 * count):
        drawn = _drawn(rng, space)
        if (share is None or space.share(drawn) <= share) and space.share(drawn) >= at_least:
            found[drawn] = None
        if len(found) == count:
            break
    if not found:
        raise _unreachable()
    return list(found)


def _unreachable() -> ValueError:
    return ValueError("no pattern of these choices keeps within the budget of KV bytes; allow more, or fewer blocks")


METHODS: Mapping[str, Callable[[Search, int], Candidate]] = {
    "genetic": genetic,
    "greedy": greedy,
    "random": scattered,
}


def front(seen: Mapping[Candidate, Score], space: Space) -> list[Candidate]:
    """Candidates that no other beats in bytes and accuracy both, fewest bytes first."""
    ranked = sorted(seen, key=lambda c: (space.share(c), -seen[c].accuracy, seen[c].perplexity))
    best, found = -1.0, []
    for candidate in ranked:
        if seen[candidate].accuracy > best:
            best = seen[candidate].accuracy
            found.append(candidate)
    return found


def _drawn(rng: random.Random, space: Space) -> Candidate:
    return tuple(rng.choice(space.choices) for _ in range(space.num_layers))

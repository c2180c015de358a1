"""What a worker will find of a prompt: in its cache, on the way there, or to be loaded at a price."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from omni_common.prefix_index import Prefixes, Tier
from omni_proxy.scheduling.view import Floats

_COMPUTED_TIERS = 2
"""`hbm` and `expected` come first; all tiers after them have to be loaded from."""


@dataclass(frozen=True, slots=True)
class LoadCost:
    """What bringing blocks into a worker's hbm takes, in milliseconds."""

    latency_ms: float
    ms_per_block: float


@dataclass(frozen=True, slots=True)
class Forecast:
    """Prompt tokens from the start. `expected_tokens` is the share of `cached_tokens` not reported by the worker yet.

    `loadable_tokens` follow the cached ones and take about `load_ms` to load. That is from above: a block in hbm
    behind one that has to be loaded is priced like its neighbours.
    """

    cached_tokens: int = 0
    expected_tokens: int = 0
    loadable_tokens: int = 0
    load_ms: float = 0.0


class Outlook:
    """One lookup's answer for every worker of a block size."""

    def __init__(
        self, prefixes: Prefixes, block_size: int, own: Mapping[str, LoadCost], pools: Mapping[str, LoadCost]
    ) -> None:
        """`own` by the name of the tier, `pools` by the pool's id."""
        self._prefixes = prefixes
        self._block_size = block_size
        self._costs = [_cost(tier, own, pools) for tier in prefixes.tiers[_COMPUTED_TIERS:]]

    def of(self, worker_id: str) -> Forecast:
        reached = self._prefixes.of(worker_id)
        cached, load_ms = reached[_COMPUTED_TIERS - 1], 0.0
        depth = cached
        for blocks, cost in zip(reached[_COMPUTED_TIERS:], self._costs, strict=True):
            if blocks > depth:
                load_ms += cost.latency_ms + (blocks - depth) * cost.ms_per_block
                depth = blocks
        size = self._block_size
        return Forecast(cached * size, (cached - reached[0]) * size, (depth - cached) * size, load_ms)

    def columns(self, worker_ids: Sequence[str]) -> Floats:
        """As `of`, of many workers: rows cached, expected, loadable tokens and load_ms; one column per worker."""
        found = np.zeros((4, len(worker_ids)))
        if not self._prefixes.longest():
            return found
        reached = self._prefixes.matrix(worker_ids)
        cached = reached[:, _COMPUTED_TIERS - 1]
        found[0], found[1] = cached * self._block_size, (cached - reached[:, 0]) * self._block_size
        if (reached[:, -1] > cached).any():
            depth, load_ms = cached.copy(), found[3]
            for tier, cost in enumerate(self._costs, _COMPUTED_TIERS):
                more = np.maximum(reached[:, tier] - depth, 0)
                load_ms += np.where(more > 0, cost.latency_ms + more * cost.ms_per_block, 0.0)
                depth += more
            found[2] = (depth - cached) * self._block_size
        return found


def reusable_tokens(cached_tokens: int, prompt_tokens: int, block_size: int) -> int:
    """What an engine can use of its cache: whole blocks, and never the last token, whose logits it needs."""
    if block_size < 1:
        return 0
    return min(cached_tokens, (prompt_tokens - 1) // block_size * block_size)


def _cost(tier: Tier, own: Mapping[str, LoadCost], pools: Mapping[str, LoadCost]) -> LoadCost:
    return pools[tier.pool] if tier.pool else own[tier.name]

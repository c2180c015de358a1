"""Router counts of a simulated MoE: a fixed skewed popularity per layer."""

import numpy as np

from omni_engine.ports import ExpertLoad
from omni_engine.sim.settings import SimSettings


class ExpertCounter:
    """Tokens since the last read, spread over experts by a seeded Zipf popularity."""

    def __init__(self, settings: SimSettings) -> None:
        self._per_token = settings.experts_per_token
        self._tokens = 0
        shape = (settings.num_moe_layers, settings.num_experts)
        self._share = np.zeros(shape)
        if all(shape):
            drawn = np.random.default_rng(settings.seed)
            popularity = 1 / np.arange(1, settings.num_experts + 1)
            self._share = np.stack([drawn.permutation(popularity / popularity.sum()) for _ in range(shape[0])])

    def count(self, tokens: int) -> None:
        self._tokens += tokens

    def take(self) -> ExpertLoad | None:
        """None for a dense model."""
        if not self._share.size:
            return None
        tokens, self._tokens = self._tokens, 0
        return ExpertLoad(np.rint(self._share * tokens * self._per_token).astype(np.int64))

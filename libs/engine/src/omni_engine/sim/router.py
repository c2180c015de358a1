"""Which experts a simulated router picks. Deterministic: settings, order and size of the steps decide.

A class of traffic prefers some experts: the r-th most popular of a layer is chosen 1 / r**skew times as often as the
first, at most once per token. Which expert is the r-th is drawn per class and layer. With drift the preferences pass
gradually to a newly drawn order, over `drift_tokens` routed tokens, and so on.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from omni_engine.sim.settings import SimSettings

Counts = npt.NDArray[np.int64]
Shares = npt.NDArray[np.float64]

_DRIFT_STEPS = 32


class Router:
    """Draws the experts of every token of a step; the draws of different tokens are independent."""

    def __init__(self, settings: SimSettings) -> None:
        self._traffic = settings.experts
        self._shape = (settings.num_moe_layers, settings.num_experts)
        self._per_token = settings.experts_per_token
        self._draws = np.random.default_rng((self._traffic.seed, 0))
        self._bounds: dict[int, tuple[int, Shares]] = {}
        self._routed = 0

    def class_of(self, prompt: Sequence[int]) -> int:
        """The class of traffic that a prompt belongs to: the sum of its token ids, modulo the number of classes."""
        return sum(prompt) % self._traffic.classes

    def route(self, tokens_by_class: Mapping[int, int]) -> Counts:
        """Tokens that go to each expert: (layers, experts); every token goes to `experts_per_token` of a layer."""
        counts = np.zeros(self._shape, dtype=np.int64)
        for traffic_class, tokens in tokens_by_class.items():
            counts += self._picks(self._bounds_of(traffic_class), tokens)
            self._routed += tokens
        return counts

    def shares(self, traffic_class: int) -> Shares:
        """Share of a class's tokens that go to each expert at this moment: (layers, experts), rows sum to
        `experts_per_token`."""
        return np.diff(self._bounds_of(traffic_class), axis=1, prepend=0.0)

    def _picks(self, bounds: Shares, tokens: int) -> Counts:
        """Systematic sampling: a token at u in [0, 1) picks the experts whose intervals hold u, u + 1, u + 2, ..."""
        points = np.sort(self._draws.random(tokens))
        whole = np.floor(bounds)
        below = whole.astype(np.int64) * tokens + np.searchsorted(points, bounds - whole)
        return np.diff(below, axis=1, prepend=0)

    def _bounds_of(self, traffic_class: int) -> Shares:
        """Upper ends of the experts' intervals on [0, experts_per_token]."""
        moment = self._moment()
        known = self._bounds.get(traffic_class)
        if known is None or known[0] != moment:
            shares = _at_most_once(self._popularity(traffic_class, moment), self._per_token)
            bounds = np.cumsum(shares, axis=1)
            bounds[:, -1] = self._per_token
            known = self._bounds[traffic_class] = (moment, bounds)
        return known[1]

    def _moment(self) -> int:
        if not self._traffic.drift_tokens:
            return 0
        return self._routed * _DRIFT_STEPS // self._traffic.drift_tokens

    def _popularity(self, traffic_class: int, moment: int) -> Shares:
        order, passed = divmod(moment, _DRIFT_STEPS)
        popularity = self._drawn(traffic_class, order)
        if passed:
            later = self._drawn(traffic_class, order + 1)
            popularity = popularity + (later - popularity) * (passed / _DRIFT_STEPS)
        return popularity

    def _drawn(self, traffic_class: int, order: int) -> Shares:
        num_layers, num_experts = self._shape
        drawn = np.random.default_rng((self._traffic.seed, 1, traffic_class, order))
        zipf = np.arange(1, num_experts + 1) ** -self._traffic.skew
        return drawn.permuted(np.tile(zipf / zipf.sum(), (num_layers, 1)), axis=1)


def _at_most_once(popularity: Shares, picks: int) -> Shares:
    """Shares proportional to popularity that sum to `picks` per row, none above 1."""
    shares = popularity * picks
    while (shares > 1 + 1e-9).any():
        shares = np.minimum(shares, 1.0)
        open_shares = np.where(shares < 1, shares, 0.0)
        room = picks - shares.sum(axis=1, keepdims=True)
        total = open_shares.sum(axis=1, keepdims=True)
        shares = shares + open_shares * room / np.where(total > 0, total, 1.0)
    return shares

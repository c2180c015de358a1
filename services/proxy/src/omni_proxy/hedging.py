"""When a second prefill is started beside one that takes too long. Pure; off unless the settings say otherwise.

A prefill's time over its prediction is a ratio; its quantile is learnt from the last few hundred. Past it, a hedge may
start, paid from a budget that every prefill adds a fraction of a hedge to, so that a slow fleet is not made slower.
"""

from collections import deque

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

_REMEMBERED = 512
_REFRESH_EVERY = 16


class HedgingSettings(BaseModel):
    """Hedged prefills."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    enabled: bool = Field(False, description="Whether to hedge at all")
    quantile: float = Field(0.95, gt=0, lt=1, description="Prefills later than this share of them may be hedged")
    min_wait_ms: float = Field(50.0, ge=0, description="No hedge before a prefill has lasted this long")
    first_ratio: float = Field(3.0, gt=0, description="Time over prediction that is late, until enough were seen")
    min_seen: int = Field(64, ge=1, description="Prefills seen before their own quantile counts")
    budget_ratio: float = Field(0.05, ge=0, le=1, description="Hedges per prefill, in the long run")
    budget_burst: float = Field(5.0, ge=1, description="Hedges that may be saved up")


class Hedging:
    """Owns the budget and the learnt quantile. `settings` may be replaced at any time."""

    def __init__(self, settings: HedgingSettings) -> None:
        self.settings = settings
        self._ratios: deque[float] = deque(maxlen=_REMEMBERED)
        self._late_ratio: float | None = None
        self._seen = 0
        self._budget = 0.0

    def patience_ms(self, predicted_ms: float) -> float | None:
        """How long a prefill may last before it is hedged; None: it is not. Each call earns its share of budget."""
        settings = self.settings
        if not settings.enabled:
            return None
        self._budget = min(settings.budget_burst, self._budget + settings.budget_ratio)
        ratio = settings.first_ratio if self._late_ratio is None else self._late_ratio
        return max(settings.min_wait_ms, ratio * predicted_ms)

    def take(self) -> bool:
        """Pay for one hedge, if the budget holds one."""
        if self._budget < 1:
            return False
        self._budget -= 1
        return True

    def give_back(self) -> None:
        """The hedge that was paid for could not start."""
        self._budget = min(self.settings.budget_burst, self._budget + 1)

    def seen(self, predicted_ms: float, lasted_ms: float) -> None:
        """A prefill ended, or was given up after `lasted_ms`."""
        if not self.settings.enabled or predicted_ms <= 0:
            return
        self._ratios.append(lasted_ms / predicted_ms)
        self._seen += 1
        if self._seen >= self.settings.min_seen and self._seen % _REFRESH_EVERY == 0:
            self._late_ratio = float(np.quantile(self._ratios, self.settings.quantile))

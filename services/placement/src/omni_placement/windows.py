"""Reported expert load: a bounded sliding window of reports per model."""

from collections import deque
from dataclasses import dataclass

import numpy as np

from omni_common.errors import InvalidRequest, ResourceExhausted
from omni_placement.layout import Load


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """Tokens per (layer, logical expert) that one worker routed in engine steps `first_step` to `last_step`."""

    worker_id: str
    first_step: int
    last_step: int
    tokens: Load

    def __post_init__(self) -> None:
        if self.last_step < self.first_step:
            raise InvalidRequest("last_step lies before first_step", field="last_step")

    @property
    def name(self) -> tuple[str, int, int]:
        return self.worker_id, self.first_step, self.last_step


class _Windows:
    def __init__(self, shape: tuple[int, ...], bound: int) -> None:
        self.kept: deque[Window] = deque()
        self.names: set[tuple[str, int, int]] = set()
        self.total = np.zeros(shape, dtype=np.int64)
        self._bound = bound

    def add(self, window: Window) -> bool:
        if window.name in self.names:
            return False
        self.kept.append(window)
        self.names.add(window.name)
        self.total += window.tokens
        if len(self.kept) > self._bound:
            oldest = self.kept.popleft()
            self.names.discard(oldest.name)
            self.total -= oldest.tokens
        return True


class LoadBook:
    """The newest `windows` reports of each model, and their sum."""

    def __init__(self, windows: int, models: int) -> None:
        self._windows, self._models = windows, models
        self._by_model: dict[str, _Windows] = {}

    def add(self, model: str, window: Window) -> bool:
        """Take a report; False for one already there. A new shape of the model starts its windows afresh.

        Raises:
            ResourceExhausted: the bound on models is reached.
        """
        known = self._by_model.get(model)
        if known is None and len(self._by_model) >= self._models:
            raise ResourceExhausted(f"load of {self._models} models is kept", reason="max_models")
        if known is None or known.total.shape != window.tokens.shape:
            known = self._by_model[model] = _Windows(window.tokens.shape, self._windows)
        return known.add(window)

    def total(self, model: str) -> Load | None:
        """Sum over the window; None where nothing was reported."""
        known = self._by_model.get(model)
        return known.total.copy() if known else None

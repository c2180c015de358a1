"""Load as the service keeps it: reports of workers, checked against their group, and what is said of them."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from omni_common.errors import InvalidRequest
from omni_placement.book import LayoutBook, Published
from omni_placement.load import Forecast, LoadBook, Window
from omni_placement.load.book import GroupName, StreamLoad
from omni_placement.load.drift import Drift
from omni_placement.load.profiles import Profile


@dataclass(frozen=True, slots=True, eq=False)
class LoadSummary:
    """What is known of a group's load. Imbalance is slowest over mean rank, sums over layers; None: unknown."""

    streams: list[StreamLoad]
    forecast: Forecast | None
    drift: Drift
    measured_imbalance: float | None
    predicted_imbalance: float | None


class Reports:
    """Reports by group; `clock` is Unix time, forecasts look `horizon_s` ahead."""

    def __init__(self, loads: LoadBook, layouts: LayoutBook, clock: Callable[[], float], horizon_s: float) -> None:
        self._loads, self._layouts, self._clock, self._horizon_s = loads, layouts, clock, horizon_s
        self._measured: dict[GroupName, float] = {}

    def restore(self, profiles: Iterable[Profile]) -> None:
        """Begin groups from what was saved."""
        for profile in profiles:
            self._loads.restore(profile, self._clock())

    def profiles(self) -> Iterator[Profile]:
        """What a restarted service needs to plan from, of every group with a layout."""
        for name in self._layouts.names():
            if (profile := self._loads.profile(*name, self._clock())) is not None:
                yield profile

    def take(self, name: GroupName, window: Window) -> bool:
        """Keep a report; False for one already there.

        Raises:
            InvalidRequest: counts of another shape than the group's layout.
            ResourceExhausted: the bound on groups is reached.
        """
        known = self._layouts.find(name)
        if known is not None:
            _check(window, *known.layout.indicator.shape)
        is_new = self._loads.add(*name, window, self._clock())
        if is_new and window.rank_tokens is not None and window.rank_tokens.any():
            usable = range(window.rank_tokens.shape[1]) if known is None else self._usable(known)
            # Ranks that can hold nothing count while they still compute.
            tokens = window.rank_tokens[:, sorted({*usable, *np.flatnonzero(window.rank_tokens.any(axis=0))})]
            self._measured[name] = float(tokens.max(axis=1).sum() / tokens.mean(axis=1).sum())
        return is_new

    def forecast(self, name: GroupName) -> Forecast | None:
        """What the next `horizon_s` will bring; None where nothing is known."""
        return self._loads.forecast(*name, self._horizon_s, self._clock())

    def drift(self, name: GroupName) -> Drift:
        return self._loads.drift(*name, self._clock())

    def age_s(self, name: GroupName) -> float | None:
        """Since the newest report; None where there is none."""
        return min((stream.age_s for stream in self._loads.streams(*name, self._clock())), default=None)

    def ms_per_token(self, name: GroupName) -> float | None:
        """As its reports have it; None where they do not tell how long steps take."""
        return self._loads.ms_per_token(*name)

    def planned(self, name: GroupName) -> None:
        """The layout in force was planned for the load known now; drift is measured from it."""
        self._loads.planned(*name, self._clock())

    def forget(self, name: GroupName) -> None:
        """Let go of what was reported for a group."""
        self._loads.forget(*name)
        self._measured.pop(name, None)

    def measured_imbalance(self, name: GroupName) -> float | None:
        return self._measured.get(name)

    def predicted_imbalance(self, name: GroupName) -> float | None:
        """Of the layout in force under the load reported."""
        known, total = self._layouts.find(name), self._loads.total(*name)
        if known is None or total is None or not total.any() or total.shape != known.layout.replicas.shape:
            return None
        return known.layout.step_load(total) * len(self._usable(known)) / float(total.sum())

    def balancedness(self, name: GroupName) -> float | None:
        """Least of a layer, of the layout in force under the load reported."""
        known, total = self._layouts.find(name), self._loads.total(*name)
        if known is None or total is None or total.shape != known.layout.replicas.shape:
            return None
        return float(known.layout.balancedness(total, self._layouts.exclusions(name).ranks).min())

    def _usable(self, known: Published) -> set[int]:
        """Ranks that may hold experts."""
        return set(np.flatnonzero(known.layout.topology.capacity)) - self._layouts.exclusions(known.name).ranks

    def summary(self, name: GroupName) -> LoadSummary:
        return LoadSummary(
            self._loads.streams(*name, self._clock()),
            self.forecast(name),
            self.drift(name),
            self.measured_imbalance(name),
            self.predicted_imbalance(name),
        )


def _check(window: Window, ranks: int, layers: int, experts: int) -> None:
    if window.tokens.shape != (layers, experts):
        raise InvalidRequest(f"load of {window.tokens.shape} does not fit {(layers, experts)}", field="load")
    if window.rank_tokens is not None and window.rank_tokens.shape != (layers, ranks):
        message = f"{window.rank_tokens.shape} counts are not {layers} layers of {ranks} ranks"
        raise InvalidRequest(message, field="rank_tokens")

"""The load of every group of engines, by stream, with forecast and drift."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from omni_common.errors import ResourceExhausted
from omni_placement.layout import Numbers
from omni_placement.load.drift import UNKNOWN, Drift
from omni_placement.load.forecast import Forecast
from omni_placement.load.group import GroupLoad, LoadRules
from omni_placement.load.profiles import Profile, StreamProfile
from omni_placement.load.windows import Counts, Phase, Stream, Window


class GroupName(NamedTuple):
    model: str
    group: str


@dataclass(frozen=True, slots=True, eq=False)
class StreamLoad:
    """What is kept of one stream: the sum of its windows, int64 (layers, experts)."""

    stream: Stream
    tokens: Numbers
    windows: int
    age_s: float


class LoadBook:
    """Load of every (model, group). Times are seconds of one clock; it must go on after a restart where profiles are
    kept (Unix time). A time that goes back is taken for the latest one known."""

    def __init__(self, rules: LoadRules) -> None:
        self._rules = rules
        self._groups: dict[GroupName, GroupLoad] = {}

    def add(self, model: str, group: str, window: Window, at_s: float) -> bool:
        """Take a report; False for one already there. A new shape of the model starts the group afresh.

        Raises:
            ResourceExhausted: the bound on groups is reached.
        """
        return self._group_for(GroupName(model, group), window.tokens.shape, at_s).add(window, at_s)

    def total(self, model: str, group: str) -> Numbers | None:
        """Sum of all windows kept, int64 (layers, experts); None where nothing was reported."""
        known = self._groups.get(GroupName(model, group))
        if known is None or not any(len(state.windows) for state in known.streams.values()):
            return None
        total: Numbers = np.sum([state.windows.total() for state in known.streams.values()], axis=0)
        return total

    def streams(self, model: str, group: str, now_s: float) -> list[StreamLoad]:
        """What is kept of each stream of a group, sorted by name."""
        known = self._groups.get(GroupName(model, group))
        return [
            StreamLoad(stream, state.windows.total(), len(state.windows), max(now_s - state.windows.newest_s, 0.0))
            for stream, state in sorted(known.streams.items() if known else [])
            if len(state.windows)
        ]

    def forecast(
        self, model: str, group: str, horizon_s: float, now_s: float, phase: Phase | None = None
    ) -> Forecast | None:
        """Tokens expected over the horizon, phases added up unless one is asked for. None where nothing is known.

        Until the first interval has ended it is what was reported, taken as if it went on.
        """
        known = self._groups.get(GroupName(model, group))
        if known is None:
            return None
        known.advance(now_s)
        interval_s = self._rules.smoothing.interval_s
        intervals = max(1, round(horizon_s / interval_s))
        load = known.expected(phase, intervals)
        if not load.any():
            return self._first_reports(known, phase, horizon_s)
        scale = horizon_s / (intervals * interval_s)
        errors = [a.error for p, a in known.accuracy.items() if a.error is not None and phase in (None, p)]
        spread = known.spread(phase, intervals)
        return Forecast(load * scale, spread * scale, horizon_s, max(errors, default=None))

    def _first_reports(self, known: GroupLoad, phase: Phase | None, horizon_s: float) -> Forecast | None:
        windows = [s.windows.total() for name, s in known.streams.items() if phase in (None, name.phase)]
        counts: Counts = np.sum([np.zeros(known.shape), *windows], axis=0)
        scale = horizon_s / self._rules.smoothing.interval_s
        return Forecast(counts * scale, np.sqrt(counts) * scale, horizon_s, None) if counts.any() else None

    def planned(self, model: str, group: str, now_s: float) -> None:
        """A layout made for the load known now is in force: drift is measured from it."""
        known = self._groups.get(GroupName(model, group))
        if known is not None:
            known.advance(now_s)
            if known.streams:
                known.drift.planned(known.evidence())

    def drift(self, model: str, group: str, now_s: float) -> Drift:
        """How far the last whole interval lies from the planned load."""
        known = self._groups.get(GroupName(model, group))
        if known is None:
            return UNKNOWN
        known.advance(now_s)
        return known.drift.latest

    def ms_per_token(self, model: str, group: str) -> float | None:
        """ms of a step per token on the slowest rank of a layer, from reports; None where none tells step times."""
        known = self._groups.get(GroupName(model, group))
        return known.step_time.ms_per_token if known else None

    def forget(self, model: str, group: str) -> None:
        """Let go of a group, which makes room for another one."""
        self._groups.pop(GroupName(model, group), None)

    def profile(self, model: str, group: str, now_s: float) -> Profile | None:
        """What a restarted service needs to plan from; None where no interval has ended yet."""
        known = self._groups.get(GroupName(model, group))
        if known is None:
            return None
        known.advance(now_s)
        streams = []
        for stream, state in sorted(known.streams.items()):
            memory = state.forecast.memories[known.method(stream.phase).memory]
            if memory.weight.any():
                streams.append(StreamProfile(stream, memory.rate.level, memory.shares.level, memory.weight))
        return Profile(model, group, now_s, tuple(streams)) if streams else None

    def restore(self, profile: Profile, now_s: float) -> None:
        """Begin a group from a profile, aged as if nothing was reported since. A group already known is kept.

        Raises:
            ResourceExhausted: the bound on groups is reached.
        """
        name = GroupName(profile.model, profile.group)
        if name in self._groups or not profile.streams:
            return
        known = self._group_for(name, profile.streams[0].shares.shape, now_s)
        for stream in profile.aged(now_s, max(self._rules.smoothing.half_lives_s)).streams:
            known.restore(stream)

    def _group_for(self, name: GroupName, shape: tuple[int, ...], now_s: float) -> GroupLoad:
        known = self._groups.get(name)
        if known is None and len(self._groups) >= self._rules.groups:
            raise ResourceExhausted(f"load of {self._rules.groups} groups is kept", reason="max_groups")
        if known is None or known.shape != shape:
            num_layers, num_experts = shape
            known = self._groups[name] = GroupLoad((num_layers, num_experts), self._rules, now_s)
        return known

"""The load of one group of engines: its streams, their forecasts, and what is learned from both."""

from dataclasses import dataclass, field
from functools import partial

import numpy as np

from omni_placement.load.accuracy import Accuracy
from omni_placement.load.drift import DriftDetector, DriftRule
from omni_placement.load.forecast import Method, Smoothing, StreamForecast, shares_of
from omni_placement.load.profiles import StreamProfile
from omni_placement.load.steptime import StepTime
from omni_placement.load.windows import Counts, Phase, Stream, Window, Windows


@dataclass(frozen=True, slots=True)
class LoadRules:
    """Bounds and constants of a book."""

    windows: int = 64
    """Windows kept per stream, of 8 bytes for each layer and expert."""
    groups: int = 64
    streams: int = 16
    """Streams kept per group, before classes without a place are counted as one per phase."""
    smoothing: Smoothing = field(default_factory=Smoothing)
    drift: DriftRule = field(default_factory=DriftRule)


class StreamState:
    def __init__(self, shape: tuple[int, int], windows: int, smoothing: Smoothing) -> None:
        self.windows = Windows(shape, windows)
        self.forecast = StreamForecast(shape, smoothing)
        self.counts = np.zeros(shape)


class GroupLoad:
    """Streams of one group. Intervals of all streams end together."""

    def __init__(self, shape: tuple[int, int], rules: LoadRules, now_s: float) -> None:
        self.shape, self._rules = shape, rules
        self.streams: dict[Stream, StreamState] = {}
        self.accuracy: dict[Phase, Accuracy] = {}
        self.drift = DriftDetector(rules.drift)
        self.step_time = StepTime()
        self._interval = self._index(now_s)

    def add(self, window: Window, at_s: float) -> bool:
        self.advance(at_s)
        state = self._state(window.stream)
        if not state.windows.add(window, at_s):
            return False
        state.counts += window.tokens
        self.step_time.add(window)
        return True

    def advance(self, now_s: float) -> None:
        """Close the intervals that have ended. A silence beyond the horizon is passed in one stride."""
        ended = self._index(now_s) - self._interval
        closed = min(ended, self._rules.smoothing.horizon_intervals + 1)
        for _ in range(closed):
            self._close()
            self._interval += 1
        if ended > closed:
            for state in self.streams.values():
                state.forecast.fade(ended - closed)
            for accuracy in self.accuracy.values():
                accuracy.withdraw()
            self._interval = self._index(now_s)

    def expected(self, phase: Phase | None, intervals: int, method: Method | None = None) -> Counts:
        """Tokens of the next intervals, of one phase or all, by the method given or the best one of each phase."""
        total = np.zeros(self.shape)
        for stream, state in self.streams.items():
            if phase in (None, stream.phase):
                total += state.forecast.ahead(intervals, method or self.method(stream.phase))
        return total

    def spread(self, phase: Phase | None, intervals: int) -> Counts:
        """Standard deviation of `expected`: what past forecasts missed by, or sampling noise until that is known."""
        variance = np.zeros(self.shape)
        for known in sorted({stream.phase for stream in self.streams}):
            if phase not in (None, known):
                continue
            missed = self.accuracy[known].variance if known in self.accuracy else None
            if missed is not None:
                variance += missed * self.expected(known, intervals).sum(axis=1, keepdims=True) ** 2
                continue
            method = self.method(known)
            for state in (state for stream, state in self.streams.items() if stream.phase is known):
                tokens = state.forecast.ahead(intervals, method).sum(axis=1, keepdims=True)
                variance += state.forecast.sampling_variance(method) * tokens**2
        spread: Counts = np.sqrt(variance)
        return spread

    def evidence(self) -> Counts:
        """Tokens that the expected shares rest on, (layers, experts)."""
        weight = np.zeros(self.shape[0])
        for stream, state in self.streams.items():
            weight += state.forecast.memories[self.method(stream.phase).memory].weight
        counts: Counts = shares_of(self.expected(None, 1)) * weight[:, None]
        return counts

    def method(self, phase: Phase) -> Method:
        """How the phase is forecast."""
        return self.accuracy[phase].method if phase in self.accuracy else self._rules.smoothing.first_method

    def _state(self, stream: Stream) -> StreamState:
        if stream not in self.streams and len(self.streams) >= self._rules.streams:
            # Over the bound, classes are counted together rather than lost.
            stream = Stream(stream.phase, "")
        if stream not in self.streams:
            self.streams[stream] = StreamState(self.shape, self._rules.windows, self._rules.smoothing)
        return self.streams[stream]

    def restore(self, stream: StreamProfile) -> None:
        self._state(stream.stream).forecast.restore(stream.rate, stream.shares, stream.weight)

    def _close(self) -> None:
        seen = np.zeros(self.shape)
        for phase in sorted({stream.phase for stream in self.streams}):
            counts = np.sum([s.counts for name, s in self.streams.items() if name.phase is phase], axis=0)
            self.accuracy.setdefault(phase, Accuracy(self.shape, self._rules.smoothing)).close(self._interval, counts)
            seen += counts
        self.drift.observe(seen)
        for state in self.streams.values():
            state.forecast.update(state.counts)
            state.counts = np.zeros(self.shape)
        for phase, accuracy in self.accuracy.items():
            accuracy.issue(self._interval, partial(self.expected, phase))

    def _index(self, at_s: float) -> int:
        return int(at_s // self._rules.smoothing.interval_s)

"""Runs a trace through simulated workers under one kind of knowledge. Deterministic: its only clock is simulated."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from sidebyside.ranks import quantile

from omni_engine.ports import BlockEvent
from omni_proxy.scheduling.forecast import Forecast
from omni_proxy.scheduling.policies.legs import first
from omni_proxy.scheduling.policies.load import tokens_to_compute
from omni_proxy.scheduling.request import SchedulingRequest
from omni_proxy.scheduling.view import WorkerRow, view_of
from tracereplay.clock import Clock
from tracereplay.knowledge import VARIANTS, Knowledge
from tracereplay.reports import Reports
from tracereplay.trace import Request, reusable
from tracereplay.worker import Job, TimeModel, Worker


@dataclass(frozen=True, slots=True)
class Scene:
    """What is held equal over the variants.

    Every worker publishes its events each `publish_s`, at a phase of its own; the proxies know them `network_s` later,
    half to one and a half of it. A mark outlives its prefill by `marks_s`. Requests arrive up to `spread_s` after the
    time in the trace, which tells it in steps of that size. Each comes to one of `proxies` by chance: they share what
    workers report and the account of load, but neither marks nor history.
    """

    cache_blocks: int
    workers: int = 8
    proxies: int = 1
    publish_s: float = 0.2
    network_s: float = 0.02
    marks_s: float = 2.0
    spread_s: float = 3.0
    times: TimeModel = field(default_factory=TimeModel)
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """Shares in [0, 1]. Times to first token are of the model of time, not of a device."""

    hit_rate: float
    """Of all prompt tokens, those that came from a cache."""
    misjudged: float
    """Of all prompt tokens, those the router took for cached and that were not, or the reverse."""
    mean_ttft_s: float
    p99_ttft_s: float
    busiest: float
    """Of all requests, those of the worker that got most."""
    load: float
    """Of the workers' time, what prefill took."""


class Replay:
    """One run. The router's own account of a worker is what it believes to be uncached there and not prefilled yet."""

    def __init__(self, scene: Scene, variant: str) -> None:
        rng = random.Random(scene.seed)
        self._scene, self._clock = scene, Clock()
        self._rng = rng
        make = VARIANTS[variant].make
        self._proxies: list[Knowledge] = [
            make(scene.workers, scene.cache_blocks, self._clock, scene.marks_s) for _ in range(scene.proxies)
        ]
        # The simulated engine does not say where in its prompt a block stands; a worker's relay does.
        self._positions: dict[bytes, int] = {}
        self._reports = [
            Reports(self._clock, scene.publish_s, scene.network_s, rng, partial(self._reported, number))
            for number in range(scene.workers)
        ]
        self._workers = [self._worker(number) for number in range(scene.workers)]
        self._uncached = [0] * scene.workers
        self._requests = [0] * scene.workers
        self._dispatched = [0] * scene.workers
        self._done: list[Job] = []

    def run(self, requests: Sequence[Request]) -> Outcome:
        """Raises ValueError if there are no requests, or one that can never fit a cache."""
        if not requests:
            raise ValueError("the trace is empty")
        for request in requests:
            at_s = request.at_s + self._rng.uniform(0, self._scene.spread_s)
            self._clock.at(at_s, partial(self._arrive, request, self._rng.choice(self._proxies)))
        self._clock.run()
        return self._outcome(requests[-1].at_s - requests[0].at_s)

    def _worker(self, number: int) -> Worker:
        def changed(events: Sequence[BlockEvent]) -> None:
            for proxy in self._proxies:
                proxy.changed(number, events)
            self._reports[number].add(events)

        scene = self._scene
        return Worker(scene.cache_blocks, scene.times, changed, self._clock.after)

    def _reported(self, number: int, events: Sequence[BlockEvent]) -> None:
        for proxy in self._proxies:
            proxy.reported(number, events, self._positions)

    def _arrive(self, request: Request, proxy: Knowledge) -> None:
        """Choose by the proxy's own rule for prefill, and send."""
        forecast_of = proxy.forecasts(request.keys[: reusable(request)])
        wish = SchedulingRequest(request.input_tokens)
        candidates = [self._candidate(number, forecast_of(number)) for number in range(self._scene.workers)]
        view, everyone = view_of(candidates), np.arange(self._scene.workers)
        chosen = first(view, everyone, tokens_to_compute(wish, view, everyone))
        prefilled = partial(self._prefilled, chosen, proxy)
        job = Job(request, self._clock.now_s, candidates[chosen].cached_tokens, prefilled)
        self._positions.update(zip(request.keys, range(len(request.keys)), strict=True))
        self._uncached[chosen] += job.believed_uncached_tokens
        self._requests[chosen] += 1
        self._dispatched[chosen] += 1
        proxy.dispatched(chosen, request.keys)
        self._workers[chosen].take(job)

    def _candidate(self, number: int, forecast: Forecast) -> WorkerRow:
        return WorkerRow(
            f"{number:06}",
            prefills=True,
            cached_tokens=forecast.cached_tokens,
            expected_tokens=forecast.expected_tokens,
            own_requests=self._requests[number],
            own_uncached_tokens=self._uncached[number],
            dispatched=self._dispatched[number],
        )

    def _prefilled(self, number: int, proxy: Knowledge, job: Job) -> None:
        job.prefilled_s = self._clock.now_s
        self._uncached[number] -= job.believed_uncached_tokens
        self._requests[number] -= 1
        proxy.prefilled(number, job.request.keys)
        self._done.append(job)

    def _outcome(self, span_s: float) -> Outcome:
        jobs, scene = self._done, self._scene
        tokens = sum(job.request.input_tokens for job in jobs)
        ttfts_s = sorted(job.prefilled_s - job.sent_s for job in jobs)
        busy_s = sum(scene.times.prefill_s(job.uncached_tokens) for job in jobs)
        return Outcome(
            hit_rate=1 - sum(job.uncached_tokens for job in jobs) / tokens,
            misjudged=sum(abs(job.believed_uncached_tokens - job.uncached_tokens) for job in jobs) / tokens,
            mean_ttft_s=sum(ttfts_s) / len(ttfts_s),
            p99_ttft_s=quantile(ttfts_s, 0.99),
            busiest=max(self._dispatched) / len(jobs),
            load=busy_s / (span_s or 1.0) / scene.workers,
        )

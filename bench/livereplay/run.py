"""Systems, one replay, the search for the knee, and all systems in turn over the same engines."""

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sidebyside import cores
from sidebyside.child import Broken

from livereplay.client import Answer, Order, body_of, replay
from livereplay.figures import Point, Promise, Samples, point_of
from livereplay.processes import Engines, Proxy, Shape, proxy
from livereplay.workload import Workload
from omni_common.errors import OmniError
from omni_proxy.schedule_config import ScheduleConfig

WARM = 0.2
"""Share of a replay, its beginning, that fills caches and teaches predictors and is not counted."""
ATTAINED = 0.9
"""The knee is where so many requests keep the promise."""
_NO_HOLD = {"lookahead_ms": 1e12}
_PATIENT = {"ttl_s": 600.0}
_SWEEP_S = 12.0
_SWEEP_STEP = 1.35
_MOST_SWEEPS = 10
_TIMEOUT_S = 180.0
_MOST_FAILED = 0.5

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class System:
    """A policy; `holds`: requests wait in the proxy, else they are sent at once and engines serve in order."""

    name: str
    policy: str
    holds: bool

    def config(self, promise: Promise) -> dict[str, object]:
        """The proxy's scheduler file."""
        return {
            "policy": {"name": self.policy},
            "slo": {"ttft_ms": promise.ttft_ms, "itl_ms": promise.itl_ms},
            "flow": _PATIENT if self.holds else _PATIENT | _NO_HOLD,
        }


def system_of(name: str) -> System:
    """`cost` as shipped, others without hold as in `bench/scheduler.py`; `/hold` or `/no-hold` says otherwise.

    Raises:
        ValueError: no such policy.
    """
    policy, _, hold = name.partition("/")
    if hold not in ("", "hold", "no-hold"):
        raise ValueError(f"{name}: what follows the policy is hold or no-hold")
    system = System(name, policy, hold == "hold" if hold else policy == "cost")
    try:
        ScheduleConfig.parse(f"policy: {{name: {policy}}}".encode())
    except OmniError as error:
        raise ValueError(error.message) from None
    return system


@dataclass(frozen=True, slots=True)
class Wishes:
    shape: Shape
    workload: Workload
    systems: Sequence[System]
    levels: Mapping[str, float]
    """Factors of the knee."""
    knee: float | None
    first_rate: float
    repeats: int
    promise: Promise


@dataclass(slots=True)
class Results:
    """`points` by level and system, one per repeat. `sweep`: (requests per second, share kept) until the knee."""

    knee: float = 0.0
    sweep: list[tuple[float, float]] = field(default_factory=list)
    points: dict[str, dict[str, list[Point]]] = field(default_factory=dict)
    load: list[float] = field(default_factory=list)
    """Processes of the whole machine that ran or waited for a core, per replay."""


def run(wishes: Wishes, beside: Engines, folder: Path, say: Say) -> Results:
    """Raises Broken where a proxy or too many requests failed."""
    results = Results()
    with cores.on(beside.cores):
        _warm(wishes, beside, folder, say)
        results.knee = wishes.knee or _find_knee(wishes, beside, folder, results, say)
        for repeat in range(wishes.repeats):
            # Every other round backwards, so that no system is always the first.
            for system in wishes.systems if repeat % 2 == 0 else wishes.systems[::-1]:
                with proxy(wishes.shape, beside, system.config(wishes.promise), folder) as started:
                    for level, factor in wishes.levels.items():
                        name = f"{system.name}/{level}/{repeat}"
                        point = one_replay(started, wishes, wishes.workload, factor * results.knee, repeat, name)
                        results.points.setdefault(level, {}).setdefault(system.name, []).append(point)
                        results.load.append(os.getloadavg()[0])
                        say(f"round {repeat + 1} {system.name:24} {level:6} {one_line(point)}")
    return results


def _warm(wishes: Wishes, beside: Engines, folder: Path, say: Say) -> None:
    """A replay that is not counted, under the first system and the load to come: engines meet every shape here."""
    rate = wishes.knee or wishes.first_rate
    part = wishes.workload if wishes.knee else wishes.workload.first(max(20, int(rate * _SWEEP_S)))
    with proxy(wishes.shape, beside, wishes.systems[0].config(wishes.promise), folder) as started:
        say(f"warming {rate:.1f}/s {one_line(one_replay(started, wishes, part, rate, 0, 'warming'))}")


def one_replay(started: Proxy, wishes: Wishes, workload: Workload, rate: float, seed: int, salt: str) -> Point:
    """`seed`: of the arrivals; `salt`: of the tokens, so that no cache holds anything of an earlier replay.

    Raises:
        Broken: most requests failed.
    """
    model = wishes.shape.model_dir.name
    arrivals_s = workload.arrivals_s(rate, seed)
    orders = [
        Order(at_s, body_of(model, workload.token_ids(p, salt), p.output_tokens), p.tokens, p.output_tokens)
        for at_s, p in zip(arrivals_s, workload.prompts, strict=True)
    ]
    warm = int(WARM * len(orders))
    answers, before = asyncio.run(_replay(started, orders, warm))
    span_s = arrivals_s[-1] - arrivals_s[warm]
    point = point_of(answers[warm:], span_s, wishes.promise, before, started.samples())
    if point.failed > _MOST_FAILED * point.requests:
        raise Broken(f"{point.failed} of {point.requests} requests failed: {', '.join(point.reasons)}")
    return point


async def _replay(started: Proxy, orders: Sequence[Order], warm: int) -> tuple[list[Answer], Samples]:
    """Answers, and the proxy's samples from when the first that counts was sent."""
    scrapes: list[asyncio.Task[Samples]] = []

    def at_order(number: int) -> None:
        if number == warm:
            scrapes.append(asyncio.create_task(started.samples_meanwhile()))

    answers = await replay(started.port, orders, at_order, _TIMEOUT_S)
    return answers, await scrapes[0]


def _find_knee(wishes: Wishes, beside: Engines, folder: Path, results: Results, say: Say) -> float:
    """Short replays under the first system, at growing rates until too few keep the promise; interpolated.

    Where too few do at the first rate, rates go down until enough do.
    """
    rate, is_kept = wishes.first_rate, []
    with proxy(wishes.shape, beside, wishes.systems[0].config(wishes.promise), folder) as started:
        for step in range(_MOST_SWEEPS):
            part = wishes.workload.first(max(20, int(rate * _SWEEP_S)))
            point = one_replay(started, wishes, part, rate, 0, f"sweep/{step}")
            results.sweep.append((rate, point.kept))
            say(f"sweep {rate:.1f}/s {one_line(point)}")
            is_kept.append(point.kept >= ATTAINED)
            if True in is_kept and False in is_kept:
                break
            rate *= _SWEEP_STEP if is_kept[0] else 1 / _SWEEP_STEP
    return knee_of(sorted(results.sweep))


def knee_of(sweep: Sequence[tuple[float, float]]) -> float:
    """Rate at which `ATTAINED` keep the promise: between the last that did and the first that did not."""
    last = (0.0, 1.0)
    for rate, kept in sweep:
        if kept < ATTAINED:
            share = (last[1] - ATTAINED) / (last[1] - kept) if last[1] > kept else 1.0
            return last[0] + share * (rate - last[0])
        last = (rate, kept)
    return last[0]


def one_line(point: Point) -> str:
    errors = " ".join(f"{model} {error:.0%}" for model, error in point.errors.items())
    return (
        f"kept {point.kept:.0%}, failed {point.failed}, TTFT {point.ttft_p50_ms:.0f} / {point.ttft_p90_ms:.0f} ms, "
        f"ITL {point.itl_mean_ms:.1f} / {point.itl_p99_ms:.0f} ms, hits {point.hit_rate:.0%}, errors {errors}"
    )

"""Says what came out: tables, goals, JSON."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

from sidebyside.tables import Block

from fleetsim.compare import ATTAINED, Level, served_speed
from fleetsim.outcome import Outcome
from fleetsim.systems import SYSTEMS

GOAL_GOODPUT, GOAL_TTFT, GOAL_ERROR = 1.2, 0.62, 0.15
HEAD = (
    "system",
    "goodput, req/s",
    "kept",
    "kept, scaled SLO",
    "kept, strict gaps",
    "TTFT p50 / p90 / p99, s",
    "ITL mean / p99, ms",
    "hit rate",
    "apart",
    "error p50 / p90: prompt",
    "step",
    "transfer",
    "missed by",
)


@dataclass(frozen=True, slots=True)
class Fleet:
    """All that is known of one fleet. `sweep`: share kept by system, one per speed of `speeds`, up to the knee's."""

    title: str
    knee: float
    levels: Sequence[Level]
    speeds: Sequence[float]
    sweep: Mapping[str, Sequence[float]]
    bounds: Mapping[str, Mapping[str, float]]
    """By level: share `unreachable`, and most kept by `prefill` workers alone and by `all` workers."""

    @property
    def at_knee(self) -> Level:
        return next(level for level in self.levels if level.title == "knee")

    def served_per_s(self, system: str) -> float:
        """Requests per second that arrive at the highest speed at which enough of them keep the promise."""
        level = self.at_knee
        rate = level.median(system, lambda o: o.offered_per_s) / level.speed
        return rate * served_speed(self.speeds, self.sweep[system])


def _rows(level: Level) -> list[tuple[str, ...]]:
    """Best goodput first."""
    promise = level.scene.promise.name
    order = sorted(level.outcomes, key=lambda s: -level.median(s, lambda o: o.goodput(promise)))
    return [_row(level, system, promise) for system in order]


def _row(level: Level, system: str, promise: str) -> tuple[str, ...]:
    def median(figure: Callable[[Outcome], float]) -> float:
        return level.median(system, figure)

    low, high = level.spread(system, lambda o: o.goodput(promise))
    missed = _mean_missed(level.outcomes[system])
    return (
        SYSTEMS[system].title,
        f"{median(lambda o: o.goodput(promise)):.2f} ({low:.2f}-{high:.2f})",
        f"{median(lambda o: o.kept[promise]):.1%}",
        f"{median(lambda o: o.kept['scaled']):.1%}",
        f"{median(lambda o: o.kept['strict']):.1%}",
        " / ".join(f"{median(lambda o, i=i: o.ttft_s[i]):.2f}" for i in range(3)),  # type: ignore[misc]
        f"{median(lambda o: o.itl_mean_s) * 1e3:.1f} / {median(lambda o: o.itl_p99_s) * 1e3:.0f}",
        f"{median(lambda o: o.hit_rate):.1%}",
        f"{median(lambda o: o.disaggregated):.0%}",
        *(_error(level, system, kind) for kind in ("prompt", "step", "transfer")),
        ", ".join(f"{cause} {share:.1%}" for cause, share in missed.items()),
    )


def _error(level: Level, system: str, kind: str) -> str:
    median = level.median(system, lambda o: o.errors[kind].median)
    p90 = level.median(system, lambda o: o.errors[kind].p90)
    return "-" if math.isnan(median) else f"{median:.1%} / {p90:.0%}"


def _mean_missed(outcomes: Sequence[Outcome]) -> Mapping[str, float]:
    causes = sorted({cause for outcome in outcomes for cause in outcome.missed})
    return {cause: sum(o.missed.get(cause, 0.0) for o in outcomes) / len(outcomes) for cause in causes}


def rivals(systems: Iterable[str]) -> list[str]:
    return [system for system in systems if SYSTEMS[system].rival]


def goals(fleet: Fleet) -> list[str]:
    """One line for each thing the product is held to; none without the systems that it takes."""
    level = fleet.at_knee
    others = rivals(level.outcomes)
    if "cost" not in level.outcomes or not others:
        return []
    promise = level.scene.promise.name
    name, best = _best(level, others, lambda o: o.goodput(promise))
    own = level.median("cost", lambda o: o.goodput(promise))
    most = fleet.bounds[level.title]["all"] / level.median(name, lambda o: o.kept[promise]) - 1
    lines = [
        _goal(
            own >= GOAL_GOODPUT * best,
            f"{fleet.title}: goodput of cost at the knee {own:.2f} req/s, of the best other ({name}) {best:.2f}: "
            f"{own / best - 1:+.0%} (goal: at least +{GOAL_GOODPUT - 1:.0%}; nothing could reach more than {most:+.0%} "
            "where the best other keeps so many)",
        )
    ]
    swept = [system for system in others if system in fleet.sweep]
    if "cost" in fleet.sweep and swept:
        own = fleet.served_per_s("cost")
        name = max(swept, key=fleet.served_per_s)
        lines.append(
            _goal(
                own >= GOAL_GOODPUT * fleet.served_per_s(name),
                f"{fleet.title}: load of which {ATTAINED:.0%} keep the SLO: cost {own:.2f} req/s, the best other "
                f"({name}) {fleet.served_per_s(name):.2f}: {own / fleet.served_per_s(name) - 1:+.0%} "
                f"(goal: at least +{GOAL_GOODPUT - 1:.0%})",
            )
        )
    if "round_robin" in level.outcomes:
        ratio = level.median("cost", lambda o: o.ttft_s[1]) / level.median("round_robin", lambda o: o.ttft_s[1])
        text = f"{fleet.title}: p90 TTFT of cost at the knee {ratio:.3f} of round robin's (goal: at most {GOAL_TTFT})"
        lines.append(_goal(ratio <= GOAL_TTFT, text))
    for kind in ("prompt", "step", "transfer"):
        error = level.median("cost", lambda o, kind=kind: o.errors[kind].median)  # type: ignore[misc]
        text = f"{fleet.title}: median error of predicted {kind} times at the knee {error:.1%} (goal: {GOAL_ERROR:.0%})"
        lines.append(_goal(error < GOAL_ERROR, text))
    return lines


def _best(level: Level, systems: Sequence[str], figure: Callable[[Outcome], float]) -> tuple[str, float]:
    name = max(systems, key=lambda system: level.median(system, figure))
    return name, level.median(name, figure)


def _goal(is_met: bool, text: str) -> str:
    return f"{'met' if is_met else 'NOT met'}: {text}"


def blocks_of(fleets: Sequence[Fleet]) -> list[Block]:
    """A table per fleet and level."""
    return [Block(_title(fleet, level), HEAD, _rows(level)) for fleet in fleets for level in fleet.levels]


def _title(fleet: Fleet, level: Level) -> str:
    bound = fleet.bounds[level.title]
    rate = next(iter(level.outcomes.values()))[0].offered_per_s
    return (
        f"{fleet.title}, {level.title}: {rate:.2f} requests/s (trace x{level.speed:.2f}); out of reach "
        f"{bound['unreachable']:.1%}, at most kept {bound['prefill']:.1%} with prefill workers alone"
    )


def as_json(fleets: Sequence[Fleet]) -> list[dict[str, object]]:
    """Everything, every seed apart."""
    return [
        {
            "fleet": fleet.title,
            "knee": fleet.knee,
            "sweep": {"speeds": list(fleet.speeds), "kept": {k: list(v) for k, v in fleet.sweep.items()}},
            "bounds": fleet.bounds,
            "levels": [
                {
                    "title": level.title,
                    "speed": level.speed,
                    "scene": asdict(level.scene),
                    "outcomes": {name: [asdict(o) for o in outcomes] for name, outcomes in level.outcomes.items()},
                }
                for level in fleet.levels
            ],
            "goals": goals(fleet),
        }
        for fleet in fleets
    ]

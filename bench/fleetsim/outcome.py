"""The figures of one run."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from sidebyside.ranks import quantile

from fleetsim.record import Guess, Served, weighted_quantile
from fleetsim.simulation import Run
from fleetsim.slo import PROMISES, Promise

_STRICT_GAP_S = 0.1


@dataclass(frozen=True, slots=True)
class Errors:
    """Of predictions made when the decision was taken, relative to what came."""

    median: float = math.nan
    p90: float = math.nan
    count: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """Shares are of all requests, in [0, 1]; times in seconds of the model, `decision_us` in microseconds of here."""

    requests: int
    offered_per_s: float
    kept: Mapping[str, float]
    """By promise; `strict` is the fixed one with 99% of a request's gaps within 100 ms too."""
    ttft_s: tuple[float, float, float]
    """p50, p90, p99."""
    itl_mean_s: float
    itl_p99_s: float
    """Of all gaps of all requests."""
    hit_rate: float
    disaggregated: float
    prefill_load: float
    """Share of their time that prefill workers computed while requests arrived; above 1 where work was left over."""
    errors: Mapping[str, Errors]
    """Of prompt (wait and prefill), step and transfer."""
    decision_us: tuple[float, float]
    """p50, p99."""
    missed: Mapping[str, float] = field(default_factory=dict)
    """Share of all requests that missed the promise, by what took most of the time that was too much."""
    phases_s: Mapping[str, float] = field(default_factory=dict)
    """Mean of each phase."""

    def goodput(self, promise: str) -> float:
        """Requests per second that kept it."""
        return self.kept[promise] * self.offered_per_s


def outcome_of(run: Run, promise: Promise) -> Outcome:
    served = run.served
    count = len(served)
    ttfts_s = sorted(one.ttft_s for one in served)
    gaps = [gap for one in served for gap in one.gaps]
    took_s = sorted(run.decision_s)
    return Outcome(
        requests=count,
        offered_per_s=count / run.arriving_s if run.arriving_s else math.inf,
        kept={
            **{name: sum(map(of.kept, served)) / count for name, of in PROMISES.items()},
            "strict": sum(PROMISES["fixed"].kept(s) and s.gap_s(0.99) <= _STRICT_GAP_S for s in served) / count,
        },
        ttft_s=(quantile(ttfts_s, 0.5), quantile(ttfts_s, 0.9), quantile(ttfts_s, 0.99)),
        itl_mean_s=statistics.mean(one.itl_s for one in served),
        itl_p99_s=weighted_quantile(gaps, 0.99),
        hit_rate=sum(one.cached_tokens for one in served) / sum(one.prompt_tokens for one in served),
        disaggregated=sum(one.disaggregated for one in served) / count,
        prefill_load=statistics.mean(run.busy[: run.prefills]),
        errors={
            "prompt": errors_of(one.prompt_guess for one in served),
            "step": errors_of(one.step_guess for one in served),
            "transfer": errors_of(one.transfer_guess for one in served),
        },
        decision_us=(quantile(took_s, 0.5) * 1e6, quantile(took_s, 0.99) * 1e6),
        missed=_missed(served, promise),
        phases_s={
            name: statistics.mean(getattr(one, name) for one in served)
            for name in ("hold_s", "queue_s", "compute_s", "transfer_s", "handoff_s")
        },
    )


def _missed(served: Sequence[Served], promise: Promise) -> Mapping[str, float]:
    causes: dict[str, int] = {}
    for one in served:
        if not promise.kept(one):
            cause = _cause(one, promise)
            causes[cause] = causes.get(cause, 0) + 1
    return {cause: number / len(served) for cause, number in sorted(causes.items())}


def _cause(one: Served, promise: Promise) -> str:
    if promise.first_kept(one):
        return "decode gaps"
    if one.compute_s > promise.ttft_of(one.unloaded_s):
        return "own compute"
    return "hold" if one.hold_s > one.queue_s else "engine queue"


def errors_of(guesses: Iterable[Guess | None]) -> Errors:
    errors = sorted(guess.error for guess in guesses if guess is not None)
    return Errors(quantile(errors, 0.5), quantile(errors, 0.9), len(errors)) if errors else Errors()

"""The figures of one replay."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sidebyside.ranks import quantile

from livereplay.client import Answer

Samples = Mapping[tuple[str, tuple[tuple[str, str], ...]], float]
PREDICTED = ("prefill", "step", "transfer")


@dataclass(frozen=True, slots=True)
class Promise:
    """First token within `ttft_ms`, and a mean gap within `itl_ms`."""

    ttft_ms: float
    itl_ms: float

    def kept(self, answer: Answer) -> bool:
        return not answer.error and answer.ttft_ms <= self.ttft_ms and answer.itl_ms <= self.itl_ms


@dataclass(frozen=True, slots=True)
class Point:
    """Of one replay without its beginning. Times in milliseconds, shares in [0, 1]."""

    requests: int
    failed: int
    offered_per_s: float
    kept: float
    ttft_p50_ms: float
    ttft_p90_ms: float
    itl_mean_ms: float
    """Of requests' mean gaps."""
    itl_p99_ms: float
    """Of all gaps between reads."""
    hit_rate: float
    errors: Mapping[str, float]
    """Median by model, relative; NaN where nothing was predicted."""
    late_ms: float
    """The most that the load was behind its own schedule."""
    reasons: Sequence[str] = ()
    """Why requests failed, each once."""

    @property
    def goodput(self) -> float:
        """Requests per second that kept the promise."""
        return self.kept * self.offered_per_s


def point_of(answers: Sequence[Answer], span_s: float, promise: Promise, before: Samples, after: Samples) -> Point:
    """`span_s`: in which these were sent; `before` and `after`: the proxy's samples around them."""
    whole = [answer for answer in answers if not answer.error]
    ttft = sorted(answer.ttft_ms for answer in whole)
    gaps = sorted(gap for answer in whole for gap in answer.gaps_ms)
    means = [answer.itl_ms for answer in whole if answer.output_tokens > 1]
    return Point(
        requests=len(answers),
        failed=len(answers) - len(whole),
        offered_per_s=len(answers) / span_s if span_s else math.inf,
        kept=sum(map(promise.kept, answers)) / len(answers),
        ttft_p50_ms=quantile(ttft, 0.5),
        ttft_p90_ms=quantile(ttft, 0.9),
        itl_mean_ms=statistics.mean(means) if means else math.nan,
        itl_p99_ms=quantile(gaps, 0.99),
        hit_rate=sum(a.cached_tokens for a in whole) / max(1, sum(a.prompt_tokens for a in whole)),
        errors={model: median_error(before, after, model) for model in PREDICTED},
        late_ms=max(answer.late_ms for answer in answers),
        reasons=sorted({answer.error for answer in answers if answer.error}),
    )


def median_error(before: Samples, after: Samples, model: str) -> float:
    """Of `omni_proxy_prediction_error_ratio` between two scrapes, interpolated within its bucket; NaN: none came."""
    grown: list[tuple[float, float]] = []
    for (name, labels), count in after.items():
        of = dict(labels)
        if name == "omni_proxy_prediction_error_ratio_bucket" and of["model"] == model:
            grown.append((float(of["le"]), count - before.get((name, labels), 0.0)))
    grown.sort()
    if not grown or not grown[-1][1]:
        return math.nan
    half, low, passed = grown[-1][1] / 2, 0.0, 0.0
    for high, count in grown:
        if count >= half:
            return low if math.isinf(high) else low + (high - low) * (half - passed) / (count - passed)
        low, passed = high, count
    return math.nan

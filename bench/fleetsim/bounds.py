"""How far goodput could go at all: limits that no scheduler passes, from relaxations of the problem."""

from collections.abc import Sequence
from itertools import accumulate

from tracereplay.trace import BLOCK_TOKENS, Request, reusable

from fleetsim.constants import PREFILL
from fleetsim.slo import Promise

_WINDOWS_S = (10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)


def least_work_s(requests: Sequence[Request]) -> list[float]:
    """Prefill time of each, with one endless cache for all that holds every prompt as soon as it has arrived."""
    seen: set[bytes] = set()
    work_s = []
    for request in requests:
        cached = 0
        for key in request.keys[: reusable(request)]:
            if key not in seen:
                break
            cached += 1
        seen.update(request.keys)
        work_s.append(_prefill_s(request.input_tokens, cached * BLOCK_TOKENS))
    return work_s


def unreachable(requests: Sequence[Request], promise: Promise) -> float:
    """Share of requests whose prompt alone takes longer than was promised, on an idle engine with that cache."""
    pairs = zip(requests, least_work_s(requests), strict=True)
    return sum(work_s > _promised_s(request, promise) for request, work_s in pairs) / len(requests)


def most_kept(requests: Sequence[Request], promise: Promise, workers: int) -> float:
    """Share of requests that could keep the promised first token if `workers` engines were one that many times as fast.

    In every span of time all that arrives in it and is kept is computed before the span's end and the longest of their
    promises; so no more are kept than the shortest of them that fit. The span whose bound is least counts.
    """
    work_s = least_work_s(requests)
    return min(_most_in(requests, work_s, promise, workers, span_s) for span_s in _WINDOWS_S) / len(requests)


def _most_in(
    requests: Sequence[Request], work_s: Sequence[float], promise: Promise, workers: int, span_s: float
) -> int:
    spans: dict[int, list[float]] = {}
    longest_s: dict[int, float] = {}
    for request, work in zip(requests, work_s, strict=True):
        promised_s = _promised_s(request, promise)
        if work <= promised_s:
            span = int(request.at_s // span_s)
            spans.setdefault(span, []).append(work)
            longest_s[span] = max(longest_s.get(span, 0.0), promised_s)
    kept = 0
    for span, works in spans.items():
        room_s = workers * (span_s + longest_s[span])
        kept += sum(total_s <= room_s for total_s in accumulate(sorted(works)))
    return kept


def _promised_s(request: Request, promise: Promise) -> float:
    return promise.ttft_of(PREFILL.unloaded_s(request.input_tokens))


def _prefill_s(prompt_tokens: int, cached_tokens: int) -> float:
    """The base of a step is shared by as many tokens as it can hold."""
    model = PREFILL
    new, context = prompt_tokens - cached_tokens, (prompt_tokens + cached_tokens) / 2
    base_ms = model.prefill_base_ms * new / model.max_num_batched_tokens
    return (base_ms + model.prefill_token_ms * new + model.prefill_context_ms * new * context) / 1e3

"""Loops over workers that every choice runs, compiled by numba: for a small fleet numpy is mostly the cost of calls.

They read whole columns and pick the slots they are asked about; see `omni_proxy.scheduling.times` for what the features
mean. Where numba meets NaN it does as numpy does: comparisons are false.
"""

# mypy: disable-error-code="no-any-return"

import numpy as np

from omni_common.compiled import kernel
from omni_proxy.scheduling.columns import (
    CONTEXT_TOKENS,
    OTHERS_PREFILLS,
    OTHERS_SEQUENCES,
    OTHERS_UNCACHED_TOKENS,
    OWN_REQUESTS,
    OWN_UNCACHED_TOKENS,
    RUNNING,
    WAITING,
)
from omni_proxy.scheduling.view import Bools, Floats, Ints, Rows

LATE = 0.1
"""Share of the predicted work that is taken to be left at least, however long it has taken already."""
SEATS, KV_TOKENS, BATCHED_TOKENS = range(3)
"""Columns of `limits`; 0 where unknown."""


@kernel
def milliseconds(coefficients: Floats, rows: Rows | Ints, features: Floats, longest_ms: float) -> Floats:
    """Coefficients of rows[i] times features[i], from 0 to `longest_ms`; 0 for what is not a number."""
    result = np.empty(len(rows))
    for i in range(len(rows)):
        ms = 0.0
        for j in range(features.shape[1]):
            ms += coefficients[rows[i], j] * features[i, j]
        result[i] = min(ms, longest_ms) if ms > 0.0 else 0.0
    return result


@kernel
def remaining(
    ints: Ints,
    own_work: Floats,
    own_load_ms: Floats,
    busy_since_s: Floats,
    slots: Rows | Ints,
    total_ms: Floats,
    now_s: float,
) -> tuple[Floats, Floats]:
    """Prompt features of the work ahead, workers x 3, and milliseconds of its adapters.

    What passed since the first prompt began is taken off. `total_ms`: what own work and adapters take on each of
    `slots`.
    """
    work, load_ms = np.zeros((len(slots), 3)), np.zeros(len(slots))
    for i in range(len(slots)):
        slot = slots[i]
        if total_ms[i] > 0.0:
            left_ms = total_ms[i] - (now_s - busy_since_s[slot]) * 1e3
            share = max(left_ms, LATE * total_ms[i], -left_ms) / max(total_ms[i], 1e-9)
            for j in range(3):
                work[i, j] = own_work[slot, j] * share
            load_ms[i] = own_load_ms[slot] * share
        others = ints[OTHERS_UNCACHED_TOKENS, slot]
        # A prompt that decode computes alone is told by its tokens only.
        prompts = max(ints[OTHERS_PREFILLS, slot], 1 if others > 0 else 0)
        if prompts > 0:
            work[i, 0] += prompts
            work[i, 1] += others
            work[i, 2] += others * (others / prompts) / 2e3
    return work, load_ms


@kernel
def prompt_features(uncached: Ints, prompt_tokens: int) -> Floats:
    """Of a prompt of which each worker has to compute `uncached`; workers x 3."""
    features = np.empty((len(uncached), 3))
    for i in range(len(uncached)):
        new = float(uncached[i])
        features[i, 0] = 1.0
        features[i, 1] = new
        features[i, 2] = new * (prompt_tokens - uncached[i] + new / 2) / 1e3
    return features


@kernel
def step_features(ints: Ints, background: Floats, slots: Rows | Ints, prompt_tokens: int) -> Floats:
    """Of a decode step with one more sequence of `prompt_tokens`; workers x 4. `background`: prompts beside it."""
    features = np.empty((len(slots), 4))
    for i in range(len(slots)):
        slot = slots[i]
        batch = max(ints[RUNNING, slot], ints[OWN_REQUESTS, slot] + ints[OTHERS_SEQUENCES, slot])
        features[i, 0] = 1.0
        features[i, 1] = batch + 1
        features[i, 2] = (ints[CONTEXT_TOKENS, slot] + prompt_tokens) / 1e3
        features[i, 3] = background[slot]
    return features


@kernel
def answer_tokens(own_answers: Floats, slots: Rows | Ints, output_tokens: int) -> Floats:
    """Mean length of the answers on each worker, as expected of this proxy's; `output_tokens` where it has none."""
    result = np.full(len(slots), float(output_tokens))
    for i in range(len(slots)):
        answers = own_answers[slots[i], 0]
        if answers > 0.0:
            result[i] = own_answers[slots[i], 1] / answers
    return result


@kernel
def ends_to_seat(ints: Ints, kv_usage: Floats, limits: Ints, slots: Rows | Ints, tokens: int) -> Floats:
    """Share of the running sequences that end before each worker has a seat for one more of `tokens`; 0: it has one.

    More than 1 where as many again have to.
    """
    result = np.zeros(len(slots))
    for i in range(len(slots)):
        slot = slots[i]
        seats, kv_tokens, running = limits[slot, SEATS], limits[slot, KV_TOKENS], ints[RUNNING, slot]
        own = ints[OWN_REQUESTS, slot] + ints[OTHERS_SEQUENCES, slot]
        sequences = max(running + ints[WAITING, slot], own)
        if seats > 0:
            # Reports are late: of those sent since, as many run as there are seats.
            running = max(running, min(sequences, seats))
        running = max(running, 1)
        ends = 0.0
        if seats > 0:
            ends = max(ends, float(sequences + 1 - seats))
        if kv_tokens > 0:
            ends = max(ends, (kv_usage[slot] + tokens / kv_tokens - 1.0) * running)
        result[i] = ends / running
    return result


@kernel
def begins_in_a_step(ints: Ints, limits: Ints, slots: Rows | Ints, uncached_tokens: int, step_share: float) -> bool:
    """Some worker has no prompt ahead, or those ahead and this one fill but a share of one of its steps."""
    for i in range(len(slots)):
        slot = slots[i]
        ahead = ints[OWN_UNCACHED_TOKENS, slot] + ints[OTHERS_UNCACHED_TOKENS, slot]
        if ahead == 0 or ahead + uncached_tokens <= step_share * limits[slot, BATCHED_TOKENS]:
            return True
    return False


@kernel
def transfer_features(
    pair_rows: Ints, connector_rows: Ints, prefills: Rows | Ints, decodes: Rows | Ints, uncached: Ints
) -> tuple[Ints, Floats]:
    """Rows and features of the transfer model for every pair of slots, one line per pair.

    `uncached`: what each decode worker does not have yet.
    """
    rows = np.empty(len(prefills) * len(decodes), np.int64)
    features = np.empty((len(rows), 2))
    at = 0
    for p in prefills:
        for j in range(len(decodes)):
            row = pair_rows[p, decodes[j]]
            rows[at] = row if row >= 0 else connector_rows[p]
            features[at, 0] = 1.0
            features[at, 1] = uncached[j] / 1e3
            at += 1
    return rows, features


@kernel
def decode_costs(
    step_ms: Floats,
    seat_ms: Floats,
    rows: Rows,
    horizon_tokens: float,
    alike: float,
    itl_slo_ms: float,
    too_slow: float,
) -> tuple[Floats, Floats]:
    """Of each of `rows`: until its seat and of so many steps; `too_slow` where its steps break the SLO.

    Steps longer than the shortest by no more than a share count as long as it. No SLO is an infinite one.
    """
    after_ms, penalty = np.empty(len(rows)), np.zeros(len(rows))
    shortest_ms = np.inf
    for row in rows:
        shortest_ms = min(shortest_ms, step_ms[row])
    for i in range(len(rows)):
        step = step_ms[rows[i]]
        counted_ms = shortest_ms if step <= (1.0 + alike) * shortest_ms else step
        after_ms[i] = seat_ms[rows[i]] + horizon_tokens * counted_ms
        if step > itl_slo_ms:
            penalty[i] = too_slow
    return after_ms, penalty


@kernel
def cheapest_pair(first_ms: Floats, rest_ms: Floats, transfer_ms: Floats, can_pair: Bools) -> tuple[int, Floats]:
    """Position of the prefill worker of the cheapest pair, and of each the cost of its cheapest pair.

    `first_ms`: of each prefill worker; `rest_ms`: of each decode worker, after the transfer.
    """
    best, least = 0, np.empty(len(first_ms))
    for p in range(len(first_ms)):
        least[p] = np.inf
        for d in range(len(rest_ms)):
            if can_pair[p, d]:
                least[p] = min(least[p], first_ms[p] + (transfer_ms[p, d] + rest_ms[d]))
        if least[p] < least[best]:
            best = p
    return best, least


@kernel
def freest(
    cost: Floats,
    known_ms: Floats,
    learned_ms: Floats,
    alike: float,
    rows: Rows,
    cached: Ints,
    own: Ints,
    others: Ints,
    dispatched: Ints,
) -> int:
    """Position of the cheapest of `rows`, or of one that cannot be told from it with fewer sequences, then legs ever.

    Those are whoever waits no longer, has as much of the prompt, and whose learned time is longer by no more than a
    share. `cached` and what follows it are of all workers.
    """
    best = 0
    for i in range(len(rows)):
        if cost[i] < cost[best]:
            best = i
    chosen = best
    for i in range(len(rows)):
        row, at = rows[i], rows[chosen]
        is_alike = (
            cost[i] < np.inf
            and known_ms[i] <= known_ms[best]
            and cached[row] >= cached[rows[best]]
            and learned_ms[i] <= (1.0 + alike) * learned_ms[best]
        )
        more = own[row] + others[row] - own[at] - others[at]
        if is_alike and (more < 0 or (more == 0 and dispatched[row] < dispatched[at])):
            chosen = i
    return chosen

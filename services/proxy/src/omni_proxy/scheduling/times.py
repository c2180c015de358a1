"""How long workers take, learned from what their answers and stats say. All times in milliseconds.

    prompt    1, new, new * context / 1000                 new: uncached tokens; context: what they attend to on average
    step      1, batch, context / 1000, prompt tokens      of one decode step; prompt tokens computed beside it
    transfer  1, tokens / 1000                             of one pair; one not seen yet is like its connector's others

A prompt's time is observed from its arrival at the worker to its end there, against the prompts ahead of it and its
own: whatever the worker's batching, in a queue served in order the sum of the work is what passes. What it takes to
bring adapters into slots, as workers tell it, is taken off before and added to what is predicted.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from omni_proxy.scheduling import kernels
from omni_proxy.scheduling.columns import Columns
from omni_proxy.scheduling.interfaces import Predictor
from omni_proxy.scheduling.linear import LinearModel
from omni_proxy.scheduling.predictors import MakePredictor
from omni_proxy.scheduling.view import Bools, Floats, Ints, Rows

_STEP_BACKGROUND = 0.1
"""Smoothing of the prompt tokens that a worker computes beside a decode step."""
_IDLE_BACKGROUND = 0.5
"""What is left of it with each report of a worker that has nothing to do; these come once a second."""
_PACE = 0.95
"""Share of the inter-token SLO up to which a worker gets more sequences: those that run grow until they end."""
_TELLS = frozenset({1, 8, 32, 128, 512})
"""Observations of a worker after which others of its kind hear of it."""
_FAR_SLOWER, _DOUBT, _DOUBT_EVERY_S = 2.0, 0.8, 1.0
"""An idle worker that is believed to be so many times slower than its kind gets quicker by this factor, so often."""
_USUAL_STEP = np.array([1.0, 8.0, 8.0, 0.0])
_STRANGER_MS = 1000.0
"""So long a worker is not free at its first prompt if nothing is known of its kind: a prior may be off by any factor,
and what is sent behind a prompt that takes ten times as long as believed waits for all of it."""


def prompt_features(uncached_tokens: float, cached_tokens: int) -> Floats:
    new = float(uncached_tokens)
    return np.array([1.0, new, new * (cached_tokens + new / 2) / 1e3])


_USUAL_PROMPT = prompt_features(1000, 0)


@dataclass(frozen=True, slots=True)
class Priors:
    """Coefficients believed of a worker that nobody like has been seen of. Wrong ones are unlearned within some dozen
    answers; see the module for the features."""

    prompt: tuple[float, float, float] = (10.0, 0.1, 0.001)
    step: tuple[float, float, float, float] = (15.0, 0.2, 0.05, 0.1)
    transfer: tuple[float, float] = (3.0, 3.0)


@dataclass(frozen=True, slots=True)
class Capacity:
    """Of one worker; 0 where unknown."""

    kind: str
    """Workers of one kind start from what is known of the others of it."""
    connector: str = ""
    max_num_seqs: int = 0
    kv_tokens: int = 0
    max_batched_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Seen:
    """A prediction beside what came."""

    predicted_ms: float
    seen_ms: float

    @property
    def error(self) -> float:
        """Relative to what was seen."""
        return abs(self.predicted_ms - self.seen_ms) / self.seen_ms if self.seen_ms > 0 else 0.0


class WorkerTimes:
    """Owns the models; workers are named by their slot in the columns."""

    def __init__(self, columns: Columns, priors: Priors | None = None, make: MakePredictor = LinearModel) -> None:
        self._columns = columns
        self._priors = priors or Priors()
        self._prompt = make(3)
        self._step = make(4)
        self._transfer = make(2)
        self._known: dict[int, Capacity] = {}
        """By slot."""
        self._prompts_seen: set[int] = set()
        """Slots of workers of which prompts were seen, in an earlier epoch perhaps."""
        self._steps_seen: set[int] = set()
        self._strangers: set[int] = set()
        """Slots of workers of whose prompts nothing but a prior is known."""
        self._connectors: dict[str, int] = {}
        self._prompt_rows = np.zeros(0, np.int64)
        self._step_rows = np.zeros(0, np.int64)
        self._pair_rows = np.zeros((0, 0), np.int64)
        """Of the transfer model, by the slots of prefill and decode; -1: not seen."""
        self._connector_rows = np.zeros(0, np.int64)
        """Of the transfer model, for pairs not seen, by the slot of prefill."""
        self._limits = np.zeros((0, 3), np.int64)
        self._background = np.zeros(0)
        self._idle_s: dict[int, float] = {}
        """Since when an idle worker's times were last looked at, by slot."""

    def join(self, slot: int, capacity: Capacity) -> None:
        """A worker, or the next epoch of one, of which more is known than of a stranger."""
        known = self._known.get(slot)
        self._fit(slot)
        if known is not None and known.kind == capacity.kind:
            self._prompt.restart(int(self._prompt_rows[slot]))
            self._step.restart(int(self._step_rows[slot]))
        else:
            self.leave(slot)
            alike = self._alike(capacity.kind)
            if alike.isdisjoint(self._prompts_seen):
                self._strangers.add(slot)
            prompts_seen, steps_seen = alike & self._prompts_seen, alike & self._steps_seen
            self._prompt_rows[slot] = _newcomer(self._prompt, self._prompt_rows, prompts_seen, self._priors.prompt)
            self._step_rows[slot] = _newcomer(self._step, self._step_rows, steps_seen, self._priors.step)
        self._known[slot] = capacity
        self._limits[slot] = capacity.max_num_seqs, capacity.kv_tokens, capacity.max_batched_tokens
        self._connector_rows[slot] = self._general(capacity.connector)
        self._background[slot] = 0.0

    def leave(self, slot: int) -> None:
        if self._known.pop(slot, None) is None:
            return
        self._prompts_seen.discard(slot)
        self._strangers.discard(slot)
        self._idle_s.pop(slot, None)
        self._steps_seen.discard(slot)
        self._prompt.remove(int(self._prompt_rows[slot]))
        self._step.remove(int(self._step_rows[slot]))
        for rows in (self._pair_rows[slot], self._pair_rows[:, slot]):
            for row in rows[rows >= 0]:
                self._transfer.remove(int(row))
            rows[:] = -1

    def work_ahead(self, slot: int, now_s: float) -> tuple[Floats, float]:
        """Features of what the worker has to compute before a prompt that is sent now; milliseconds of its adapters."""
        work, load_ms = self._remaining(np.array([slot]), now_s)
        return work[0], float(load_ms[0])

    def saw_prompt(self, slot: int, work: Floats, seen_ms: float, loads_ms: float = 0.0) -> Seen | None:
        """`work`: of what was ahead when the prompt was sent, and of itself; `loads_ms`: of the adapters of both."""
        known = self._known.get(slot)
        if known is None:
            return None
        self._prompts_seen.add(slot)
        self._strangers.discard(slot)
        row = int(self._prompt_rows[slot])
        # Bringing an adapter in is no prompt's work, and whether it was as long as believed cannot be told.
        seen = Seen(self._prompt.observe(row, work, seen_ms - loads_ms) + loads_ms, seen_ms)
        if self._prompt.counts(np.array([row]))[0] in _TELLS:
            self._tell(known.kind, self._prompt, self._prompt_rows, self._prompts_seen)
            self._strangers -= self._alike(known.kind)
        return seen

    def heard_of_prompts(self, slot: int, prompts: int, tokens: int, busy_ms: float) -> None:
        """What a worker that nothing was seen of says of its life: its mean prompt counts as seen.

        So who comes anew to a running fleet need not send it prompts to learn what they take.
        """
        if slot not in self._prompts_seen:
            self.saw_prompt(slot, prompt_features(tokens / prompts, 0), busy_ms / prompts)

    def saw_transfer(self, prefill: int, decode: int, tokens: int, seen_ms: float) -> Seen | None:
        known = self._known.get(prefill)
        if known is None or decode not in self._known or tokens <= 0:
            return None
        general = self._general(known.connector)
        features = np.array([1.0, tokens / 1e3])
        row = int(self._pair_rows[prefill, decode])
        if row < 0:
            row = self._transfer.add(self._transfer.typical(np.array([general])))
            self._pair_rows[prefill, decode] = row
        self._transfer.observe(general, features, seen_ms)
        return Seen(self._transfer.observe(row, features, seen_ms), seen_ms)

    def saw_steps(self, slot: int, batch: float, context_tokens: float, prompt_tokens: float, ms: float) -> Seen | None:
        """The mean of some steps: sequences, their tokens, prompt tokens computed beside them."""
        known = self._known.get(slot)
        if known is None:
            return None
        self._background[slot] += _STEP_BACKGROUND * (prompt_tokens - self._background[slot])
        features = np.array([1.0, batch, context_tokens / 1e3, prompt_tokens])
        self._steps_seen.add(slot)
        row = int(self._step_rows[slot])
        seen = Seen(self._step.observe(row, features, ms), ms)
        if self._step.counts(np.array([row]))[0] in _TELLS:
            self._tell(known.kind, self._step, self._step_rows, self._steps_seen)
        return seen

    def saw_idle(self, slot: int, now_s: float) -> None:
        """A worker has nothing to do: fewer prompts than lately are to be expected beside its steps.

        Else one whose last steps held prompts would look slow for as long as that keeps work from it. One that is
        believed to be far slower than others of its kind is believed so less and less, for the same reason.
        """
        known = self._known.get(slot)
        if known is None:
            return
        self._background[slot] *= _IDLE_BACKGROUND
        if self._columns.own_requests[slot]:
            self._idle_s.pop(slot, None)
            return
        if now_s - self._idle_s.setdefault(slot, now_s) < _DOUBT_EVERY_S:
            return
        self._idle_s[slot] = now_s
        others = self._alike(known.kind) - {slot}
        self._doubt(self._prompt, self._prompt_rows, slot, others & self._prompts_seen, _USUAL_PROMPT)
        self._doubt(self._step, self._step_rows, slot, others & self._steps_seen, _USUAL_STEP)

    def _doubt(self, model: Predictor, rows: Ints, slot: int, others: set[int], usual: Floats) -> None:
        if not others:
            return
        own, usual_ms = model.typical(rows[[slot]]), float(model.typical(rows[list(others)]) @ usual)
        if (own_ms := float(own @ usual)) > _FAR_SLOWER * usual_ms:
            model.remove(int(rows[slot]))
            rows[slot] = _like(model, own * max(_DOUBT, _FAR_SLOWER * usual_ms / own_ms))

    def backlog_ms(self, slots: Rows | Ints, now_s: float) -> Floats:
        """Until what is in flight to each worker is computed."""
        work, load_ms = self._remaining(slots, now_s)
        return self._prompt.milliseconds(self._prompt_rows[slots], work) + load_ms

    def free_in_ms(self, slots: Rows | Ints, now_s: float) -> Floats:
        """Until each worker should get more: `backlog_ms`, but a stranger's first prompt is waited for."""
        ms = self.backlog_ms(slots, now_s)
        if self._strangers:
            is_busy = (self._columns.own_prefills + self._columns.others_prefills)[slots] > 0
            is_strange = np.isin(slots, list(self._strangers))
            ms = np.where(is_strange & is_busy, np.maximum(ms, _STRANGER_MS), ms)
        return ms

    def most_sequences(self, slots: Rows) -> Ints:
        """Seats of each worker; 0: unknown."""
        seats: Ints = self._limits[slots, kernels.SEATS]
        return seats

    def sequences(self, slots: Rows) -> Ints:
        """On each worker: as it last said, or as own legs and others' tell where that is more."""
        columns = self._columns
        told = columns.running[slots] + columns.waiting[slots]
        more: Ints = np.maximum(told, columns.own_requests[slots] + columns.others_sequences[slots])
        return more

    def have_seats(self, slots: Rows, tokens: int) -> Bools:
        """Whether each worker's batch and cache have room for one more sequence of so many tokens."""
        return self._ends_to_seat(slots, tokens) <= 0.0

    def steps_to_seat(self, slots: Rows, tokens: int, output_tokens: int) -> Floats:
        """Until each worker has room for one more sequence of so many tokens, `output_tokens` of them its answer.

        A sequence ends every (answer / running) steps, where the answers are those of the sequences that are there.
        """
        return self._ends_to_seat(slots, tokens) * self._answer_tokens(slots, output_tokens)

    def pace_ms(self, slots: Rows, tokens: int, output_tokens: int, coming: float, itl_slo_ms: float) -> Floats:
        """Until each worker keeps the SLO with one more sequence of so many prompt tokens; 0 where it does.

        `coming`: sequences like it on their way to each. A worker without any, or one whose steps would break the SLO
        for the sequence alone, is not waited for.
        """
        limit_ms = _PACE * itl_slo_ms
        features = kernels.step_features(self._columns.ints, self._background, slots, tokens)
        features[:, 1] += coming
        features[:, 2] += coming * tokens / 1e3
        alone = np.zeros_like(features)
        alone[:, :3] = 1.0, 1.0, tokens / 1e3
        step_ms, alone_ms = (self._step.milliseconds(self._step_rows[slots], f) for f in (features, alone))
        is_late = (step_ms > limit_ms) & (alone_ms <= limit_ms) & (features[:, 1] > 1.0)
        # So large a share of the others has to end, and one ends every (their answers / others) steps.
        share = np.minimum((step_ms - limit_ms) / np.maximum(step_ms - alone_ms, 1e-9), 1.0)
        return np.where(is_late, share * self._answer_tokens(slots, output_tokens) * step_ms, 0.0)

    def begins_in_a_step(self, slots: Rows, uncached_tokens: int, step_share: float) -> bool:
        """Some worker has no prompt ahead, or those ahead and this one fill but a share of one of its steps."""
        return kernels.begins_in_a_step(self._columns.ints, self._limits, slots, uncached_tokens, step_share)

    def of(self, slots: Rows, now_s: float, prompt_tokens: int, output_tokens: int, uncached: Ints) -> "RequestTimes":
        """Of one request on each of these workers."""
        return RequestTimes(self, slots, now_s, prompt_tokens, output_tokens, uncached)

    def confidence(self) -> Mapping[str, float]:
        """Of each model over all workers, [0, 1]."""
        slots = list(self._known)
        rows = {
            "prefill": (self._prompt, self._prompt_rows[slots].tolist()),
            "step": (self._step, self._step_rows[slots].tolist()),
            "transfer": (self._transfer, list(self._connectors.values())),
        }
        return {name: float(model.confidence(np.array(of)).mean()) if of else 0.0 for name, (model, of) in rows.items()}

    def _remaining(self, slots: Rows | Ints, now_s: float) -> tuple[Floats, Floats]:
        """Features of the work ahead and milliseconds of its adapters, less what passed since the first began."""
        columns = self._columns
        total_ms = self._prompt.milliseconds(self._prompt_rows[slots], columns.own_work[slots])
        total_ms = total_ms + columns.own_load_ms[slots]
        return kernels.remaining(
            columns.ints, columns.own_work, columns.own_load_ms, columns.busy_since_s, slots, total_ms, now_s
        )

    def _ends_to_seat(self, slots: Rows, tokens: int) -> Floats:
        columns = self._columns
        return kernels.ends_to_seat(columns.ints, columns.kv_usage, self._limits, slots, tokens)

    def _answer_tokens(self, slots: Rows, output_tokens: int) -> Floats:
        return kernels.answer_tokens(self._columns.own_answers, slots, output_tokens)

    def _alike(self, kind: str) -> set[int]:
        """Slots of the workers of a kind."""
        return {slot for slot, capacity in self._known.items() if capacity.kind == kind}

    def _tell(self, kind: str, model: Predictor, rows: Ints, seen: set[int]) -> None:
        """Workers of a kind that the model has not seen start from what was learned of the others.

        Else one that is only believed slow would get no work, and never show what it can.
        """
        alike = self._alike(kind)
        typical = model.typical(rows[list(alike & seen)])
        for slot in alike - seen:
            model.remove(int(rows[slot]))
            rows[slot] = _like(model, typical)

    def _general(self, connector: str) -> int:
        row = self._connectors.get(connector)
        if row is None:
            row = self._connectors[connector] = self._transfer.add(np.array(self._priors.transfer))
        return row

    def _fit(self, slot: int) -> None:
        """Room for the slot; at least twice what there was."""
        size = len(self._prompt_rows)
        if slot < size:
            return
        more = max(slot + 1 - size, size)
        self._prompt_rows = np.pad(self._prompt_rows, (0, more))
        self._step_rows = np.pad(self._step_rows, (0, more))
        self._connector_rows = np.pad(self._connector_rows, (0, more))
        self._pair_rows = np.pad(self._pair_rows, (0, more), constant_values=-1)
        self._limits = np.pad(self._limits, ((0, more), (0, 0)))
        self._background = np.pad(self._background, (0, more))


class _once:
    """A property computed when first asked for; `functools.cached_property` takes a lock for it before Python 3.12."""

    def __init__(self, compute: "Callable[[RequestTimes], Floats]") -> None:
        self._compute = compute
        self._name = compute.__name__

    def __get__(self, times: "RequestTimes", kind: type) -> Floats:
        value = times.__dict__[self._name] = self._compute(times)
        return value


class RequestTimes:
    """One request on some workers, each figure computed when first asked for. The `Times` of a view."""

    def __init__(
        self, times: WorkerTimes, slots: Rows, now_s: float, prompt_tokens: int, output_tokens: int, uncached: Ints
    ) -> None:
        self._times = times
        self._slots = slots
        self._now_s = now_s
        self._prompt_tokens = prompt_tokens
        self._output_tokens = output_tokens
        self._uncached = uncached

    @_once
    def queue_ms(self) -> Floats:
        return self._times.backlog_ms(self._slots, self._now_s)

    @_once
    def prefill_ms(self) -> Floats:
        return self._prompt_ms(self._uncached)

    @_once
    def step_ms(self) -> Floats:
        times, slots = self._times, self._slots
        features = kernels.step_features(times._columns.ints, times._background, slots, self._prompt_tokens)
        return times._step.milliseconds(times._step_rows[slots], features)

    @_once
    def stall_ms(self) -> Floats:
        most = self._times._limits[self._slots, kernels.BATCHED_TOKENS]
        chunk = np.where(most > 0, np.minimum(self._uncached, most), self._uncached)
        return self.step_ms + self._prompt_ms(chunk)

    @_once
    def seat_ms(self) -> Floats:
        tokens = self._prompt_tokens + self._output_tokens
        return self._times.steps_to_seat(self._slots, tokens, self._output_tokens) * self.step_ms

    @_once
    def confidence(self) -> Floats:
        return self._times._prompt.confidence(self._times._prompt_rows[self._slots])

    def transfer_ms(self, prefills: Rows, decodes: Rows) -> Floats:
        times, slots = self._times, self._slots
        rows, features = kernels.transfer_features(
            times._pair_rows, times._connector_rows, slots[prefills], slots[decodes], self._uncached[decodes]
        )
        return times._transfer.milliseconds(rows, features).reshape(len(prefills), len(decodes))

    def _prompt_ms(self, new: Ints) -> Floats:
        """Computing so many tokens of the prompt behind all the others."""
        times, features = self._times, kernels.prompt_features(new, self._prompt_tokens)
        return times._prompt.milliseconds(times._prompt_rows[self._slots], features)


def _newcomer(model: Predictor, rows: Ints, alike: Collection[int], fallback: Sequence[float]) -> int:
    """Its row: like what is typical of those alike that were seen, by slot."""
    return _like(model, model.typical(rows[list(alike)])) if alike else model.add(np.array(fallback, np.float64))


def _like(model: Predictor, coefficients: Floats) -> int:
    """A row of which as much is known as of a worker that started anew.

    Its first time may have met a compiler or a pause; one that nothing is known of would take it at its word.
    """
    row = model.add(coefficients)
    model.restart(row)
    return row

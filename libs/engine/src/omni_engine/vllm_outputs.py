"""What vLLM's engine core reports each step, sorted by who waits for it. Pure bookkeeping, no I/O."""

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from omni_engine import ports
from omni_engine.adapters import AdapterSlots, AdapterTurns
from omni_engine.ports import EngineStats, FinishReason, Logprobs, SequenceOutput, SequenceStart, StepSink, Timings

_REASONS = {
    "stop": FinishReason.STOP,
    "length": FinishReason.LENGTH,
    "abort": FinishReason.ABORT,
    "error": FinishReason.ERROR,
    "repetition": FinishReason.STOP,
}
_STEP_SMOOTHING = 0.1
_IDLE_GAP_S = 1.0


@dataclass(slots=True)
class PendingPrefill:
    """A prompt being computed; `done` gets vLLM's only output for it. `core_id` is vLLM's name of it.

    `kept_out` is vLLM's request, as long as it waits for its adapter's turn.
    """

    core_id: str
    request_id: str
    believed_tokens: int
    submitted_s: float
    done: asyncio.Future[tuple[Any, float]]
    adapter: str = ""
    kept_out: Any = None


@dataclass(slots=True)
class RunningSequence:
    """`num_tokens` were submitted, `believed_tokens` of them count as queued until the first token.

    `kept_out` is vLLM's request, as long as it waits for its adapter's turn.
    """

    core_id: str
    request_id: str
    num_tokens: int
    believed_tokens: int
    submitted_s: float
    sink: StepSink
    expects_pull: bool
    adapter: str = ""
    queued_s: float = 0.0
    scheduled_s: float = 0.0
    generated: int = 0
    cached_tokens: int = 0
    pulled_tokens: int = 0
    has_started: bool = False
    kept_out: Any = None


@dataclass(slots=True)
class Tracker:
    """Work in flight by vLLM's request id, and the counters `EngineStats` is read from."""

    slots: AdapterSlots = field(default_factory=AdapterSlots)
    turns: AdapterTurns[str] = field(default_factory=AdapterTurns)
    prefills: dict[str, PendingPrefill] = field(default_factory=dict)
    sequences: dict[str, RunningSequence] = field(default_factory=dict)
    queued_tokens: int = 0
    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    step_ms: float = 0.0
    generated_tokens: int = 0
    computed_prompt_tokens: int = 0
    context_tokens: int = 0
    steps: float = 0.0
    busy_s: float = 0.0
    drafts: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    accepted_by_position: list[int] = field(default_factory=list)
    _cores: dict[int, tuple[int, int, float]] = field(default_factory=dict)
    _last_step_s: dict[int, float] = field(default_factory=dict)
    _is_busy: bool = False

    def add(self, work: PendingPrefill | RunningSequence, request: Any = None) -> bool:
        """Whether vLLM may have the request now; if not, `admitted` gives it later."""
        self.queued_tokens += work.believed_tokens
        self.slots.enter(work.adapter)
        may_go = self.turns.comes(work.core_id, work.adapter, work.submitted_s)
        work.kept_out = None if may_go else request
        if isinstance(work, PendingPrefill):
            self.prefills[work.core_id] = work
        else:
            self.sequences[work.core_id] = work
        return may_go

    def admitted(self, now_s: float) -> Iterator[Any]:
        """Requests whose adapter's turn has come, for vLLM to have now; not those dropped while earlier ones went."""
        for core_id in self.turns.admitted(now_s):
            work = self.prefills.get(core_id) or self.sequences.get(core_id)
            if work is not None:
                request, work.kept_out = work.kept_out, None
                yield request

    def drop(self, core_id: str) -> PendingPrefill | RunningSequence | None:
        """Forget work that will give no further output."""
        work = self.prefills.pop(core_id, None) or self.sequences.pop(core_id, None)
        if work is not None:
            self.slots.leave(work.adapter)
            self.turns.leaves(core_id)
        if isinstance(work, RunningSequence) and work.has_started:
            self.context_tokens -= work.num_tokens + work.generated
        elif work is not None:
            self.queued_tokens -= work.believed_tokens
        self._is_busy &= self.has_work
        return work

    def core_ids(self, request_ids: Sequence[str]) -> list[str]:
        wanted = frozenset(request_ids)
        return [
            w.core_id for table in (self.prefills, self.sequences) for w in table.values() if w.request_id in wanted
        ]

    def step(self, outputs: Any) -> list[Any]:
        """Take one step's outputs: wake prefills, call each sink once. Returns outputs nobody waits for."""
        self._count(outputs)
        unclaimed: list[Any] = []
        by_sink: dict[StepSink, list[SequenceOutput]] = {}
        for output in outputs.outputs:
            if (sequence := self.sequences.get(output.request_id)) is not None:
                by_sink.setdefault(sequence.sink, []).append(self._advance(sequence, output, outputs.timestamp))
            elif not self._finish_prefill(output, outputs.timestamp):
                unclaimed.append(output)
        self._is_busy = self.has_work
        for sink, batch in by_sink.items():
            sink(batch)
        return unclaimed

    def fail_all(self, detail: str) -> None:
        """The engine is dead: end everything."""
        by_sink: dict[StepSink, list[SequenceOutput]] = {}
        for sequence in self.sequences.values():
            by_sink.setdefault(sequence.sink, []).append(
                SequenceOutput(sequence.request_id, (), finish_reason=FinishReason.ERROR, detail=detail)
            )
        for prefill in self.prefills.values():
            prefill.done.cancel()
        self.sequences.clear()
        self.prefills.clear()
        self.turns = AdapterTurns()
        self.queued_tokens = self.context_tokens = self.running = self.waiting = 0
        self._is_busy = False
        for sink, batch in by_sink.items():
            sink(batch)

    def stats(self, leases: int) -> EngineStats:
        return EngineStats(
            running=self.running,
            waiting=self.waiting + self.turns.kept_out,
            queued_tokens=self.queued_tokens,
            kv_usage=self.kv_usage,
            leases=leases,
            step_ms=self.step_ms,
            generated_tokens=self.generated_tokens,
            computed_prompt_tokens=self.computed_prompt_tokens,
            context_tokens=self.context_tokens,
            steps=round(self.steps),
            busy_ms=self.busy_s * 1e3,
            drafts=self.drafts,
            drafted_tokens=self.drafted_tokens,
            accepted_tokens=self.accepted_tokens,
            accepted_by_position=tuple(self.accepted_by_position),
            adapters=self.slots.names,
        )

    def _count(self, outputs: Any) -> None:
        """Data-parallel engine cores report one by one; their counts add up, their caches are of one size."""
        if (stats := outputs.scheduler_stats) is not None:
            waiting = stats.num_waiting_reqs + getattr(stats, "num_skipped_waiting_reqs", 0)
            self._cores[outputs.engine_index] = (stats.num_running_reqs, waiting, stats.kv_cache_usage)
            running, queues, usages = zip(*self._cores.values(), strict=True)
            self.running, self.waiting = sum(running), sum(queues)
            self.kv_usage = sum(usages) / len(usages)
            self._count_drafts(getattr(stats, "spec_decoding_stats", None))
        lengths = [len(output.new_token_ids) for output in outputs.outputs if output.new_token_ids]
        self._time_step(outputs.engine_index, outputs.timestamp, sum(lengths) / len(lengths) if lengths else 0.0)

    def _count_drafts(self, stats: Any) -> None:
        """vLLM's counts of one step; None where nothing was drafted."""
        if stats is None:
            return
        self.drafts += stats.num_drafts
        self.drafted_tokens += stats.num_draft_tokens
        self.accepted_tokens += stats.num_accepted_tokens
        accepted = stats.num_accepted_tokens_per_pos
        self.accepted_by_position += [0] * (len(accepted) - len(self.accepted_by_position))
        for position, count in enumerate(accepted):
            self.accepted_by_position[position] += count

    def _time_step(self, core: int, timestamp_s: float, tokens_each: float) -> None:
        """vLLM reports every step at its end; one that followed another without a pause began when that ended.

        `tokens_each` is what a sequence got of it, 0 of a step without tokens.
        """
        step_s = timestamp_s - self._last_step_s.get(core, 0.0)
        if tokens_each and self._is_busy and 0 < step_s < _IDLE_GAP_S:
            self.step_ms += _STEP_SMOOTHING * (step_s * 1e3 / tokens_each - self.step_ms)
            self.steps += tokens_each
            self.busy_s += step_s
        self._last_step_s[core] = timestamp_s

    @property
    def has_work(self) -> bool:
        return bool(self.prefills or self.sequences)

    def _finish_prefill(self, output: Any, timestamp_s: float) -> bool:
        """False if nobody waits for it: its caller may have been cancelled in this very pass of the event loop."""
        prefill = self.prefills.pop(output.request_id, None)
        if prefill is None:
            return False
        self.queued_tokens -= prefill.believed_tokens
        self.slots.leave(prefill.adapter)
        self.turns.begins(prefill.core_id, timestamp_s)
        self.turns.leaves(prefill.core_id)
        self.generated_tokens += len(output.new_token_ids)
        if (stats := output.prefill_stats) is not None:
            self.computed_prompt_tokens += stats.num_computed_tokens
        if prefill.done.done():
            return False
        prefill.done.set_result((output, timestamp_s))
        return True

    def _advance(self, sequence: RunningSequence, output: Any, timestamp_s: float) -> SequenceOutput:
        _note_events(sequence, output)
        tokens = output.new_token_ids
        self.generated_tokens += len(tokens)
        result = SequenceOutput(sequence.request_id, tokens)
        if tokens and not sequence.has_started:
            sequence.has_started = True
            self.turns.begins(sequence.core_id, timestamp_s)
            self.queued_tokens -= sequence.believed_tokens
            self.context_tokens += sequence.num_tokens
            result.start = _start(sequence, timestamp_s)
            self.computed_prompt_tokens += sequence.num_tokens - sequence.cached_tokens - result.start.pulled_tokens
        sequence.generated += len(tokens)
        if sequence.has_started:
            self.context_tokens += len(tokens)
        if output.new_logprobs is not None:
            result.logprobs = logprobs_of(output.new_logprobs)
        if output.finish_reason is not None:
            result.finish_reason = _REASONS[str(output.finish_reason)]
            self.drop(sequence.core_id)
        return result


def logprobs_of(lists: Any) -> Logprobs:
    """vLLM's arrays (tokens, 1 + n) as flat lists, the sampled token first in each row."""
    return Logprobs(
        width=lists.logprob_token_ids.shape[1],
        token_ids=lists.logprob_token_ids.ravel().tolist(),
        logprobs=lists.logprobs.ravel().tolist(),
        sampled_ranks=lists.sampled_token_ranks.ravel().tolist(),
    )


def finish_reason_of(output: Any) -> ports.FinishReason | None:
    return None if output.finish_reason is None else _REASONS[str(output.finish_reason)]


def prefill_timings(output: Any, submitted_s: float, timestamp_s: float) -> Timings:
    """Queue until first scheduled, compute until the output; both on the machine's monotonic clock."""
    scheduled_s = next((e.timestamp for e in output.events or () if e.type.name == "SCHEDULED"), submitted_s)
    return Timings(
        queue_ms=max(0.0, scheduled_s - submitted_s) * 1e3,
        compute_ms=max(0.0, timestamp_s - scheduled_s) * 1e3,
        total_ms=max(0.0, timestamp_s - submitted_s) * 1e3,
    )


def _note_events(sequence: RunningSequence, output: Any) -> None:
    for event in output.events or ():
        if event.type.name == "QUEUED":
            sequence.queued_s = event.timestamp
        elif event.type.name == "SCHEDULED":
            sequence.scheduled_s = event.timestamp
    if (stats := output.prefill_stats) is not None:
        sequence.cached_tokens = stats.num_local_cached_tokens
        sequence.pulled_tokens = stats.num_external_cached_tokens


def _start(sequence: RunningSequence, timestamp_s: float) -> SequenceStart:
    scheduled_s = sequence.scheduled_s or sequence.submitted_s
    waited_ms = max(0.0, scheduled_s - sequence.submitted_s) * 1e3
    was_pulled = sequence.pulled_tokens > 0
    timings = Timings(
        queue_ms=0.0 if was_pulled else waited_ms,
        transfer_ms=waited_ms if was_pulled else 0.0,
        compute_ms=max(0.0, timestamp_s - scheduled_s) * 1e3,
        total_ms=max(0.0, timestamp_s - sequence.submitted_s) * 1e3,
    )
    # All of the prompt may be in the local cache; then nothing had to be pulled and nothing failed.
    is_covered = sequence.pulled_tokens + sequence.cached_tokens >= sequence.num_tokens - 1
    return SequenceStart(
        cached_tokens=sequence.cached_tokens,
        pulled_tokens=sequence.pulled_tokens,
        fell_back=sequence.expects_pull and not is_covered,
        timings=timings,
    )

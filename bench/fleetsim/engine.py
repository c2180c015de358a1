"""One simulated engine: chunked continuous batching over a prefix cache, as `omni_engine.sim` does it, in closed form.

The order of things is the simulated engine's: sequences that run come first, each prompt among them with as many
tokens as the step's budget leaves; then what has been pulled joins; then the queue is admitted in order of arrival
while seats, blocks and budget last. Between two changes of the batch decode steps are not played one by one: k steps of
a batch take the sum of an arithmetic series. Unlike there, a sequence's blocks are held from its admission to its end
for all that it will generate, so nothing is ever preempted.
"""

import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from heapq import heappop, heappush

from tracereplay.clock import Clock
from tracereplay.trace import BLOCK_TOKENS

from fleetsim.constants import EngineModel
from fleetsim.leg import Leg, Plan, Stats
from omni_engine.ports import BlockEvent
from omni_engine.sim.blocks import BlockPool


class Engine:
    """`changed` hears of blocks stored and removed as it happens."""

    def __init__(
        self,
        clock: Clock,
        model: EngineModel,
        rng: random.Random,
        changed: Callable[[Sequence[BlockEvent]], None],
        slow: float = 1.0,
    ) -> None:
        self._clock, self._model, self._rng, self._changed, self.slow = clock, model, rng, changed, slow
        self.pool = BlockPool(model.num_blocks, BLOCK_TOKENS)
        self._waiting: deque[Leg] = deque()
        self._pulling = 0
        self._prompts: list[Leg] = []
        """Admitted, their prompts not computed."""
        self._joining: list[Leg] = []
        """Pulled; they decode from the next step with budget for them."""
        self._decoding: list[tuple[int, int, Leg]] = []
        """Heap by the step that brings the last token."""
        self._entered = 0
        self._context = 0
        """Tokens of the decoding sequences at the last boundary."""
        self._steps = 0
        self._busy_ms = 0.0
        self._prompt_tokens = 0
        self._log: list[tuple[int, float]] = []
        """Steps of decode so far, and the length of each since the entry before."""
        self._plan: Plan | None = None
        self._turn = 0
        self.worked_s = 0.0
        self.changes = 0
        """Grows with whatever `stats` tells, but for the steps of a batch that stays the same."""

    def take(self, leg: Leg) -> None:
        leg.arrived_s = self._clock.now_s
        self._waiting.append(leg)
        self._wake()

    def release(self, leg: Leg) -> None:
        """Give up the blocks of a prefill that were kept for a pull."""
        blocks, leg.blocks = leg.blocks, []
        if blocks:
            self.pool.release(blocks)
            self._wake()

    def stats(self) -> Stats:
        plan, steps, busy_ms, context = self._plan, self._steps, self._busy_ms, self._context
        batch = len(self._decoding)
        if plan is not None and plan.is_run:
            done = plan.steps_by(self._clock.now_s)
            steps += done
            busy_ms += plan.length_ms(done)
            context += done * batch
        queued_tokens = sum([leg.prompt_tokens - leg.computed for leg in self._prompts])
        if self._waiting:
            queued_tokens += sum([leg.prompt_tokens for leg in self._waiting if not leg.pulls])
        return Stats(
            running=batch + len(self._prompts) + len(self._joining),
            waiting=len(self._waiting) + self._pulling,
            queued_tokens=queued_tokens,
            kv_usage=self.pool.usage,
            context_tokens=context,
            steps=steps,
            busy_ms=busy_ms,
            computed_prompt_tokens=self._prompt_tokens,
        )

    @property
    def decodes(self) -> bool:
        return bool(self._decoding)

    def _wake(self) -> None:
        """Something new to consider: at once if nothing runs, else at the end of the step that runs."""
        self.changes += 1
        plan = self._plan
        if plan is None:
            self._begin()
        elif plan.is_run:
            now_s = self._clock.now_s
            done = plan.steps_by(now_s)
            # The step under way ends before anything changes.
            last = done if done and plan.end_of(done) >= now_s else done + 1
            if last < plan.steps:
                plan.steps = last
                self._schedule(plan.end_of(last))

    def _schedule(self, at_s: float) -> None:
        self._turn += 1
        self._clock.at(at_s, self._end, self._turn)

    def _begin(self) -> None:
        """Plan from a boundary on."""
        model, batch, now_s = self._model, len(self._decoding), self._clock.now_s
        budget = model.max_num_batched_tokens - batch
        chunks: list[tuple[Leg, int]] = []
        for leg in self._prompts:
            if budget <= 0:
                break
            count = min(leg.prompt_tokens - leg.computed, budget)
            chunks.append((leg, count))
            budget -= count
        while self._joining and budget > 0:
            self._enter(self._joining.pop(0))
            budget -= 1
        budget = self._admit(chunks, budget)
        self._tell()
        batch = len(self._decoding)
        if not chunks and not batch:
            self._plan = None
            return
        noise = self._rng.gauss(0.0, 1.0) * model.noise
        decode_ms = model.step_base_ms + model.step_sequence_ms * batch if batch else 0.0
        decode_ms += model.step_context_ms * self._context
        if chunks:
            ms = decode_ms + model.prompt_ms([(count, leg.computed + count) for leg, count in chunks])
            plan = Plan(now_s, ms, 0.0, 1, self.slow * max(0.2, 1 + noise), False, chunks)
        else:
            steps = self._decoding[0][0] - self._steps
            noise /= math.sqrt(steps)
            growth = model.step_context_ms * batch
            plan = Plan(now_s, decode_ms, growth, steps, self.slow * max(0.2, 1 + noise), True, chunks)
        self._plan = plan
        self._schedule(plan.end_of(plan.steps))

    def _end(self, turn: int) -> None:
        plan = self._plan
        if turn != self._turn or plan is None:
            return
        self.changes += 1
        ms = plan.length_ms(plan.steps)
        self.worked_s += ms / 1e3
        now_s, batch = self._clock.now_s, len(self._decoding)
        if batch:
            self._steps += plan.steps
            self._busy_ms += ms
            self._context += plan.steps * batch
            self._log.append((self._steps, ms / plan.steps / 1e3))
        self._plan = None
        while self._decoding and self._decoding[0][0] <= self._steps:
            _, _, leg = heappop(self._decoding)
            self._context -= leg.prompt_tokens + leg.output_tokens
            self._finish(leg)
        for leg, count in plan.chunks:
            self._computed(leg, count, now_s)
        if not self._decoding:
            self._log.clear()
        self._begin()

    def _admit(self, chunks: list[tuple[Leg, int]], budget: int) -> int:
        model, now_s = self._model, self._clock.now_s
        in_batch = len(self._prompts) + len(self._joining) + self._pulling + len(self._decoding)
        while self._waiting and budget > 0 and in_batch < model.max_num_seqs:
            leg = self._waiting[0]
            if not self._place(leg):
                break
            self._waiting.popleft()
            in_batch += 1
            leg.scheduled_s = now_s
            if leg.pulls:
                self._pull(leg)
                continue
            self._prompts.append(leg)
            count = min(leg.prompt_tokens - leg.computed, budget)
            chunks.append((leg, count))
            budget -= count
        return budget

    def _place(self, leg: Leg) -> bool:
        cached = self.pool.match(leg.keys[: (leg.prompt_tokens - 1) // BLOCK_TOKENS])
        last = leg.output_tokens if leg.output_tokens > 1 else 0
        fresh = self.pool.allocate(-(-(leg.prompt_tokens + last) // BLOCK_TOKENS) - len(cached))
        if fresh is None:
            self.pool.release(cached)
            return False
        leg.blocks = cached + fresh
        leg.named = len(cached)
        leg.cached = leg.computed = len(cached) * BLOCK_TOKENS
        return True

    def _pull(self, leg: Leg) -> None:
        self._pulling += 1
        noise = max(0.2, 1 + self._rng.gauss(0.0, 1.0) * self._model.noise)
        leg.transfer_s = self._model.transfer_s(leg.prompt_tokens - leg.cached) * noise * self.slow
        self._clock.after(leg.transfer_s, self._pulled, leg)

    def _pulled(self, leg: Leg) -> None:
        self._pulling -= 1
        leg.computed = leg.prompt_tokens
        self._name(leg)
        if leg.on_pulled is not None:
            leg.on_pulled(leg)
        self._joining.append(leg)
        self._wake()

    def _computed(self, leg: Leg, count: int, now_s: float) -> None:
        """A chunk of a prompt is done; the last one brings a token."""
        leg.computed += count
        self._prompt_tokens += count
        self._name(leg)
        if leg.computed < leg.prompt_tokens:
            return
        self._prompts.remove(leg)
        leg.first_s = now_s
        if leg.on_first is not None:
            leg.on_first(leg)
        if leg.output_tokens <= 1:
            self._finish(leg)
        else:
            self._enter(leg)

    def _enter(self, leg: Leg) -> None:
        """Into the decoding batch, with one token generated already."""
        leg.first_step = self._steps
        self._entered += 1
        self._context += leg.prompt_tokens + 1
        heappush(self._decoding, (self._steps + leg.output_tokens - 1, self._entered, leg))

    def _finish(self, leg: Leg) -> None:
        leg.ended_s = self._clock.now_s
        if leg.output_tokens > 1:
            leg.gaps = self._gaps_since(leg.first_step)
        if not leg.keeps_blocks:
            self.pool.release(leg.blocks)
            leg.blocks = []
        if leg.on_end is not None:
            leg.on_end(leg)

    def _gaps_since(self, step: int) -> list[tuple[int, float]]:
        gaps: list[tuple[int, float]] = []
        index = len(self._log) - 1
        while index >= 0:
            until, gap_s = self._log[index]
            since = self._log[index - 1][0] if index else 0
            gaps.append((until - max(since, step), gap_s))
            if since <= step:
                break
            index -= 1
        gaps.reverse()
        return gaps

    def _name(self, leg: Leg) -> None:
        full = min(leg.computed // BLOCK_TOKENS, len(leg.keys))
        if full > leg.named:
            self.pool.register(leg.blocks, leg.keys[:full], leg.named, (), "")
            leg.named = full
            self._tell()

    def _tell(self) -> None:
        if events := self.pool.take_events():
            self._changed(events)

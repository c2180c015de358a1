"""Chunked continuous batching over the block pool: which sequence computes how many tokens in the next step. Pure."""

from collections import deque
from dataclasses import dataclass, field

from omni_engine.adapters import AdapterTurns
from omni_engine.ports import KvHandle
from omni_engine.sim.blocks import BlockPool, chain_hashes
from omni_engine.sim.sequence import SimSequence
from omni_engine.sim.settings import SimSettings, Timing
from omni_engine.sim.slots import Slots


@dataclass(slots=True)
class Step:
    """Tokens to compute per sequence, and sequences whose blocks are to be pulled first.

    `adapters_loaded` lay in no slot before.
    """

    chunks: list[tuple[SimSequence, int]] = field(default_factory=list)
    pulls: list[tuple[SimSequence, KvHandle]] = field(default_factory=list)
    adapters_loaded: int = 0

    def duration_ms(self, timing: Timing) -> float:
        """How long the step lasts; see the package's docstring."""
        total_ms = self.adapters_loaded * timing.adapter_load_ms
        prompts = [(s, n) for s, n in self.chunks if n > 1]
        decodes = [s for s, n in self.chunks if n == 1]
        if prompts:
            total_ms += timing.prefill_base_ms + sum(timing.prefill_ms(n, s.computed + n) for s, n in prompts)
        if decodes:
            total_ms += timing.step_ms(len(decodes), sum(len(s.tokens) for s in decodes))
        return total_ms


class Scheduler:
    """Owns the queue and the batch. A sequence is in exactly one of waiting, pulling, running, or in none.

    Those pulling and running have at most `adapter_slots` different adapters, which take turns.
    """

    def __init__(self, settings: SimSettings, adapter_slots: int = 0) -> None:
        self._settings = settings
        self._slots = Slots(adapter_slots)
        self._turns = AdapterTurns[SimSequence](adapter_slots)
        self.pool = BlockPool(settings.num_blocks, settings.block_size)
        self.waiting: deque[SimSequence] = deque()
        self.running: list[SimSequence] = []
        self.pulling: list[SimSequence] = []

    def add(self, sequence: SimSequence) -> None:
        self._turns.comes(sequence, sequence.adapter, sequence.arrived_s)
        self.waiting.append(sequence)

    def remove(self, sequence: SimSequence) -> list[int]:
        """Take a sequence out; its blocks become the caller's."""
        self._turns.leaves(sequence)
        return self._take_out(sequence)

    def _take_out(self, sequence: SimSequence) -> list[int]:
        for place in (self.running, self.pulling, self.waiting):
            if sequence in place:
                place.remove(sequence)
        blocks, sequence.blocks = sequence.blocks, []
        return blocks

    def pulled(self, sequence: SimSequence, num_tokens: int) -> None:
        """The pull ended with `num_tokens` of the prompt here; the rest is computed."""
        self.pulling.remove(sequence)
        self.running.append(sequence)
        sequence.handle = None
        sequence.computed = max(sequence.computed, min(num_tokens, len(sequence.tokens) - 1))
        self._register(sequence)

    def plan(self, now_s: float) -> Step:
        """The next step; empty when nothing can run."""
        step = Step()
        budget = self._settings.max_num_batched_tokens
        for sequence in list(self.running):
            if sequence not in self.running:
                continue
            count = min(sequence.uncomputed, budget)
            if count and self._reserve_or_preempt(sequence, count):
                step.chunks.append((sequence, count))
                budget -= count
        step.chunks = [(s, n) for s, n in step.chunks if s in self.running]
        self._admit(step, budget, now_s)
        if adapters := dict.fromkeys(s.adapter for s, _ in step.chunks if s.adapter):
            step.adapters_loaded = self._slots.bring_in(adapters, self._adapters_in_use)
        return step

    def commit(self, sequence: SimSequence, count: int) -> bool:
        """The step computed `count` tokens of it; True when a new token follows."""
        sequence.computed += count
        self._register(sequence)
        return sequence.uncomputed == 0

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens to be computed: what is left where the prompt runs, else what its caller believes."""
        left = sum(max(0, s.num_prompt - s.computed) for s in self.running)
        believed = sum(s.believed_tokens for place in (self.waiting, self.pulling) for s in place if not s.has_started)
        return left + believed

    @property
    def context_tokens(self) -> int:
        """Tokens of the sequences that generate."""
        return sum(len(s.tokens) for s in self.running if s.has_started)

    @property
    def adapters(self) -> tuple[str, ...]:
        """Those in slots: of the batch, then the last used."""
        return self._slots.names(self._adapters_in_use)

    def _admit(self, step: Step, budget: int, now_s: float) -> None:
        in_use, passed_over = self._adapters_in_use, list[SimSequence]()
        self._turns.admitted(now_s)
        while self.waiting and budget > 0 and self._in_batch < self._settings.max_num_seqs:
            sequence = self.waiting[0]
            if self._turns.keeps_out(sequence) or not self._slots.has_room(sequence.adapter, in_use):
                passed_over.append(self.waiting.popleft())
                continue
            if not self._place(sequence):
                break
            self.waiting.popleft()
            if sequence.adapter:
                in_use.add(sequence.adapter)
            if sequence.scheduled_s is None:
                sequence.scheduled_s = now_s
                self._turns.begins(sequence, now_s)
            if sequence.handle is not None:
                self.pulling.append(sequence)
                step.pulls.append((sequence, sequence.handle))
                continue
            self.running.append(sequence)
            count = min(sequence.uncomputed, budget)
            step.chunks.append((sequence, count))
            budget -= count
        self.waiting.extendleft(reversed(passed_over))

    @property
    def _in_batch(self) -> int:
        return len(self.running) + len(self.pulling)

    @property
    def _adapters_in_use(self) -> set[str]:
        return {s.adapter for place in (self.running, self.pulling) for s in place if s.adapter}

    def _place(self, sequence: SimSequence) -> bool:
        """Hold blocks for all of its tokens, cached ones first; at least the last token is computed."""
        size = self._settings.block_size
        hashes = chain_hashes(sequence.tokens[:-1], size, sequence.salt, sequence.adapter)
        blocks = self.pool.match(hashes)
        fresh = self.pool.allocate(-(-len(sequence.tokens) // size) - len(blocks))
        if fresh is None:
            self.pool.release(blocks)
            return False
        sequence.hashes = hashes[: len(blocks)]
        sequence.computed = len(blocks) * size
        if not sequence.has_started:
            sequence.cached = min(sequence.computed, sequence.num_prompt)
        sequence.blocks = blocks + fresh
        return True

    def _reserve_or_preempt(self, sequence: SimSequence, count: int) -> bool:
        """Hold blocks for `count` more tokens, sending the youngest back to the queue while there are none."""
        needed = -(-(sequence.computed + count) // self._settings.block_size) - len(sequence.blocks)
        while needed > 0 and (fresh := self.pool.allocate(needed)) is None:
            youngest = self.running[-1]
            self.pool.release(self._take_out(youngest))
            self.waiting.appendleft(youngest)
            if youngest is sequence:
                return False
        if needed > 0 and fresh is not None:
            sequence.blocks += fresh
        return True

    def _register(self, sequence: SimSequence) -> None:
        """Name the blocks that have become full."""
        size, known = self._settings.block_size, len(sequence.hashes)
        full = sequence.computed // size
        if full > known:
            salt, adapter = sequence.salt, sequence.adapter
            sequence.hashes = chain_hashes(sequence.tokens[: full * size], size, salt, adapter)
            self.pool.register(sequence.blocks, sequence.hashes, known, sequence.tokens, salt, adapter)

"""The simulated engines' constants. Assumptions with their reasons: no device was measured, none is claimed."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineModel:
    """One worker: an instance of a large mixture-of-experts model on eight cards. Times in milliseconds.

    The formulas are those of `omni_engine.sim`. The defaults resemble a model of the kind of DeepSeek-V3 (671 billion
    weights of 8 bits, 37 billion active, 61 layers, compressed KV) on an eight-card server of the 140 GB class:

    - prompt token: 2 x 37e9 FLOP at 1.5e15 FLOP/s reached by eight cards together: 0.05 ms, 20,000 tokens/s, the order
      of what single eight-card servers are reported to reach;
    - attention: 61 layers x 128 heads x 2 x (192 + 128) FLOP per pair of tokens at 2.5e15 FLOP/s: 2e-6 ms;
    - base of a prompt step: 61 layers' launches and collectives at about a quarter of a millisecond each;
    - decode: 22 ms for one sequence (some 45 tokens/s, as reported with tensor parallelism over eight cards), 0.15 ms
      more per sequence since more experts are read, and per token of context 70 KB of KV read at about 10 TB/s;
    - KV: 61 x 576 values of 16 bits are 70,272 bytes per token; 144 GB of cards' memory hold 2,048,000 tokens;
    - transfer: 50 GiB/s of RDMA reached of a server's eight 400 Gb/s links, 5 ms to set up.
    """

    prefill_base_ms: float = 15.0
    prefill_token_ms: float = 0.05
    prefill_context_ms: float = 2e-6
    step_base_ms: float = 22.0
    step_sequence_ms: float = 0.15
    step_context_ms: float = 7e-6
    transfer_latency_ms: float = 5.0
    transfer_gib_per_s: float = 50.0
    kv_bytes_per_token: int = 70_272
    num_blocks: int = 4000
    max_num_seqs: int = 128
    max_num_batched_tokens: int = 8192
    noise: float = 0.05
    """Standard deviation of a step's and a transfer's length, relative."""

    def prompt_ms(self, chunks: Iterable[tuple[int, int]]) -> float:
        """One step's share for prompts: (tokens, tokens of context at their end) each."""
        tokens = sum(self.prefill_token_ms * new + self.prefill_context_ms * new * context for new, context in chunks)
        return self.prefill_base_ms + tokens

    def transfer_s(self, tokens: int) -> float:
        moved = tokens * self.kv_bytes_per_token / (self.transfer_gib_per_s * 2**30)
        return self.transfer_latency_ms / 1e3 + moved

    def unloaded_s(self, prompt_tokens: int) -> float:
        """The whole prompt on an idle engine with an empty cache, until its first token."""
        total_ms, done = 0.0, 0
        while done < prompt_tokens:
            count = min(self.max_num_batched_tokens, prompt_tokens - done)
            done += count
            total_ms += self.prompt_ms([(count, done)])
        return total_ms / 1e3


PREFILL = EngineModel()
DECODE = EngineModel(max_num_batched_tokens=512)
"""Prompts computed beside decode are cut into pieces of 512 tokens, so that a step with one stays near 75 ms."""

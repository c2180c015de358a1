"""A thinned, shortened trace: whole conversations with their shared beginnings, small enough for a tiny model.

Reads Mooncake's format (see `tracereplay.trace`). A block of the trace becomes `512 / divisor` token ids that depend
on its hash id and a salt only: equal ids give equal tokens, another salt gives prompts that no cache has seen.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from tracereplay.trace import BLOCK_TOKENS

_VOCABULARY = 1000
"""Token ids below this are words in any vocabulary."""
_STEP_S = 3.0
"""The trace tells times in steps of this size."""
_LEAST_OUTPUT = 2


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request. `hash_ids`: one per block, the last may be cut."""

    at_s: float
    tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Workload:
    """`left_out` conversations had a prompt that the model cannot hold."""

    prompts: tuple[Prompt, ...]
    block_tokens: int
    conversations: int
    left_out: int

    def first(self, count: int) -> "Workload":
        return Workload(self.prompts[:count], self.block_tokens, self.conversations, self.left_out)

    def token_ids(self, prompt: Prompt, salt: str) -> list[int]:
        """Equal salts and ids give equal tokens."""
        blocks = (self._block(salt, hash_id) for hash_id in prompt.hash_ids)
        return list(chain.from_iterable(blocks))[: prompt.tokens]

    def arrivals_s(self, rate: float, seed: int) -> list[float]:
        """From 0 on, `rate` per second on average: the trace's own times, spread within its steps and scaled."""
        draw = random.Random(seed)
        raw = sorted(prompt.at_s + draw.uniform(0.0, _STEP_S) for prompt in self.prompts)
        span_s = raw[-1] - raw[0]
        scale = (len(raw) - 1) / rate / span_s if span_s else 0.0
        return [(at_s - raw[0]) * scale for at_s in raw]

    def best_hit_rate(self, warm: int = 0) -> float:
        """Of prompt tokens after the first `warm` prompts, with one endless cache that fills at once."""
        seen: set[tuple[int, ...]] = set()
        hits = 0
        for number, prompt in enumerate(self.prompts):
            # Whole blocks, and never the last token's.
            prefixes = [prompt.hash_ids[: i + 1] for i in range((prompt.tokens - 1) // self.block_tokens)]
            held = next((i for i, prefix in enumerate(prefixes) if prefix not in seen), len(prefixes))
            hits += held * self.block_tokens if number >= warm else 0
            seen.update(prefixes)
        return hits / max(1, sum(prompt.tokens for prompt in self.prompts[warm:]))

    def _block(self, salt: str, hash_id: int) -> list[int]:
        return random.Random(f"{salt}/{hash_id}").choices(range(_VOCABULARY), k=self.block_tokens)


def read_workload(path: Path, conversations: int, divisor: int, most_tokens: int) -> Workload:
    """Conversations taken evenly over the whole trace, so that turns keep their distance to each other.

    A conversation is what shares its first two blocks. Raises ValueError where nothing is left.
    """
    block = BLOCK_TOKENS // divisor
    found: dict[tuple[int, ...], list[Prompt]] = {}
    with path.open() as lines:
        for number, row in enumerate(map(json.loads, lines)):
            ids = tuple(row["hash_ids"])
            prompt = Prompt(
                row["timestamp"] / 1e3,
                max(1, row["input_length"] // divisor),
                max(_LEAST_OUTPUT, row["output_length"] // divisor),
                ids,
            )
            found.setdefault(ids[:2] if len(ids) > 1 else (-1 - number,), []).append(prompt)
    fitting = [turns for turns in found.values() if max(t.tokens + t.output_tokens for t in turns) < most_tokens]
    if not fitting:
        raise ValueError(f"no conversation of {path.name} fits {most_tokens} tokens")
    chosen = evenly(fitting, conversations)
    prompts = sorted(chain.from_iterable(chosen), key=lambda prompt: prompt.at_s)
    return Workload(tuple(prompts), block, len(chosen), len(found) - len(fitting))


def evenly(items: Sequence[list[Prompt]], count: int) -> list[list[Prompt]]:
    """At most `count` of them, equally far apart."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]

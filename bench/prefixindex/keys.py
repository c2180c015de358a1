"""Block keys of a conversation's next turn: from the cache of earlier turns, and hashed anew."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np

from omni_common.blocks import block_keys, root_key
from omni_common.key_cache import KeyCache
from prefixindex.population import BLOCK_TOKENS, MODEL
from prefixindex.timing import latency_of, timed

_CACHE_BYTES = 64 * 1024**2
_VOCABULARY = 128_000


class Wrong(Exception):
    """The cache gave other keys than hashing does."""


def measure_keys(prompt_tokens: int, turn_tokens: int, samples: int, budget_s: float, seed: int) -> dict[str, Any]:
    """Microseconds for a prompt of which all but the last `turn_tokens` were asked for before.

    Tokens come as a list of ints, as a tokenizer gives them, and as an array. Conversations take turns, so each is read
    from a cache that holds the others, too.
    """
    root, rng = root_key(MODEL), np.random.default_rng(seed)
    arrays = [rng.integers(0, _VOCABULARY, prompt_tokens, dtype=np.uint32) for _ in range(4)]
    figures: dict[str, Any] = {"prompt_tokens": prompt_tokens, "turn_tokens": turn_tokens}
    for kind, prompts in {"list": [array.tolist() for array in arrays], "array": arrays}.items():
        cache = KeyCache(_CACHE_BYTES)
        for prompt in prompts:
            cache.keys(prompt[:-turn_tokens], BLOCK_TOKENS, root)
        for prompt in prompts:
            if cache.keys(prompt, BLOCK_TOKENS, root) != block_keys(prompt, BLOCK_TOKENS, root):
                raise Wrong("cached keys differ from hashed ones")

        def turns(prompts: list[Any] = prompts, cache: KeyCache = cache) -> Iterator[Callable[[], object]]:
            """Each prompt with a new tail every time, so that the tail is never known."""
            for number, prompt in enumerate(itertools.cycle(prompts)):
                changed = prompt.copy()
                changed[-turn_tokens] = _VOCABULARY + number
                yield partial(cache.keys, changed, BLOCK_TOKENS, root)

        hashing = (partial(block_keys, prompt, BLOCK_TOKENS, root) for prompt in itertools.cycle(prompts))
        before = cache.hashed_blocks
        taken = timed(turns(), lambda: None, most=samples, budget_s=budget_s)
        hashed = (cache.hashed_blocks - before) / len(taken)
        figures[kind] = {
            "second turn": asdict(latency_of(taken)),
            "full hashing": asdict(latency_of(timed(hashing, lambda: None, most=samples, budget_s=budget_s))),
            "hashed_blocks": hashed,
        }
    return figures

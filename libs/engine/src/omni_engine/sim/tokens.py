"""Which tokens a simulated model generates: a hash of prompt, seed, adapter and position, and nothing else.

So the same request gives the same tokens on every engine, whole or split between prefill and decode.
"""

import math
from collections.abc import Sequence

import numpy as np
import xxhash

from omni_engine.ports import FinishReason, Logprobs, SamplingParams
from omni_engine.sim.settings import SimSettings

_DEFAULT_EOS = 2


class TokenStream:
    """The output of one prompt; `token(i)` is its i-th generated token, from 0.

    `num_output_tokens` of them were generated elsewhere: `sampling.min_tokens` is of those to come.
    """

    __slots__ = ("_end", "_first", "_least", "_root", "_sampling", "_span", "eos_token_id")

    def __init__(
        self,
        settings: SimSettings,
        prompt: Sequence[int],
        sampling: SamplingParams,
        num_output_tokens: int = 0,
        adapter: str = "",
    ) -> None:
        seed = settings.seed if sampling.seed is None else sampling.seed
        digest = xxhash.xxh3_64(np.asarray(prompt, dtype="<u4").tobytes())
        digest.update(seed.to_bytes(16, "little", signed=True))
        digest.update(adapter.encode())
        self._root = digest.digest()
        self._sampling = sampling
        self._first, self._span = settings.first_token_id, settings.num_token_ids
        self.eos_token_id = _DEFAULT_EOS if settings.eos_token_id is None else settings.eos_token_id
        share = (xxhash.xxh3_64_intdigest(self._root + b"length") + 1) / 2**64
        length = max(1, math.ceil(-settings.mean_output_tokens * math.log(share)))
        self._least = num_output_tokens + sampling.min_tokens
        self._end = max(length, self._least)

    def token(self, position: int) -> int:
        if position == self._end and not self._sampling.ignore_eos:
            return self.eos_token_id
        drawn = xxhash.xxh3_64_intdigest(self._root + position.to_bytes(8, "little"))
        token = self._first + drawn % self._span
        return token + 1 if token == self.eos_token_id else token

    def finish(self, token: int, position: int) -> FinishReason | None:
        """How the sequence ends with this token, apart from its length."""
        sampling = self._sampling
        if token == self.eos_token_id and not sampling.ignore_eos:
            return FinishReason.STOP
        if token in sampling.stop_token_ids and position + 1 >= self._least:
            return FinishReason.STOP
        return None

    def logprobs(self, token: int) -> Logprobs | None:
        """The sampled token is the likeliest, its neighbours follow with halved probabilities."""
        count = self._sampling.logprobs
        if count is None:
            return None
        ids = [token, *(token + i for i in range(count))]
        values = [math.log(0.5), *(math.log(0.5) * (i + 1) for i in range(count))]
        return Logprobs(width=count + 1, token_ids=ids, logprobs=values, sampled_ranks=[1])

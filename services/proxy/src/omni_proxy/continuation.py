"""What decode is told after a prefill, and why."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from omni_proxy.sampling import Sampling


class FirstToken(StrEnum):
    """Where the client's first token comes from; every value but PREFILL means decode draws it."""

    PREFILL = "prefill"
    DECODE_ALONE = "decode_alone"
    SEEDED = "recompute_seeded"
    PENALISED = "recompute_penalised"
    FULL_BLOCK = "recompute_full_block"


@dataclass(frozen=True, slots=True)
class Continuation:
    """Tokens and sampling of a Submit; `num_output_tokens` of the tokens are generated ones."""

    token_ids: Sequence[int]
    num_output_tokens: int
    sampling: Sampling
    first_token: FirstToken


def first_token_source(prompt_length: int, sampling: Sampling, block_size: int | None) -> FirstToken:
    """Whether the token of a prefill worker may stand, or decode must draw the first token itself.

    `block_size` is that of the worker's blocks; None where decode computes the prompt.

    A seeded generator's state and the penalties' output counts live in the engine that drew the token, so a
    sequence split after it would differ from an undivided one. A prompt of whole blocks is a connector limit:
    the generated token would start a block that the holder does not have.
    """
    if block_size is None:
        return FirstToken.DECODE_ALONE
    if sampling.seed is not None and sampling.temperature > 0:
        return FirstToken.SEEDED
    if sampling.presence_penalty != 0 or sampling.frequency_penalty != 0:
        return FirstToken.PENALISED
    if block_size > 0 and prompt_length % block_size == 0:
        return FirstToken.FULL_BLOCK
    return FirstToken.PREFILL


def resumes_by_replay(sampling: Sampling) -> bool:
    """Whether a broken sequence is run again from its prompt, and what the client has is left out of the answer.

    The state of a seeded generator and the penalties' counts of output tokens died with the engine; only the same
    draws in the same order bring them back. Without a seed there is nothing to repeat.
    """
    is_drawn = sampling.temperature > 0
    if is_drawn:
        return sampling.seed is not None
    return sampling.presence_penalty != 0 or sampling.frequency_penalty != 0


def resumes_exactly(sampling: Sampling) -> bool:
    """Whether what follows a resumption is distributed as if nothing had happened, or the same where it is determined.

    Without a seed a sequence goes on from its tokens as a prompt, of which presence and frequency are not counted.
    """
    has_counts = sampling.presence_penalty != 0 or sampling.frequency_penalty != 0
    return resumes_by_replay(sampling) or not has_counts


def continuation(
    prompt: Sequence[int], generated: Sequence[int], sampling: Sampling, first_token: FirstToken
) -> Continuation:
    """Continue after `generated` (what the client has), or start if that is empty."""
    count = len(generated)
    if not count:
        return Continuation(prompt, 0, sampling, first_token)
    left = replace(sampling, max_tokens=sampling.max_tokens - count, min_tokens=max(0, sampling.min_tokens - count))
    return Continuation([*prompt, *generated], count, left, first_token)

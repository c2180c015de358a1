"""The port's sampling parameters as vLLM's."""

from typing import Any

from omni_engine.ports import SamplingParams


def sampling_params(params: SamplingParams, kv_transfer: dict[str, Any] | None, max_tokens: int | None = None) -> Any:
    """vllm.SamplingParams for token ids out; `max_tokens` overrides the request's (prefill runs with 1).

    Raises ValueError for values vLLM refuses.
    """
    from vllm import SamplingParams as VllmSamplingParams

    limit = params.max_tokens if max_tokens is None else max_tokens
    return VllmSamplingParams(
        max_tokens=limit,
        min_tokens=min(params.min_tokens, limit),
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        seed=params.seed,
        stop_token_ids=list(params.stop_token_ids),
        ignore_eos=params.ignore_eos,
        logprobs=params.logprobs,
        logit_bias=dict(params.logit_bias) or None,
        detokenize=False,
        extra_args={"kv_transfer_params": kv_transfer} if kv_transfer else None,
    )

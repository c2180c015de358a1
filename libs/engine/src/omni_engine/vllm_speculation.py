"""Speculative decoding: who drafts, what each leg needs of it, and what is refused. Imports nothing of vLLM.

The prediction layer of a model (`mtp`) has a KV cache of its own. The prefill leg must fill it, or decode would draft
from blocks that were never written: it runs the same drafter, one token far. N-gram lookup (`ngram`) drafts from the
sequence's own tokens; the prefill leg needs nothing for it.
"""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from omni_common.errors import InvalidRequest
from omni_engine.ports import SamplingParams

Method = Literal["mtp", "ngram", "auto"]
# What configurations call the number of prediction layers.
PREDICTION_LAYERS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers")
# What vLLM cannot apply to drafts.
_NOT_WITH_DRAFTS = ("min_p", "logit_bias")
# An n-gram of this many tokens, the longest first, is looked for in the sequence.
_NGRAM_TOKENS = (2, 4)


class Speculation(BaseModel):
    """Drafts of `tokens` tokens that each step verifies. 'mtp:2' is read as method mtp, 2 tokens.

    `auto` is mtp where the model has prediction layers, else ngram.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Method
    tokens: int = Field(2, ge=1, le=16, description="Tokens drafted for each step")

    @model_validator(mode="before")
    @classmethod
    def _read_short_form(cls, value: Any) -> Any:
        if not isinstance(value, str) or value.lstrip().startswith("{"):
            return value
        method, colon, tokens = value.partition(":")
        return {"method": method} | ({"tokens": tokens} if colon else {})

    def for_model(self, config: Mapping[str, Any]) -> Self:
        """The same with `auto` decided for the model of this config.json.

        Raises InvalidRequest for mtp where the model has no prediction layer.
        """
        has_layers = num_prediction_layers(config) > 0
        if self.method == "mtp" and not has_layers:
            raise InvalidRequest(
                f"speculative: the model has no prediction layers (none of {', '.join(PREDICTION_LAYERS)} in its "
                "config.json); ngram drafts for any model",
                field="vllm.speculative",
            )
        if self.method != "auto":
            return self
        return self.model_copy(update={"method": "mtp" if has_layers else "ngram"})

    def arguments(self, *, prefill_only: bool) -> dict[str, Any] | None:
        """vLLM's `speculative_config`; None where this leg drafts nothing and keeps nothing for the drafter."""
        if self.method == "mtp":
            return {"method": "mtp", "num_speculative_tokens": 1 if prefill_only else self.tokens}
        if prefill_only:
            return None
        shortest, longest = _NGRAM_TOKENS
        window = {"prompt_lookup_min": shortest, "prompt_lookup_max": longest}
        return {"method": "ngram", "num_speculative_tokens": self.tokens} | window

    def __str__(self) -> str:
        return f"{self.method}:{self.tokens}"


def num_prediction_layers(config: Mapping[str, Any]) -> int:
    """Multi-token-prediction layers in a model's config.json."""
    shape = config.get("text_config", config)
    return next((int(shape[name]) for name in PREDICTION_LAYERS if shape.get(name)), 0)


def check_sampling(params: SamplingParams) -> None:
    """Raises InvalidRequest for what cannot be applied to drafts.

    Asked on both legs: a prefill leg that drafts nothing would give a first token of an answer that decode refuses.
    """
    for name in _NOT_WITH_DRAFTS:
        if getattr(params, name):
            raise InvalidRequest(f"{name} cannot be used: this model is served with speculative decoding", field=name)

"""Which weights of a checkpoint are quantized, and what is refused because it could not be served."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SCHEMES = ("w8a8",)
# Routers choose by small differences; heads and embeddings are looked at by name; latent attention multiplies the two
# halves of kv_b_proj into queries and outputs; eh_proj is no quantizable layer in engines. The rest are no matrices.
KEPT = re.compile(
    r"(\.mlp\.gate|_norm|norm|layernorm|embed_tokens|head|lm_head|kv_b_proj|eh_proj|indexer\.\w+)\.weight$"
)
_LINEAR = re.compile(r"\.layers\.\d+\.(self_attn|mlp)\..*\.weight$")
# What models call the width of one expert.
EXPERT_WIDTHS = ("moe_intermediate_size", "intermediate_size")
EXPERT_COUNTS = ("num_experts", "n_routed_experts", "num_local_experts")
# Of the int8 expert kernels on CPUs with AMX.
_EXPERT_MULTIPLE = 32


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor of a checkpoint and its shape."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def module(self) -> str:
        return self.name.removesuffix(".weight")


@dataclass(frozen=True, slots=True)
class Choice:
    """Names of the weights to quantize, and the linear modules that stay as they are."""

    quantized: tuple[str, ...]
    kept_modules: tuple[str, ...]


def choose(weights: Sequence[Weight], config: Mapping[str, Any], scheme: str) -> Choice:
    """All projections of attention, MLPs and experts but those of KEPT.

    Raises ValueError, naming the field or tensor, for what no engine here would serve.
    """
    _check_scheme(scheme, config)
    if config.get("quantization_config"):
        raise ValueError("quantization_config: the model is quantized already; start from its bf16 or fp32 weights")
    _check_expert_sizes(config)
    for weight in weights:
        if len(weight.shape) == 3 and "experts" in weight.name:
            raise ValueError(f"{weight.name}: experts in one tensor {weight.shape}; one matrix for each is expected")
    chosen = [weight for weight in weights if is_quantizable(weight)]
    if not chosen:
        raise ValueError("no tensor is named like a projection (model.layers.<n>.self_attn|mlp.*.weight)")
    for weight in chosen:
        if weight.dtype not in ("BF16", "F16", "F32"):
            raise ValueError(f"{weight.name}: {weight.dtype} cannot be quantized; bf16, fp16 or fp32 is expected")
    names = tuple(weight.name for weight in chosen)
    kept = {w.module for w in weights if len(w.shape) == 2 and w.name.endswith(".weight") and w.name not in set(names)}
    return Choice(names, tuple(sorted(kept | _heads_of_predictors(kept))))


def is_quantizable(weight: Weight) -> bool:
    return len(weight.shape) == 2 and bool(_LINEAR.search(weight.name)) and not KEPT.search(weight.name)


def _heads_of_predictors(kept: set[str]) -> set[str]:
    """Engines name the head of a prediction layer without the `shared_head` of checkpoints."""
    layers = {name.rsplit(".eh_proj", 1)[0] for name in kept if name.endswith(".eh_proj")}
    return {f"{layer}.{part}" for layer in layers for part in ("head", "shared_head.head")}


def _check_scheme(scheme: str, config: Mapping[str, Any]) -> None:
    if scheme == "w4a8":
        where = "the experts" if num_experts(config) else "a dense model"
        raise ValueError(
            f"--scheme: w4a8 for {where} is not offered: vLLM's CPU kernels for int4 weights and int8 activations are "
            "for Arm, or need AMX and take no such checkpoint; use w8a8"
        )
    if scheme not in SCHEMES:
        raise ValueError(f"--scheme: {scheme!r} is not one of {', '.join(SCHEMES)}")


def _check_expert_sizes(config: Mapping[str, Any]) -> None:
    shape = config.get("text_config", config)
    if not num_experts(config):
        return
    width = next(name for name in (*EXPERT_WIDTHS, "") if not name or shape.get(name))
    for field in ("hidden_size", width):
        if field and int(shape.get(field) or 0) % _EXPERT_MULTIPLE:
            raise ValueError(f"{field}: {shape[field]} is not a multiple of {_EXPERT_MULTIPLE}, as int8 experts need")


def num_experts(config: Mapping[str, Any]) -> int:
    """Routed experts per layer; 0 for a dense model."""
    shape = config.get("text_config", config)
    return next((int(shape[name]) for name in EXPERT_COUNTS if shape.get(name)), 0)

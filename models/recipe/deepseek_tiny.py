#!/usr/bin/env python3
"""Make a DeepSeek-V3-shaped model with random weights, for tests of shapes rather than of answers.

    python deepseek_tiny.py --out /tmp/deepseek-tiny

It has what serving code must treat differently from the Qwen shape: multi-head latent attention with the
real latent sizes (512 + 64 values per token and layer), a dense first layer, a shared expert, grouped
sigmoid routing with a correction bias, and one multi-token-prediction layer, whose weights follow the last
layer under the names that published checkpoints use. Only hidden sizes and counts are small. The tokenizer
is the tiny model's. Answers are noise, yet the same noise for the same seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from model_folder import TINY_MOE, arguments, copy_tokenizer, token_ids, write_json, write_weights
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes that tests may shrink or grow; the latent and head sizes are DeepSeek-V3's own."""

    vocab: int
    hidden: int = 128
    layers: int = 3
    heads: int = 4
    dense: int = 256
    expert: int = 64
    experts: int = 16
    groups: int = 4
    q_rank: int = 96
    kv_rank: int = 512
    rope: int = 64
    nope: int = 128
    value: int = 128


def config(shape: Shape, ids: Mapping[str, int]) -> dict[str, object]:
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.dense,
        "moe_intermediate_size": shape.expert,
        "num_hidden_layers": shape.layers,
        "num_nextn_predict_layers": 1,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "q_lora_rank": shape.q_rank,
        "kv_lora_rank": shape.kv_rank,
        "qk_rope_head_dim": shape.rope,
        "qk_nope_head_dim": shape.nope,
        "v_head_dim": shape.value,
        "n_routed_experts": shape.experts,
        "n_shared_experts": 1,
        "num_experts_per_tok": 4,
        "n_group": shape.groups,
        "topk_group": 2,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000,
        "rope_scaling": None,
        "max_position_embeddings": 8192,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": ids["eos_token_id"],
        "pad_token_id": ids["pad_token_id"],
    }


def mlp(prefix: str, hidden: int, inner: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{prefix}.gate_proj.weight", (inner, hidden)
    yield f"{prefix}.up_proj.weight", (inner, hidden)
    yield f"{prefix}.down_proj.weight", (hidden, inner)


def attention(prefix: str, s: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{prefix}.q_a_proj.weight", (s.q_rank, s.hidden)
    yield f"{prefix}.q_a_layernorm.weight", (s.q_rank,)
    yield f"{prefix}.q_b_proj.weight", (s.heads * (s.nope + s.rope), s.q_rank)
    yield f"{prefix}.kv_a_proj_with_mqa.weight", (s.kv_rank + s.rope, s.hidden)
    yield f"{prefix}.kv_a_layernorm.weight", (s.kv_rank,)
    yield f"{prefix}.kv_b_proj.weight", (s.heads * (s.nope + s.value), s.kv_rank)
    yield f"{prefix}.o_proj.weight", (s.hidden, s.heads * s.value)


def layer(prefix: str, s: Shape, *, is_dense: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{prefix}.input_layernorm.weight", (s.hidden,)
    yield f"{prefix}.post_attention_layernorm.weight", (s.hidden,)
    yield from attention(f"{prefix}.self_attn", s)
    if is_dense:
        yield from mlp(f"{prefix}.mlp", s.hidden, s.dense)
        return
    yield f"{prefix}.mlp.gate.weight", (s.experts, s.hidden)
    yield f"{prefix}.mlp.gate.e_score_correction_bias", (s.experts,)
    yield from mlp(f"{prefix}.mlp.shared_experts", s.hidden, s.expert)
    for expert in range(s.experts):
        yield from mlp(f"{prefix}.mlp.experts.{expert}", s.hidden, s.expert)


def prediction_layer(prefix: str, s: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The multi-token-prediction layer: an ordinary layer, what joins it to the next token, and its own head."""
    yield from layer(prefix, s, is_dense=False)
    yield f"{prefix}.enorm.weight", (s.hidden,)
    yield f"{prefix}.hnorm.weight", (s.hidden,)
    yield f"{prefix}.eh_proj.weight", (s.hidden, 2 * s.hidden)
    yield f"{prefix}.embed_tokens.weight", (s.vocab, s.hidden)
    yield f"{prefix}.shared_head.norm.weight", (s.hidden,)
    yield f"{prefix}.shared_head.head.weight", (s.vocab, s.hidden)


def every_weight(s: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (s.vocab, s.hidden)
    for n in range(s.layers):
        yield from layer(f"model.layers.{n}", s, is_dense=n == 0)
    yield from prediction_layer(f"model.layers.{s.layers}", s)
    yield "model.norm.weight", (s.hidden,)
    yield "lm_head.weight", (s.vocab, s.hidden)


def random_weight(name: str, size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if name.endswith("e_score_correction_bias"):
        return 0.05 * torch.randn(size, generator=generator)
    if len(size) == 1:
        return torch.ones(size, dtype=torch.bfloat16)
    # Unit-variance activations and a sharp head: the usual 0.02 would make near ties between tokens common,
    # and two correct engines would then differ greedily by rounding alone. Ties stay possible.
    scale = {"embed_tokens.weight": 1.0, "head.weight": 4 / size[1] ** 0.5}
    gain = next((value for end, value in scale.items() if name.endswith(end)), size[1] ** -0.5)
    weight: Tensor = gain * torch.randn(size, generator=generator)
    return weight.bfloat16()


def make(out: Path, seed: int = 0, tiny: Path = TINY_MOE) -> Path:
    """Write the model to `out`, with the tokenizer and token ids of `tiny`."""
    out.mkdir(parents=True, exist_ok=True)
    ids = token_ids(tiny)
    shape = Shape(vocab=ids["vocab_size"])
    generator = torch.Generator().manual_seed(seed)
    weights = {name: random_weight(name, size, generator) for name, size in every_weight(shape)}
    # A checkpoint repeats the embedding and the head under the prediction layer; engines may share them.
    last = f"model.layers.{shape.layers}"
    weights[f"{last}.embed_tokens.weight"] = weights["model.embed_tokens.weight"].clone()
    weights[f"{last}.shared_head.head.weight"] = weights["lm_head.weight"].clone()
    write_weights(out, weights)
    write_json(out / "config.json", config(shape, ids))
    copy_tokenizer(out, tiny)
    return out


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument(
        "--tiny", type=Path, default=TINY_MOE, help="folder of the tiny model whose tokenizer is reused"
    )
    args = parser.parse_args()
    print(make(args.out, args.seed, args.tiny))


if __name__ == "__main__":
    main()

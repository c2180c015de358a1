#!/usr/bin/env python3
"""Make openPangu-shaped models with random weights, for tests of shapes rather than of answers.

    python pangu_tiny.py --shape embedded --out /tmp/pangu-embedded
    python pangu_tiny.py --shape ultra-moe --out /tmp/pangu-ultra-moe

`embedded` is dense with biased grouped-query attention, as openPangu Embedded 1B and 7B. `ultra-moe` is openPangu Ultra
MoE: latent attention with the real latent sizes, norms before and after every part (sandwich), a dense first layer, a
shared expert and sigmoid routing without groups. As published checkpoints do, both bring the class of their
configuration along, so that engines need `trust_remote_code`. The tokenizer is the tiny model's with the special tokens
that openPangu writes turns, reasoning and tool calls with. Answers are noise, yet the same noise for the same seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from deepseek_tiny import random_weight
from model_folder import TINY_MOE, arguments, write_json, write_weights
from tokenizers import AddedToken, Tokenizer

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD, DENSE = 128, 3, 4, 2, 32, 256
Q_RANK, KV_RANK, ROPE, NOPE, VALUE = 96, 512, 64, 128, 128
EXPERTS, EXPERT = 16, 64
# Turns, tool calls, reasoning: the places openPangu gives these in its vocabulary.
SPECIAL = tuple(f"[unused{number}]" for number in (9, 10, 11, 12, 16, 17))
VOCAB = 1536 + len(SPECIAL)
TEMPLATE = (
    "{%- if messages[0].role != 'system' %}{{ '[unused9]系统：[unused10]' }}{% endif -%}"
    "{%- for m in messages -%}"
    "{%- set name = {'system': '系统', 'user': '用户', 'assistant': '助手', 'tool': '工具'}[m.role] -%}"
    "{{ '[unused9]' + name + '：' + m.content + '[unused10]' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt %}{{ '[unused9]助手：' }}{% endif -%}"
)

Weights = Iterator[tuple[str, tuple[int, ...]]]


def common(model_type: str, architecture: str, eos: int) -> dict[str, object]:
    return {
        "architectures": [architecture],
        "auto_map": {"AutoConfig": "configuration_openpangu.OpenPanguConfig"},
        "model_type": model_type,
        "torch_dtype": "bfloat16",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": DENSE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 16000000.0,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": eos,
        "pad_token_id": eos,
    }


EMBEDDED: Mapping[str, object] = {"num_key_value_heads": KV_HEADS, "head_dim": HEAD, "bias": True}
ULTRA_MOE: Mapping[str, object] = {
    "num_key_value_heads": HEADS,
    "q_lora_rank": Q_RANK,
    "kv_lora_rank": KV_RANK,
    "qk_rope_head_dim": ROPE,
    "qk_nope_head_dim": NOPE,
    "v_head_dim": VALUE,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": EXPERT,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
    "sandwich_norm": True,
    "router_enable_expert_bias": True,
}
SHAPES = {
    "embedded": ("PanguEmbedded", "PanguEmbeddedForCausalLM", EMBEDDED),
    "ultra-moe": ("pangu_ultra_moe", "PanguUltraMoEForCausalLM", ULTRA_MOE),
}


def mlp(prefix: str, inner: int) -> Weights:
    yield f"{prefix}.gate_proj.weight", (inner, HIDDEN)
    yield f"{prefix}.up_proj.weight", (inner, HIDDEN)
    yield f"{prefix}.down_proj.weight", (HIDDEN, inner)


def grouped_attention(prefix: str) -> Weights:
    for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
        yield f"{prefix}.{name}_proj.weight", (heads * HEAD, HIDDEN)
        yield f"{prefix}.{name}_proj.bias", (heads * HEAD,)
    yield f"{prefix}.o_proj.weight", (HIDDEN, HEADS * HEAD)
    yield f"{prefix}.o_proj.bias", (HIDDEN,)


def latent_attention(prefix: str) -> Weights:
    yield f"{prefix}.q_a_proj.weight", (Q_RANK, HIDDEN)
    yield f"{prefix}.q_a_layernorm.weight", (Q_RANK,)
    yield f"{prefix}.q_b_proj.weight", (HEADS * (NOPE + ROPE), Q_RANK)
    yield f"{prefix}.kv_a_proj_with_mqa.weight", (KV_RANK + ROPE, HIDDEN)
    yield f"{prefix}.kv_a_layernorm.weight", (KV_RANK,)
    yield f"{prefix}.kv_b_proj.weight", (HEADS * (NOPE + VALUE), KV_RANK)
    yield f"{prefix}.o_proj.weight", (HIDDEN, HEADS * VALUE)


def experts(prefix: str) -> Weights:
    yield f"{prefix}.gate.weight", (EXPERTS, HIDDEN)
    yield f"{prefix}.e_score_correction_bias", (EXPERTS,)
    yield from mlp(f"{prefix}.shared_experts", EXPERT)
    for expert in range(EXPERTS):
        yield from mlp(f"{prefix}.experts.{expert}", EXPERT)


def every_weight(shape: str) -> Weights:
    is_moe = shape == "ultra-moe"
    yield "model.embed_tokens.weight", (VOCAB, HIDDEN)
    for number in range(LAYERS):
        layer = f"model.layers.{number}"
        norms = ["input_layernorm", "post_attention_layernorm"]
        norms += ["pre_mlp_layernorm", "post_mlp_layernorm"] if is_moe else []
        for norm in norms:
            yield f"{layer}.{norm}.weight", (HIDDEN,)
        attention = f"{layer}.self_attn"
        yield from latent_attention(attention) if is_moe else grouped_attention(attention)
        yield from experts(f"{layer}.mlp") if is_moe and number > 0 else mlp(f"{layer}.mlp", DENSE)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCAB, HIDDEN)


def configuration_code(model_type: str) -> str:
    return (
        "from transformers import PretrainedConfig\n\n\n"
        "class OpenPanguConfig(PretrainedConfig):\n"
        f'    model_type = "{model_type}"\n'
    )


def make(out: Path, shape: str, seed: int = 0) -> Path:
    """Write the model to `out`."""
    model_type, architecture, sizes = SHAPES[shape]
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_file(str(TINY_MOE / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    assert tokenizer.get_vocab_size() == VOCAB
    tokenizer.save(str(out / "tokenizer.json"))
    eos = tokenizer.token_to_id("[unused10]")
    names = {"eos_token": "[unused10]", "pad_token": "[unused10]", "tokenizer_class": "PreTrainedTokenizerFast"}
    write_json(out / "tokenizer_config.json", names)
    (out / "chat_template.jinja").write_text(TEMPLATE)
    write_json(out / "generation_config.json", {"eos_token_id": eos}, indent=None)
    (out / "configuration_openpangu.py").write_text(configuration_code(model_type))
    write_json(out / "config.json", common(model_type, architecture, eos) | dict(sizes))
    generator = torch.Generator().manual_seed(seed)
    write_weights(out, {name: random_weight(name, size, generator) for name, size in every_weight(shape)})
    return out


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--shape", choices=SHAPES, required=True, help="dense, or latent attention with experts")
    args = parser.parse_args()
    print(make(args.out, args.shape, args.seed))


if __name__ == "__main__":
    main()

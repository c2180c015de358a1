#!/usr/bin/env python3
"""Make a dense Qwen3-shaped model with random weights, for tests of shapes rather than of answers.

    python qwen3_tiny.py --out /tmp/qwen3-tiny

The tokenizer is the tiny model's. Answers are noise, yet the same noise for the same seed.
"""

from __future__ import annotations

from pathlib import Path

import torch
from model_folder import TINY_MOE, arguments, copy_tokenizer, let_others_read, token_ids
from transformers import Qwen3Config, Qwen3ForCausalLM


def make(out: Path, seed: int = 0, tiny: Path = TINY_MOE) -> Path:
    """Write the model to `out`, with the tokenizer and token ids of `tiny`."""
    torch.manual_seed(seed)
    ids = token_ids(tiny)
    config = Qwen3Config(
        vocab_size=ids["vocab_size"],
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=False,
        max_position_embeddings=8192,
        rope_theta=10000.0,
        eos_token_id=ids["eos_token_id"],
        pad_token_id=ids["pad_token_id"],
        bos_token_id=None,
    )
    model = Qwen3ForCausalLM(config).to(torch.bfloat16)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:  # unit-variance activations and a sharp head, so that ties are rare
                gain = 1.0 if "embed" in name else (4.0 if "lm_head" in name else 1.0) * weight.shape[1] ** -0.5
                weight.normal_(std=gain)
    model.save_pretrained(out)
    let_others_read(out)
    copy_tokenizer(out, tiny)
    return out


def main() -> None:
    args = arguments(__doc__).parse_args()
    print(make(args.out, args.seed))


if __name__ == "__main__":
    main()

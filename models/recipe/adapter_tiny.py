#!/usr/bin/env python3
"""Make a LoRA adapter with random weights for a model's attention projections, in PEFT's format.

    python adapter_tiny.py --model ../tiny-moe --out /tmp/poet

For models of the Qwen3 shape, with or without experts. Answers are noise, yet the same noise for the same seed, and
unlike the model's own.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from model_folder import arguments, write_json
from safetensors.torch import save_file
from torch import Tensor

ALPHA = 16
WEIGHTS = "adapter_model.safetensors"


def projections(config: dict[str, int]) -> dict[str, tuple[int, int]]:
    """Widths of what each projection gives and takes."""
    hidden = config["hidden_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    return {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
    }


def every_weight(config: dict[str, int], seed: int, rank: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        for name, (wide, narrow) in projections(config).items():
            module = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            down = torch.randn((rank, narrow), generator=generator) * narrow**-0.5
            up = torch.randn((wide, rank), generator=generator) * 0.3 * rank**-0.5
            weights |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
    return weights


def make(model: Path, out: Path, seed: int = 0, rank: int = 8) -> Path:
    """Write an adapter of the model in folder `model` to `out`."""
    config = json.loads((model / "config.json").read_text())
    out.mkdir(parents=True, exist_ok=True)
    save_file(every_weight(config, seed, rank), out / WEIGHTS, metadata={"format": "pt"})
    (out / WEIGHTS).chmod(0o644)
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.resolve().name,
        "r": rank,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(projections(config)),
    }
    write_json(out / "adapter_config.json", described)
    return out


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of the model that it adapts")
    parser.add_argument("--rank", type=int, default=8)
    args = parser.parse_args()
    print(make(args.model, args.out, args.seed, args.rank))


if __name__ == "__main__":
    main()

"""A model with an adapter's weights added to its own: what serving the adapter must come to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def add_to(model: Any, folder: Path) -> None:
    """W + alpha / r * B @ A, in place, for every layer that the adapter in PEFT's format names."""
    config = json.loads((folder / "adapter_config.json").read_text())
    weights = load_file(folder / "adapter_model.safetensors")
    for name, down in weights.items():
        if name.endswith(".lora_A.weight"):
            layer = model.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
            up = weights[name.replace("lora_A", "lora_B")]
            layer.weight.data += config["lora_alpha"] / config["r"] * up @ down


def greedy(model: Any, prompt: Sequence[int], count: int) -> tuple[list[int], float]:
    """The likeliest tokens, and the least distance between the logits of the two likeliest at any of them."""
    tokens, margin = list(prompt), float("inf")
    with torch.inference_mode():
        for _ in range(count):
            best = model(torch.tensor([tokens])).logits[0, -1].topk(2)
            margin = min(margin, float(best.values[0] - best.values[1]))
            tokens.append(int(best.indices[0]))
    return tokens[len(prompt) :], margin

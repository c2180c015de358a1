"""openPangu Ultra MoE in plain torch and float32, from its published description: one whole sequence at a time."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional


class UltraMoE:
    """Latent attention, sandwich norms, sigmoid routing whose bias counts for the choice only.

    `margins` (tokens,) has, of the last sequence, how clearly the experts of each token were chosen: the least distance
    over all layers between the score of the last one chosen and that of the next.
    """

    def __init__(self, folder: Path) -> None:
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self.weights = {name: weight.float() for name, weight in load_file(folder / "model.safetensors").items()}

    def logits(self, tokens: Tensor) -> Tensor:
        """(tokens, vocabulary), of the token after each."""
        self.margins = torch.full((len(tokens),), torch.inf)
        hidden = self.weights["model.embed_tokens.weight"][tokens]
        for number in range(self.config["num_hidden_layers"]):
            layer = f"model.layers.{number}"
            attended = self.attention(f"{layer}.self_attn", self.norm(f"{layer}.input_layernorm", hidden))
            hidden = hidden + self.norm(f"{layer}.post_attention_layernorm", attended)
            part = self.norm(f"{layer}.pre_mlp_layernorm", hidden)
            is_dense = number < self.config["first_k_dense_replace"]
            part = self.mlp(f"{layer}.mlp", part) if is_dense else self.experts(f"{layer}.mlp", part)
            hidden = hidden + self.norm(f"{layer}.post_mlp_layernorm", part)
        return self.linear("lm_head", self.norm("model.norm", hidden))

    def linear(self, name: str, x: Tensor) -> Tensor:
        return functional.linear(x, self.weights[f"{name}.weight"])

    def norm(self, name: str, x: Tensor) -> Tensor:
        weight = self.weights[f"{name}.weight"]
        return functional.rms_norm(x, weight.shape, weight, self.config["rms_norm_eps"])

    def mlp(self, name: str, x: Tensor) -> Tensor:
        gate, up = self.linear(f"{name}.gate_proj", x), self.linear(f"{name}.up_proj", x)
        return self.linear(f"{name}.down_proj", functional.silu(gate) * up)

    def experts(self, name: str, x: Tensor) -> Tensor:
        scores = self.linear(f"{name}.gate", x).sigmoid()
        count = self.config["num_experts_per_tok"]
        best, order = (scores + self.weights[f"{name}.e_score_correction_bias"]).topk(count + 1)
        self.margins = torch.minimum(self.margins, best[:, -2] - best[:, -1])
        chosen = order[:, :count]
        shares = scores.gather(1, chosen)
        shares = shares / shares.sum(-1, keepdim=True) * self.config["routed_scaling_factor"]
        routed = torch.zeros_like(x)
        for expert in range(self.config["n_routed_experts"]):
            rows, places = (chosen == expert).nonzero(as_tuple=True)
            if len(rows):
                routed[rows] += shares[rows, places, None] * self.mlp(f"{name}.experts.{expert}", x[rows])
        return routed + self.mlp(f"{name}.shared_experts", x)

    def attention(self, name: str, x: Tensor) -> Tensor:
        c = self.config
        heads, nope, rope, value = (
            c[k] for k in ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        )
        query = self.linear(f"{name}.q_b_proj", self.norm(f"{name}.q_a_layernorm", self.linear(f"{name}.q_a_proj", x)))
        query = query.view(len(x), heads, nope + rope).transpose(0, 1)
        latent, key_rope = self.linear(f"{name}.kv_a_proj_with_mqa", x).split([c["kv_lora_rank"], rope], -1)
        key_value = self.linear(f"{name}.kv_b_proj", self.norm(f"{name}.kv_a_layernorm", latent))
        key, values = key_value.view(len(x), heads, nope + value).transpose(0, 1).split([nope, value], -1)
        key = torch.cat([key, self.rotated(key_rope[None]).expand(heads, -1, -1)], -1)
        query = torch.cat([query[..., :nope], self.rotated(query[..., nope:])], -1)
        attended = functional.scaled_dot_product_attention(query, key, values, is_causal=True)
        return self.linear(f"{name}.o_proj", attended.transpose(0, 1).reshape(len(x), heads * value))

    def rotated(self, x: Tensor) -> Tensor:
        """(heads, tokens, dim), neighbouring pairs turned by their position."""
        dim = x.shape[-1]
        rates = self.config["rope_theta"] ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)
        angles = torch.arange(x.shape[-2], dtype=torch.float32)[:, None] * rates
        even, odd = x[..., 0::2], x[..., 1::2]
        turned = (even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos())
        return torch.stack(turned, -1).flatten(-2)

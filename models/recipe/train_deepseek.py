#!/usr/bin/env python3
"""Train the DeepSeek-V3-shaped tiny model and its prediction layer, on the tiny model's text. CPU only.

    python train_deepseek.py --steps 600 --out ../tiny-deepseek    the committed model
    python train_deepseek.py --steps 40 --out /tmp/smoke            does the recipe run? answers are nonsense

Shape: multi-head latent attention with DeepSeek's own latent sizes (512 + 64 values per token and layer), a dense
first layer, a shared expert, grouped sigmoid routing whose correction bias keeps the experts evenly used, and one
multi-token-prediction layer. The prediction layer is trained together with the model, one and two tokens ahead, as
it is used: the second time it reads its own output (DeepSeek-V3 report, section 2.2, with the layer repeated).
Head widths and counts are small. Tokenizer, text and schedule are the tiny model's (`train.py`).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from deepseek_tiny import Shape, config
from model_folder import TINY_MOE, copy_tokenizer, token_ids, write_json, write_weights
from muon import Muon
from tokens import batches
from torch import Tensor, nn
from torch.nn import functional as F
from train import LONG, LONG_FROM, SHORT, STEP_TOKENS, Phases
from transformers import AutoTokenizer, DeepseekV3Config, DeepseekV3ForCausalLM, PreTrainedTokenizerFast
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3DecoderLayer,
    DeepseekV3RMSNorm,
    DeepseekV3TopkRouter,
)

TRAINED = Shape(vocab=1536, nope=64, value=64)
AHEAD_WEIGHTS = (0.3, 0.15)  # of the losses one and two tokens further ahead
BIAS_STEP = 0.003  # how far a step moves the routing bias of an expert used too much or too little


class Predictor(nn.Module):
    """The prediction layer: the model's hidden state and the next token's embedding to the state one token on."""

    def __init__(self, cfg: DeepseekV3Config) -> None:
        super().__init__()
        self.enorm = DeepseekV3RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.hnorm = DeepseekV3RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * cfg.hidden_size, cfg.hidden_size, bias=False)
        self.block = DeepseekV3DecoderLayer(cfg, cfg.num_hidden_layers)
        self.norm = DeepseekV3RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)

    def forward(self, hidden: Tensor, embedded: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """(rows, tokens, hidden) twice to the normed state; engines zero the embedding at position 0."""
        joined = self.eh_proj(torch.cat((self.enorm(embedded), self.hnorm(hidden)), -1))
        out: Tensor = self.norm(self.block(joined, attention_mask=None, position_embeddings=rotary))
        return out


class Learner(nn.Module):
    def __init__(self, cfg: DeepseekV3Config) -> None:
        super().__init__()
        self.causal = DeepseekV3ForCausalLM(cfg)
        self.predictor = Predictor(cfg)
        self.routers = [m for m in self.modules() if isinstance(m, DeepseekV3TopkRouter)]
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        for router in self.routers:
            nn.init.normal_(router.weight, std=0.02)
            router.register_forward_hook(_balance)
        for name, weight in self.predictor.named_parameters():
            if "experts.gate_up_proj" in name or "experts.down_proj" in name:
                nn.init.normal_(weight, std=0.02)

    def losses(self, tokens: Tensor, weights: Tensor) -> list[Tensor]:
        """Weighted cross entropy of the next token, of the one after it, and of the third."""
        model, length = self.causal.model, tokens.shape[1] - 1
        hidden = model(tokens[:, :-1], use_cache=False).last_hidden_state
        found = [self._loss(hidden, tokens[:, 1:], weights[:, 1:])]
        for ahead in (1, 2):
            embedded = model.embed_tokens(tokens[:, ahead:-1])
            if ahead == 1:
                embedded = torch.cat((torch.zeros_like(embedded[:, :1]), embedded[:, 1:]), 1)
            positions = torch.arange(ahead - 1, length - 1)[None]
            hidden = self.predictor(hidden[:, :-1], embedded, model.rotary_emb(embedded, positions))
            found.append(self._loss(hidden, tokens[:, ahead + 1 :], weights[:, ahead + 1 :]))
        return found

    def _loss(self, hidden: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        logits = self.causal.lm_head(hidden).float()
        each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return (each * weights.flatten()).sum() / weights.sum()


@torch.no_grad()
def _balance(router: DeepseekV3TopkRouter, _: object, output: tuple[Tensor, Tensor, Tensor]) -> None:
    """DeepSeek-V3's balance without a loss: lower the bias of experts used more than the mean, raise the others'."""
    if router.training:
        used = torch.bincount(output[2].flatten(), minlength=router.num_experts).float()
        router.e_score_correction_bias += BIAS_STEP * torch.sign(used.mean() - used)


def train(
    learner: Learner, tokenizer: PreTrainedTokenizerFast, steps: int, rate: float, seed: int, keep: Callable[[], None]
) -> list[dict[str, float]]:
    """Train in place; returns the curve. `keep` is called before the long phase too, in case of interruption."""
    phases = Phases(steps)
    short = batches(tokenizer, seed + 1, STEP_TOKENS // SHORT, SHORT + 1)
    long = batches(tokenizer, seed + 2, 1, LONG + 1, long=True)
    named = list(learner.named_parameters())
    # Orthogonalising the wide latent projections would cost a fifth of a step.
    by_adam = ("embed_tokens.weight", "lm_head.weight", "gate.weight", "kv_b_proj.weight", "kv_a_proj_with_mqa.weight")
    matrices = [p for n, p in named if p.ndim >= 2 and not n.endswith(by_adam)]
    chosen = {id(p) for p in matrices}
    others = [p for _, p in named if id(p) not in chosen]
    optims = (Muon(matrices, lr=rate), torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0))
    curve, began = [], time.monotonic()
    for step in range(steps):
        tokens, weights = next(long if phases.is_long(step) else short)
        with torch.autocast("cpu", torch.bfloat16):
            losses = learner.losses(tokens, weights)
        (losses[0] + sum(w * loss for w, loss in zip(AHEAD_WEIGHTS, losses[1:], strict=True))).backward()
        torch.nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        for optim in optims:
            for group in optim.param_groups:
                group["lr"] = rate * phases.rate(step)
            optim.step()
            optim.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            names = ("loss", "second_loss", "third_loss")
            point = {"step": step} | {n: round(v.item(), 4) for n, v in zip(names, losses, strict=True)}
            curve.append(point | {"spent_s": round(time.monotonic() - began)})
            print(curve[-1], flush=True)
        if step + 1 == int(LONG_FROM * steps):
            keep()
    return curve


def checkpoint(learner: Learner, shape: Shape) -> dict[str, Tensor]:
    """Weights under the names of published checkpoints: bfloat16, the routing bias float32.

    The prediction layer's copies of the embedding and the head are left out; vLLM shares the model's.
    """
    names = {"block.": "", "norm.": "shared_head.norm."}
    found: dict[str, Tensor] = dict(learner.causal.state_dict())
    for name, weight in learner.predictor.state_dict().items():
        start = next((old for old in names if name.startswith(old)), "")
        found[f"model.layers.{shape.layers}.{names.get(start, '')}{name.removeprefix(start)}"] = weight
    saved: dict[str, Tensor] = {}
    for name, weight in found.items():
        kept = weight.float() if name.endswith("e_score_correction_bias") else weight.bfloat16()
        if name.endswith("experts.gate_up_proj"):
            for expert, joined in enumerate(kept):
                for part, half in zip(("gate_proj", "up_proj"), joined.chunk(2), strict=True):
                    saved[f"{name.removesuffix('gate_up_proj')}{expert}.{part}.weight"] = half.contiguous()
        elif name.endswith("experts.down_proj"):
            for expert, matrix in enumerate(kept):
                saved[f"{name.removesuffix('down_proj')}{expert}.down_proj.weight"] = matrix.contiguous()
        else:
            saved[name] = kept.contiguous()
    return saved


def save(learner: Learner, shape: Shape, out: Path, tiny: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    write_weights(out, checkpoint(learner, shape))
    write_json(out / "config.json", config(shape, token_ids(tiny)))
    copy_tokenizer(out, tiny)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600, help="training steps of 2,048 tokens")
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate of both optimizers")
    parser.add_argument("--seed", type=int, default=0, help="fixes weights, text and order")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads for torch")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "tiny-deepseek", help="folder to write")
    parser.add_argument("--tiny", type=Path, default=TINY_MOE, help="the tiny model whose tokenizer is reused")
    return parser.parse_args()


def main() -> None:
    args = parsed()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.tiny)
    shape = TRAINED
    learner = Learner(DeepseekV3Config(**config(shape, token_ids(args.tiny))))
    learner.causal.set_experts_implementation("grouped_mm")
    print(f"{sum(p.numel() for p in learner.parameters()):,} parameters", flush=True)
    began = time.monotonic()
    keep = partial(save, learner, shape, args.out, args.tiny)
    curve = train(learner, tokenizer, args.steps, args.rate, args.seed, keep)
    keep()
    figures = {"steps": args.steps, "seed": args.seed, "train_s": round(time.monotonic() - began), "final": curve[-1]}
    write_json(args.out / "figures.json", figures | {"curve": curve})


if __name__ == "__main__":
    main()

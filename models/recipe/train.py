#!/usr/bin/env python3
"""Make the tiny demonstration model from nothing: text, tokenizer, weights, figures. CPU only.

    python train.py --steps 2400 --out ../tiny-moe        the committed model, a quarter of an hour on two free cores
    python train.py --steps 60 --out /tmp/smoke           does the recipe run? answers are nonsense

A step reads 2,048 tokens in rows of 256. The last eighth of the steps reads one row of 3,072 tokens each,
with long prompts, so that position 3,000 is not new to the model. The learning rate warms up,
stays, and falls to zero over the last two fifths; a shorter run is therefore complete in itself, and
stopping a long run early gives a worse model than a short run would. Weights are trained in float32
with bfloat16 products and saved as bfloat16. `figures.json` in the output folder says how it went.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from evaluate import accuracy, overall
from model_folder import let_others_read, write_json
from muon import Muon
from tokens import END_OF_TEXT, TURN_END, batches, save_tokenizer, train_tokenizer
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

SHORT, LONG, STEP_TOKENS = 256, 3072, 2048
BALANCE_WEIGHT = 0.01
LONG_FROM = 0.88  # fraction of the steps after which rows are long


@dataclass(frozen=True, slots=True)
class Phases:
    """Learning rate and row length as functions of the step."""

    steps: int

    def is_long(self, step: int) -> bool:
        return step >= LONG_FROM * self.steps

    def rate(self, step: int) -> float:
        return min(1.0, (step + 1) / 100, (self.steps - step) / (0.4 * self.steps))


def model_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        moe_intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=16,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
        rope_theta=10000.0,
        eos_token_id=tokenizer.convert_tokens_to_ids(TURN_END),
        pad_token_id=tokenizer.convert_tokens_to_ids(END_OF_TEXT),
        bos_token_id=None,
        # Switches the router's logits on in the output during training; train() computes its own balance loss.
        output_router_logits=False,
    )


def new_model(config: Qwen3MoeConfig) -> Qwen3MoeForCausalLM:
    model = Qwen3MoeForCausalLM(config)
    for name, param in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            torch.nn.init.normal_(param, std=0.02)
    model.set_experts_implementation("grouped_mm")
    return model


def balance_loss(router_logits: tuple[Tensor, ...], per_token: int) -> Tensor:
    """Switch Transformer's loss, layer by layer: 1 when a layer uses its experts evenly, more otherwise."""
    losses = []
    for logits in router_logits:
        probs = logits.float().softmax(-1)
        experts = probs.shape[-1]
        used = F.one_hot(probs.topk(per_token).indices, experts).float().sum(1).mean(0) / per_token
        losses.append(experts * (used * probs.mean(0)).sum())
    return torch.stack(losses).mean()


def step_losses(model: Qwen3MoeForCausalLM, tokens: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted loss, the unweighted loss of answer tokens alone, and the balance loss."""
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(tokens[:, :-1], use_cache=False, output_router_logits=True)
        logits = model.lm_head(hidden.last_hidden_state)
    each = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    weight = weights[:, 1:].flatten()
    answer = each.detach()[weight == 1.0].mean()
    balance = balance_loss(hidden.router_logits, model.config.num_experts_per_tok)
    return (each * weight).sum() / weight.sum(), answer, balance


def optimizers(model: Qwen3MoeForCausalLM, rate: float) -> tuple[Muon, torch.optim.AdamW]:
    """Muon for hidden matrices; AdamW for embeddings, norms and routers."""
    named = list(model.named_parameters())
    matrices = [p for n, p in named if p.ndim >= 2 and "embed" not in n and "gate.weight" not in n]
    chosen = {id(p) for p in matrices}
    others = [p for _, p in named if id(p) not in chosen]
    return Muon(matrices, lr=rate), torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0)


def train(
    model: Qwen3MoeForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    steps: int,
    rate: float,
    seed: int,
    save: Callable[[], None],
) -> list[dict[str, float]]:
    """Train in place; returns the curve. `save` is called before the long phase too, in case of interruption."""
    phases = Phases(steps)
    short = batches(tokenizer, seed + 1, STEP_TOKENS // SHORT, SHORT + 1)
    long = batches(tokenizer, seed + 2, 1, LONG + 1, long=True)
    optims = optimizers(model, rate)
    curve, began, seen = [], time.monotonic(), 0
    for step in range(steps):
        tokens, weights = next(long if phases.is_long(step) else short)
        loss, answer, balance = step_losses(model, tokens, weights)
        (loss + BALANCE_WEIGHT * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optim in optims:
            for group in optim.param_groups:
                group["lr"] = rate * phases.rate(step)
            optim.step()
            optim.zero_grad()
        seen += tokens.numel()
        if step % 50 == 0 or step == steps - 1:
            spent = time.monotonic() - began
            point = {
                "step": step,
                "loss": loss.item(),
                "answer_loss": answer.item(),
                "balance": balance.item(),
                "tokens_per_s": seen / spent,
            }
            curve.append({name: round(value, 4) for name, value in point.items()})
            print(curve[-1], flush=True)
        if step + 1 == int(LONG_FROM * steps):
            save()
    return curve


def save_all(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Weights in bfloat16 beside everything a server needs; the model in memory keeps float32."""
    narrow = Qwen3MoeForCausalLM(model.config).to(torch.bfloat16)
    narrow.load_state_dict(model.state_dict())
    ends = [tokenizer.convert_tokens_to_ids(mark) for mark in (TURN_END, END_OF_TEXT)]
    narrow.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=ends[1], do_sample=False)
    narrow.save_pretrained(folder)
    let_others_read(folder)
    respell_config(folder / "config.json")
    save_tokenizer(tokenizer, folder)


def respell_config(path: Path) -> None:
    """Published Qwen3-MoE configs, and the tools that read them without transformers, use these two names."""
    config = json.loads(path.read_text())
    config["num_experts"] = config.pop("num_local_experts", config.get("num_experts"))
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    write_json(path, config, sort_keys=True)


def largest_difference(trained: Qwen3MoeForCausalLM, saved: Qwen3MoeForCausalLM, tokens: Tensor) -> float:
    """Between the training forward and the saved folder's, both on bfloat16-rounded weights in float32."""
    rounded = Qwen3MoeForCausalLM(trained.config)
    rounded.load_state_dict({name: value.bfloat16().float() for name, value in trained.state_dict().items()})
    rounded.set_experts_implementation("grouped_mm")
    saved.set_experts_implementation("eager")
    with torch.inference_mode():
        return float((rounded(tokens).logits - saved(tokens).logits).abs().max())


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--steps", type=int, default=2400, help="training steps of 2,048 tokens; the schedule stretches to fit"
    )
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate of both optimizers")
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="fixes weights, text and order; figures still vary a little with the thread count",
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parents[1] / "tiny-moe", help="folder to write; made if missing"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads for torch")
    parser.add_argument(
        "--per-topic", type=int, default=20, help="held-out questions of each topic in the final evaluation"
    )
    return parser.parse_args()


def main() -> None:
    args = parsed()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(args.seed)
    model = new_model(model_config(tokenizer))
    count = sum(p.numel() for p in model.parameters())
    print(f"{count:,} parameters, {len(tokenizer)} tokens in the vocabulary", flush=True)

    began = time.monotonic()
    curve = train(model, tokenizer, args.steps, args.rate, args.seed, lambda: save_all(model, tokenizer, args.out))
    train_s = time.monotonic() - began
    save_all(model, tokenizer, args.out)

    saved = Qwen3MoeForCausalLM.from_pretrained(args.out, dtype=torch.float32)
    tokens, _ = next(batches(tokenizer, args.seed + 3, 2, SHORT))
    difference = largest_difference(model, saved, tokens)
    by_topic = accuracy(saved, AutoTokenizer.from_pretrained(args.out), args.per_topic)
    figures = {
        "parameters": count,
        "steps": args.steps,
        "seed": args.seed,
        "threads": args.threads,
        "train_s": round(train_s),
        "final": curve[-1],
        "largest_logit_difference_after_saving": difference,
        "held_out_accuracy": round(overall(by_topic), 3),
        "held_out_topics": by_topic,
        "curve": curve[:: max(1, len(curve) // 20)],
    }
    write_json(args.out / "figures.json", figures)
    print(json.dumps({name: value for name, value in figures.items() if name != "curve"}, indent=2))


if __name__ == "__main__":
    main()

"""What the tiny model's router really chose, token by token, on texts of several kinds."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from placementbench.texts import KINDS, ROOT, texts

MODEL = ROOT / "models" / "tiny-moe"
CACHE = ROOT / ".omni" / "bench"
TOKENS, CHUNK = 8192, 512


@dataclass(frozen=True, slots=True, eq=False)
class Routed:
    """`choices[kind]`: int8 (tokens, layers, experts per token)."""

    num_experts: int
    choices: dict[str, npt.NDArray[np.int8]]

    def counts(self, kind: str) -> npt.NDArray[np.float64]:
        """Tokens of a kind that went to each expert: (layers, experts)."""
        chosen = self.choices[kind]
        layers = chosen.shape[1]
        counts = [np.bincount(chosen[:, layer].ravel(), minlength=self.num_experts) for layer in range(layers)]
        return np.array(counts, dtype=np.float64)


def routed(seed: int = 0, tokens: int = TOKENS, cache: Path | None = CACHE) -> Routed:
    """Run the model over `tokens` tokens of every kind, or read what an earlier run over the same text kept."""
    streams = {kind: _gather(kind, seed, tokens) for kind in KINDS}
    digest = hashlib.sha256(repr((tokens, CHUNK, streams)).encode())
    digest.update((MODEL / "model.safetensors").read_bytes())
    file = cache / f"router-{digest.hexdigest()[:16]}.npz" if cache else None
    if file is not None and file.exists():
        with np.load(file) as kept:
            return Routed(int(kept["num_experts"]), {kind: kept[kind] for kind in KINDS})
    made = _run(streams, tokens)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, Any] = {**made.choices, "num_experts": np.array(made.num_experts)}
        np.savez(file, **arrays)
    return made


def _gather(kind: str, seed: int, tokens: int) -> list[str]:
    """More characters than `tokens` tokens can take."""
    parts: list[str] = []
    for text in texts(kind, seed):
        parts.append(text)
        if sum(map(len, parts)) > 6 * tokens:
            return parts
    raise AssertionError("texts do not end")


def _run(streams: dict[str, list[str]], tokens: int) -> Routed:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Several threads wait for each other more than they compute, as small as this model is.
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    per_token = model.config.num_experts_per_tok
    choices = {}
    for kind, parts in streams.items():
        ids = tokenizer("\n".join(parts), return_tensors="pt").input_ids[0, :tokens].reshape(-1, CHUNK)
        with torch.no_grad():
            logits = model(ids, output_router_logits=True).router_logits
        chosen = torch.stack([layer.topk(per_token, dim=-1).indices for layer in logits], dim=1)
        choices[kind] = chosen.to(torch.int8).numpy()
    return Routed(model.config.num_experts, choices)


def stretched(
    counts: npt.NDArray[np.float64], like: npt.NDArray[np.float64], num_experts: int
) -> npt.NDArray[np.float64]:
    """Counts of (layers, experts) as loads of more experts, summing to 1 per layer, with the same skew.

    The tiny layer's experts are put in order of their count in `like`, evenly spread over the new experts, and the
    logarithm of their count is interpolated between them. Two kinds stretched along the same `like` keep which experts
    they share.
    """
    order = np.argsort(-like, axis=1)
    width = num_experts / counts.shape[1]
    at = (np.arange(counts.shape[1]) + 0.5) * width - 0.5
    logs = np.log(np.take_along_axis(counts, order, axis=1) + 0.5)
    loads = np.exp(np.array([np.interp(np.arange(num_experts), at, row) for row in logs]))
    shares: npt.NDArray[np.float64] = loads / loads.sum(axis=1, keepdims=True)
    return shares

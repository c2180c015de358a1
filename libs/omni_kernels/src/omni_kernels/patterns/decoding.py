"""Decoding under a pattern, with the model in transformers: the same rule as in the engines (`vllm.omni_attn.rows`).

A prompt's tokens but the last attend to everything before them, whatever the pattern, so their keys and values are
computed once for all patterns. A pattern then costs the answers' tokens only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from omni_kernels.patterns.pattern import Layer
from omni_kernels.patterns.questions import Question
from omni_kernels.patterns.search import Score

ATTENTION = "omni_pattern"


@dataclass(slots=True)
class _Past:
    """What a layer holds of n sequences: keys and values (n, KV heads, T, D), and the position of each, -1 for none,
    int64 (n, T)."""

    keys: Tensor
    values: Tensor
    positions: Tensor


@dataclass(slots=True)
class _Step:
    """One forward pass over new tokens. Per layer: parts of the past, and bool (n, 1, queries, T) of what is seen of
    each part and of the new tokens; no parts for a causal pass over prompts. `computed` gets the new keys, values."""

    parts: Sequence[Sequence[_Past]]
    seen: Sequence[Sequence[Tensor]]
    computed: list[tuple[Tensor, Tensor]]


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, omni_step: _Step, **_: Any
) -> tuple[Tensor, None]:
    """Transformers' attention interface: query (n, heads, queries, D), key and value of the new tokens.

    Parts are multiplied where they lie: joining them would copy the prompts' keys in every step.
    """
    omni_step.computed.append((key, value))
    if not omni_step.parts:
        out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2), None
    rows, heads, queries, size = query.shape
    groups = heads // key.shape[1]
    folded = query.reshape(rows, heads // groups, groups * queries, size) * scaling
    keys = [*(part.keys for part in omni_step.parts[module.layer_idx]), key]
    values = [*(part.values for part in omni_step.parts[module.layer_idx]), value]
    seen = torch.cat(list(omni_step.seen[module.layer_idx]), 3).repeat(1, 1, groups, 1)
    scores = torch.cat([folded @ k.transpose(2, 3) for k in keys], 3).masked_fill_(~seen, float("-inf"))
    weights = scores.softmax(3).split([k.shape[2] for k in keys], 3)
    out = torch.stack([w @ v for w, v in zip(weights, values, strict=True)]).sum(0)
    return out.reshape(rows, heads, queries, -1).transpose(1, 2), None


class Decoder:
    """A model and its questions' prompts, computed. `block_size` in tokens is that of the patterns scored;
    `token_bytes` counts two bytes a value, as the engines' caches do."""

    def __init__(self, model_dir: Path, questions: Sequence[Question], block_size: int):
        import transformers

        transformers.AttentionInterface.register(ATTENTION, _attend)
        self.model: Any
        self.tokenizer: Any
        try:
            self.model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir)
        except (OSError, ValueError, SafetensorError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"--model: {model_dir} holds no model that transformers loads: {reason}") from None
        config = self.model.config.get_text_config()
        if getattr(config, "kv_lora_rank", None) or getattr(config, "use_sliding_window", False):
            raise ValueError(f"--model: {model_dir}: only layers of plain full attention can take part in a pattern")
        self.model.set_attn_implementation(ATTENTION)
        self.model.eval()
        ends = self.model.generation_config.eos_token_id
        self._ends = {self.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
        self.num_layers: int = config.num_hidden_layers
        heads = config.num_key_value_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.token_bytes: int = 2 * heads * size * 2
        self.block_size = block_size
        self._questions = list(questions)
        self.prompts = [self._ids(question.prompt) for question in questions]
        for number, ids in enumerate(self.prompts, 1):
            if len(ids) < 2:
                raise ValueError(f"--questions: prompt {number} must have 2 tokens or more, not {len(ids)}")
        self._answers = [[*self._ids(question.answer), self.tokenizer.eos_token_id] for question in questions]
        self._max_new_tokens = max(map(len, self._answers)) + 4
        self._prefix_lens = torch.tensor([len(ids) - 1 for ids in self.prompts])
        self._prefix = self._prefill()

    @torch.inference_mode()
    def score(self, layers: Sequence[Layer]) -> Score:
        """Of a pattern with one entry per layer of the model."""
        rows = torch.arange(len(self._questions))
        forced = _padded([[p[-1], *a[:-1]] for p, a in zip(self.prompts, self._answers, strict=True)])
        logits, _ = self._forward(rows, forced, [self._prefixes(rows, layers)], layers)
        loss = cross_entropy(logits.flatten(0, 1), _padded(self._answers, -100).flatten(), ignore_index=-100)
        best = logits.argmax(-1)
        given = [list(answer) for answer in self._answers]
        # Where every best token is the good answer's, the good answer is what greedy decoding says.
        others = [n for n, answer in enumerate(given) if best[n, : len(answer)].tolist() != answer]
        for n, said in zip(others, self._greedy(others, layers, self._max_new_tokens), strict=True):
            given[n] = said
        right = sum(map(self._is_right, self._questions, given))
        return Score(round(right / len(given), 6), round(float(loss.exp()), 4))

    def _is_right(self, question: Question, ids: list[int]) -> bool:
        if ids[-1] not in self._ends:
            return False
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return all(expected in text for expected in question.expect)

    @torch.inference_mode()
    def answers(self, layers: Sequence[Layer], max_new_tokens: int) -> list[list[int]]:
        """Greedy continuations of all prompts, up to and with the token that ends them."""
        return self._greedy(range(len(self._questions)), layers, max_new_tokens)

    def _greedy(self, chosen: Sequence[int], layers: Sequence[Layer], max_new_tokens: int) -> list[list[int]]:
        if not chosen:
            return []
        rows = torch.tensor(chosen)
        ends = torch.tensor(sorted(self._ends))
        done = torch.zeros(len(rows), dtype=torch.bool)
        past = [self._prefixes(rows, layers)]
        tokens = torch.tensor([[self.prompts[n][-1]] for n in rows])
        said = []
        for _ in range(max_new_tokens):
            logits, computed = self._forward(rows, tokens, past, layers)
            past = [past[0], self._appended(past[1:], computed, self._next_positions(rows, past))]
            tokens = logits[:, -1].argmax(-1, keepdim=True)
            said.append(tokens)
            done |= torch.isin(tokens.squeeze(1), ends)
            if done.all():
                break
        return [self._to_end(ids) for ids in torch.cat(said, 1).tolist()]

    def _to_end(self, ids: list[int]) -> list[int]:
        last = next((n for n, token in enumerate(ids) if token in self._ends), len(ids))
        return ids[: last + 1]

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _prefixes(self, rows: Tensor, layers: Sequence[Layer]) -> list[_Past]:
        """What each layer may read of the prompts `rows`: no more than the blocks that its budget keeps."""
        lens = self._prefix_lens[rows].unsqueeze(1)
        everything = torch.arange(int(lens.max())).expand(len(rows), -1)
        kept: dict[Layer, Tensor] = {None: everything}
        for layer in set(layers) - {None}:
            assert layer is not None
            sinks = layer.sink_blocks * self.block_size
            first = ((lens // self.block_size - layer.recent_blocks + 1) * self.block_size).clamp(min=sinks)
            recent = first + torch.arange(layer.recent_blocks * self.block_size)
            kept[layer] = torch.cat([torch.arange(sinks).expand(len(rows), -1), recent], 1)
        return [self._held(prefix, rows, kept[layer], lens) for prefix, layer in zip(self._prefix, layers, strict=True)]

    def _held(self, prefix: tuple[Tensor, Tensor], rows: Tensor, slots: Tensor, lens: Tensor) -> _Past:
        positions = torch.where(slots < lens, slots, -1)
        if len(rows) == len(self._questions) and slots.shape[1] == prefix[0].shape[2]:
            return _Past(*prefix, positions)
        index = slots.clamp(max=prefix[0].shape[2] - 1)
        keys, values = (x[rows.unsqueeze(1), :, index].transpose(1, 2) for x in prefix)
        return _Past(keys, values, positions)

    def _appended(
        self, past: Sequence[list[_Past]], computed: Sequence[tuple[Tensor, Tensor]], positions: Tensor
    ) -> list[_Past]:
        """Tokens decoded so far, with one more."""
        if not past:
            return [_Past(key, value, positions) for key, value in computed]
        return [
            _Past(
                torch.cat([part.keys, key], 2),
                torch.cat([part.values, value], 2),
                torch.cat([part.positions, positions], 1),
            )
            for part, (key, value) in zip(past[0], computed, strict=True)
        ]

    def _next_positions(self, rows: Tensor, past: Sequence[list[_Past]]) -> Tensor:
        decoded = past[1][0].positions.shape[1] if len(past) > 1 else 0
        return self._prefix_lens[rows].unsqueeze(1) + decoded

    def _forward(
        self, rows: Tensor, tokens: Tensor, past: Sequence[list[_Past]], layers: Sequence[Layer]
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Logits (rows, queries, vocabulary) of the tokens that follow the past, and their keys and values."""
        positions = self._next_positions(rows, past) + torch.arange(tokens.shape[1])
        parts = [[held[n] for held in past] for n in range(self.num_layers)]
        seen: dict[Layer, list[Tensor]] = {}
        for n, layer in enumerate(layers):
            if layer not in seen:
                keys = [*(part.positions for part in parts[n]), positions]
                seen[layer] = [self._seen(layer, k.unsqueeze(1), positions.unsqueeze(2)) for k in keys]
        step = _Step(parts, [seen[layer] for layer in layers], [])
        out = self.model(input_ids=tokens, position_ids=positions, use_cache=False, omni_step=step)
        return out.logits, step.computed

    def _seen(self, layer: Layer, keys: Tensor, queries: Tensor) -> Tensor:
        """bool (n, 1, queries, keys) from positions; a decoding query sees its layer's sink and recent blocks."""
        causal = (keys >= 0) & (keys <= queries)
        if layer is None:
            return causal.unsqueeze(1)
        block, last = keys // self.block_size, queries // self.block_size
        return (causal & ((block < layer.sink_blocks) | (block > last - layer.recent_blocks))).unsqueeze(1)

    @torch.inference_mode()
    def _prefill(self, group: int = 16) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of all prompts but their last tokens, per layer, padded at the right."""
        tokens = _padded([ids[:-1] for ids in self.prompts])
        parts: list[list[tuple[Tensor, Tensor]]] = []
        for chunk in tokens.split(group):
            step = _Step([], [], [])
            self.model.model(input_ids=chunk, use_cache=False, omni_step=step)
            parts.append(step.computed)
        layers = range(self.num_layers)
        return [(torch.cat([p[n][0] for p in parts]), torch.cat([p[n][1] for p in parts])) for n in layers]


def _padded(rows: Sequence[Sequence[int]], value: int = 0) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])

#!/usr/bin/env python3
"""Ask a saved model questions that its training never contained, greedily, and count right answers.

Right means: the answer holds the expected text and ends by itself within the token limit.

    python evaluate.py --model ../tiny-moe --per-topic 20 --show
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

import torch
from corpus import Document, held_out
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast, Qwen3MoeForCausalLM


@torch.inference_mode()
def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[str],
    max_new_tokens: int = 200,
    group: int = 64,
) -> list[tuple[str, bool]]:
    """Greedy continuation of each prompt, and whether it ended by itself."""
    by_length = sorted(range(len(prompts)), key=lambda n: len(prompts[n]))
    done: dict[int, tuple[str, bool]] = {}
    for first in range(0, len(by_length), group):
        chosen = by_length[first : first + group]
        batch = tokenizer([prompts[n] for n in chosen], return_tensors="pt", padding=True, padding_side="left")
        out = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
        for n, tokens in zip(chosen, out[:, batch["input_ids"].shape[1] :], strict=True):
            ended = tokenizer.eos_token_id in tokens
            done[n] = tokenizer.decode(tokens, skip_special_tokens=True), ended
    return [done[n] for n in range(len(prompts))]


def chat_prompt(tokenizer: PreTrainedTokenizerFast, document: Document) -> str:
    messages = [{"role": t.role, "content": t.content} for t in document.turns[:-1]]
    tools = [tool.schema() for tool in document.tools] or None
    return str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True))


def accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, per_topic: int, seed: int = 99, *, show: bool = False
) -> dict[str, dict[str, int]]:
    """Right answers and questions asked, by topic."""
    asked = held_out(seed, per_topic)
    given = answers(model, tokenizer, [chat_prompt(tokenizer, d) for d in asked])
    total: Counter[str] = Counter()
    right: Counter[str] = Counter()
    for document, (text, ended) in zip(asked, given, strict=True):
        good = ended and all(expected in text for expected in document.expect)
        total[document.topic] += 1
        right[document.topic] += good
        if show and not good:
            print(f"[{document.topic}] {document.turns[0].content}")
            print(f"  said {text!r}, ended {ended}, wanted {document.expect}")
    return {topic: {"right": right[topic], "asked": total[topic]} for topic in sorted(total)}


def overall(by_topic: dict[str, dict[str, int]]) -> float:
    return sum(t["right"] for t in by_topic.values()) / sum(t["asked"] for t in by_topic.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, default=Path(__file__).parents[1] / "tiny-moe", help="folder of a saved model"
    )
    parser.add_argument("--per-topic", type=int, default=20, help="questions of each topic, where there are that many")
    parser.add_argument("--seed", type=int, default=99, help="which held-out questions to draw")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads for torch")
    parser.add_argument("--show", action="store_true", help="print every wrong answer")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = Qwen3MoeForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    by_topic = accuracy(model, AutoTokenizer.from_pretrained(args.model), args.per_topic, args.seed, show=args.show)
    print(json.dumps({"accuracy": round(overall(by_topic), 3), "topics": by_topic}, indent=2))


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Held-out questions at the end of long texts, as `omni attention search --questions` reads them.

    python questions.py --count 96 --sentences 20 60 --out questions.jsonl

Each question is one that training never contained (`corpus.held_out`), behind prose that does not bear on it.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from corpus import Document, Turn, filler, held_out
from evaluate import chat_prompt
from transformers import AutoTokenizer, PreTrainedTokenizerFast

LONG_ANSWERS = ("story", "poem", "table", "listing")


def questions(
    tokenizer: PreTrainedTokenizerFast, count: int, sentences: tuple[int, int], seed: int
) -> list[dict[str, object]]:
    """`count` questions of all topics, each behind so many sentences of prose."""
    rng = random.Random(seed)
    drawn = [d for d in held_out(seed, -(-count // 12)) if d.topic not in LONG_ANSWERS]
    rng.shuffle(drawn)
    made = []
    for document in drawn[:count]:
        ask, answer = document.turns
        text = f"{filler(rng, rng.randint(*sentences))}\n\n{ask.content}"
        prompt = chat_prompt(tokenizer, Document(document.topic, (Turn("user", text), answer)))
        made.append({"prompt": prompt, "answer": answer.content, "expect": list(document.expect)})
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(__file__).parents[1] / "tiny-moe", help="for its tokenizer")
    parser.add_argument("--count", type=int, default=96, help="how many questions")
    parser.add_argument("--sentences", type=int, nargs=2, default=(20, 60), metavar=("FROM", "TO"), help="of prose")
    parser.add_argument("--seed", type=int, default=99, help="which questions, and which prose")
    parser.add_argument("--out", type=Path, required=True, help="file of one JSON object a line")
    args = parser.parse_args()
    low, high = args.sentences
    made = questions(AutoTokenizer.from_pretrained(args.model), args.count, (low, high), args.seed)
    args.out.write_text("".join(json.dumps(question, ensure_ascii=False) + "\n" for question in made))


if __name__ == "__main__":
    main()

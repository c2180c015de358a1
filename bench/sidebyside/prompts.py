"""Prompts of a wanted length in tokens, no two alike."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

_SENTENCES = """
the cat sat on a red chair and looked at water because it was old but good what is capital of France or Germany
tell me about your friend who lives in big city where sun and moon are green small dog can count one two three
four five six days week before after winter summer bread apple river
"""
WORDS = tuple(_SENTENCES.split())


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request's text and how many tokens it asks for."""

    prompt: str
    max_tokens: int


class Prompts:
    """Draws prompts; equal seeds draw equal prompts, so every system gets the same ones."""

    def __init__(self, model_dir: Path, seed: str) -> None:
        self._random = random.Random(seed)
        tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
        self._sizes = {word: len(tokenizer.encode(" " + word).ids) for word in WORDS}

    def draw(self, count: int, prompt_tokens: int, output_tokens: tuple[int, int]) -> list[Prompt]:
        """Prompts of about `prompt_tokens`, the chat template not counted, asking for a length in `output_tokens`."""
        low, high = output_tokens
        return [Prompt(" ".join(self._words(prompt_tokens)), self._random.randint(low, high)) for _ in range(count)]

    def _words(self, tokens: int) -> Iterator[str]:
        used = 0
        while used < tokens:
            word = self._random.choice(WORDS)
            used += self._sizes[word]
            yield word

"""Held-out questions that a pattern is judged by, one JSON object a line: prompt, answer, expect.

`prompt` is the whole text given to the model (chat template applied), `answer` a good continuation of it, whose
perplexity is measured, and `expect` the strings that a right greedy continuation holds.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Question:
    prompt: str
    answer: str
    expect: tuple[str, ...]


def read(path: Path) -> list[Question]:
    """Raises ValueError naming the line that is not a question."""
    questions = []
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}") from None
    for number, line in enumerate(lines, 1):
        try:
            questions.append(_question(json.loads(line)))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
    if not questions:
        raise ValueError(f"{path}: no questions; write one JSON object a line, with prompt, answer and expect")
    return questions


def _question(fields: Any) -> Question:
    if not isinstance(fields, dict):
        raise ValueError("must be an object with prompt, answer and expect")
    for name in ("prompt", "answer"):
        if not isinstance(fields.get(name), str):
            raise ValueError(f"{name}: must be a string")
    expect = fields.get("expect")
    if not isinstance(expect, list) or not all(isinstance(text, str) for text in expect):
        raise ValueError("expect: must be a list of strings")
    return Question(fields["prompt"], fields["answer"], tuple(expect))


def write(questions: list[Question], path: Path) -> None:
    lines = (
        json.dumps({"prompt": q.prompt, "answer": q.answer, "expect": q.expect}, ensure_ascii=False) for q in questions
    )
    path.write_text("\n".join(lines) + "\n")

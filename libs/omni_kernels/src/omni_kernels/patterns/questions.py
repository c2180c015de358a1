"""Held-out questions that a pattern is judged by, one JSON object a line: prompt, answer, expect.

`prompt` is the whole text given to the model (chat template applied), `answer` a good continuation of it, whose
perplexity is measured, and `expect` the strings that a right greedy continuation holds.
"""

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Question:
    prompt: str
    answer: str
    expect: tuple[str, ...]


def read(path: Path) -> list[Question]:
    """Raises ValueError naming the line that is not a question."""
    questions = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            fields = json.loads(line)
            questions.append(Question(str(fields["prompt"]), str(fields["answer"]), tuple(map(str, fields["expect"]))))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}:{number}: not a question with prompt, answer and expect: {error!r}") from None
    if not questions:
        raise ValueError(f"{path}: no questions")
    return questions


def write(questions: list[Question], path: Path) -> None:
    lines = (
        json.dumps({"prompt": q.prompt, "answer": q.answer, "expect": q.expect}, ensure_ascii=False) for q in questions
    )
    path.write_text("\n".join(lines) + "\n")

